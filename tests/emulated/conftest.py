"""Operands for the emulated kernels. Real kernels compile here, so the cache is shared by all workers of a run."""

import pytest
import torch

import nvfp4dsl as nv

TARGETS = ("sm_120a", "sm_121a")


@pytest.fixture
def random_operands():
    """(m, n, k, batch=(), seed=0) -> canonical (a, b) of random normal values."""

    def make(m, n, k, batch=(), seed=0, **kwargs):
        generator = torch.Generator().manual_seed(seed)
        a = torch.randn(*batch, m, k, generator=generator)
        b = torch.randn(*batch, n, k, generator=generator)
        return nv.quantize(a, per_matrix=bool(batch)), nv.quantize(b, per_matrix=bool(batch), **kwargs)

    return make
