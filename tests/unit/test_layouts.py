"""Layouts as integer maps: hand-picked values, and what prepare makes of them."""

import itertools

import pytest
import torch

from nvfp4dsl.constants import E2M1_VALUES
from nvfp4dsl.errors import OperandError, TargetError
from nvfp4dsl.formats import NVFP4Tensor, pack_codes
from nvfp4dsl.layouts import (
    FRAGMENT_CODES,
    FRAGMENT_LAST_BIT_ROTATION,
    FRAGMENT_ROTATIONS,
    FRAGMENT_SCALE_OFFSET,
    FRAGMENT_SCALES,
    IntLayout,
    fragment_code_bit,
    packed_k,
    scale_coordinate,
    scale_layout,
    scale_offset,
    scale_tiles,
)
from nvfp4dsl.packing import prepare, swizzle_scales, unswizzle_scales
from nvfp4dsl.testing import assert_bijective, assert_identical


@pytest.mark.parametrize(
    ("row", "block", "k", "offset"),
    [
        (0, 0, 64, 0),
        (0, 3, 64, 3),  # four blocks of one row are four consecutive bytes
        (1, 0, 64, 16),
        (31, 0, 64, 496),
        (32, 0, 64, 4),  # rows 32 apart share a 16-byte line
        (127, 3, 64, 511),
        (128, 0, 64, 512),  # the next row atom
        (0, 4, 128, 512),  # the next K atom comes first ...
        (128, 0, 128, 1024),  # ... and the next row atom after the last K atom
        (128, 0, 80, 1024),  # K atoms are whole
        (200, 17, 512, 4096 + 8 * 16 + 2 * 4 + 4 * 512 + 1),
    ],
)
def test_scale_offsets(row, block, k, offset):
    assert scale_offset(row, block, k) == offset
    assert scale_coordinate(offset, rows=row + 1, k=k) == (row, block)
    assert scale_layout(row + 1, k)(row, 16 * block + 15) == offset  # a block's 16 values share its byte


