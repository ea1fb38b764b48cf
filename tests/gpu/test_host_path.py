"""The host's side of ``linear`` on a GPU: its time, what it must not overlook, warmup, and order among kernels."""

from __future__ import annotations

import importlib.util
import itertools
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._C._dynamo import guards
from torch.utils._python_dispatch import TorchDispatchMode

import nvfp4dsl as nv
from nvfp4dsl import dispatch, eager, jit
from nvfp4dsl.autotune.measure import host_us
from nvfp4dsl.config import GemmSpec, TileConfig
from nvfp4dsl.jit.pool import pool
from nvfp4dsl.testing import bits_differing, relative_error

pytestmark = pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="CuTe DSL is not installed here")

MOST_HOST_US = 5.0


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().cuda()


def same(y: torch.Tensor, expected: torch.Tensor) -> bool:
    return bits_differing(y.cpu(), expected.cpu()) == 0


def operator(x: torch.Tensor, weight: nv.NVFP4Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """What the long way computes."""
    parts = (weight.qdata, weight.scale.view(torch.uint8), weight.global_scale, weight.layout, weight.n, weight.k)
    return torch.ops.nvfp4dsl.linear(x, *parts, list(weight.row_ends or ()), bias, "bf16", "weights")


@pytest.fixture(scope="module")
def weight() -> nv.NVFP4Tensor:
    return nv.quantize(random(4096, 4096, seed=1))


@pytest.fixture
def long_ways(monkeypatch):
    """A list as long as the number of calls that went through the operator."""
    taken, w4a16 = [], dispatch.w4a16
    monkeypatch.setattr(dispatch, "w4a16", lambda *args, **options: taken.append(args) or w4a16(*args, **options))
    return taken


def test_host_time_of_a_warm_call(weight, capsys):
    x, bias, one = random(1, 4096), random(4096, seed=2), random(1, 1, 4096)
    y = torch.empty(1, 4096, dtype=torch.bfloat16, device="cuda")
    nv.linear(x, weight)
    kernel = dispatch.linear_kernel(dispatch.linear_spec(4096, 4096, x.dtype, None), 1, weight, "sm_90a")
    function, operands, sms = kernel.function, dispatch.linear_operands(weight), dispatch.sm_count(x.device)
    launch = getattr(weight, eager.LAUNCH)
    whole = {
        "linear": host_us(lambda: nv.linear(x, weight)),
        "linear with bias": host_us(lambda: nv.linear(x, weight, bias)),
    }
    with torch.inference_mode():
        whole["linear in inference mode"] = host_us(lambda: nv.linear(x, weight))
    whole["linear of [1, 1, K]"] = host_us(lambda: nv.linear(one, weight))
    rows = whole | {
        "its part in C": host_us(lambda: launch(x, None, None, "weights")),
        "the operator": host_us(lambda: operator(x, weight), samples=1000),
        "the compiled function through tvm-ffi": host_us(lambda: function(x, *operands, None, y, sms)),
        "torch.empty": host_us(lambda: torch.empty((1, 4096), dtype=torch.bfloat16, device=x.device)),
        "_empty_strided_cuda": host_us(lambda: guards._empty_strided_cuda((1, 4096), (4096, 1), torch.bfloat16)),
        "an empty lambda": host_us(lambda: None),
        "time of the clock itself": clock_us(),
    }
    with capsys.disabled():
        print(
            "\nhost microseconds, median of 10,000:", *(f"  {us:7.2f}  {name}" for name, us in rows.items()), sep="\n"
        )
    assert {name: us for name, us in whole.items() if us > MOST_HOST_US} == {}


def clock_us() -> float:
    times = [time.perf_counter_ns() for _ in range(10_001)]
    return statistics.median(b - a for a, b in itertools.pairwise(times)) / 1e3


@pytest.mark.parametrize("m", [1, 5, 16, 64, 300])
def test_the_short_way_computes_what_the_operator_does(weight, long_ways, m):
    bias = random(4096, seed=2)
    for x in (random(m, 4096), random(m, 2, 4096), random(m, 8192)[:, :4096], random(4096)):
        for b in (None, bias, bias.float()):
            for _ in range(2):
                y, taken = nv.linear(x, weight, b), len(long_ways)
                assert same(y, operator(x, weight, b))
                assert len(long_ways) == taken + 1
    assert len(long_ways) == 24


def test_what_is_written_in_place_is_seen(long_ways):
    x = random(2, 512)
    for row_ends in (None, (32, 96)):
        a, b = (nv.quantize(random(96, 512, seed=i) * i, row_ends=row_ends) for i in (1, 2))
        before = nv.linear(x, a), nv.linear(x, b)
        for name in ("qdata", "scale", "global_scale"):
            getattr(a, name).view(-1).view(torch.uint8).copy_(getattr(b, name).view(-1).view(torch.uint8))
        assert same(nv.linear(x, a), before[1])
        assert not same(before[0], before[1])
        a.qdata.data = nv.quantize(-nv.dequantize(b), b.global_scale, row_ends=row_ends).qdata  # as Module.to does
        assert same(nv.linear(x, a), -before[1])
        assert same(nv.linear(x, a), -before[1])
    assert not long_ways


def test_bad_input_of_a_warm_shape_is_a_typed_error(weight):
    x, bias = random(2, 4096), random(4096)
    nv.linear(x, weight, bias)
    for bad, bad_bias, word in [
        (x.half(), bias, "float16"),
        (x[:, :4080], bias, "K differs"),
        (x.cpu(), bias, "device"),
        (x, bias[:16], "bias"),
        (x, bias.cpu(), "bias is on cpu"),
        (x, bias.double(), "bias"),
    ]:
        with pytest.raises(nv.OperandError, match=word):
            nv.linear(bad, weight, bad_bias)
    with pytest.raises(nv.OperandError, match="quantize"):
        nv.linear(x, x)
    assert same(nv.linear(x, weight, bias), operator(x, weight, bias))


def test_misaligned_and_strided_rows(weight):
    expected = nv.linear(random(2, 4096), weight)
    for place in (random(3 * 4096)[1:], random(2, 4099)[:, 1:4097], random(4096, 2).mT):
        x = place[: 2 * 4096].view(2, 4096) if place.ndim == 1 else place
        assert same(nv.linear(x.copy_(random(2, 4096)), weight), expected)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_what_torch_watches_goes_through_the_operator(weight, long_ways):
    x = random(2, 4096)
    expected = nv.linear(x, weight)
    assert not long_ways
    with Seen() as seen:
        assert same(nv.linear(x, weight), expected)
    assert "nvfp4dsl.linear.default" in seen.names
    watched = x.clone().requires_grad_()
    nv.linear(watched, weight).sum().backward()
    column_sums = nv.dequantize(weight).double().sum(0).cpu()
    assert relative_error(watched.grad.cpu(), column_sums.expand(2, -1)) < 1e-2
    assert same(torch.vmap(lambda row: nv.linear(row, weight))(x), expected)
    assert len(long_ways) == 4
    with torch.no_grad():
        assert same(nv.linear(watched, weight), expected)
    assert len(long_ways) == 4


def test_memory_is_that_of_the_output_and_the_stream_is_the_current_one(weight):
    x = random(16, 4096)
    nv.linear(x, weight)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    kept = [nv.linear(x, weight) for _ in range(10)]
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + len(kept)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.zero_()
        y = nv.linear(x, weight)
    stream.synchronize()
    assert not y.any()
    assert kept[0].any()


def test_nothing_is_loaded_under_capture_and_warmup_does_it_before(weight, monkeypatch):
    monkeypatch.setattr(dispatch, "_kernels", {})  # as in a new process
    x, bias, graph = random(3, 4096), random(4096).float(), torch.cuda.CUDAGraph()
    weight = replace(weight)  # one with nothing remembered
    with (
        torch.cuda.graph(torch.cuda.CUDAGraph()),
        pytest.raises(nv.LaunchError, match=r"M 3, N x K 4096 x 4096.*warmup"),
    ):
        nv.linear(x, weight, bias)
    (kernel,) = nv.warmup(weight, 3, bias=torch.float32)
    assert "function" in vars(kernel)
    with torch.cuda.graph(graph):
        y = nv.linear(x, weight, bias)
    for seed in range(2):
        x.copy_(random(3, 4096, seed=seed))
        graph.replay()
        assert same(y, nv.linear(x, weight, bias))


@pytest.fixture(scope="module")
def write_late(tmp_path_factory):
    """Copies int32 tensors some 40 microseconds after it has let its successor start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVFP4DSL_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(sys, "path", [str(Path(__file__).parent), *sys.path])
        pool.close()  # a worker takes over sys.path when it starts
        kernel = jit.compile(GemmSpec(), TileConfig(), "sm_90a", builder="late_writer:build")
    return lambda source, target: kernel(source.view(torch.int32).flatten(), target.view(torch.int32).flatten())


@pytest.mark.parametrize("m", [1, 256])
@pytest.mark.parametrize("graphed", [False, True], ids=["stream", "graph"])
def test_a_weight_that_the_kernel_before_writes(write_late, graphed, m):
    """Right with ``overlap="launch"`` and ``"none"``; wrong without, or this would test nothing."""
    weight = nv.quantize(random(2048, 2048, seed=1), 1.0)
    x, codes = random(m, 2048), [weight.qdata.clone(), nv.quantize(-nv.dequantize(weight), 1.0).qdata]
    live = replace(weight, qdata=codes[0].clone())
    expected = [nv.linear(x, replace(weight, qdata=c)) for c in codes]
    assert not same(*expected)

    def outputs(overlap: str, times: int = 20) -> list[torch.Tensor]:
        ys = []
        for i in range(times):
            write_late(codes[i % 2], live.qdata)
            ys.append(nv.linear(x, live, overlap=overlap))
        return ys

    for overlap, right in (("launch", True), ("none", True), ("weights", False)):
        nv.linear(x, live, overlap=overlap)
        torch.cuda.synchronize()
        if graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                ys = outputs(overlap)
            graph.replay()
        else:
            ys = outputs(overlap)
        torch.cuda.synchronize()
        assert all(same(y, expected[i % 2]) for i, y in enumerate(ys)) == right, overlap
