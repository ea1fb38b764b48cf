"""The oracle against hand-made numbers, exact rationals and plain matrix products."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from nvfp4dsl import reference
from nvfp4dsl.errors import ModeError, OperandError
from nvfp4dsl.formats import E2M1_VALUES, NVFP4Tensor, pack_codes, unpack_codes
from nvfp4dsl.packing import prepare
from nvfp4dsl.reference import dequantize, encode_e2m1, gemm, gemm_model, linear, quantize
from nvfp4dsl.testing import assert_close, assert_identical, bits_differing, relative_error

BELOW, ABOVE = np.float32(0), np.float32(np.inf)


def random(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Rounding to e2m1


@pytest.mark.parametrize(
    ("tie", "code"), [(0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5.0, 6)], ids=str
)
def test_e2m1_ties_go_to_even_and_their_neighbours_do_not(tie, code):
    below, above = np.nextafter(np.float32(tie), BELOW), np.nextafter(np.float32(tie), ABOVE)
    lower, upper = (code, code + 1) if encode(above) > code else (code - 1, code)
    assert encode(np.float32(tie)) == code
    assert (encode(below), encode(above)) == (lower, upper)
    assert (E2M1_VALUES[lower] + E2M1_VALUES[upper]) / 2 == tie
    assert encode(-np.float32(tie)) == code | 8


def encode(x: np.float32) -> int:
    return int(encode_e2m1(torch.tensor(x)))


def test_e2m1_returns_its_own_values_saturates_and_keeps_the_sign_of_zero():
    assert encode_e2m1(torch.tensor(E2M1_VALUES)).tolist() == list(range(16))
    assert encode_e2m1(torch.tensor([7.0, 1e30, math.inf, -math.inf, -1e-30, 1e-30])).tolist() == [7, 7, 7, 15, 8, 0]


# Quantization


def test_a_block_by_hand():
    """amax 6 * 448 makes the global scale 1; then each block is its own arithmetic."""
    x = torch.zeros(3, 32)
    x[0, 0] = 2688.0
    x[1, :4] = torch.tensor([12.0, 5.0, -1.0, 0.4])  # scale 12/6 = 2: codes of 6, 2.5 (tie to 2), -0.5, 0.2
    x[2, 16:19] = torch.tensor([6.5, 3.0, 1.0])  # 6.5/6 = 1.083 is nearer to 1.125 than to 1: 5.78, 2.67, 0.89
    t = quantize(x)
    assert t.global_scale.item() == 1.0
    smallest = 2.0**-9  # what a block of zeros gets
    assert t.scale.float().tolist() == [[448.0, smallest], [2.0, smallest], [smallest, 1.125]]
    codes = unpack_codes(t.qdata)
    assert codes[0].tolist() == [7] + [0] * 31
    assert codes[1].tolist() == [7, 4, 9, 0] + [0] * 28
    assert codes[2].tolist() == [0] * 16 + [7, 5, 2] + [0] * 13


def test_zeros_have_global_scale_one_and_zero_codes():
    t = quantize(torch.zeros(4, 32, dtype=torch.bfloat16))
    assert t.global_scale.item() == 1.0
    assert not t.qdata.any()
    assert not dequantize(t).any()


def test_the_global_scale_is_a_true_quotient():
    for seed in range(50):
        x = random(2, 16, seed=seed)
        assert quantize(x).global_scale.numpy() == x.abs().max().numpy() / np.float32(2688)


def test_global_scale_for_the_tensor_each_matrix_each_row_range():
    x = random(2, 6, 32) * torch.tensor([1.0, 4.0]).view(2, 1, 1)
    amax = lambda y: (y.abs().max() / torch.full((), 2688.0)).item()  # noqa: E731
    assert quantize(x).global_scale.item() == amax(x)
    assert quantize(x, per_matrix=True).global_scale.tolist() == [amax(x[0]), amax(x[1])]
    assert quantize(x, row_ends=(2, 6)).global_scale.tolist() == [amax(x[:, :2]), amax(x[:, 2:])]
    both = quantize(x, row_ends=(2, 6), per_matrix=True)
    assert both.global_scale.tolist() == [[amax(m[:2]), amax(m[2:])] for m in x]
    for i in range(2):  # each part is quantized as if it were alone
        alone = quantize(x[i, 2:])
        assert torch.equal(both.qdata[i, 2:], alone.qdata)
        assert bits_differing(both.scale[i, 2:], alone.scale) == 0


def test_a_given_global_scale_is_used_as_it_is():
    x = random(4, 32)
    t = quantize(x, 0.125)
    assert t.global_scale.item() == 0.125
    assert_identical(quantize(x, torch.tensor(0.125)), t)
    assert relative_error(dequantize(t), x) < 0.12
    clamped = quantize(x, 1e-6)  # too small: block scales stop at 448 and codes at 6
    assert clamped.scale.float().max() == 448.0
    assert dequantize(clamped).abs().max() == torch.tensor(2688.0) * torch.tensor(1e-6)


def test_strides_do_not_matter():
    x = random(64, 24)
    assert_identical(quantize(x.T), quantize(x.T.contiguous()))
    assert_identical(quantize(x.T[::2]), quantize(x.T[::2].contiguous()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gaussian_error(dtype):
    x = random(256, 512, dtype=dtype)
    assert 0.08 < relative_error(dequantize(quantize(x)), x) < 0.1


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4, 32, dtype=torch.float64), "x is torch.float64; it must be bfloat16, float16 or float32"),
        (torch.zeros(4, 32, dtype=torch.int8), "x is torch.int8"),
        (torch.zeros(32), r"x has shape \[32\].*at least two dimensions"),
        (torch.zeros(4, 40), r"K \(the last dimension of x\) is 40.*multiple of 16; pad K with zeros up to 48"),
        (torch.tensor([[0.0] * 15 + [math.nan]]), r"x\[0, 15\] is nan.*finite"),
        (torch.tensor([[-math.inf] + [0.0] * 15]).half(), r"x\[0, 0\] is -inf"),
    ],
)
def test_quantize_refuses(x, message):
    with pytest.raises(OperandError, match=message):
        quantize(x)


@pytest.mark.parametrize(
    "scale", [0.0, -1.0, math.nan, math.inf, torch.ones(3), torch.tensor(1.0, dtype=torch.float64)]
)
def test_quantize_refuses_a_bad_global_scale(scale):
    with pytest.raises(OperandError, match="global_scale"):
        quantize(torch.zeros(4, 32), scale)


def test_quantize_refuses_row_ranges_that_do_not_end_at_n():
    with pytest.raises(OperandError, match="row_ends"):
        quantize(torch.zeros(4, 32), row_ends=(2, 3))


def test_no_rows_quantize_to_no_rows():
    t = quantize(torch.zeros(0, 32))
    assert t.shape == (0, 32)
    assert t.global_scale.item() == 1.0


# Dequantization


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_code_times_block_scale_is_exact(dtype):
    """Every code with every scale, global 1: what the one-hot probe rests on."""
    scale = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).unsqueeze(-1)
    codes = torch.arange(16, dtype=torch.uint8).expand(0x7F, 16)
    t = NVFP4Tensor(pack_codes(codes), scale, torch.tensor(1.0))
    values = dequantize(t, dtype)
    assert values.dtype == dtype
    for s in range(0x7F):
        exact = 2.0 ** max(s >> 3, 1) * ((s & 7) + (8 if s >> 3 else 0)) * 2.0**-10
        assert values[s].tolist() == [v * exact for v in E2M1_VALUES]


def test_the_global_scale_multiplies_by_matrix_and_row_range():
    x = random(2, 4, 16)
    t = quantize(x, torch.tensor([[1.0, 2.0], [0.5, 3.0]]), row_ends=(1, 4))
    scaled_codes = dequantize(t._with(global_scale=torch.tensor(1.0), row_ends=None))
    expected = scaled_codes * torch.tensor([[1, 2, 2, 2], [0.5, 3, 3, 3]]).unsqueeze(-1)
    assert torch.equal(dequantize(t), expected)


# GEMM in float64


@pytest.mark.parametrize("bias", [None, torch.bfloat16, torch.float32])
def test_gemm_is_the_product_of_the_dequantized(bias):
    a, b = quantize(random(2, 5, 80)), quantize(random(2, 7, 80, seed=1), row_ends=(3, 7))
    vector = None if bias is None else random(7, seed=2, dtype=bias)
    expected = dequantize(a, torch.float64) @ dequantize(b, torch.float64).mT
    expected = expected if vector is None else expected + vector.double()
    assert gemm(a, b, vector).dtype == torch.float64
    assert_close(gemm(a, b, vector), expected, norm=1e-15, element=1e-14)
    assert_close(gemm(a, b, vector, torch.bfloat16), expected, norm=3e-3, element=2.0**-8)


def test_layouts_and_batches_do_not_matter():
    a, b = quantize(random(3, 5, 80)), quantize(random(7, 80, seed=1))
    y = gemm(a, b)
    assert y.shape == (3, 5, 7)
    assert torch.equal(gemm(prepare(a, "sm_120a"), prepare(b, "sm_121a")), y)
    assert torch.equal(gemm_model(prepare(a, "sm_120a"), prepare(b, "sm_121a")), gemm_model(a, b))
    for i in range(3):
        one = NVFP4Tensor(a.qdata[i], a.scale[i], a.global_scale)
        assert torch.equal(gemm(one, b), y[i])
        assert bits_differing(gemm_model(one, b), gemm_model(a, b)[i]) == 0


OPERANDS = {"a": (4, 64), "b": (6, 64)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": random(4, 64)}, "a is a Tensor; it must be an NVFP4Tensor: call quantize first"),
        ({"b": quantize(random(6, 48))}, r"K differs: \[4, 64\] against \[6, 48\]"),
        (
            {"a": quantize(random(2, 4, 64)), "b": quantize(random(3, 6, 64))},
            r"batch dimensions \[2\] and \[3\] differ",
        ),
        ({"a": quantize(random(4, 64)).to("meta")}, r"operands are on meta and cpu; move them"),
        ({"a": quantize(random(4, 64), row_ends=(1, 4))}, "a has row_ends; only b"),
        ({"bias": torch.zeros(4)}, r"bias is torch.float32 \[4\]; it must be \[6\] \(N\)"),
        ({"bias": torch.zeros(6, dtype=torch.float64)}, r"bias is torch.float64 \[6\]"),
        ({"bias": torch.zeros(6, device="meta")}, r"bias is on meta, the operands on cpu"),
        ({"out_dtype": torch.int8}, r"out_dtype is torch.int8; allowed"),
    ],
)
@pytest.mark.parametrize("function", [gemm, gemm_model])
def test_gemm_refuses(function, change, message):
    operands = {"a": quantize(random(4, 64)), "b": quantize(random(6, 64))}
    function(**operands)
    with pytest.raises(OperandError, match=message):
        function(**operands | change)


# The arithmetic model


def one_hot(k: int) -> NVFP4Tensor:
    """The identity, with codes and scales made by hand and global scale 1."""
    codes = 2 * torch.eye(k, dtype=torch.uint8)  # code 2 is 1.0
    ones = torch.full((k, k // 16), 0x38, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return NVFP4Tensor(pack_codes(codes), ones, torch.tensor(1.0))


def test_the_one_hot_probe_returns_the_weight_bit_for_bit():
    g = torch.Generator().manual_seed(0)
    qdata = torch.randint(0, 256, (40, 40), generator=g, dtype=torch.uint8)
    scale = torch.randint(0, 0x7F, (40, 5), generator=g, dtype=torch.uint8).view(torch.float8_e4m3fn)
    w = NVFP4Tensor(qdata, scale, torch.tensor(1.0))
    expected = dequantize(w).T + 0.0  # the accumulator has no -0
    for dtype in (torch.float32, torch.bfloat16):
        assert bits_differing(gemm_model(one_hot(80), w, out_dtype=dtype), expected.to(dtype)) == 0


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 8, 16), (17, 40, 48), (64, 32, 64), (20, 24, 1024)])
def test_the_model_is_the_gemm_but_for_rounding(m, n, k, with_bias):
    a, b = quantize(random(m, k)), quantize(random(n, k, seed=1), row_ends=(n // 2, n))
    bias = random(n, seed=2) if with_bias else None
    magnitude = dequantize(a).abs().double() @ dequantize(b).abs().double().T + (bias.abs() if with_bias else 0)
    steps = -(-k // 64)  # one truncation a step, then alpha and the product, each half a unit
    assert_close(
        gemm_model(a, b, bias), gemm(a, b, bias), norm=1e-6, element=(steps + 2) * 2.0**-23, magnitude=magnitude
    )


def test_the_epilogue_rounds_alpha_then_the_product_then_the_output():
    """A 1 x 1 x 16 product of 6 * 6 * 448 * 448 = 36 * 448^2 is exact in the accumulator."""
    big = NVFP4Tensor(
        pack_codes(torch.tensor([[7] + [0] * 15], dtype=torch.uint8)),
        torch.tensor([[448.0]]).to(torch.float8_e4m3fn),
        torch.tensor(1.0),
    )
    third, fifth = np.float32(1 / 3), np.float32(1 / 5)
    a, b = big._with(global_scale=torch.tensor(third)), big._with(global_scale=torch.tensor(fifth))
    alpha = third * fifth
    acc = np.float32(36 * 448 * 448)
    assert gemm_model(a, b).item() == acc * alpha
    for addend in (1.0, -481689.6, 1e-8, -float(acc * alpha)):
        bias = torch.tensor([addend])
        exact = Fraction(float(acc)) * Fraction(float(alpha)) + Fraction(bias.item())
        assert gemm_model(a, b, bias).item() == nearest_fp32(exact)
        assert gemm_model(a, b, bias, torch.float16).item() == torch.tensor(nearest_fp32(exact)).half().item()


def nearest_fp32(x: Fraction) -> float:
    """Round a rational to fp32, to nearest even, by integers alone."""
    if x == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(x))), -126)
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while exponent > -126 and abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - 23)
    return float(round(x / unit) * unit)  # round() of a Fraction is to nearest even


def test_fma_rounds_once():
    g = np.random.default_rng(0)
    x, y = (g.standard_normal(3000).astype(np.float32) for _ in range(2))
    z = (g.standard_normal(3000) * np.exp2(g.integers(-60, 30, 3000))).astype(np.float32)
    z[:1000] = -(x[:1000] * y[:1000])  # cancels all but the product's rounding
    # Below float64's last place beside a tie of fp32: (1 + e)(1 - e) 2^-24 is half a unit of z, less e^2.
    e = np.exp2(-g.integers(15, 24, 1000)).astype(np.float32)
    x[1000:2000], y[1000:2000] = 1 + e, (1 - e) * np.float32(2.0**-24)
    z[1000:2000] = 1 + g.integers(0, 1000, 1000) * np.float32(2.0**-23)
    got = reference._fma(*(torch.from_numpy(v) for v in (x, y, z))).tolist()
    expected = [
        nearest_fp32(Fraction(float(p)) * Fraction(float(q)) + Fraction(float(r)))
        for p, q, r in zip(x, y, z, strict=True)
    ]
    assert got == expected
    twice = (x.astype(np.float64) * y + z).astype(np.float32).tolist()
    assert twice != expected, "rounding twice passes: the inputs are too easy"


def test_fma_of_special_values():
    inf, nan = math.inf, math.nan
    x, y, z = torch.tensor([[inf, 1.0, inf, nan], [1.0, 2.0, 1.0, 1.0], [1.0, inf, -inf, 0.0]])
    got = reference._fma(x, y, z)
    assert got[:2].tolist() == [inf, inf]
    assert got[2:].isnan().all()


def test_empty_products():
    empty, w = quantize(torch.zeros(0, 64)), quantize(random(6, 64))
    for function in (gemm, gemm_model):
        assert function(empty, w).shape == (0, 6)
        assert function(w, empty).shape == (6, 0)


# Linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linear_in_both_modes(dtype):
    x, w, bias = random(2, 5, 64, dtype=dtype), quantize(random(6, 64, seed=1)), random(6, seed=2)
    weight = dequantize(w, torch.float64)
    y = linear(x, w, bias)
    assert y.dtype == dtype
    assert torch.equal(y, (x.double() @ weight.T + bias).to(dtype))
    y = linear(x, w, bias, activation="nvfp4", out_dtype=torch.float32)
    expected = dequantize(quantize(x), torch.float64) @ weight.T + bias
    assert_close(y, expected, norm=1e-7, element=1e-6)


def test_linear_takes_any_rank_and_no_rows():
    x, w = random(64), quantize(random(6, 64, seed=1))
    for mode in ("bf16", "nvfp4"):
        assert torch.equal(linear(x, w, activation=mode), linear(x.unsqueeze(0), w, activation=mode)[0])
        assert linear(random(0, 64), w, activation=mode).shape == (0, 6)
        assert linear(random(2, 0, 64), w, activation=mode).shape == (2, 0, 6)


def test_linear_takes_strided_activations():
    x, w = random(64, 10), quantize(random(6, 64, seed=1))
    for mode in ("bf16", "nvfp4"):
        assert torch.equal(linear(x.T, w, activation=mode), linear(x.T.contiguous(), w, activation=mode))


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (random(4, 48), {}, OperandError, r"K differs: \[4, 48\] against \[6, 64\]"),
        (random(4, 64).double(), {}, OperandError, "x is torch.float64; it must be"),
        (random(4, 64).to("meta"), {}, OperandError, "operands are on meta and cpu"),
        (torch.tensor(1.0), {}, OperandError, "x is a scalar"),
        (random(4, 64), {"bias": torch.zeros(7)}, OperandError, r"bias is torch.float32 \[7\]; it must be \[6\]"),
        (random(4, 64), {"activation": "fp8"}, ModeError, "activation is 'fp8'; it must be 'bf16'.*or 'nvfp4'"),
        (random(4, 64), {"weight": random(6, 64)}, OperandError, "weight is a Tensor; it must be an NVFP4Tensor"),
    ],
)
def test_linear_refuses(x, options, error, message):
    with pytest.raises(error, match=message):
        linear(**{"x": x, "weight": quantize(random(6, 64))} | options)
