"""W4A4 whose kernel quantizes its tokens: one launch, and the bits of quantizing first."""

import copy

import pytest
import torch
from split_model import gemm_model

import nvfp4dsl as nv
from nvfp4dsl import dispatch, emulator, reference
from nvfp4dsl.config import TILES, GemmSpec, TileConfig, legal, legal_tiles, plan
from nvfp4dsl.constants import BLOCK
from nvfp4dsl.emulator import mutate
from nvfp4dsl.emulator.faults import WrongResult
from nvfp4dsl.emulator.substitute import substitute_conversions
from nvfp4dsl.inspect import inspect
from nvfp4dsl.jit import compile_many
from nvfp4dsl.testing import assert_close, bits_differing

TARGETS = ("sm_120a", "sm_121a")
FEW = tuple(tile for tile in TILES["nvfp4"] if tile.m <= 16)
REGISTERS = 168  # a thread's share of the register file, with 12 warps a CTA


def operands(m, n, k, batch=(), dtype=torch.bfloat16, seed=0):
    """x, a canonical weight, and x's own global scales."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, m, k, generator=generator).to(dtype)
    weight = nv.quantize(torch.randn(*batch, n, k, generator=generator), per_matrix=bool(batch))
    return x, weight, x.float().abs().amax((-2, -1)) / 2688


def emulated(x, scale, weight, bias=None, *, tile, target="sm_121a", out_dtype=torch.float32, seed=0, max_ctas=3):
    """By the kernel that quantizes, one launch; the run."""
    with nv.emulate(target, seed=seed, max_ctas=max_ctas) as emulation:
        y = dispatch.quantizing_gemm(
            x, scale, nv.prepare(weight, target), bias, tile=TileConfig.parse(tile), out_dtype=out_dtype
        )
    (run,) = emulation.runs
    assert run.kernel.meta["spills"] == 0
    assert run.kernel.meta["registers"] <= REGISTERS
    return y, run


def check(y, x, scale, weight, bias=None, *, tile):
    """Bits against the reference's recipe and the arithmetic model; values against float64, in norm and per element."""
    a = reference.quantize(x, scale)
    assert bits_differing(y, gemm_model(a, weight, bias, out_dtype=y.dtype, tile=TileConfig.parse(tile))) == 0
    magnitude = reference.dequantize(a, torch.float64).abs() @ reference.dequantize(weight, torch.float64).abs().mT
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 3e-4}[y.dtype]
    if bias is not None:
        magnitude = magnitude + bias.double().abs()
    assert_close(y, reference.gemm(a, weight, bias), norm=tolerance, element=4 * tolerance, magnitude=magnitude)


@pytest.mark.parametrize(
    ("target", "tile", "shape"),
    [
        ("sm_121a", "8x64x64", (1, 40, 16)),
        ("sm_121a", "8x128x256", (7, 131, 336)),
        ("sm_121a", "16x128x128", (16, 200, 1040)),
        ("sm_121a", "16x64x256/4", (13, 72, 1040)),
        ("sm_121a", "8x64x128/2", (21, 133, 400)),
        ("sm_120a", "16x128x256", (7, 136, 400)),
    ],
    ids=str,
)
def test_the_bits_are_those_of_two_launches(target, tile, shape):
    """Tokens past M, K past its end, N past a tile; more tokens than a tile; split K; a ring that goes round."""
    x, weight, scale = operands(*shape)
    y, _ = emulated(x, scale, weight, tile=tile, target=target)
    with nv.emulate(target, max_ctas=3) as emulation:
        b = nv.prepare(weight, target)
        two = dispatch.gemm(nv.quantize(x, scale), b, tile=TileConfig.parse(tile), out_dtype=torch.float32)
    assert len(emulation.runs) == 2
    assert bits_differing(y, two) == 0
    check(y, x, scale, weight, tile=tile)


@pytest.mark.parametrize(("tile", "dtype"), [*zip(map(str, FEW), 2 * [torch.bfloat16, torch.float16], strict=True)])
def test_types_bias_and_batch(tile, dtype):
    """The tiles that dispatch chooses from; a global scale for each matrix; a bias of its own type."""
    x, weight, scale = operands(5, 72, 272, batch=(2,), dtype=dtype, seed=1)
    bias = torch.randn(72, generator=torch.Generator().manual_seed(2))
    y, _ = emulated(x, scale, weight, bias, tile=tile, out_dtype=dtype)
    check(y, x, scale, weight, bias, tile=tile)


