"""The public operations on a CPU: values of the oracle, bad input, torch integration. No kernel is compiled here."""

import contextlib
import copy
import functools

import pytest
import torch

import nvfp4dsl as nv
from nvfp4dsl import reference
from nvfp4dsl.testing import bits_differing, relative_error


def _random(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_mm_is_the_oracle_in_every_layout():
    a, b = nv.quantize(_random(5, 48)), nv.quantize(_random(7, 48, seed=1))
    expected = nv.dequantize(a, torch.float64) @ nv.dequantize(b, torch.float64).mT
    y = nv.mm(a, b, out_dtype=torch.float32)
    assert relative_error(y, expected) < 1e-7
    assert bits_differing(nv.mm(nv.prepare(a, "sm_121a"), nv.prepare(b, "sm_100a"), out_dtype=torch.float32), y) == 0


@pytest.mark.parametrize("activation", ["bf16", "nvfp4", None])
def test_linear_follows_the_mode_it_is_given(activation):
    x, weight, bias = _random(2, 3, 64), nv.quantize(_random(9, 64, seed=1)), _random(9, seed=2)
    values = nv.dequantize(nv.quantize(x)) if activation == "nvfp4" else x
    expected = values.double() @ nv.dequantize(weight, torch.float64).mT + bias.double()
    y = nv.linear(x, weight, bias, activation=activation)
    assert y.dtype == x.dtype
    assert relative_error(y, expected) < 3e-3
    other = x if activation == "nvfp4" else nv.dequantize(nv.quantize(x))
    assert relative_error(y, other.double() @ nv.dequantize(weight, torch.float64).mT + bias.double()) > 3e-2


def test_strides_of_activations_do_not_matter():
    weight = nv.quantize(_random(8, 32))
    x = _random(32, 6, seed=1).mT
    assert not x.is_contiguous()
    for activation in ("bf16", "nvfp4"):
        y = nv.linear(x, weight, activation=activation)
        assert bits_differing(y, nv.linear(x.contiguous(), weight, activation=activation)) == 0


def test_no_rows_give_an_empty_result():
    weight = nv.quantize(_random(8, 32))
    for activation in ("bf16", "nvfp4"):
        assert nv.linear(_random(0, 32), weight, activation=activation).shape == (0, 8)
    empty = nv.quantize(_random(0, 32))
    assert nv.mm(empty, weight).shape == (0, 8)
    with nv.emulate("sm_121a") as emulation:
        assert nv.linear(_random(0, 32), nv.prepare(weight, "sm_121a"), activation="nvfp4").shape == (0, 8)
    assert emulation.runs == []


def _bad_calls():
    x, w = _random(4, 32), nv.quantize(_random(8, 32, seed=1))
    prepared = nv.prepare(w, "sm_121a")
    yield "K differs", nv.OperandError, lambda: nv.mm(nv.quantize(_random(4, 48)), w), "48"
    yield "not quantized", nv.OperandError, lambda: nv.mm(x, w), "quantize"
    yield "weight not quantized", nv.OperandError, lambda: nv.linear(x, x), "quantize"
    yield "dtype of x", nv.OperandError, lambda: nv.linear(x.int(), w), "int32"
    yield "K of x", nv.OperandError, lambda: nv.linear(_random(4, 30), w), "30"
    yield "K not a multiple of 16", nv.OperandError, lambda: nv.quantize(_random(4, 40)), "multiple of 16"
    yield "infinite weight", nv.OperandError, lambda: nv.quantize(_random(4, 32) / 0), "finite"
    yield "bias shape", nv.OperandError, lambda: nv.mm(w, w, _random(9)), "bias"
    yield "bias dtype", nv.OperandError, lambda: nv.mm(w, w, torch.zeros(8, dtype=torch.int32)), "int32"
    yield "out_dtype", nv.OperandError, lambda: nv.mm(w, w, out_dtype=torch.int8), "int8"
    yield "mode", nv.ModeError, lambda: nv.linear(x, w, activation="fp8"), "nvfp4"
    for mode in ("", [], 0, False):
        yield f"mode {mode!r}", nv.ModeError, functools.partial(nv.linear, x, w, activation=mode), "'bf16'"
    yield "overlap", nv.ModeError, lambda: nv.linear(x, w, overlap=["weights"]), "'launch'"
    yield "batch of x", nv.OperandError, lambda: nv.linear(x, nv.quantize(_random(2, 8, 32))), "expand"
    yield "list for x", nv.OperandError, lambda: nv.linear([1.0], w), "torch.Tensor"
    yield "sparse x", nv.OperandError, lambda: nv.linear(x.to_sparse(), w), "to_dense"
    for bias in (1.0, [1.0], "x"):
        yield f"bias {bias}", nv.OperandError, functools.partial(nv.linear, x, w, bias), "bias is a .*torch.Tensor"
    yield "prepare a tensor", nv.OperandError, lambda: nv.prepare(x, "sm_121a"), "quantize"
    yield "dequantize a tensor", nv.OperandError, lambda: nv.dequantize(x), "quantize"
    for mode in ("", [], "fp8"):
        prepare = functools.partial(nv.prepare, w, "sm_121a", activation=mode)
        yield f"prepare for {mode!r}", nv.TargetError, prepare, "nvfp4, bf16"
    for ctas in (0, -1, "3", 1.5):
        emulate = functools.partial(nv.emulate, "sm_121a", max_ctas=ctas)
        yield f"max_ctas {ctas!r}", nv.OperandError, lambda e=emulate: e().__enter__(), "max_ctas"
    w4a4 = functools.partial(nv.linear, x, w, activation="nvfp4")
    yield "scale in mode bf16", nv.ModeError, lambda: nv.linear(x, w, activation_scale=1.0), "activation='nvfp4'"
    for scale in (0.0, -1.0, float("nan"), float("inf"), 1e-40, torch.tensor(0.0), torch.tensor(float("nan"))):
        yield f"scale {scale}", nv.OperandError, functools.partial(w4a4, activation_scale=scale), "finite, positive"
    for scale in ("0.5", [0.5], {}, 1j):
        yield f"scale {scale!r}", nv.OperandError, functools.partial(w4a4, activation_scale=scale), "number"
    yield "scale shape", nv.OperandError, lambda: w4a4(activation_scale=torch.ones(4)), "global_scale has shape"
    yield "scale dtype", nv.OperandError, lambda: w4a4(activation_scale=torch.ones((), dtype=torch.half)), "float32"
    yield "target", nv.TargetError, lambda: nv.prepare(w, "sm_89"), "sm_121a"
    yield "target of emulate", nv.TargetError, lambda: nv.emulate("sm_75").__enter__(), "sm_121a"
    yield "tile on the CPU", nv.TileError, lambda: nv.mm(w, w, tile="128x128x128"), "emulate"
    yield "tile text", nv.TileError, lambda: nv.mm(w, w, tile="big"), "MxNxK"
    yield "two devices", nv.OperandError, lambda: nv.mm(w.to("meta"), w), "meta"
    yield "scale shape", nv.OperandError, lambda: nv.NVFP4Tensor(w.qdata, w.scale[:, :1], w.global_scale), "scale"
    yield "K strided", nv.OperandError, lambda: nv.NVFP4Tensor(w.qdata.mT.contiguous().mT, w.scale, w.global_scale), "K"
    yield (
        "layout unknown",
        nv.LayoutError,
        lambda: nv.NVFP4Tensor(prepared.qdata, prepared.scale, prepared.global_scale, layout="volta", k=32),
        "blackwell",
    )


@pytest.mark.parametrize("case", list(_bad_calls()), ids=lambda c: c[0])
def test_bad_input_is_a_typed_error(case):
    _, kind, call, word = case
    with pytest.raises(kind, match=word):
        call()


@pytest.mark.parametrize(
    ("call", "kind", "word"),
    [
        (lambda x, w, p: nv.mm(nv.prepare(w, "sm_121a"), w), nv.LayoutError, "prepare"),
        (lambda x, w, p: nv.linear(x, w, activation="nvfp4"), nv.LayoutError, "prepare"),
        (lambda x, w, p: nv.linear(x, p), nv.LayoutError, "activation='bf16'"),
        (lambda x, w, p: nv.linear(x, p, activation="nvfp4", bias=_random(3)), nv.OperandError, "bias"),
        (lambda x, w, p: nv.mm(p, p, tile="256x256x128"), nv.TileError, "128"),
        (lambda x, w, p: nv.mm(p, p, tile="128x128x256x9"), nv.TileError, "101376"),
        (lambda x, w, p: nv.mm(p, p, out_dtype=torch.float64), nv.OperandError, "float64"),
        (lambda x, w, p: nv.mm(p, p, tile="128x128x128-hmma"), nv.TileError, "mainloop=hmma.*Nearest"),
        (lambda x, w, p: nv.linear(x, p, activation="nvfp4", activation_scale=0.0), nv.OperandError, "positive"),
        (lambda x, w, p: nv.linear(x, w, activation="nvfp4", activation_scale=1.0), nv.LayoutError, "prepare"),
        (lambda x, w, p: nv.linear(x / 0, p, activation="nvfp4", activation_scale=1.0), nv.OperandError, "finite"),
        (lambda x, w, p: nv.linear(x, p, activation="nvfp4", activation_scale=1.0, overlap="all"), nv.ModeError, "all"),
    ],
)
def test_bad_input_never_launches(call, kind, word):
    x, w = _random(4, 32), nv.quantize(_random(8, 32, seed=1))
    with nv.emulate("sm_121a") as emulation, pytest.raises(kind, match=word):
        call(x, w, nv.prepare(w, "sm_121a"))
    assert emulation.runs == []


def test_emulate_ends_with_its_block_and_nests():
    w = nv.quantize(_random(8, 32))
    with nv.emulate("sm_120a") as outer:
        with nv.emulate("sm_121a", seed=3) as inner:
            assert nv.quantize(_random(8, 32)).layout == "blackwell"
            assert (inner.target.name, inner.seed) == ("sm_121a", 3)
        assert outer.target.name == "sm_120a"
    assert nv.quantize(_random(8, 32)).layout == "canonical"
    assert nv.mm(w, w).shape == (8, 8)


@pytest.mark.parametrize("activation", ["bf16", "nvfp4"])
def test_gradients_of_x_and_bias(activation):
    x, weight = _random(2, 3, 32, dtype=torch.float32).requires_grad_(), nv.quantize(_random(5, 32, seed=1))
    bias = _random(5, seed=3, dtype=torch.float32).requires_grad_()
    grad = _random(2, 3, 5, seed=2, dtype=torch.float32)
    nv.linear(x, weight, bias, activation=activation).backward(grad)
    assert relative_error(x.grad, grad @ nv.dequantize(weight)) < 1e-6
    assert relative_error(bias.grad, grad.sum((0, 1))) < 1e-6


@pytest.mark.parametrize("activation", ["bf16", "nvfp4"])
def test_gradients_of_a_single_row(activation):
    x, weight = _random(32, dtype=torch.float32).requires_grad_(), nv.quantize(_random(5, 32, seed=1))
    bias = _random(5, seed=3, dtype=torch.float32).requires_grad_()
    grad = _random(5, seed=2, dtype=torch.float32)
    nv.linear(x, weight, bias, activation=activation).backward(grad)
    assert relative_error(x.grad, grad @ nv.dequantize(weight)) < 1e-6
    assert torch.equal(bias.grad, grad)


@pytest.mark.parametrize("target", [None, "sm_121a"])
def test_a_parameter_becomes_a_frozen_weight(target):
    parameter = torch.nn.Linear(64, 40).bfloat16().weight
    scale = torch.tensor(0.01, requires_grad=True)
    norm = functools.partial(nv.quantize_rms_norm, parameter, parameter[0], 1e-6)
    with nv.emulate(target) if target else contextlib.nullcontext():
        made = [nv.quantize(parameter), nv.quantize(parameter, scale), nv.quantize_silu_mul(parameter, parameter)]
        made += [norm(scale), nv.quantize(parameter, row_ends=(8, 40))]
        assert not any(t.requires_grad for w in made for t in (w.qdata, w.scale, w.global_scale))
        with pytest.raises(nv.ModeError, match="no_grad"):
            norm(0.01, residual=parameter)
        assert nv.linear(_random(3, 64), made[0], activation="nvfp4").shape == (3, 40)


def test_a_gradient_of_the_weight_is_refused():
    weight = nv.quantize(_random(5, 32))
    weight.global_scale.requires_grad_()
    with pytest.raises(nv.ModeError, match="frozen"):
        nv.linear(_random(3, 32), weight)


def test_operators_pass_opcheck():
    x, w, bias = _random(3, 32), nv.quantize(_random(5, 32, seed=1)), _random(5)
    parts = (w.qdata, w.scale.view(torch.uint8), w.global_scale, w.layout, w.n, w.k)
    torch.library.opcheck(torch.ops.nvfp4dsl.mm.default, (*parts, *parts, [], bias, torch.bfloat16))
    for activation in ("bf16", "nvfp4"):
        args = (x.float().requires_grad_(), *parts, [], bias, activation, "weights")
        torch.library.opcheck(torch.ops.nvfp4dsl.linear.default, args)
    torch.library.opcheck(torch.ops.nvfp4dsl.linear.default, (*args, torch.tensor(0.01)))


def test_a_given_activation_scale():
    """By the reference on a CPU; no gradient goes through it; it passes through torch.compile."""
    x, w, scale = _random(2, 3, 32, dtype=torch.float32).requires_grad_(), nv.quantize(_random(5, 32, seed=1)), 0.003
    linear = functools.partial(nv.linear, activation="nvfp4")
    y = linear(x, w, activation_scale=scale)
    expected = reference.gemm(reference.quantize(x.detach(), scale), w, out_dtype=torch.float32)
    assert bits_differing(y.detach(), expected) == 0
    assert bits_differing(y.detach(), linear(x, w).detach()) > 0
    grad = _random(2, 3, 5, seed=2, dtype=torch.float32)
    y.backward(grad)
    assert relative_error(x.grad, grad @ nv.dequantize(w)) < 1e-6
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert bits_differing(compiled(x.detach(), w, activation_scale=torch.tensor(scale)), y.detach()) == 0
    assert linear(_random(0, 32), w, activation_scale=scale).shape == (0, 5)
    each = nv.quantize(_random(2, 5, 32, seed=3), per_matrix=True)
    scales = torch.tensor([0.003, 0.02])
    expected = reference.gemm(reference.quantize(x.detach(), scales), each, out_dtype=torch.float32)
    assert bits_differing(linear(x.detach(), each, activation_scale=scales), expected) == 0


def test_warmup_compiles_the_kernel_that_quantizes():
    weight = nv.prepare(nv.quantize(_random(40, 256, seed=1)), "sm_121a")
    with nv.emulate("sm_121a") as emulation:
        (kernel,) = nv.warmup(weight, 3, activation="nvfp4", activation_scale=True)
        nv.linear(_random(3, 256), weight, activation="nvfp4", activation_scale=0.01)
    assert [run.kernel for run in emulation.runs] == [kernel]
    assert kernel.spec.quantizes == "bf16"


@pytest.mark.parametrize("target", ["sm_90a", "sm_121a"])
@pytest.mark.parametrize("given", [False, True])
def test_warmup_compiles_what_quantizes(target, given, caplog):
    weight = nv.prepare(nv.quantize(_random(40, 256, seed=1)), target)
    with nv.emulate(target) as emulation:
        kernels = nv.warmup(weight, 17, activation="nvfp4", activation_scale=given)
        assert emulation.runs == []
        caplog.set_level("INFO", logger="nvfp4dsl")
        nv.linear(_random(17, 256), weight, activation="nvfp4", activation_scale=0.01 if given else None)
    assert caplog.text == ""
    assert {id(run.kernel) for run in emulation.runs} == set(map(id, kernels))
    assert len(emulation.runs) == (2 if given else 3)


def test_fake_kernels_know_the_prepared_shapes():
    w = nv.prepare(nv.quantize(_random(5, 48)), "sm_121a")
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 3, 48, dtype=torch.bfloat16)
        assert nv.linear(x, w).shape == (2, 3, 5)


