"""The W4A16 kernels of few tokens, compiled for each target and executed in the emulator."""

import pytest
import torch

import nvfp4dsl as nv
from nvfp4dsl import dispatch, emulator
from nvfp4dsl.config import GemmSpec, TileConfig, plan, skinny
from nvfp4dsl.emulator import mutate
from nvfp4dsl.formats import NVFP4Tensor, pack_codes
from nvfp4dsl.testing import assert_close, bits_differing

# sm_100a and sm_120a only where one shape shows that the same source serves them
SHAPES = [(1, 16, 16), (1, 40, 4096), (7, 35, 2880), (2, 64, 272), (20, 48, 1040), (70, 48, 528)]
CASES = [
    *((target, shape) for target in ("sm_90a", "sm_121a") for shape in SHAPES if target == "sm_121a" or shape[0] <= 8),
    *(("sm_120a", SHAPES[2]), ("sm_100a", SHAPES[2]), ("sm_100a", SHAPES[4])),
]
# less work than warps and more, a warp in one row tile and in two, columns that are tokens and blocks of K, chunks of
# 128 and of 256 k, clusters without work for some CTAs, several jobs
FORCED = [
    ("sm_90a", "1x16x4096", (1, 35, 80)),
    ("sm_90a", "1x16x4096", (2, 200, 1040)),
    ("sm_121a", "1x16x16384", (1, 70, 8208)),
    ("sm_90a", "2x16x4096", (3, 70, 2320)),
    ("sm_90a", "2x16x16384", (2, 40, 4112)),
    ("sm_120a", "2x16x4096", (2, 300, 528)),
    ("sm_100a", "2x16x4096/2", (1, 70, 8192)),
    ("sm_90a", "4x16x4096", (4, 600, 1040)),
    ("sm_121a", "4x16x4096", (3, 70, 2064)),
    ("sm_90a", "4x16x8192/2", (3, 100, 2880)),
    ("sm_90a", "4x16x4096/4", (4, 48, 80)),
    ("sm_90a", "8x16x4096", (5, 300, 1040)),
    ("sm_90a", "8x16x8192", (9, 40, 4112)),
    ("sm_90a", "8x16x4096/2", (8, 100, 2880)),
    ("sm_100a", "8x16x4096/8", (7, 65, 528)),
    ("sm_90a", "8x16x2048", (3, 200, 2304)),
    ("sm_120a", "8x32x2048", (5, 65, 528)),
    ("sm_90a", "16x32x2048", (9, 70, 4624)),
    ("sm_121a", "32x16x2048", (33, 40, 272)),
]
KERNELS = ("1x16x4096", "2x16x4096/2", "4x16x4096", "8x16x4096", "8x16x4096/2", "8x16x2048")


