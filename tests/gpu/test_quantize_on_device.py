"""The quantization kernels on a Hopper GPU against the reference, bit for bit."""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch

from nvfp4dsl import quantization, reference
from nvfp4dsl.packing import swizzle_scales
from nvfp4dsl.testing import near_ties

pytestmark = pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="CuTe DSL is not installed here")
SHAPES = [(1, 16), (1, 7168), (7, 80), (131, 272), (1000, 2880), (4096, 7168)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(x: torch.Tensor, global_scale: torch.Tensor | None, layout: str = "blackwell") -> None:
    """Against the reference on the CPU, whose divisions nobody optimises."""
    on_device = None if global_scale is None else global_scale.cuda()
    codes, scales, own, linear = quantization.quantize(x.cuda(), on_device, layout=layout, linear_scales=True)
    expected = reference.quantize(x, global_scale)
    if own is not None:
        assert torch.equal(own.cpu(), expected.global_scale)
    scale = expected.scale.view(torch.uint8)
    assert linear is None or torch.equal(linear.cpu(), scale)
    assert torch.equal(scales.cpu(), swizzle_scales(scale) if layout == "blackwell" else scale)
    pad = codes.shape[-1] - expected.qdata.shape[-1]
    assert torch.equal(codes.cpu(), torch.nn.functional.pad(expected.qdata, (0, pad)))


@pytest.mark.parametrize(("shape", "dynamic"), [*itertools.product(SHAPES, (False, True))], ids=str)
def test_shapes(shape, dynamic):
    for dtype in (torch.bfloat16, torch.float16, torch.float32)[: 3 if shape[0] < 4096 else 1]:
        x = random(*shape, dtype=dtype)
        check(x, None if dynamic else torch.tensor(0.0013))
        check(x, None if dynamic else torch.tensor(0.0013), "canonical")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ties(dtype):
    for exponent in range(-6, 9):
        check(*near_ties(dtype, exponent, 2000, torch.Generator().manual_seed(exponent + 6)), "canonical")


def test_any_values():
    """Blocks that differ by up to 2^250, zero blocks, outliers; global scales over the whole range of fp32."""
    generator = torch.Generator().manual_seed(0)
    for spread, scale in itertools.product((0, 3, 20, 120), (None, 2.0**-126, 2.0**-110, 1e-30, 0.3, 2.0**90, 3e38)):
        exponent = torch.randint(-spread, spread + 1, (40, 16, 1), generator=generator).double()
        x = torch.randn(40, 16, 16, generator=generator, dtype=torch.float64) * torch.exp2(exponent)
        x = (x * (torch.rand(40, 16, 1, generator=generator) > 0.2)).flatten(1).clamp(-3e38, 3e38).bfloat16()
        check(x, None if scale is None else torch.tensor(scale), "canonical")


def test_every_launch_gives_the_same_bits():
    x = random(515, 4096).cuda()
    first = quantization.quantize(x, None, layout="blackwell")
    for _ in range(20):
        again = quantization.quantize(x, None, layout="blackwell")
        assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))


def test_a_captured_graph_follows_x_and_the_scale():
    x, scale = random(70, 1040).cuda(), torch.tensor(0.01).cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        quantization.quantize(x, scale, layout="blackwell")
        quantization.quantize(x, None, layout="blackwell")
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given_scale = quantization.quantize(x, scale, layout="blackwell")
        dynamic = quantization.quantize(x, None, layout="blackwell")
    for seed, value in ((1, 0.02), (2, 0.3)):
        x.copy_(random(70, 1040, seed=seed))
        scale.fill_(value)
        graph.replay()
        torch.cuda.synchronize()
        for found, wanted in ((given_scale, reference.quantize(x, scale)), (dynamic, reference.quantize(x))):
            assert torch.equal(found[1], swizzle_scales(wanted.scale.view(torch.uint8)))
            assert torch.equal(found[0][:, :520], wanted.qdata)
