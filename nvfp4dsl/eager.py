"""The short way of an eager ``linear`` on CUDA tensors: the host's time for a call is that of a launch and little else.

At decode a kernel takes some microseconds, and so may the host. What of a call depends on shapes alone (checks, spec,
tile, kernel, views of the weight) is worked out once and kept on the weight; a call finds it by x's shape, allocates
the output and calls the compiled function. That function itself checks dtypes, strides, alignment and devices, guards
the device and takes torch's current stream; what it refuses goes the long way, through the operator, which says what is
wrong or makes it fit. So does whatever torch wants to see: gradients, tracing, compilation, modes, tensor subclasses.

Nothing of the weight is copied, so writing into its tensors in place is seen; there is one exception, which is watched:
the global scales of a weight with ``row_ends``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C import _is_tracing, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._dynamo.guards import _empty_strided_cuda  # Inductor's allocation: torch.empty takes 1.8 us longer
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from nvfp4dsl import dispatch, reference
from nvfp4dsl.formats import NVFP4Tensor

Launch = Callable[[torch.Tensor, "torch.Tensor | None"], "torch.Tensor | None"]

MOST_SHAPES = 64
"""Shapes of x that a weight remembers: those that decode, and CUDA graphs, come back to. Beyond, it starts afresh."""

_ATTRIBUTE = "_launches"
_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))


def linear(
    x: torch.Tensor, weight: NVFP4Tensor, bias: torch.Tensor | None, overlap: str = dispatch.DEFAULT_OVERLAP
) -> torch.Tensor | None:
    """``nvfp4dsl.linear`` in mode bf16; None if the call has to go the long way. Errors are those of ``linear``."""
    if (
        is_dynamo_compiling()  # first: Dynamo takes it for a constant and looks no further
        or type(x) not in _PLAIN
        or type(bias) not in _PLAIN
        or _len_torch_dispatch_stack()
        or (_len_torch_function_stack() and not _only_a_default_device())
        or peek_interpreter_stack() is not None
        or _is_tracing()
        or forward_ad._current_level >= 0
        or (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
    ):
        return None
    key = x.shape, None if bias is None else bias.dtype, overlap
    launches = getattr(weight, _ATTRIBUTE, None)
    launch = launches.get(key) if launches else None
    if launch is None:
        launch = _remember(key, x, weight, bias, overlap)
        if launch is None:
            return None
    y = launch(x, bias)
    if y is None:
        getattr(weight, _ATTRIBUTE).pop(key, None)
    return y


def _only_a_default_device() -> bool:
    """Whether the modes in force are those of ``torch.set_default_device`` and ``with torch.device(..)``."""
    return all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


def _remember(
    key: tuple[Any, ...], x: torch.Tensor, weight: NVFP4Tensor, bias: torch.Tensor | None, overlap: str
) -> Launch | None:
    """The launch for such an x, kept on the weight under ``key``; None if the short way does not serve it."""
    if not (isinstance(x, torch.Tensor) and x.is_cuda and x.dtype == torch.bfloat16 and x.numel()):
        return None
    reference.check_linear(x, weight, bias, "bf16")
    if weight.batch_shape or weight.global_scale.requires_grad or not weight.n:
        return None
    if any(type(t) not in _PLAIN for t in (weight.qdata, weight.scale, weight.global_scale)):
        return None
    if weight.row_ends and weight.global_scale.is_inference():
        return None  # its alpha is a copy, and nothing would tell that it is out of date
    launch = _prepare(x, weight, bias, overlap)
    launches = weight.__dict__.setdefault(_ATTRIBUTE, {})
    if len(launches) >= MOST_SHAPES:
        launches.clear()
    launches[key] = launch
    return launch


def _prepare(x: torch.Tensor, weight: NVFP4Tensor, bias: torch.Tensor | None, overlap: str) -> Launch:
    import tvm_ffi

    device, dtype, n, k = x.device, x.dtype, weight.n, weight.k
    target = dispatch.site(device)
    assert target is not None  # a CUDA device has one
    dispatch.check_layout("weight", weight, target, "bf16")
    rows = x.numel() // k
    spec = dispatch.linear_spec(n, k, dtype, None if bias is None else bias.dtype, overlap)
    function = dispatch.linear_kernel(spec, rows, weight, target.name).function
    # As tvm-ffi's own tensors, which take no conversion at a call.
    codes, scales, alpha = (tvm_ffi.from_dlpack(t) for t in dispatch.linear_operands(weight))
    ctas = dispatch.sm_count(device)
    qdata, address = weight.qdata, weight.qdata.data_ptr()
    watched = weight.global_scale if weight.row_ends else None
    version = weight.global_scale._version if weight.row_ends else 0
    shape = (*x.shape[:-1], n)
    strides = torch.empty(shape, device="meta").stride()
    flat = x.ndim == 2

    def launch(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        if qdata.data_ptr() != address or (watched is not None and watched._version != version):
            return None
        y = _empty_strided_cuda(shape, strides, dtype)
        try:
            if flat:
                function(x, codes, scales, alpha, bias, y, ctas)
            else:
                function(x.view(rows, k), codes, scales, alpha, bias, y.view(rows, n), ctas)
        except Exception:
            return elsewhere(x, bias)
        return y

    def elsewhere(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        """Once more with the output on the weight's device, which need not be the current one."""
        y = torch.empty(shape, dtype=dtype, device=device)
        try:
            function(x.view(rows, k), codes, scales, alpha, bias, y.view(rows, n), ctas)
        except Exception:
            return None
        return y

    return launch