def _random(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _linear(x, weight, target, bias=None, max_ctas=2, seed=0, activation=None):
    prepared = nv.prepare(weight, target, activation="bf16")
    with nv.emulate(target, max_ctas=max_ctas, seed=seed) as emulation:
        y = nv.linear(x, prepared, bias, activation=activation)
    run = emulation.runs[-1]  # before it, one may quantize x
    assert run.kernel.meta["spills"] == 0
    planned = plan(run.kernel.spec, run.kernel.tile, target)
    assert (run.launch.smem_bytes, run.launch.block[0]) == (planned.smem_bytes, planned.threads)
    return y


def _forced(x, weight, target, tile, bias=None, out_dtype=torch.bfloat16, seed=0, clusters=2):
    """As ``nv.linear``, with a tile of the test's choice; ``clusters`` at a time."""
    prepared = nv.prepare(weight, target, activation="bf16")
    name = {torch.bfloat16: "bf16", torch.float32: "fp32"}
    spec = GemmSpec(
        "bf16", name[out_dtype], None if bias is None else "fp32", aligned_rows=False, whole_chunks=weight.k % 256 == 0
    )
    tile = TileConfig.parse(tile)
    # the skinny kernel takes what an SM has room for
    ctas = clusters * tile.split // (plan(spec, tile, target).ctas_per_sm if tile.k in skinny.TILE_K else 1)
    with nv.emulate(target, max_ctas=ctas, seed=seed) as emulation:
        kernel = dispatch.kernel_for(spec, tile, target)
        y = torch.full((*x.shape[:-1], weight.n), float("nan"), dtype=out_dtype)
        flat = (x.reshape(-1, x.shape[-1]), *dispatch.linear_operands(prepared), bias, y.view(-1, weight.n))
        dispatch.run(kernel, flat)
    (run,) = emulation.runs
    assert run.kernel.meta["spills"] == 0
    assert run.launch.cluster == (tile.split, 1, 1)
    assert run.report.tolerated == []
    return y, run


def _check(y, x, weight, bias=None):
    weight = nv.dequantize(weight, torch.float64)
    expected, magnitude = x.double() @ weight.mT, x.double().abs() @ weight.abs().mT
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    # half a bf16 ulp of the output is 2^-9 of it; few outputs make for a noisy norm
    assert_close(y, expected, norm=2e-3 if y.numel() > 64 else 4e-3, element=4e-3, magnitude=magnitude)


@pytest.mark.parametrize(("target", "shape"), CASES, ids=str)
def test_shapes(target, shape):
    m, n, k = shape
    x, weight = _random(m, k), nv.quantize(_random(n, k, seed=1))
    _check(_linear(x, weight, target), x, weight)


@pytest.mark.parametrize(("target", "tile", "shape"), FORCED, ids=str)
def test_tiles(target, tile, shape):
    m, n, k = shape
    x, weight = _random(m, k), nv.quantize(_random(n, k, seed=1))
    y, _ = _forced(x, weight, target, tile)
    _check(y, x, weight)


@pytest.mark.parametrize(
    ("tile", "clusters", "expected"),
    [("2x16x4096", 5, 5), ("8x16x4096", 8, 8), ("1x16x4096/2", 6, 6), ("2x16x4096", 3, 3), ("2x16x4096", 9, 4)],
)
def test_no_sm_is_left_without_a_cta(tile, clusters, expected):
    """Four row tiles: clusters past the fourth repeat the work of the first ones, unless more than half would."""
    tile = TileConfig.parse(tile)
    x, weight = _random(tile.m, 528), nv.quantize(_random(64, 528, seed=1))
    y, run = _forced(x, weight, "sm_90a", str(tile), clusters=clusters)
    assert run.launch.grid == (expected * tile.split, 1, 1)
    _check(y, x, weight)


@pytest.mark.parametrize("tile", KERNELS)
def test_fp32_with_batch_and_bias_and_the_same_bits_in_any_order(tile):
    x, bias = _random(3, 5, 528), _random(37, seed=2, dtype=torch.float32)
    weight = nv.quantize(_random(3, 37, 528, seed=1), row_ends=(10, 37), per_matrix=True)
    results = [_forced(x, weight, "sm_90a", tile, bias, torch.float32, seed)[0] for seed in range(3)]
    expected = x.double() @ nv.dequantize(weight, torch.float64).mT + bias.double()
    assert_close(results[0], expected, norm=1e-5, element=1e-4)
    assert all(bits_differing(y, results[0]) == 0 for y in results)


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**-40, 2.0**40, 2.0**55])
def test_tokens_far_from_one(scale):
    """Of up to four tokens, products are taken before scales are applied; none is lost on the way."""
    x, weight = _random(2, 528) * scale, nv.quantize(_random(37, 528, seed=1))
    y, _ = _forced(x, weight, "sm_90a", "2x16x4096", None, torch.float32)
    assert_close(y / scale, x.double() / scale @ nv.dequantize(weight, torch.float64).mT, norm=1e-5, element=1e-4)


def test_batch_bias_and_row_ranges():
    x, bias = _random(3, 5, 80), _random(37, seed=2, dtype=torch.float32)
    weight = nv.quantize(_random(3, 37, 80, seed=1), row_ends=(10, 37), per_matrix=True)
    _check(_linear(x, weight, "sm_90a", bias), x, weight, bias)


def test_any_order_gives_the_same_bits():
    """Partial sums are added in a fixed order, whichever warp comes first."""
    x, weight = _random(3, 2304), nv.quantize(_random(80, 2304, seed=1))
    results = [_linear(x, weight, "sm_90a", max_ctas=1, seed=seed) for seed in range(4)]
    assert all(bits_differing(y, results[0]) == 0 for y in results)


