"""The C launcher on CPU tensors, a Python function in the kernel's place: what it hands over, and when it does not."""

from __future__ import annotations

import ctypes
import gc
import sys
from types import SimpleNamespace

import pytest
import torch
import tvm_ffi
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from nvfp4dsl.jit.launcher import MOST_PLANS, Launcher

ROWS, K, N = 6, 32, 8


class Kernel:
    """y = x @ codes.T * alpha (+ bias), with one byte a code; what it was given is kept."""

    def __init__(self):
        self.calls, self.refuse = [], 0
        self.function = tvm_ffi.convert(self)

    def __call__(self, *arguments):
        tensors = [view(a) if isinstance(a, tvm_ffi.Tensor) else a for a in arguments]
        self.calls.append([(tuple(t.shape), t.stride()) if isinstance(t, torch.Tensor) else t for t in tensors])
        if self.refuse:
            self.refuse -= 1
            raise ValueError("refused")
        x, codes, _, alpha, bias, y, _ = tensors
        y.copy_(x.float() @ codes[0].float().T * alpha + (0 if bias is None else bias.float()))


def view(t):
    """As a torch tensor; DLPack would want an owner, which what a kernel is handed has not."""
    dtype, steps = getattr(torch, str(t.dtype)), zip(t.shape, t.strides, strict=True)
    size = (1 + sum((extent - 1) * stride for extent, stride in steps)) * dtype.itemsize
    memory = (ctypes.c_uint8 * size).from_address(t.data_ptr())
    return torch.frombuffer(memory, dtype=dtype).as_strided(tuple(t.shape), tuple(t.strides))


@pytest.fixture
def kernel():
    return Kernel()


