"""The oracle gives the same bits on a GPU as on a CPU: quantization, packing, and the arithmetic model."""

from __future__ import annotations

import pytest
import torch

from nvfp4dsl.packing import prepare
from nvfp4dsl.reference import dequantize, gemm_model, quantize
from nvfp4dsl.testing import assert_identical, bits_differing


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantization_has_the_same_bits(dtype):
    """torch divides a CUDA tensor by a Python number through its reciprocal; the recipe's divisions are true ones."""
    for seed in range(20):
        x = (random(300, 512, seed=seed) * torch.exp2(random(300, 1, seed=seed + 100) * 2)).to(dtype)
        on_cpu, on_gpu = quantize(x, row_ends=(100, 300)), quantize(x.cuda(), row_ends=(100, 300))
        assert on_gpu.device.type == "cuda"
        assert_identical(on_gpu, on_cpu)
        assert_identical(prepare(on_gpu, "sm_121a"), prepare(on_cpu, "sm_121a"))
        assert_identical(prepare(on_gpu, "sm_121a").canonical(), on_cpu)
        assert bits_differing(dequantize(on_gpu), dequantize(on_cpu)) == 0


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_the_arithmetic_model_has_the_same_bits(out_dtype):
    a, b, bias = quantize(random(3, 100, 272, seed=0)), quantize(random(72, 272, seed=1)), random(72, seed=2)
    for vector in (None, bias):
        expected = gemm_model(a, b, vector, out_dtype)
        actual = gemm_model(a.to("cuda"), b.to("cuda"), None if vector is None else vector.cuda(), out_dtype)
        assert bits_differing(actual, expected) == 0