def test_the_map_is_the_published_formula():
    k = 320
    row = torch.arange(300).unsqueeze(-1)
    kb = torch.arange(k // 16)
    row_tile_stride = -(-k // 64) * 512
    published = (row % 32) * 16 + (row // 32 % 4) * 4 + (row // 128) * row_tile_stride + (kb % 4) + (kb // 4) * 512
    assert torch.equal(scale_offset(row, kb, k), published)


@pytest.mark.parametrize(
    ("rows", "k", "tiles"), [(1, 16, (1, 1)), (128, 64, (1, 1)), (129, 80, (2, 2)), (0, 64, (0, 1)), (257, 272, (3, 5))]
)
def test_scale_tiles(rows, k, tiles):
    assert scale_tiles(rows, k) == tiles
    assert scale_layout(max(rows, 1), k).cosize == max(tiles[0], 1) * tiles[1] * 512


@pytest.mark.parametrize(("k", "stored"), [(16, 32), (32, 32), (48, 64), (64, 64), (272, 288)])
def test_packed_rows_suit_tma(k, stored):
    assert packed_k(k) == stored
    assert stored // 2 % 16 == 0


def test_int_layout_is_colexicographic_like_cute():
    """(2,(2,2)):(4,(1,2)), by hand."""
    layout = IntLayout((2, (2, 2)), (4, (1, 2)))
    assert [layout(i, j) for i in range(2) for j in range(4)] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert layout.extents == (2, 4)
    assert layout.cosize == 8
    assert [layout.inverse(o) for o in range(8)] == [(i, j) for i in range(2) for j in range(4)]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (IntLayout((4, 2), (1, 2)), "not hit once: 2 is hit 2 times"),
        (IntLayout((4, 2), (1, 8)), "not hit once: 4 is hit 0 times"),
        (IntLayout(((2, 2), 3), ((1, 0), 1)), "not hit once"),
    ],
    ids=["overlap", "hole", "overlap beside a broadcast"],
)
def test_assert_bijective_can_fail(layout, message):
    with pytest.raises(AssertionError, match=message):
        assert_bijective(layout)


def tensor(n: int, k: int, *batch: int) -> NVFP4Tensor:
    g = torch.Generator().manual_seed(n * k)
    return NVFP4Tensor(
        torch.randint(0, 256, (*batch, n, k // 2), generator=g, dtype=torch.uint8),
        torch.randint(0, 0x7F, (*batch, n, k // 16), generator=g, dtype=torch.uint8).view(torch.float8_e4m3fn),
        torch.tensor(1.0),
    )


def test_prepare_places_every_scale_and_code():
    t = tensor(130, 80, 2)
    p = prepare(t, "sm_121a")
    assert p.layout == "blackwell"
    assert p.shape == t.shape
    assert p.qdata.shape == (2, 130, 48)
    assert p.scale.shape == (2, 2, 2, 512)
    atoms, linear = p.scale.view(torch.uint8).flatten(1), t.scale.view(torch.uint8)
    for batch in range(2):
        for row in (0, 1, 31, 32, 100, 127, 128, 129):
            for block in range(5):
                assert atoms[batch, scale_offset(row, block, 80)] == linear[batch, row, block]
    assert torch.equal(p.qdata[..., :40], t.qdata)
    assert not p.qdata[..., 40:].any()


@pytest.mark.parametrize("target", ["sm_100a", "sm_120a", "sm_121a"])
def test_blackwell_targets_share_one_layout(target):
    p = prepare(tensor(8, 32), target)
    assert p.layout == "blackwell"
    for other in ("sm_100a", "sm_120a", "sm_121a"):
        assert prepare(p, other) is p
    assert prepare(p, "canonical").layout == "canonical"


def test_prepare_of_a_canonical_tensor_for_canonical_is_itself():
    t = tensor(8, 32)
    assert prepare(t, "canonical") is t


def test_unknown_target_lists_the_known():
    with pytest.raises(TargetError, match=r"unknown target 'sm_86'; known targets: sm_90a, sm_100a, sm_120a, sm_121a"):
        prepare(tensor(8, 32), "sm_86")


def test_a_mode_without_a_layout_is_refused():
    with pytest.raises(TargetError, match=r"sm_90a has no layout for activation='nvfp4'; it has bf16"):
        prepare(tensor(8, 32), "sm_90a", activation="nvfp4")


def test_layouts_by_target_and_mode():
    t = tensor(8, 32)
    assert prepare(t, "sm_90a").layout == prepare(t, "sm_121a", activation="bf16").layout == "fragments"
    assert prepare(t, "sm_121a").layout == prepare(t, "sm_100a", activation="nvfp4").layout == "blackwell"


def test_fragment_words_use_every_bit_once():
    bits = [fragment_code_bit(i, bit) for i in range(8) for bit in range(4)]
    assert sorted(bits) == list(range(32))


def test_fragment_places_are_each_hit_once():
    assert_bijective(FRAGMENT_CODES)
    assert FRAGMENT_CODES.cosize == 1024
    scales = [FRAGMENT_SCALES(row, k) for row in range(16) for k in range(0, 64, 16)]
    assert sorted(scales) == list(range(64))


def test_fragment_words_are_what_the_mma_takes():
    """PTX ISA, m16n8k16, A in 16-bit: registers 0..3 are rows g, g + 8, g, g + 8, the last two at k + 8."""
    for lane, mma, register, half in itertools.product(range(32), range(4), range(4), range(2)):
        row, k = lane // 4 + register % 2 * 8, 16 * mma + lane % 4 * 2 + register // 2 * 8 + half
        assert FRAGMENT_CODES(row, k) == (4 * lane + mma) * 8 + register * 2 + half
        assert FRAGMENT_SCALES(row, k) == lane // 4 * 8 + mma * 2 + register % 2


def test_fragment_words_decode_as_the_kernel_decodes_them():
    """Shift or rotate, mask, and the pairs are bf16 of the codes' values times 2^-126."""
    codes = torch.randint(0, 16, (16, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scale = torch.full((16, 4), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)
    t = prepare(NVFP4Tensor(pack_codes(codes), scale, torch.tensor(1.0)), "sm_90a")
    words = t.qdata.view(torch.int32).flatten()
    places = [FRAGMENT_CODES.inverse(place) for place in range(1024)]
    for index in range(128):
        word = int(words[index]) & 0xFFFFFFFF

        def rotated(by, word=word):
            return (word << by | word >> 32 - by) & 0xFFFFFFFF

        pairs = [rotated(by) & 0x81C081C0 for by in FRAGMENT_ROTATIONS[:3]]
        pairs.append(word & 0x80C080C0 | word << FRAGMENT_LAST_BIT_ROTATION & 0x01000100)
        halves = torch.tensor([half for p in pairs for half in (p & 0xFFFF, p >> 16)], dtype=torch.int32)
        values = (halves << 16).view(torch.float32).double() * 2.0**126
        assert values.tolist() == [E2M1_VALUES[codes[place]] for place in places[8 * index : 8 * index + 8]]


def test_fragment_scales_become_bf16_by_a_shift_and_an_add():
    """Every finite e4m3 scale, subnormals and zero included, times 2^107."""
    scales = torch.arange(0x7F, dtype=torch.uint8)
    k = 16 * 127
    t = NVFP4Tensor(
        torch.zeros(1, k // 2, dtype=torch.uint8), scales.view(torch.float8_e4m3fn)[None], torch.tensor(1.0)
    )
    strip = prepare(t, "sm_90a").scale.view(torch.uint8)[0]
    for block in range(127):
        byte = int(strip[block // 4, FRAGMENT_SCALES(0, block % 4 * 16)])
        bits = torch.tensor([(byte * 16 + FRAGMENT_SCALE_OFFSET) << 16 & 0xFFFFFFFF], dtype=torch.int64)
        value = bits.to(torch.int32).view(torch.float32).double() * 2.0**-107
        assert value.item() == t.scale[0, block].double().item()


@pytest.mark.parametrize("shape", [(16, 64), (1, 16), (35, 48), (3, 20, 272), (129, 1040)])
def test_fragments_are_undone_bit_for_bit(shape):
    generator = torch.Generator().manual_seed(1)
    scale = torch.randint(0, 0x7F, (*shape[:-1], shape[-1] // 16), dtype=torch.uint8, generator=generator)
    scale[..., 0] = 0x80  # a negative zero keeps its sign
    qdata = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8, generator=generator)
    t = NVFP4Tensor(qdata, scale.view(torch.float8_e4m3fn), torch.tensor(0.5))
    prepared = prepare(t, "sm_90a")
    assert prepared.shape == t.shape
    assert prepared.batch_shape == t.batch_shape
    assert_identical(prepared.canonical(), t)


def test_swizzling_refuses():
    with pytest.raises(OperandError, match=r"torch.float32.*takes bytes \[\.\.\., rows, K/16\]"):
        swizzle_scales(torch.zeros(4, 4))
    with pytest.raises(OperandError, match=r"\[1, 1, 512\].*129 x 64 operand are bytes \[\.\.\., 2, 1, 512\]"):
        unswizzle_scales(torch.zeros(1, 1, 512, dtype=torch.uint8), 129, 64)


def test_no_rows():
    p = prepare(tensor(0, 64), "sm_120a")
    assert p.scale.shape == (0, 1, 512)
    assert p.canonical().scale.shape == (0, 4)