@pytest.mark.parametrize("tile", [None, *KERNELS])
def test_one_hot_tokens_return_the_weight_bit_for_bit(tile):
    """Every code, every scale there is (zero and subnormals too), global 1: exact in bf16, whatever the K position."""
    k, n = 272, 136
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    scale = (torch.arange(n * (k // 16)) % 0x7F).to(torch.uint8).view(n, -1)
    weight = NVFP4Tensor(pack_codes(codes), scale.view(torch.float8_e4m3fn), torch.tensor(1.0))
    expected = nv.dequantize(weight)
    if tile is None:
        y = _linear(torch.eye(k, dtype=torch.bfloat16), weight, "sm_90a", max_ctas=4)
    else:
        y, _ = _forced(torch.eye(k, dtype=torch.bfloat16), weight, "sm_90a", tile, clusters=4)
    assert bits_differing(y.float().mT + 0.0, expected + 0.0) == 0


def test_what_lies_past_k_is_never_multiplied():
    """x is a view into rows that hold infinities behind K; zero codes times infinity would be NaN."""
    wide = torch.full((4, 96), float("inf"), dtype=torch.bfloat16)
    wide[:, :80] = _random(4, 80)
    weight = nv.quantize(_random(16, 80, seed=1))
    _check(_linear(wide[:, :80], weight, "sm_90a"), wide[:, :80], weight)


def test_mode_nvfp4_on_hopper_computes_what_blackwell_would():
    x, weight = _random(9, 272), nv.quantize(_random(40, 272, seed=1))
    quantized = nv.dequantize(nv.quantize(x))
    y = _linear(x, weight, "sm_90a", activation="nvfp4")
    _check(y, quantized, weight)
    blackwell = nv.linear(x, weight, activation="nvfp4")
    assert_close(y, blackwell.double(), norm=3e-3, element=1e-2)


def test_errors():
    weight = nv.quantize(_random(16, 64))
    with nv.emulate("sm_90a") as emulation:
        with pytest.raises(nv.LayoutError, match="prepare"):
            nv.linear(_random(2, 64), weight)
        with pytest.raises(nv.OperandError, match="bfloat16"):
            nv.linear(_random(2, 64, dtype=torch.float16), nv.prepare(weight, "sm_90a"))
    with nv.emulate("sm_121a"), pytest.raises(nv.LayoutError, match="activation='bf16'"):
        nv.linear(_random(2, 64), nv.prepare(weight, "sm_121a"))
    assert emulation.runs == []


def _survivors(target, tile, *shapes, clusters=1):
    """Instructions of a kernel without which the emulator sees nothing wrong in any of the shapes."""
    launches = []
    for m, n, k in shapes:
        _, run = _forced(_random(m, k), nv.quantize(_random(n, k, seed=1)), target, tile, clusters=clusters)
        launches.append(run.launch)  # one job at a time: rings and buffers go round
    outcomes = mutate.survey(run.kernel.ptx, launches)
    assert len(outcomes) >= 8
    return [o.mutant.instruction.split()[0] for o in outcomes if not o.verdict]


def test_every_deleted_barrier_fence_and_wait_is_noticed():
    # The warp barrier after lane 0 initialised the warp's mbarriers survives. PTX wants it, so it stays; a warp that
    # never diverged cannot tell, and the emulator orders a warp's lanes.
    assert _survivors("sm_90a", "8x16x2048", (1, 100, 2304), (2, 40, 6400), clusters=2) == ["bar.warp.sync"]
    assert _survivors("sm_90a", "2x16x4096", (1, 100, 2304), (2, 40, 3856)) == ["bar.warp.sync"]


def test_every_deleted_barrier_fence_and_wait_is_noticed_in_a_cluster():
    survivors = _survivors("sm_90a", "8x16x4096/2", (3, 100, 1040), (2, 40, 4624))
    # What survives: warp barriers, since the emulator orders a warp's lanes, and the first of two fences.
    assert [name for name in survivors if name != "bar.warp.sync"] == ["fence.mbarrier_init.release.cluster;"]


def test_k_that_a_tile_has_no_room_for_is_an_error():
    with pytest.raises(nv.TileError, match="up to K = 4096"):
        _forced(_random(1, 4112), nv.quantize(_random(16, 4112)), "sm_90a", "1x16x4096")


def test_the_emulator_runs_it_without_tolerance():
    x, weight = _random(2, 512), nv.quantize(_random(33, 512, seed=1))
    with nv.emulate("sm_90a") as emulation:
        nv.linear(x, nv.prepare(weight, "sm_90a"))
    (run,) = emulation.runs
    assert run.report.tolerated == []
    assert isinstance(run.report, emulator.Report)
