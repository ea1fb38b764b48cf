"""The short way of an eager ``linear`` on CUDA tensors: the host's time for a call is that of a launch and little else.

At decode a kernel takes some microseconds, and so may the host. What of a call depends on shapes alone (checks, spec,
tile, kernel, layout of the weight) is worked out once and kept on the weight; a call finds it by x's shape, allocates
the output and launches, in C (:mod:`nvfp4dsl.jit.launcher`). The compiled function itself checks dtypes, strides,
alignment and devices, guards the device and takes torch's current stream; what it refuses goes the long way, through
the operator, which says what is wrong or makes it fit. So does whatever torch wants to see: gradients, tracing,
compilation, modes (``torch.set_default_device`` is one), tensor subclasses.

Nothing of the weight is copied, so writing into its tensors in place is seen. There is one exception, which is watched:
the global scales of a weight with ``row_ends``.
"""

from __future__ import annotations

from typing import Any

import torch

from nvfp4dsl import dispatch, reference
from nvfp4dsl.formats import NVFP4Tensor
from nvfp4dsl.jit.launcher import Launch, Watch, launcher

ATTRIBUTE = "_launches"
"""Where a weight keeps them, by (x's shape, bias dtype or None, activation, overlap); None for what has none."""

MOST_SHAPES = 64
"""Shapes of x that a weight remembers: those that decode, and CUDA graphs, come back to. Beyond, it starts afresh."""

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def remember(
    x: torch.Tensor, weight: NVFP4Tensor, bias: torch.Tensor | None, activation: str | None, overlap: str
) -> Launch | None:
    """The launch for such a call, kept on the weight; None if only the long way serves it. Errors are ``linear``'s."""
    if not (type(x) in _PLAIN and x.is_cuda and activation in (None, "bf16")):
        return None
    reference.check_linear(x, weight, bias, "bf16")
    launch = None
    tensors = (weight.qdata, weight.scale, weight.global_scale)
    if (
        x.dtype == torch.bfloat16
        and x.numel()
        and weight.n
        and not weight.batch_shape
        and all(type(t) in _PLAIN for t in tensors)
        and not weight.global_scale.requires_grad
        # the alpha of row ranges is a copy, and nothing would tell that it is out of date
        and not (weight.row_ends and weight.global_scale.is_inference())
    ):
        launch = _prepare(x, weight, bias, overlap)
    launches = weight.__dict__.setdefault(ATTRIBUTE, {})
    if len(launches) >= MOST_SHAPES:
        launches.clear()
    launches[x.shape, None if bias is None else bias.dtype, activation, overlap] = launch
    return launch


def forget(weight: Any) -> None:
    """After a refusal: a copy of the weight's global scales may be out of date."""
    if isinstance(weight, NVFP4Tensor) and weight.row_ends:
        weight.__dict__.pop(ATTRIBUTE, None)


def _prepare(x: torch.Tensor, weight: NVFP4Tensor, bias: torch.Tensor | None, overlap: str) -> Launch | None:
    target = dispatch.site(x.device)
    assert target is not None  # a CUDA device has one
    dispatch.check_layout("weight", weight, target, "bf16")
    spec = dispatch.linear_spec(weight.n, weight.k, x.dtype, None if bias is None else bias.dtype, overlap)
    kernel = dispatch.linear_kernel(spec, x.numel() // weight.k, weight, target.name)
    codes, scales, alpha = dispatch.linear_operands(weight)
    scale, watches = weight.global_scale, list[Watch]()
    if weight.row_ends:
        watches.append((scale, "_version", scale._version))
    return launcher(
        kernel.function,
        weights=[(weight.qdata, codes), (weight.scale, scales), (alpha if weight.row_ends else scale, alpha)],
        shape=(*x.shape[:-1], weight.n),
        dtype=x.dtype,
        device=x.device,
        k=weight.k,
        max_ctas=dispatch.sm_count(x.device),
        watches=watches,
    )