def test_quantize_defaults_agree_with_the_reference():
    x = _random(6, 64)
    ours, oracle = nv.quantize(x), reference.quantize(x)
    assert torch.equal(ours.qdata, oracle.qdata)
    assert torch.equal(ours.scale.view(torch.uint8), oracle.scale.view(torch.uint8))


def test_warmup_compiles_what_a_call_will_need(caplog):
    caplog.set_level("INFO", logger="nvfp4dsl")
    weight = nv.prepare(nv.quantize(_random(40, 256, seed=1)), "sm_90a")
    with nv.emulate("sm_90a") as emulation:
        kernels = nv.warmup([weight, (24, 256)], [1, 2, 16])
        assert "3 of 3 kernels" in caplog.text
        assert nv.warmup(weight, 1) == kernels[:1]
        caplog.clear()
        for m in (1, 2, 16):
            nv.linear(_random(m, 256), weight)
    assert [run.kernel for run in emulation.runs] == kernels
    assert caplog.text == ""


def test_warmup_for_another_target_needs_no_device():
    kernel, *quantizing = nv.warmup((64, 256), 4, activation="nvfp4", target="sm_121a", dtype=torch.float16)
    assert {kernel.spec.reduce for kernel in quantizing} == {True, False}
    assert (kernel.target, kernel.spec.activation, kernel.spec.out_dtype) == ("sm_121a", "nvfp4", "fp16")
    if not torch.cuda.is_available():
        with pytest.raises(nv.TargetError, match="target="):
            nv.warmup((64, 256), 4)