@pytest.mark.parametrize("factor", [2.0**-12, 2.0**9, 2.0**-113, 2.0**92], ids=["saturates", "coarse", "tiny", "huge"])
def test_any_global_scale(factor):
    """One that saturates every block; one that makes block scales subnormal; those whose quotients are divisions."""
    x, weight, scale = operands(9, 40, 144, seed=3)
    if factor < 2.0**-100 or factor > 2.0**90:
        x = (x.float() * factor).bfloat16()
    x[2], x[4, 16:48], x[5, 3] = 0, 0, -0.0
    scale = scale * factor
    y, _ = emulated(x, scale, weight, tile="16x64x64")
    a = reference.quantize(x, scale)
    assert bits_differing(y, reference.gemm_model(a, weight)) == 0
    if factor == 2.0**-12:
        assert reference.saturated_blocks(x, scale) > 0.9 * x.numel() // BLOCK - 3


def test_every_finite_bit_pattern():
    words = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    values = words.view(torch.bfloat16)
    x = values[torch.isfinite(values)]
    x = x[: len(x) // (16 * 128) * 16 * 128].view(16, -1)[:, torch.randperm(len(x) // 2048 * 128)[:2048]].contiguous()
    weight = operands(1, 8, x.shape[1], seed=4)[1]
    scale = torch.tensor(2.0**100)
    y, _ = emulated(x, scale, weight, tile="16x64x256")
    assert bits_differing(y, reference.gemm_model(reference.quantize(x, scale), weight)) == 0


@pytest.mark.parametrize("seed", range(3))
def test_any_order_gives_the_same_bits(seed):
    x, weight, scale = operands(16, 200, 1040, seed=5)
    y, _ = emulated(x, scale, weight, tile="8x64x128x2", seed=seed, max_ctas=1)
    check(y, x, scale, weight, tile="8x64x128x2")


def test_a_nan_global_scale_makes_everything_nan():
    """As on a GPU, where a scale is not looked at."""
    x, weight, _ = operands(3, 40, 80)
    y, _ = emulated(x, torch.tensor(float("nan")), weight, tile="8x64x64")
    assert torch.isnan(y).all()


def test_comparisons_can_stand_in_for_the_conversion():
    """As on an H200: the same PTX, its conversions to e2m1 substituted."""
    x, weight, scale = operands(9, 40, 1040, seed=10)
    x[0, :16] = torch.tensor([0.25, -0.25, 0.75, 1.25, -1.75, 2.5, 3.5, 5, 6, 7, -0.0, 0, 4.9, -5.1, 0.2, 1]).bfloat16()
    scale = torch.tensor(1 / 8)
    y, run = emulated(x, scale, weight, tile="16x64x64")
    text = substitute_conversions(run.kernel.ptx)
    assert "e2m1x2" in run.kernel.ptx
    assert "e2m1x2" not in text
    run.launch.expected["c"] = y.view(-1).view(torch.uint8).numpy()
    emulator.run(text, copy.deepcopy(run.launch))
    with pytest.raises(WrongResult):
        emulator.run(
            text.replace("setp.ge.f32 %cv_p, %cv_x, 0f3F400000", "setp.gt.f32 %cv_p, %cv_x, 0f3F400000"), run.launch
        )


# linear -------------------------------------------------------------------------------------------------------------


def launches(x, weight, bias=None, target="sm_121a", **kwargs):
    with nv.emulate(target) as emulation:
        y = nv.linear(x, nv.prepare(weight, target), bias, activation="nvfp4", **kwargs)
    return y, [run.kernel.spec for run in emulation.runs]


@pytest.mark.parametrize(("m", "target"), [(1, "sm_121a"), (7, "sm_120a"), (16, "sm_121a")])
def test_a_decode_step_is_one_launch(m, target):
    x, weight, scale = operands(m, 133, 336, seed=6)
    bias = torch.randn(133, generator=torch.Generator().manual_seed(7)).bfloat16()
    y, specs = launches(x, weight, bias, target, activation_scale=scale)
    assert len(specs) == 1
    assert specs[0].quantizes == "bf16"
    expected = reference.gemm_model(reference.quantize(x, scale), weight, bias, out_dtype=torch.bfloat16)
    assert bits_differing(y, expected) == 0
    assert bits_differing(launches(x, weight, bias, target, activation_scale=scale.item())[0], y) == 0


def test_more_rows_other_types_and_own_scales_take_more_launches():
    for x, given, count in (
        (operands(17, 8, 80)[0], True, 2),
        (operands(3, 8, 80, dtype=torch.float32)[0], True, 2),
        (operands(3, 8, 80)[0], False, 3),
    ):
        weight, scale = operands(1, 40, 80, seed=8)[1], torch.tensor(2.0**-9)
        y, specs = launches(x, weight, **({"activation_scale": scale} if given else {}))
        assert len(specs) == count
        a = reference.quantize(x, scale if given else None)
        assert bits_differing(y, reference.gemm_model(a, weight, out_dtype=x.dtype)) == 0


def test_leading_dimensions_strides_and_no_rows():
    x, weight, scale = operands(8, 40, 160, seed=9)
    expected = reference.gemm_model(reference.quantize(x, scale), weight, out_dtype=torch.bfloat16)
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert strided.stride(-1) == 2
    for form in (x, x.view(2, 4, 160), strided, torch.nn.functional.pad(x, (1, 2))[:, 1:-2]):
        y, specs = launches(form, weight, activation_scale=scale)
        assert len(specs) == 1
        assert bits_differing(y.reshape(8, 40), expected) == 0
    assert bits_differing(launches(x[0], weight, activation_scale=scale)[0], expected[0]) == 0
    empty, specs = launches(x[:0], weight, activation_scale=scale)
    assert empty.shape == (0, 40)
    assert specs == []


# Machine code and synchronisation -------------------------------------------------------------------------------------


def compiled(target, tiles, dtype):
    spec = GemmSpec(quantizes=dtype)
    for tile, kernel in zip(tiles, compile_many([(spec, tile, target) for tile in tiles]), strict=True):
        assert kernel.meta["spills"] == 0, tile
        assert kernel.meta["registers"] <= REGISTERS, tile
        assert plan(spec, tile, target).registers == ()


@pytest.mark.parametrize("target", TARGETS)
def test_chosen_tiles_compile_without_spills(target):
    compiled(target, FEW, "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("target", TARGETS)
def test_every_tile_compiles_without_spills(target, dtype):
    compiled(target, legal_tiles(GemmSpec(quantizes=dtype), target), dtype)


def test_machine_code_can_be_inspected():
    """The quantizing warps' loop is not taken for the main loop."""
    tile, spec = TileConfig(16, 128, 256), GemmSpec(quantizes="bf16")
    (kernel,) = compile_many([(spec, tile, "sm_121a")])
    found = inspect(kernel.cubin, plan(spec, tile, "sm_121a"))
    assert (found.as_json()["omma_per_kstep"], found.spills) == (2, 0)


def test_only_tiles_of_few_tokens_quantize():
    spec = GemmSpec(quantizes="bf16")
    tiles = legal_tiles(spec, "sm_121a")
    assert {tile.m for tile in tiles} == {8, 16}
    (reason,) = legal(spec, TileConfig(32, 128, 256), "sm_121a")
    assert "at most 16" in reason
    x, weight, scale = operands(3, 40, 80)
    with pytest.raises(nv.TileError, match=r"32 tokens.*Nearest legal tiles: 16x128x256"):
        emulated(x, scale, weight, tile="32x128x256")


def test_every_deleted_barrier_and_wait_is_noticed():
    """Of the quantizing warps too: a stage written too early, announced too early, or never."""
    launches = []
    for m, n, k, ctas in ((5, 136, 656, 1), (8, 72, 80, 2)):
        x, weight, scale = operands(m, n, k, seed=m)
        y, run = emulated(x, scale, weight, tile="8x64x128x2", out_dtype=torch.bfloat16, max_ctas=ctas)
        run.launch.expected["c"] = y.view(-1).view(torch.uint8).numpy()
        launches.append(run.launch)
    outcomes = mutate.survey(run.kernel.ptx, launches)
    assert len(outcomes) >= 25
    survivors = [f"line {o.mutant.line}: {o.mutant.instruction} ({o.mutant.change})" for o in outcomes if not o.verdict]
    assert survivors == [], survivors