def add(launcher, kernel, x, bias=None, activation=None, overlap="weights", **options):
    codes = torch.randint(0, 9, (N, K), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    alpha = torch.tensor(0.5)
    weights = [(codes, codes.view(1, N, K)), (codes, codes.view(1, N, K)), (alpha, alpha.expand(1, N))]
    launcher.add(kernel.function, weights, x, bias, activation, overlap, max_ctas=132, **options)
    return codes, alpha


def make(kernel, *shape, **options):
    """A launch for x of ``shape`` with no bias, one of bf16 and one of fp32; codes; alpha."""
    launcher, x = Launcher(), random(*(shape or (ROWS, K)))
    launch = launcher.launch
    biases = [None, random(N), random(N).float()]
    weights = [add(launcher, kernel, x, bias, **options) for bias in biases]
    codes, alpha = weights[0]

    def call(x, bias=None):
        for other_codes, other_alpha in weights[1:]:  # the three are one weight
            other_codes.data, other_alpha.data = codes, alpha
        return launch(x, bias, None, "weights")

    call.launch, call.weights = launch, weights
    return call, codes, alpha


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16()


def expected(x, codes, alpha, bias=None):
    return (x.float() @ codes.float().T * alpha + (0 if bias is None else bias.float())).bfloat16()


@pytest.mark.parametrize(
    "x",
    [random(ROWS, K), random(2, 3, K), random(1, ROWS, 1, K), random(ROWS, 2 * K)[:, :K], random(2, 1, 3, K)[:, :1]],
    ids=lambda x: f"{tuple(x.shape)}, strides {x.stride()}",
)
def test_an_x_of_any_rank_is_handed_over_as_a_matrix(kernel, x):
    launch, codes, alpha = make(kernel, *x.shape)
    for bias in (None, random(N), torch.nn.Parameter(random(N).float(), requires_grad=False)):
        y = launch(x, bias)
        assert y.shape == (*x.shape[:-1], N)
        assert torch.equal(y, expected(x, codes, alpha, bias))
    matrix = x.reshape(ROWS, K) if x.is_contiguous() else x
    assert kernel.calls[0] == [
        ((ROWS, K), matrix.stride()),
        *[((1, N, K), (N * K, K, 1))] * 2,
        ((1, N), (0, 0)),
        None,
        ((ROWS, N), (N, 1)),
        132,
    ]


def test_one_row_and_a_vector(kernel):
    for x in (random(1, K), random(K), random(1, 1, K)):
        launch, codes, alpha = make(kernel, *x.shape)
        assert torch.equal(launch(x, None), expected(x, codes, alpha))


def test_what_is_written_in_place_or_moved_is_seen(kernel):
    launch, codes, alpha = make(kernel)
    x = random(ROWS, K)
    codes.fill_(3)
    alpha.fill_(2)
    assert torch.equal(launch(x, None), expected(x, codes, alpha))
    codes.data = torch.full((N, K), 5, dtype=torch.uint8)
    assert torch.equal(launch(x, None), expected(x, torch.full((N, K), 5), alpha))


@pytest.mark.parametrize(
    "x",
    [random(ROWS, K + 1), random(ROWS + 1, K), random(K, ROWS).T, random(3, 2, K).transpose(0, 1), random(()), None, 3],
    ids=lambda x: str(getattr(x, "shape", x)),
)
def test_what_does_not_fit_is_not_handed_over(kernel, x):
    launch, _, _ = make(kernel)
    assert launch(x, None) in (None, NotImplemented)
    assert kernel.calls == []


def test_the_plan_of_the_call_is_found(kernel):
    """By x's shape, the bias' type and both arguments; the others are not disturbed."""
    launcher, calls = Launcher(), []
    xs = [random(m, K) for m in range(1, 6)] + [random(1, m, K) for m in range(1, 4)]
    for x in xs:
        for bias, activation, overlap in [(None, None, "weights"), (random(N), "bf16", "none")]:
            calls.append((x, bias, activation, overlap, *add(launcher, kernel, x, bias, activation, overlap)))
    assert len(calls) < MOST_PLANS
    for _ in range(2):
        for x, bias, activation, overlap, codes, alpha in reversed(calls):
            assert torch.equal(launcher.launch(x, bias, activation, "".join(overlap)), expected(x, codes, alpha, bias))
            assert launcher.launch(x, bias, activation, "launch") is NotImplemented
    assert launcher.launch(random(6, K), None, None, "weights") is NotImplemented
    assert launcher.launch(xs[0], random(N).float(), "bf16", "none") is NotImplemented
    x = random(9, K)
    while launcher.launch(xs[0], None, None, "weights") is not NotImplemented:  # until there are too many
        add(launcher, kernel, x)
    assert launcher.launch(x, None, None, "weights") is not NotImplemented
    launcher.clear()
    assert launcher.launch(x, None, None, "weights") is NotImplemented


def test_what_the_kernel_refuses_is_tried_once_more_elsewhere(kernel):
    launch, codes, alpha = make(kernel)
    x = random(ROWS, K)
    kernel.refuse = 1
    assert torch.equal(launch(x, None), expected(x, codes, alpha))
    kernel.refuse = 2
    assert launch(x, None) is None
    assert len(kernel.calls) == 4
    assert torch.equal(launch(x, None), expected(x, codes, alpha))


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def test_whatever_torch_watches_is_not_handed_over(kernel):
    launch, codes, alpha = make(kernel)
    x, bias = random(ROWS, K), random(N)
    inside = []

    def transformed(x):
        inside.append(launch(x.detach(), None))
        return x.sum()

    assert launch(x.clone().requires_grad_(), None) is None
    assert launch(x, bias.clone().requires_grad_()) is None
    assert launch(x.as_subclass(Subclass), None) is None
    with Mode():
        assert launch(x, None) is None
    with torch.device("cpu"):
        assert launch(x, None) is None
    with forward_ad.dual_level():
        assert launch(x, None) is None
    torch.func.grad(transformed)(x)
    torch.vmap(transformed)(x)
    torch.jit.trace(lambda x: transformed(x) + 0, (x,), check_trace=False)
    assert inside == [None] * 3
    assert kernel.calls == []
    with torch.no_grad():
        assert torch.equal(launch(x.clone().requires_grad_(), None), expected(x, codes, alpha))
    with torch.inference_mode():
        assert launch(x, bias).is_inference()
    assert not launch(x, bias).requires_grad


def test_a_watch_of_ones_own(kernel):
    said, other = [7 * 10**6], SimpleNamespace(version=3)
    launch, codes, alpha = make(kernel, watches=[(lambda: said[0], None, 7 * 10**6), (other, "version", 3)])
    x = random(ROWS, K)
    assert torch.equal(launch(x, None), expected(x, codes, alpha))
    other.version = 4
    assert launch(x, None) is NotImplemented
    other.version = 3
    assert launch(x, None) is NotImplemented  # it was forgotten
    said[0] += 1
    assert launch(x, random(N)) is NotImplemented
    said[:] = []  # so that it raises
    assert launch(x, random(N).float()) is NotImplemented
    assert len(kernel.calls) == 1


def test_the_address_of_a_type_that_dlpack_knows_not_is_watched(kernel, monkeypatch):
    scale = torch.zeros(N, K).to(torch.float8_e4m3fn)
    (told, _), watches = Launcher.addressed(scale, scale.view(torch.uint8))
    assert (told is scale, watches) in [(True, []), (False, watches)]
    unknown = torch.zeros(4).to_sparse()
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda self: 5)
    (told, view), watches = Launcher.addressed(unknown, scale)
    assert told is view is scale
    assert [(watch(), attribute, quiet) for watch, attribute, quiet in watches] == [(5, None, 5)]


def test_nothing_is_leaked(kernel):
    launcher, x, bias = Launcher(), random(ROWS, K), random(N)
    codes, _ = add(launcher, kernel, x, bias)
    add(launcher, kernel, x)
    calls = [(x, bias), (random(ROWS, 3), None), (None, bias), (x, None)]

    def exercise(launch):
        for given in calls:
            kernel.refuse = 2 if given[1] is None else 0
            launch(*given, None, "weights")
        kernel.calls.clear()

    launch = launcher.launch
    exercise(launch)
    gc.collect()
    counted = [x, bias, codes, torch.Tensor, torch.nn.Parameter, launch, None, NotImplemented, *launcher._plans]
    before = [sys.getrefcount(o) for o in counted]
    for _ in range(100):
        exercise(launch)
    gc.collect()
    after = [sys.getrefcount(o) for o in counted]
    assert max(abs(a - b) for a, b in zip(after, before, strict=True)) < 50  # None comes and goes
    held = sys.getrefcount(codes)
    del launch, counted, launcher
    assert sys.getrefcount(codes) < held