@pytest.mark.parametrize(
    ("options", "kind", "word"),
    [
        *[({"activation": mode}, nv.ModeError, "'nvfp4'") for mode in ("fp8", "", [])],
        *[({"overlap": overlap}, nv.ModeError, "'launch'") for overlap in ("all", ["weights"])],
        *[({"weights": (40, k)}, nv.OperandError, f"K is {k}.*multiple of 16") for k in (63, 17)],
        *[({"weights": (n, 64)}, nv.OperandError, f"N is {n}") for n in (0, -40, 4.0)],
        *[({"weights": w}, nv.OperandError, "NVFP4Tensor") for w in ((40,), (1, 2, 3), 5, None, "w", [40, 64])],
        *[({"ms": ms}, nv.OperandError, "M .*whole number") for ms in ([0], [-1], [1.5], ["1"], "1", None, 0)],
        ({"activation": "nvfp4", "dtype": torch.int8}, nv.OperandError, "dtype is torch.int8"),
        ({"dtype": "bf16"}, nv.OperandError, "dtype is bf16"),
        ({"bias": torch.int8}, nv.OperandError, "bias is torch.int8"),
        ({"dtype": torch.float16}, nv.OperandError, "W4A16 kernels multiply bfloat16"),
        ({"target": ""}, nv.TargetError, "sm_121a"),
    ],
    ids=str,
)
def test_warmup_refuses_what_linear_does(options, kind, word):
    with pytest.raises(kind, match=word):
        nv.warmup(**{"weights": (40, 64), "ms": [1], "target": "sm_121a"} | options)


def test_how_far_a_kernel_runs_ahead_is_checked_and_changes_no_value():
    x, weight = _random(3, 64), nv.quantize(_random(9, 64, seed=1))
    for overlap in ("weights", "launch", "none"):
        assert bits_differing(nv.linear(x, weight, overlap=overlap), nv.linear(x, weight)) == 0
    with pytest.raises(nv.ModeError, match="'launch'"):
        nv.linear(x, weight, overlap="all")


def test_copies_have_no_remembered_calls():
    weight = nv.quantize(_random(9, 64))
    weight.__dict__["_launch"] = lambda *args: None
    for other in (copy.copy(weight), copy.deepcopy(weight)):
        assert vars(other).keys() == vars(nv.quantize(_random(9, 64))).keys()
        assert bits_differing(nv.dequantize(other), nv.dequantize(weight)) == 0
