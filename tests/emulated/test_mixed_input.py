"""W4A16 for more than a few tokens, through WGMMA and HMMA, executed in the emulator: shapes that divide nothing."""

from dataclasses import replace

import pytest
import torch

import nvfp4dsl as nv
from nvfp4dsl import dispatch, jit
from nvfp4dsl.autotune.peers import Weights, select
from nvfp4dsl.config import GemmSpec, TileConfig, hmma, legal, mixed_input, plan
from nvfp4dsl.emulator import mutate
from nvfp4dsl.formats import NVFP4Tensor, pack_codes
from nvfp4dsl.inspect import inspect
from nvfp4dsl.targets import get_target
from nvfp4dsl.testing import assert_close, bits_differing

TARGET = "sm_90a"
# WGMMA. Tile, M, N, K, output, bias: ragged in every extent; rows of 16 bytes and not; K steps that the split does not
# divide
CASES = [
    ("16x128x128/4", 14, 160, 272, torch.bfloat16, True),
    ("32x128x128", 33, 129, 80, torch.bfloat16, False),
    ("64x128x128", 70, 264, 400, torch.float32, True),
    ("64x128x128/2", 70, 200, 1296, torch.bfloat16, False),
    ("128x128x64/3", 150, 200, 848, torch.float32, True),
    ("128x256x64", 130, 300, 336, torch.float16, False),
    ("256x128x64", 270, 136, 144, torch.bfloat16, True),
    ("16x64x128/3", 17, 160, 1296, torch.float32, True),
    ("32x64x128", 33, 200, 400, torch.bfloat16, False),
    ("64x64x128", 70, 137, 592, torch.bfloat16, True),
    ("64x64x128x8", 70, 64, 1296, torch.bfloat16, False),
    ("16x128x128x4", 16, 128, 1040, torch.bfloat16, False),
    ("64x192x64", 70, 400, 1296, torch.bfloat16, False),
    ("128x192x128", 140, 304, 400, torch.float32, True),
    ("128x192x128/4", 150, 200, 1040, torch.bfloat16, True),
    ("192x192x64", 200, 200, 208, torch.float16, True),
    ("128x128x128/2", 140, 304, 400, torch.float32, True),
    ("32x128x128/3", 30, 130, 1040, torch.bfloat16, False),
]
# The same for HMMA, and the target: warpgroups along rows and along tokens, one to four blocks of rows, with clusters
# and without
HMMA_CASES = [
    ("sm_121a", "16x128x128", 14, 160, 272, torch.bfloat16, True),
    ("sm_121a", "32x64x128", 33, 72, 400, torch.float16, True),
    ("sm_121a", "48x256x64", 50, 264, 208, torch.float32, False),
    ("sm_121a", "64x128x64", 70, 137, 592, torch.bfloat16, True),
    ("sm_121a", "128x128x64", 150, 200, 336, torch.float32, True),
    ("sm_120a", "256x128x64", 270, 136, 144, torch.bfloat16, False),
    ("sm_90a", "128x256x64-hmma", 130, 300, 336, torch.bfloat16, True),
    ("sm_90a", "64x64x128/3-hmma", 70, 130, 1296, torch.float32, True),
    ("sm_100a", "96x128x128/2", 97, 200, 528, torch.bfloat16, False),
]


# groups of warps that share K, and a ring that they go round several times
SHARED_K = ["16x64x128", "32x64x128/2", "64x64x128/2", "64x64x128/3", "16x128x128", "64x128x128/2"]


