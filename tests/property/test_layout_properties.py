"""The swizzle: a bijection onto padded storage, CuTe's own layout, and exactly undone."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nvfp4dsl.formats import pack_codes, unpack_codes
from nvfp4dsl.layouts import SCALE_ATOM_BYTES, IntLayout, scale_coordinate, scale_layout, scale_offset, scale_tiles
from nvfp4dsl.packing import prepare, swizzle_scales, unswizzle_scales
from nvfp4dsl.testing import (
    assert_bijective,
    assert_identical,
    assert_matches_cute,
    ks,
    nvfp4_tensors,
    scale_layouts,
)

ROWS = st.integers(1, 600)


@given(st.integers(1, 64).flatmap(lambda half: st.lists(st.integers(0, 15), min_size=2 * half, max_size=2 * half)))
def test_packing_round_trip(codes):
    codes = torch.tensor(codes, dtype=torch.uint8)
    packed = pack_codes(codes)
    assert packed.tolist() == [
        low + 16 * high for low, high in zip(codes[0::2].tolist(), codes[1::2].tolist(), strict=True)
    ]
    assert torch.equal(unpack_codes(packed), codes)


@given(scale_layouts())
def test_every_address_of_the_padded_storage_is_hit_once(layout):
    assert_bijective(layout)


@given(ROWS, ks(1024))
def test_every_swizzled_scale_arrives_and_every_pad_is_zero(rows, k):
    blocks = k // 16
    # Distinct bytes in each neighbourhood, none zero, so that neither a lost nor a swapped scale can hide.
    linear = (torch.arange(rows * blocks).view(rows, blocks) % 251 + 1).to(torch.uint8)
    atoms = swizzle_scales(linear)
    assert atoms.shape == (*scale_tiles(rows, k), SCALE_ATOM_BYTES)
    flat = atoms.flatten()
    row, block = scale_coordinate(torch.arange(len(flat)), rows, k)
    inside = (row < rows) & (block < blocks)
    assert int(inside.sum()) == rows * blocks
    assert torch.equal(flat[inside], linear[row[inside], block[inside]])
    assert not flat[~inside].any()
    assert torch.equal(unswizzle_scales(atoms, rows, k), linear)


@given(ROWS, ks(1024), st.data())
def test_map_and_inverse(rows, k, data):
    row, block = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, k // 16 - 1))
    offset = scale_offset(row, block, k)
    assert 0 <= offset < scale_layout(rows, k).cosize
    assert scale_coordinate(offset, rows, k) == (row, block)


@given(nvfp4_tensors(), st.sampled_from(["sm_100a", "sm_120a", "sm_121a"]))
def test_prepare_is_undone_bit_for_bit(t, target):
    prepared = prepare(t, target)
    assert prepared.shape == t.shape
    assert prepared.row_ends == t.row_ends
    assert_identical(prepared.canonical(), t)
    assert_identical(prepare(prepared.canonical(), target), prepared)
    pads = prepared.scale.numel() - t.scale.numel()
    assert int((prepared.scale.view(torch.uint8) == 0).sum()) == int((t.scale.view(torch.uint8) == 0).sum()) + pads


@settings(max_examples=8)  # CuTe takes a fifth of a millisecond for every coordinate
@given(ROWS, ks(1024), st.integers(1, 3))
@example(128, 64, 1)
@example(129, 80, 1)
@example(257, 272, 3)
def test_the_map_is_what_cute_makes_of_the_atom(rows, k, batch):
    from cutlass.utils.blockscaled_layout import tile_atom_to_shape_SF

    one = scale_layout(rows, k)
    batched = IntLayout((*one.shape, batch), (*one.stride, one.cosize))
    assert_matches_cute(batched, lambda: tile_atom_to_shape_SF((rows, k, batch), 16), limit=600)


def test_the_map_is_cutes_for_every_scale_of_two_by_two_atoms():
    from cutlass import cute
    from cutlass.utils.blockscaled_layout import tile_atom_to_shape_SF

    every = [(row, k) for row in range(256) for k in range(0, 128, 16)]
    layout = scale_layout(256, 128)
    assert_matches_cute(layout, lambda: cute.select(tile_atom_to_shape_SF((256, 128, 1), 16), mode=[0, 1]), every)


@settings(max_examples=6)
@given(scale_layouts())
def test_the_twin_made_of_the_same_numbers_has_the_same_image(layout):
    from cutlass import cute

    assert_matches_cute(layout, lambda: cute.make_layout(layout.shape, stride=layout.stride), limit=400)
