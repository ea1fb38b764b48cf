"""The dense W4A4 kernel, compiled and executed in the emulator: values, bits, layouts, every output type and tile."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from split_model import gemm_model

import nvfp4dsl as nv
from nvfp4dsl import reference, testing
from nvfp4dsl.config import TileConfig
from nvfp4dsl.formats import NVFP4Tensor, pack_codes
from nvfp4dsl.testing import assert_close, bits_differing

TARGETS = ("sm_120a", "sm_121a")
SHAPES = [(1, 128, 64), (17, 40, 48), (128, 128, 128), (200, 320, 1024), (257, 129, 272)]
#: one tile of each kind, of those that dispatch chooses from; test_tiles.py has the rest
KINDS = tuple(map(TileConfig.parse, ("128x128x128", "64x128x256", "8x128x256", "64x128x128-pingpong")))
TOLERANCE = {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 1e-5}


def emulated(a, b, target, bias=None, seed=0, max_ctas=None, **kwargs):
    with nv.emulate(target, seed=seed, max_ctas=max_ctas) as emulation:
        y = nv.mm(nv.prepare(a, target), nv.prepare(b, target), bias, **kwargs)
    assert len(emulation.runs) == 1
    return y


def check(y, a, b, bias=None, tile=KINDS[0]):
    """Bits against the arithmetic model, values against float64 in norm and per element."""
    assert bits_differing(y, gemm_model(a, b, bias, out_dtype=y.dtype, tile=tile)) == 0
    tolerance = TOLERANCE[y.dtype]
    magnitude = reference.dequantize(a, torch.float64).abs() @ reference.dequantize(b, torch.float64).abs().mT
    if bias is not None:
        magnitude = magnitude + bias.double().abs()
    assert_close(y, reference.gemm(a, b, bias), norm=tolerance, element=4 * tolerance, magnitude=magnitude)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_shapes(target, shape, random_operands):
    a, b = random_operands(*shape)
    check(emulated(a, b, target), a, b)


@pytest.mark.parametrize("target", TARGETS)
def test_batch(target, random_operands):
    a, b = random_operands(70, 136, 208, batch=(3,))
    check(emulated(a, b, target, out_dtype=torch.float32), a, b)


@pytest.mark.parametrize("tile", KINDS, ids=str)
@pytest.mark.parametrize("out_dtype", list(TOLERANCE), ids=str)
def test_tiles_and_output_types(tile, out_dtype, random_operands):
    a, b = random_operands(150, 200, 336, seed=1)
    check(emulated(a, b, "sm_121a", out_dtype=out_dtype, tile=tile), a, b)


@pytest.mark.parametrize("out_dtype", list(TOLERANCE), ids=str)
def test_unaligned_rows_are_stored_under_a_bounds_check(out_dtype, random_operands):
    a, b = random_operands(67, 131, 80, seed=2)
    check(emulated(a, b, "sm_120a", out_dtype=out_dtype), a, b)


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [136, 133])
def test_bias_and_row_ranges(bias_dtype, n, random_operands):
    a, b = random_operands(33, n, 128, seed=3, row_ends=(40, 41, n))
    bias = torch.randn(n, generator=torch.Generator().manual_seed(4)).to(bias_dtype)
    check(emulated(a, b, "sm_121a", bias, out_dtype=torch.float32), a, b, bias)


def test_few_ctas_walk_many_tiles(random_operands):
    """Two CTAs, nine tiles: stages, phases and store buffers are reused across tiles."""
    a, b = random_operands(300, 264, 400, seed=5)
    check(emulated(a, b, "sm_121a", max_ctas=2, seed=7), a, b)


@pytest.mark.parametrize("seed", range(4))
def test_any_order_gives_the_same_bits(seed, random_operands):
    a, b = random_operands(130, 136, 1040, seed=6)
    check(emulated(a, b, "sm_121a", seed=seed, max_ctas=1), a, b)


@settings(max_examples=10, deadline=None)
@given(
    testing.tiles(nv.GemmSpec(out_dtype="fp32")),
    testing.shapes(max_m=300, max_n=300, max_k=400),
    st.sampled_from(list(TOLERANCE)),
)
def test_any_legal_tile_on_any_shape(tile, shape, out_dtype):
    a, b = (nv.quantize(torch.randn(rows, shape[2], generator=torch.Generator().manual_seed(0))) for rows in shape[:2])
    check(emulated(a, b, "sm_121a", tile=tile, out_dtype=out_dtype), a, b, tile=tile)


def _probe(rows, k, seed):
    """A hand-made operand: every code, block scales that are powers of two times odd significands, global 1."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, k), dtype=torch.uint8, generator=generator)
    scale = torch.randint(0x08, 0x7F, (rows, k // 16), dtype=torch.uint8, generator=generator)
    return NVFP4Tensor(pack_codes(codes), scale.view(torch.float8_e4m3fn), torch.tensor(1.0))


def _one_hot(rows, k, first):
    """Row i is one at k = first + i: code 2 (1.0) with scale 1 (0x38)."""
    codes = torch.zeros(rows, k, dtype=torch.uint8)
    codes[torch.arange(rows), first + torch.arange(rows)] = 2
    scale = torch.full((rows, k // 16), 0x38, dtype=torch.uint8)
    return NVFP4Tensor(pack_codes(codes), scale.view(torch.float8_e4m3fn), torch.tensor(1.0))


@pytest.mark.parametrize(("target", "tile"), [("sm_120a", KINDS[0]), *(("sm_121a", kind) for kind in KINDS)], ids=str)
def test_one_hot_probe_returns_the_weight_bit_for_bit(target, tile):
    k, n = 272, 168
    weight = _probe(n, k, seed=8)
    expected = nv.dequantize(weight)
    probed = [
        emulated(_one_hot(136, k, first), weight, target, out_dtype=torch.float32, tile=tile) for first in (0, 136)
    ]
    assert bits_differing(torch.cat(probed).mT.contiguous(), expected + 0.0) == 0
    # and with the weight on the other side, which pins A's layouts
    probed = [
        emulated(weight, _one_hot(136, k, first), target, out_dtype=torch.float32, tile=tile) for first in (0, 136)
    ]
    assert bits_differing(torch.cat(probed, dim=1), expected + 0.0) == 0


def test_scales_that_are_swapped_are_noticed(random_operands):
    """The check can fail: two scale bytes of one row exchanged change the result."""
    a, b = random_operands(128, 128, 128, seed=9)
    prepared = nv.prepare(b, "sm_121a")
    broken = prepared.scale.view(torch.uint8).clone()
    assert broken[0, 0, 0] != broken[0, 0, 1]
    broken[0, 0, [0, 1]] = broken[0, 0, [1, 0]]
    damaged = NVFP4Tensor(
        prepared.qdata, broken.view(torch.float8_e4m3fn), prepared.global_scale, layout=prepared.layout, k=prepared.k
    )
    with nv.emulate("sm_121a"):
        y = nv.mm(nv.prepare(a, "sm_121a"), damaged, out_dtype=torch.float32)
    assert bits_differing(y, reference.gemm_model(a, b)) > 0


def test_256x256x512_within_the_time_bar(random_operands):
    a, b = random_operands(256, 256, 512, seed=10)
    with nv.emulate("sm_121a") as emulation:
        y = nv.mm(nv.prepare(a, "sm_121a"), nv.prepare(b, "sm_121a"), out_dtype=torch.float32)
    check(y, a, b)
    assert emulation.runs[0].report.seconds < 30
