"""Tensors into what kernels read, and back: permutation and zero padding, nothing rounded.

The maps themselves are integers, in :mod:`nvfp4dsl.layouts`; here they are applied.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from nvfp4dsl.constants import BLOCK, NIBBLES
from nvfp4dsl.errors import OperandError, TargetError
from nvfp4dsl.formats import CANONICAL, STORAGES, NVFP4Tensor, Storage
from nvfp4dsl.layouts import SCALE_ATOM_BYTES, packed_k, scale_offset, scale_tiles

BLACKWELL = "blackwell"

TARGET_LAYOUT = {CANONICAL: CANONICAL, "sm_100a": BLACKWELL, "sm_120a": BLACKWELL, "sm_121a": BLACKWELL}
"""The layout that each target's kernels read."""

_PLANNED = ("sm_90a",)


def _scale_index(rows: int, k: int, device: torch.device) -> torch.Tensor:
    """Swizzled offset of each scale of a rows x K operand: int64 [rows * K/16]."""
    row = torch.arange(rows, device=device).unsqueeze(-1)
    block = torch.arange(k // BLOCK, device=device)
    return scale_offset(row, block, k).flatten()


def swizzle_scales(scale: torch.Tensor) -> torch.Tensor:
    """Linear block scales [..., R, K/16] to atoms [..., ceil(R/128), ceil(K/64), 512], pads zero. One-byte dtypes.

    Zero pads matter: a pad is multiplied by zero codes, and only a finite scale makes that zero.
    """
    if scale.element_size() != 1 or scale.ndim < 2:
        raise OperandError(f"scales are {scale.dtype} {list(scale.shape)}; swizzling takes bytes [..., rows, K/16]")
    *batch, rows, blocks = scale.shape
    tiles = scale_tiles(rows, blocks * BLOCK)
    atoms = torch.zeros(*batch, tiles[0] * tiles[1] * SCALE_ATOM_BYTES, dtype=torch.uint8, device=scale.device)
    atoms[..., _scale_index(rows, blocks * BLOCK, scale.device)] = scale.view(torch.uint8).flatten(-2)
    return atoms.view(scale.dtype).unflatten(-1, (*tiles, SCALE_ATOM_BYTES))


def unswizzle_scales(atoms: torch.Tensor, rows: int, k: int) -> torch.Tensor:
    """The inverse of :func:`swizzle_scales`: atoms to linear scales [..., rows, k/16]; pads are dropped."""
    expected = (*scale_tiles(rows, k), SCALE_ATOM_BYTES)
    if atoms.element_size() != 1 or tuple(atoms.shape[-3:]) != expected:
        raise OperandError(
            f"swizzled scales are {atoms.dtype} {list(atoms.shape)}; those of a {rows} x {k} operand are bytes "
            f"[..., {', '.join(map(str, expected))}]"
        )
    linear = atoms.view(torch.uint8).flatten(-3)[..., _scale_index(rows, k, atoms.device)]
    return linear.view(atoms.dtype).unflatten(-1, (rows, k // BLOCK))


def _to_blackwell(t: NVFP4Tensor) -> NVFP4Tensor:
    return t._with(
        qdata=pad(t.qdata, (0, (packed_k(t.k) - t.k) // NIBBLES)).contiguous(),
        scale=swizzle_scales(t.scale),
        layout=BLACKWELL,
    )


def _from_blackwell(t: NVFP4Tensor) -> NVFP4Tensor:
    return t._with(
        qdata=t.qdata[..., : t.k // NIBBLES].contiguous(),
        scale=unswizzle_scales(t.scale, t.shape[-2], t.k),
        layout=CANONICAL,
    )


STORAGES[BLACKWELL] = Storage(
    BLACKWELL,
    shapes=lambda n, k: ((n, packed_k(k) // NIBBLES), (*scale_tiles(n, k), SCALE_ATOM_BYTES)),
    canonicalize=_from_blackwell,
)


def prepare(tensor: NVFP4Tensor, target: str) -> NVFP4Tensor:
    """The layout that a target's kernels read. ``prepare(t, target).canonical()`` is ``t``, bit for bit.

    Args:
        tensor: in any layout.
        target: ``"sm_100a"``, ``"sm_120a"``, ``"sm_121a"`` (one layout for the three), or ``"canonical"``.

    Returns:
        The tensor in that layout, on the same device; itself if it is so already. For the Blackwell targets qdata is
        uint8 [..., N, Kp/2], Kp = K rounded up to 32, and scale is float8_e4m3fn
        [..., ceil(N/128), ceil(K/64), 512], both padded with zeros.

    Raises:
        TargetError: unknown target, or one that has no layout yet.
    """
    layout = TARGET_LAYOUT.get(target)
    if layout is None:
        known = ", ".join(sorted(TARGET_LAYOUT))
        if target in _PLANNED:
            raise TargetError(f"there is no prepared layout for {target} yet: it comes with its kernels; now: {known}")
        raise TargetError(f"unknown target {target!r}; known: {', '.join(sorted((*TARGET_LAYOUT, *_PLANNED)))}")
    if tensor.layout == layout:
        return tensor
    tensor = tensor.canonical()
    return tensor if layout == CANONICAL else _to_blackwell(tensor)
