"""The W4A16 kernel, compiled for each target and executed in the emulator."""

import pytest
import torch

import nvfp4dsl as nv
from nvfp4dsl import dispatch, emulator
from nvfp4dsl.config import GemmSpec, TileConfig, plan
from nvfp4dsl.emulator import mutate
from nvfp4dsl.formats import NVFP4Tensor, pack_codes
from nvfp4dsl.testing import assert_close, bits_differing

# sm_100a and sm_120a only where one shape shows that the same source serves them
SHAPES = [(1, 16, 16), (1, 40, 4096), (7, 35, 2880), (2, 64, 272), (20, 48, 1040), (70, 48, 528)]
CASES = [
    *((target, shape) for target in ("sm_90a", "sm_121a") for shape in SHAPES if target == "sm_121a" or shape[0] <= 8),
    *(("sm_120a", SHAPES[2]), ("sm_100a", SHAPES[2]), ("sm_100a", SHAPES[4])),
]
# K of one chunk and of several a warp, more of x than shared memory keeps, tokens and rows that fill no tile, clusters
# without work for some warps
ONCE_CASES = [
    ("sm_90a", "1x16x2048", (1, 35, 80)),
    ("sm_90a", "1x32x4096", (3, 70, 4112)),
    ("sm_121a", "2x32x2048", (2, 70, 2320)),
    ("sm_90a", "4x32x4096", (3, 70, 14336)),
    ("sm_120a", "4x16x2048", (3, 70, 2064)),
    ("sm_90a", "16x16x4096", (13, 40, 4112)),
    ("sm_100a", "4x16x2048/4", (4, 50, 8192)),
    ("sm_90a", "8x16x2048/2", (1, 35, 80)),
    ("sm_90a", "8x32x2048/2", (3, 200, 2304)),
    ("sm_90a", "8x16x2048/4", (8, 100, 2880)),
    ("sm_90a", "16x32x2048/2", (9, 70, 4624)),
    ("sm_90a", "16x16x2048/8", (16, 48, 1040)),
    ("sm_100a", "8x32x2048/8", (5, 65, 528)),
    ("sm_100a", "16x16x2048/4", (33, 40, 272)),
]


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
    ctas = clusters * tile.split // plan(spec, tile, target).ctas_per_sm
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


@pytest.mark.parametrize(("target", "tile", "shape"), ONCE_CASES, ids=str)
def test_x_read_once(target, tile, shape):
    m, n, k = shape
    x, weight = _random(m, k), nv.quantize(_random(n, k, seed=1))
    y, _ = _forced(x, weight, target, tile)
    _check(y, x, weight)


def test_k_shared_by_a_cluster_in_fp32_with_batch_and_bias():
    x, bias = _random(3, 5, 528), _random(37, seed=2, dtype=torch.float32)
    weight = nv.quantize(_random(3, 37, 528, seed=1), row_ends=(10, 37), per_matrix=True)
    results = [_forced(x, weight, "sm_90a", "8x16x2048/2", bias, torch.float32, seed)[0] for seed in range(3)]
    expected = x.double() @ nv.dequantize(weight, torch.float64).mT + bias.double()
    assert_close(results[0], expected, norm=1e-5, element=1e-4)
    assert all(bits_differing(y, results[0]) == 0 for y in results)


def test_batch_bias_and_row_ranges():
    x, bias = _random(3, 5, 80), _random(37, seed=2, dtype=torch.float32)
    weight = nv.quantize(_random(3, 37, 80, seed=1), row_ends=(10, 37), per_matrix=True)
    _check(_linear(x, weight, "sm_90a", bias), x, weight, bias)


def test_any_order_gives_the_same_bits():
    """Partial sums are added in a fixed order, whichever warp comes first."""
    x, weight = _random(3, 2304), nv.quantize(_random(80, 2304, seed=1))
    results = [_linear(x, weight, "sm_90a", max_ctas=1, seed=seed) for seed in range(4)]
    assert all(bits_differing(y, results[0]) == 0 for y in results)


def test_one_hot_tokens_return_the_weight_bit_for_bit():
    """Every code, every scale there is (zero and subnormals too), global 1: exact in bf16, whatever the K position."""
    k, n = 272, 136
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    scale = (torch.arange(n * (k // 16)) % 0x7F).to(torch.uint8).view(n, -1)
    weight = NVFP4Tensor(pack_codes(codes), scale.view(torch.float8_e4m3fn), torch.tensor(1.0))
    expected = nv.dequantize(weight)
    y = _linear(torch.eye(k, dtype=torch.bfloat16), weight, "sm_90a", max_ctas=4)
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


def test_every_deleted_barrier_fence_and_wait_is_noticed():
    launches = []
    for m, n, k, ctas in ((1, 100, 2304, 1), (2, 40, 6400, 1)):
        weight = nv.prepare(nv.quantize(_random(n, k, seed=1)), "sm_90a")
        with nv.emulate("sm_90a", max_ctas=ctas) as emulation:
            nv.linear(_random(m, k), weight)
        (run,) = emulation.runs
        launch = run.launch
        launch.grid = (2, 1, 1)  # two CTAs for all row tiles: rings and buffers go round
        launches.append(launch)
    outcomes = mutate.survey(run.kernel.ptx, launches)
    assert len(outcomes) >= 8
    # One survives: the warp barrier after lane 0 initialised the warp's mbarriers. PTX wants it, so it stays; a warp
    # that never diverged cannot tell, and the emulator orders a warp's lanes.
    survivors = [o.mutant.instruction.split()[0] for o in outcomes if not o.verdict]
    assert survivors == ["bar.warp.sync"]


def test_every_deleted_barrier_fence_and_wait_is_noticed_in_a_cluster():
    launches = []
    for m, n, k in ((3, 100, 1040), (2, 40, 4624)):
        x, weight = _random(m, k), nv.quantize(_random(n, k, seed=1))
        _, run = _forced(x, weight, "sm_90a", "8x16x2048/2", clusters=1)
        launches.append(run.launch)  # one cluster for all row tiles: rings and buffers go round
    outcomes = mutate.survey(run.kernel.ptx, launches)
    assert len(outcomes) >= 8
    # What survives: warp barriers, since the emulator orders a warp's lanes, and the first of two fences.
    survivors = [o.mutant.instruction.split()[0] for o in outcomes if not o.verdict]
    assert [name for name in survivors if name != "bar.warp.sync"] == ["fence.mbarrier_init.release.cluster;"]


def test_the_emulator_runs_it_without_tolerance():
    x, weight = _random(2, 512), nv.quantize(_random(33, 512, seed=1))
    with nv.emulate("sm_90a") as emulation:
        nv.linear(x, nv.prepare(weight, "sm_90a"))
    (run,) = emulation.runs
    assert run.report.tolerated == []
    assert isinstance(run.report, emulator.Report)
