"""A kernel from the cache on a real GPU: loaded, called on the current stream, beside a capture in one process."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from nvfp4dsl import jit
from nvfp4dsl.config import GemmSpec, TileConfig
from nvfp4dsl.emulator.capture import capture
from nvfp4dsl.errors import LaunchError
from nvfp4dsl.jit.pool import pool

pytestmark = pytest.mark.skipif(importlib.util.find_spec("cutlass") is None, reason="CuTe DSL is not installed here")


@pytest.fixture
def scale(tmp_path, monkeypatch):
    """y = factor * x + bias, for sm_90a, in a cache of its own."""
    tests = str(Path(__file__).parents[1] / "unit")
    monkeypatch.setenv("NVFP4DSL_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "path", [tests, *sys.path])
    pool.close()  # a worker takes over sys.path when it starts, and one may have started before
    return lambda target="sm_90a": jit.compile(GemmSpec(bias="fp32"), TileConfig(), target, builder="tiny_kernel:scale")


def test_a_cached_kernel_runs_on_the_current_stream(scale):
    kernel = scale()
    x, bias = torch.randn(1000, device="cuda"), torch.randn(1000, device="cuda")
    y = torch.empty_like(x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x.mul_(2)  # the kernel must come after this on the same stream
        kernel(x, y, bias, 3)
    stream.synchronize()
    torch.testing.assert_close(y, x * 3 + bias)
    again = scale()
    assert again.cached
    again(y, x, bias, 1)
    torch.testing.assert_close(x, y + bias)


def test_capture_does_not_touch_the_device_beside_it(scale):
    kernel = scale()
    x, bias = torch.randn(64), torch.randn(64)
    (launch,) = capture(kernel.object_path, kernel.symbol, (x, torch.empty(64), bias, 3), outputs=())
    assert launch.grid == (64, 1, 1)
    y = torch.empty(64, device="cuda")
    kernel(x.cuda(), y, bias.cuda(), 3)
    torch.testing.assert_close(y.cpu(), x * 3 + bias)


def test_another_targets_kernel_is_refused_by_name(scale):
    with pytest.raises(LaunchError, match=r"sm_121a.*12\.1.*emulate"):
        scale("sm_121a")(torch.zeros(1, device="cuda"))