def _random(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _launch(x, weight, tile, out_dtype=torch.bfloat16, bias=None, max_ctas=2, seed=0, target=TARGET):
    """(y, the emulated run) of x [L, M, K] with a forced tile."""
    batch, m, k = x.shape
    prepared, tile = nv.prepare(weight, target, activation="bf16"), TileConfig.parse(tile)
    spec = dispatch.linear_spec(weight.n, k, out_dtype, None if bias is None else bias.dtype)
    kernel = dispatch.kernel_for(spec, tile, target)
    assert kernel.meta["spills"] == 0
    y = torch.full((batch * m, weight.n), float("nan"), dtype=out_dtype)
    with nv.emulate(target, max_ctas=max_ctas, seed=seed) as emulation:
        dispatch.run(kernel, (x.flatten(0, 1), *dispatch.linear_operands(prepared), bias, y))
    (run,) = emulation.runs
    planned = plan(spec, tile, target)
    assert (run.launch.smem_bytes, run.launch.block[0]) == (planned.smem_bytes, planned.threads)
    assert run.report.tolerated == []
    return y.view(batch, m, -1), run


def _check(y, x, weight, bias=None):
    values = nv.dequantize(weight, torch.float64)
    expected, magnitude = x.double() @ values.mT, x.double().abs() @ values.abs().mT
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    norm, element = {torch.bfloat16: (2e-3, 4e-3), torch.float16: (3e-4, 5e-4), torch.float32: (1e-6, 1e-6)}[y.dtype]
    assert_close(y, expected, norm=norm, element=element, magnitude=magnitude)


@pytest.mark.parametrize("tile", SHARED_K)
def test_groups_that_share_k_wait_for_a_late_copy(tile):
    """Orders in which some copies come after many that were asked for later: no group may take a stage for filled."""
    x, weight = _random(1, 5, 8208), nv.quantize(_random(64, 8208, seed=1))
    results = [_launch(x, weight, tile, torch.float32, seed=seed)[0] for seed in range(6)]
    _check(results[0], x, weight)
    assert all(bits_differing(y, results[0]) == 0 for y in results)


@pytest.mark.parametrize(("tile", "m", "n", "k", "out_dtype", "with_bias"), CASES, ids=str)
def test_tiles(tile, m, n, k, out_dtype, with_bias):
    x, weight = _random(1, m, k), nv.quantize(_random(n, k, seed=1))
    bias = _random(n, seed=2, dtype=torch.float32) if with_bias else None
    y, _ = _launch(x, weight, tile, out_dtype, bias)
    _check(y, x, weight, bias)


@pytest.mark.parametrize(("target", "tile", "m", "n", "k", "out_dtype", "with_bias"), HMMA_CASES, ids=str)
def test_hmma_tiles(target, tile, m, n, k, out_dtype, with_bias):
    x, weight = _random(1, m, k), nv.quantize(_random(n, k, seed=1))
    bias = _random(n, seed=2, dtype=torch.float32) if with_bias else None
    y, run = _launch(x, weight, tile, out_dtype, bias, target=target)
    assert "mma.sync" in run.kernel.ptx
    assert "wgmma" not in run.kernel.ptx
    _check(y, x, weight, bias)


@pytest.mark.parametrize("target", ["sm_90a", "sm_121a"])
def test_batch_and_row_ranges(target):
    x = _random(3, 20, 80)
    weight = nv.quantize(_random(3, 150, 80, seed=1), row_ends=(10, 150), per_matrix=True)
    y, _ = _launch(x, weight, "32x128x128", max_ctas=2, target=target)
    _check(y, x, weight)


@pytest.mark.parametrize(("target", "instruction"), [(TARGET, "wgmma"), ("sm_121a", "mma.sync")])
def test_linear_takes_it_for_more_than_a_few_tokens(target, instruction):
    x, bias = _random(65, 272), _random(40, seed=2)
    weight = nv.quantize(_random(40, 272, seed=1))
    with nv.emulate(target, max_ctas=2) as emulation:
        y = nv.linear(x, nv.prepare(weight, target, activation="bf16"), bias, activation="bf16")
    (run,) = emulation.runs
    assert run.kernel.tile.k in mixed_input.TILE_K
    assert instruction in run.kernel.ptx
    _check(y, x, weight, bias)


def test_bench_has_a_peer_that_forces_hmma():
    weights = Weights(136, 272, 1, device="cpu")
    (peer,) = select(["nvfp4dsl_hmma"])
    with nv.emulate(TARGET, max_ctas=132) as emulation:
        x = _random(70, 272)
        y = peer.call(x, peer.prepare(weights.tensors[0]))
    (run,) = emulation.runs
    assert "mma.sync" in run.kernel.ptx
    _check(y, x, weights.tensors[0])


@pytest.mark.parametrize(
    ("target", "tile"), [(TARGET, "64x128x128"), (TARGET, "64x128x128/3"), ("sm_121a", "64x64x128")]
)
def test_any_order_gives_the_same_bits(target, tile):
    x, weight = _random(1, 40, 784), nv.quantize(_random(130, 784, seed=1))
    results = [_launch(x, weight, tile, torch.float32, seed=seed, target=target)[0] for seed in range(3)]
    assert all(bits_differing(y, results[0]) == 0 for y in results)


@pytest.mark.parametrize(
    ("target", "tile"),
    [(TARGET, "64x128x128/2"), (TARGET, "128x128x64"), (TARGET, "64x128x64-hmma"), ("sm_121a", "32x128x128")],
)
def test_one_hot_tokens_return_the_weight_bit_for_bit(target, tile):
    """Every code, every scale there is (zero and subnormals too), global 1: exact in bf16, whatever the K position."""
    k, n = 144, 136
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    scale = (torch.arange(n * (k // 16)) % 0x7F).to(torch.uint8).view(n, -1)
    weight = NVFP4Tensor(pack_codes(codes), scale.view(torch.float8_e4m3fn), torch.tensor(1.0))
    y, _ = _launch(torch.eye(k, dtype=torch.bfloat16)[None], weight, tile, target=target)
    assert bits_differing(y[0].float().mT + 0.0, nv.dequantize(weight) + 0.0) == 0


def test_what_lies_past_k_is_never_multiplied():
    """x is a view into rows that hold infinities behind K; zero codes times infinity would be NaN."""
    wide = torch.full((20, 96), float("inf"), dtype=torch.bfloat16)
    wide[:, :80] = _random(20, 80)
    weight = nv.quantize(_random(16, 80, seed=1))
    with nv.emulate(TARGET):
        _check(nv.linear(wide[:, :80], nv.prepare(weight, TARGET)), wide[:, :80], weight)


@pytest.mark.parametrize(("target", "sms"), [(TARGET, 132), ("sm_121a", 48), ("sm_120a", 170), ("sm_100a", 148)])
@pytest.mark.parametrize("k", [64, 4096])
@pytest.mark.parametrize("n", [100, 4096, 28672])
@pytest.mark.parametrize("m", [17, 100, 8192])
def test_choice_is_legal(m, n, k, target, sms):
    """And takes no tile with twice the tokens there are, nor splits K where tiles fill the chip."""
    spec = dispatch.linear_spec(n, k, torch.bfloat16, None)
    tile = dispatch.choose_tile(spec, m, n, k, target, sms)
    assert legal(spec, tile, target) == []
    assert tile.k in mixed_input.TILE_K or (n <= 4096 and m <= 100), "a small grid may be left to the skinny kernel"
    assert tile.m < 2 * m
    assert tile.split == 1 or -(-m // tile.m) * -(-n // tile.n) * tile.split <= 2 * sms


@pytest.mark.slow
@pytest.mark.parametrize(("target", "tile", "least"), [(TARGET, "32x128x128", 30), ("sm_121a", "64x64x64x3", 20)])
def test_every_deleted_barrier_fence_and_wait_is_noticed(target, tile, least):
    launches = []
    for k in (1168, 272):  # the ring goes round; or holds several tiles, and orders nothing between them
        x, weight = _random(1, 40, k), nv.quantize(_random(300, k, seed=1))
        _, run = _launch(x, weight, tile, max_ctas=1, target=target)
        launches.append(run.launch)
    outcomes = mutate.survey(run.kernel.ptx, launches)
    assert len(outcomes) >= least
    # One survives: the warp barrier after a tile's last products, which already wait for the whole warp.
    survivors = [o.mutant.instruction.split()[0] for o in outcomes if not o.verdict]
    assert survivors in ([], ["bar.warp.sync"])


def _legal_specs(target):
    """(spec, tile) of every legal HMMA tile with each output type, bias and aligned rows or not."""
    loop = {"mainloop": "hmma"} if "wgmma" in get_target(target).mainloops["bf16"] else {}
    for options in ({}, {"out_dtype": "fp32", "bias": "fp32"}, {"out_dtype": "fp16", "aligned_rows": False}):
        spec = GemmSpec(activation="bf16", **options)
        tiles = (replace(tile, **loop) for tile in mixed_input.tiles(spec))
        yield from ((spec, tile) for tile in tiles if not legal(spec, tile, target))


def test_hmma_tiles_that_dispatch_chooses_do_not_spill():
    specs = [(spec, tile) for spec, tile in _legal_specs("sm_121a") if tile in hmma.TILES]
    kernels = jit.compile_many([(spec, tile, "sm_121a") for spec, tile in specs])
    assert len(kernels) >= 2 * len(hmma.TILES)
    assert [str(k.tile) for k in kernels if k.meta["spills"]] == []


@pytest.mark.parametrize(("tile", "bar"), [("64x128x64", 0.92), ("128x128x64", 0.95), ("256x128x64", 0.95)])
def test_hmma_issues_as_fast_as_the_tensor_pipe_takes_it(tile, bar):
    """By the issue model, no cards at hand: 16 cycles an MMA on sm_12x, with little beside."""
    spec, tile = GemmSpec(activation="bf16"), TileConfig.parse(tile)
    report = inspect(jit.compile(spec, tile, "sm_121a").cubin, plan(spec, tile, "sm_121a"))
    assert report.mma.startswith("HMMA")
    assert report.mma_cycles == 16
    assert report.predicted_peak_fraction >= bar
    # decoding, scaling, loads and the ring, in words of the module's docstring; moves would show here
    rows, tokens = plan(spec, tile, "sm_121a").blocks
    per_k16 = 15.5 * rows + tokens / 2
    assert report.other_per_mma * rows * tokens <= per_k16 + 12


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90a", "sm_100a", "sm_120a", "sm_121a"])
def test_no_hmma_tile_spills(target):
    kernels = jit.compile_many([(spec, tile, target) for spec, tile in _legal_specs(target)])
    assert len(kernels) >= 80
    assert [(str(k.tile), k.spec) for k in kernels if k.meta["spills"]] == []
