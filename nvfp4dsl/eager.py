"""The short way of an eager ``linear`` on CUDA tensors: the host's time for a call is that of a launch and little else.

At decode a kernel takes some microseconds, and so may the host. What of a call depends on shapes alone (checks, spec,
tile, kernel, layout of the weight) is worked out once and kept on the weight; a call finds it by x's shape, allocates
the output and launches, all in C (:mod:`nvfp4dsl.jit.launcher`). The compiled function itself checks dtypes, strides,
alignment and devices, guards the device and takes torch's current stream; what it refuses goes the long way, through
the operator, which says what is wrong or makes it fit. So does whatever torch wants to see: gradients, tracing,
compilation, modes (``torch.set_default_device`` is one), tensor subclasses.

Nothing of the weight is copied, so writing into its tensors in place is seen. There is one exception, which is watched:
the global scales of a weight with ``row_ends``.
"""

from __future__ import annotations

import torch

from nvfp4dsl import dispatch, reference
from nvfp4dsl.formats import NVFP4Tensor
from nvfp4dsl.jit.launcher import MOST_RANKS, Launcher

LAUNCH, _LAUNCHER = "_launch", "_launcher"
"""Attributes of a weight: the function that launches, and what it belongs to."""

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def remember(
    x: torch.Tensor, weight: NVFP4Tensor, bias: torch.Tensor | None, activation: str | None, overlap: str
) -> bool:
    """Makes the weight's launch function serve such a call; whether it can. Errors are those of ``linear``."""
    if not (type(x) in _PLAIN and x.is_cuda and activation in (None, "bf16")):
        return False
    reference.check_linear(x, weight, bias, "bf16")
    tensors = (weight.qdata, weight.scale, weight.global_scale)
    if (
        x.dtype != torch.bfloat16
        or not x.numel()
        or not weight.n
        or x.ndim > MOST_RANKS
        or weight.batch_shape
        or any(type(t) not in _PLAIN for t in tensors)
        or weight.global_scale.requires_grad
        # the alpha of row ranges is a copy, and nothing would tell that it is out of date
        or (weight.row_ends and weight.global_scale.is_inference())
        or not Launcher.available()
    ):
        return False
    target = dispatch.site(x.device)
    assert target is not None  # a CUDA device has one
    dispatch.check_layout("weight", weight, target, "bf16")
    spec = dispatch.linear_spec(weight.n, weight.k, x.dtype, None if bias is None else bias.dtype, overlap)
    kernel = dispatch.linear_kernel(spec, x.numel() // weight.k, weight, target.name)
    codes, scales, alpha = dispatch.linear_operands(weight)
    addressed, watches = Launcher.addressed(weight.scale, scales)
    scale = weight.global_scale
    if weight.row_ends:
        watches.append((scale, "_version", scale._version))
    launcher = weight.__dict__.setdefault(_LAUNCHER, Launcher())
    launcher.add(
        kernel.function,
        weights=[(weight.qdata, codes), addressed, (alpha if weight.row_ends else scale, alpha)],
        x=x,
        bias=bias,
        activation=activation,
        overlap=overlap,
        max_ctas=dispatch.sm_count(x.device),
        watches=watches,
    )
    weight.__dict__[LAUNCH] = launcher.launch
    return True
