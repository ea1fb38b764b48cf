"""W4A16 through the public API on a Hopper GPU: values, streams, graphs, repetition."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import nvfp4dsl as nv
from nvfp4dsl.testing import assert_close, bits_differing

pytestmark = pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="CuTe DSL is not installed here")

SHAPES = [(1, 16, 16), (1, 4096, 4096), (3, 35, 2880), (8, 14336, 4096), (13, 64, 272), (16, 8200, 528), (70, 48, 528)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().cuda()


def expected(x: torch.Tensor, weight: nv.NVFP4Tensor) -> torch.Tensor:
    return x.double() @ nv.dequantize(weight, torch.float64).mT


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_repetition(shape):
    m, n, k = shape
    x, weight = random(m, k), nv.quantize(random(n, k, seed=1))
    assert weight.layout == "fragments"
    y = nv.linear(x, weight)
    magnitude = x.double().abs() @ nv.dequantize(weight, torch.float64).abs().mT
    assert_close(y, expected(x, weight), norm=2e-3 if y.numel() > 64 else 4e-3, element=4e-3, magnitude=magnitude)
    assert all(bits_differing(nv.linear(x, weight).cpu(), y.cpu()) == 0 for _ in range(5))


def test_one_hot_tokens_return_the_weight():
    weight = nv.quantize(random(200, 272, seed=1), 1.0)
    y = nv.linear(torch.eye(272, dtype=torch.bfloat16, device="cuda"), weight)
    assert bits_differing(y.float().mT.cpu() + 0.0, nv.dequantize(weight).cpu() + 0.0) == 0


def test_x_written_by_the_kernel_before_is_waited_for():
    """Weights are asked for before the kernel before has ended; x must not be."""
    weight, hidden = nv.quantize(random(4096, 4096, seed=1)), random(64, 4096, 4096)
    for i in range(20):
        x = hidden[i % 64].float().mean(0, keepdim=True).bfloat16()  # a long kernel, whose last act is x
        y = nv.linear(x, weight)
        torch.cuda.synchronize()
        assert bits_differing(nv.linear(x, weight).cpu(), y.cpu()) == 0


def test_chained_calls_see_each_other():
    """y of one call is x of the next, on a stream of its own."""
    weights = [nv.quantize(random(1024, 1024, seed=i) / 32) for i in range(8)]
    x = random(2, 1024)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = x
        for weight in weights:
            y = nv.linear(y, weight)
    stream.synchronize()
    slow = x
    for weight in weights:
        slow = nv.linear(slow, weight)
        torch.cuda.synchronize()
    assert bits_differing(y.cpu(), slow.cpu()) == 0


def test_graph_capture_and_replay():
    weight, x = nv.quantize(random(2048, 1024, seed=1)), random(4, 1024)
    nv.linear(x, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = nv.linear(x, weight)
    for seed in range(3):
        x.copy_(random(4, 1024, seed=seed + 5))
        graph.replay()
        torch.cuda.synchronize()
        assert bits_differing(nv.linear(x, weight).cpu(), y.cpu()) == 0


def test_full_graph_compile():
    weight, x = nv.quantize(random(256, 512, seed=1)), random(4, 512)
    compiled = torch.compile(lambda x: nv.linear(x, weight).relu(), fullgraph=True)
    assert bits_differing(compiled(x).cpu(), nv.linear(x, weight).relu().cpu()) == 0


def test_mode_nvfp4_computes_what_blackwell_would():
    x, weight = random(9, 272), nv.quantize(random(40, 272, seed=1))
    y = nv.linear(x, weight, activation="nvfp4").cpu()
    oracle = nv.linear(x.cpu(), nv.quantize(random(40, 272, seed=1).cpu()), activation="nvfp4")
    assert_close(y, oracle.double(), norm=3e-3, element=1e-2)


def test_wrong_device_layout_is_refused():
    weight = nv.prepare(nv.quantize(random(16, 64)), "sm_121a")
    with pytest.raises(nv.LayoutError, match="prepare"):
        nv.linear(random(1, 64), weight)
