"""NVFP4 as data: codes, packing, and the container that carries a quantized matrix.

A value is ``e2m1 code * e4m3 block scale (one per 16 along K) * fp32 global scale``. The global scale multiplies;
formats that store its reciprocal are converted when they are loaded.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from nvfp4dsl.constants import (
    BLOCK,
    E2M1_MAX,
    E2M1_VALUES,
    E4M3_MAX,
    E4M3_MIN_NORMAL,
    E4M3_MIN_SUBNORMAL,
    FP32_MIN_NORMAL,
    NIBBLES,
)
from nvfp4dsl.errors import LayoutError, OperandError

__all__ = [
    "BLOCK",
    "CANONICAL",
    "E2M1_MAX",
    "E2M1_VALUES",
    "E4M3_MAX",
    "E4M3_MIN_NORMAL",
    "E4M3_MIN_SUBNORMAL",
    "NIBBLES",
    "STORAGES",
    "NVFP4Tensor",
    "Storage",
    "as_number",
    "check_count",
    "check_k",
    "check_nvfp4",
    "check_row_ends",
    "check_scale_shape",
    "check_tensor",
    "decode_codes",
    "pack_codes",
    "unpack_codes",
    "values_at_hand",
]

CANONICAL = "canonical"


def check_k(k: int, what: str = "K") -> None:
    """Raise :class:`OperandError` unless ``k`` is a positive multiple of the block size."""
    if k <= 0 or k % BLOCK:
        raise OperandError(
            f"{what} is {k}, but NVFP4 shares one scale among {BLOCK} values along K, so K must be a positive multiple "
            f"of {BLOCK}; pad K with zeros up to {max(BLOCK, -(-k // BLOCK) * BLOCK)}"
        )


def check_count(name: str, given: object) -> None:
    """Raise :class:`OperandError` unless ``given`` is a whole number from 1."""
    if not isinstance(given, numbers.Integral) or given < 1:
        raise OperandError(f"{name} is {given!r}; it must be a whole number from 1")


def as_number(name: str, given: Any) -> float:
    """``given`` as a float; raises :class:`OperandError` unless it is a real number."""
    if not isinstance(given, numbers.Real):
        raise OperandError(f"{name} is {given!r}; it must be a number")
    return float(given)


def check_tensor(name: str, given: object) -> None:
    """Raise :class:`OperandError` unless ``given`` is a dense tensor of torch."""
    if not isinstance(given, torch.Tensor):
        raise OperandError(f"{name} is a {type(given).__name__}; it must be a torch.Tensor")
    if given.layout != torch.strided:
        raise OperandError(f"{name} is {given.layout}; it must be dense: use .to_dense()")


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Pack uint8 [..., K] codes 0..15 into uint8 [..., K/2], the even k in the low nibble."""
    if codes.dtype != torch.uint8 or codes.shape[-1] % NIBBLES:
        raise OperandError(f"codes are {codes.dtype} {list(codes.shape)}; packing takes uint8 of even last dimension")
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """Unpack uint8 [..., K/2] into uint8 [..., K] codes 0..15: the inverse of :func:`pack_codes`."""
    if packed.dtype != torch.uint8:
        raise OperandError(f"packed codes are {packed.dtype}; they must be uint8, two codes a byte")
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)


def decode_codes(codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values of uint8 codes 0..15, elementwise; exact in every floating dtype of 16 bits or more.

    The table is worked out where the codes are: copied there, it could not be captured in a CUDA graph.
    """
    every = torch.arange(16, dtype=torch.int32, device=codes.device)
    exponent, odd = every >> 1 & 3, every & 1
    halves = (odd + 2 * (exponent > 0)) << (exponent - 1).clamp(min=0)
    magnitude = halves.to(dtype) / 2
    return torch.where(every > 7, -magnitude, magnitude)[codes.int()]


@dataclass(frozen=True)
class Storage:
    """How a layout tag stores a logical [..., N, K] matrix.

    Attributes:
        name: the tag.
        shapes: (N, K) -> (shape of one matrix's qdata, of its scale).
        canonicalize: a tensor with this tag -> the same tensor, canonical; a pure permutation that drops the padding.
        rank: dimensions of one matrix's qdata; those before them are the batch.
        compact: whether kernels address the storage as one contiguous block.
        encoded: whether block scales are e4m3 no longer, but another code for the same values.
    """

    name: str
    shapes: Callable[[int, int], tuple[tuple[int, ...], tuple[int, ...]]]
    canonicalize: Callable[[NVFP4Tensor], NVFP4Tensor]
    rank: int = 2
    compact: bool = True
    encoded: bool = False


STORAGES: dict[str, Storage] = {
    CANONICAL: Storage(
        CANONICAL,
        shapes=lambda n, k: ((n, k // NIBBLES), (n, k // BLOCK)),
        canonicalize=lambda t: t,
        compact=False,
    )
}
"""Every layout tag. Other modules add theirs (:mod:`nvfp4dsl.packing` adds ``blackwell``)."""


@dataclass(frozen=True, eq=False)
class NVFP4Tensor:
    """A quantized matrix, or a batch of them, logically [..., N, K]. Immutable; a pytree of three tensors.

    Attributes:
        qdata: uint8, packed codes. Canonical: [..., N, K/2], the even k in the low nibble.
        scale: float8_e4m3fn block scales, nonnegative. Canonical: [..., N, K/16], linear.
        global_scale: fp32 multiplier, positive. 0-d: one for the tensor. [...]: one for each matrix of the batch. With
            ``row_ends``, a last dimension of ``len(row_ends)`` more: one for each row range.
        layout: ``"canonical"``, or the name of a layout that kernels read (see :func:`nvfp4dsl.packing.prepare`).
        row_ends: end of each row range, ascending, the last one N; for stacked weights (q/k/v, gate/up) that keep their
            own global scales.
        k, n: logical K and N, which a padded layout's shapes no longer tell; 0 stands for "read it off qdata" where
            that tells.

    Raises:
        OperandError: at construction, for a wrong dtype, shape or stride, tensors on different devices, K not a
            multiple of 16, a NaN or negative block scale, a global scale that is not finite and positive. Values are
            looked at only where they can be: not of fake or meta tensors, nor under torch.compile or graph capture.
    """

    qdata: torch.Tensor
    scale: torch.Tensor
    global_scale: torch.Tensor
    layout: str = CANONICAL
    row_ends: tuple[int, ...] | None = None
    k: int = 0
    n: int = 0

    def __post_init__(self) -> None:
        if self.row_ends is not None:
            ends = tuple(self.row_ends) if isinstance(self.row_ends, Iterable) else self.row_ends
            object.__setattr__(self, "row_ends", ends)
        _check_kind(self)
        if self.k == 0 and self.layout == CANONICAL:
            object.__setattr__(self, "k", self.qdata.shape[-1] * NIBBLES)
        if self.n == 0 and STORAGES[self.layout].rank == 2 and self.qdata.ndim >= 2:
            object.__setattr__(self, "n", self.qdata.shape[-2])
        _check_shapes(self)
        if values_at_hand(self.qdata):
            _check_values(self)

    @classmethod
    def unchecked(cls, **fields_: Any) -> NVFP4Tensor:
        """Build from fields already known to be valid, all seven given; nothing is checked and no value is read."""
        self = object.__new__(cls)
        for name in _FIELDS:
            object.__setattr__(self, name, fields_[name])
        return self

    @property
    def batch_shape(self) -> torch.Size:
        return self.qdata.shape[: -STORAGES[self.layout].rank]

    @property
    def shape(self) -> torch.Size:
        """Logical shape (..., N, K)."""
        return torch.Size((*self.batch_shape, self.n, self.k))

    @property
    def ndim(self) -> int:
        return len(self.batch_shape) + 2

    @property
    def device(self) -> torch.device:
        return self.qdata.device

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.qdata, self.scale, self.global_scale))

    def canonical(self) -> NVFP4Tensor:
        """The same tensor in the checkpoint's layout, bit for bit; itself if it is so already."""
        return STORAGES[self.layout].canonicalize(self)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> NVFP4Tensor:
        """The same tensor on another device, in the same layout."""

        def move(t: torch.Tensor) -> torch.Tensor:
            return t.to(device, non_blocking=non_blocking)

        return self._with(qdata=move(self.qdata), scale=move(self.scale), global_scale=move(self.global_scale))

    def row_scale(self) -> torch.Tensor:
        """The global scale of every row: fp32 [..., N]. Broadcast (stride 0) where one scale serves many rows."""
        *batch, n, _ = self.shape
        if self.row_ends is None:
            return self.global_scale.unsqueeze(-1).expand(*batch, n)
        ranges = zip((0, *self.row_ends), self.row_ends, strict=False)
        parts = [self.global_scale[..., i : i + 1].expand(*batch, e - b) for i, (b, e) in enumerate(ranges)]
        return torch.cat(parts, dim=-1)

    def _with(self, **changes: Any) -> NVFP4Tensor:
        return self.unchecked(**{name: changes.get(name, getattr(self, name)) for name in _FIELDS})

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have the fields alone, not what has been remembered about calls with this tensor."""
        return {name: getattr(self, name) for name in _FIELDS}

    def __repr__(self) -> str:
        ranges = f", row_ends={self.row_ends}" if self.row_ends else ""
        return f"NVFP4Tensor(shape={tuple(self.shape)}, layout={self.layout!r}, device={str(self.device)!r}{ranges})"


_FIELDS = tuple(f.name for f in fields(NVFP4Tensor))
_LEAVES = ("qdata", "scale", "global_scale")
_STATIC = tuple(name for name in _FIELDS if name not in _LEAVES)


def _flatten(t: NVFP4Tensor) -> tuple[list[Any], tuple[Any, ...]]:
    return [getattr(t, name) for name in _LEAVES], tuple(getattr(t, name) for name in _STATIC)


def _flatten_with_keys(t: NVFP4Tensor) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
    leaves, static = _flatten(t)
    return [(pytree.GetAttrKey(name), leaf) for name, leaf in zip(_LEAVES, leaves, strict=True)], static


def _unflatten(leaves: Any, static: tuple[Any, ...]) -> NVFP4Tensor:
    # Unchecked: a tree_map may put anything in the leaves, shapes or None included.
    return NVFP4Tensor.unchecked(**dict(zip(_LEAVES, leaves, strict=True)), **dict(zip(_STATIC, static, strict=True)))


pytree.register_pytree_node(NVFP4Tensor, _flatten, _unflatten, flatten_with_keys_fn=_flatten_with_keys)


def values_at_hand(t: torch.Tensor) -> bool:
    """Whether a check may read the values of ``t``: not of fake or meta tensors, nor while compiling or capturing."""
    if t.is_meta or isinstance(t, FakeTensor) or torch.compiler.is_compiling():
        return False
    return not (t.is_cuda and torch.cuda.is_current_stream_capturing())


def _check_kind(t: NVFP4Tensor) -> None:
    """Tag, dtypes and devices."""
    if t.layout not in STORAGES:
        raise LayoutError(f"layout {t.layout!r} is unknown; known layouts: {', '.join(sorted(STORAGES))}")
    for name, dtype in (("qdata", torch.uint8), ("scale", torch.float8_e4m3fn), ("global_scale", torch.float32)):
        given = getattr(t, name)
        check_tensor(name, given)
        if given.dtype != dtype:
            raise OperandError(f"{name} is {given.dtype}; it must be {dtype}{_dtype_hint(name, given)}")
    if len({t.qdata.device, t.scale.device, t.global_scale.device}) > 1:
        raise OperandError(
            f"qdata is on {t.qdata.device}, scale on {t.scale.device}, global_scale on {t.global_scale.device}; "
            "all three must be on one device: move them with .to(device)"
        )


def _dtype_hint(name: str, given: torch.Tensor) -> str:
    if given.element_size() == 1 and name in ("qdata", "scale"):
        return f"; if these are the right bytes, use .view(torch.{'uint8' if name == 'qdata' else 'float8_e4m3fn'})"
    return "; use .float()" if name == "global_scale" and given.is_floating_point() else ""


def _check_shapes(t: NVFP4Tensor) -> None:
    """K, the shapes of the three tensors against each other, row ranges, and strides."""
    if t.qdata.ndim < 2:
        raise OperandError(f"qdata has shape {list(t.qdata.shape)}; it must be [..., N, bytes], a matrix or a batch")
    check_k(t.k, "K (twice the last dimension of qdata)" if t.layout == CANONICAL else "K")
    batch, n = tuple(t.batch_shape), t.shape[-2]
    logical = list(t.shape)
    qdata_shape, scale_shape = STORAGES[t.layout].shapes(n, t.k)
    for name, expected in (("qdata", (*batch, *qdata_shape)), ("scale", (*batch, *scale_shape))):
        if tuple(getattr(t, name).shape) != expected:
            raise OperandError(
                f"{name} has shape {list(getattr(t, name).shape)}; layout {t.layout!r} stores the {name} of a "
                f"{logical} tensor as {list(expected)}"
            )
    if t.row_ends is not None:
        check_row_ends(t.row_ends, n)
    check_scale_shape(t.global_scale, batch, t.row_ends)
    for name in ("qdata", "scale"):
        given = getattr(t, name)
        if STORAGES[t.layout].compact and not given.is_contiguous():
            raise OperandError(f"{name} is not contiguous (strides {given.stride()}); use .contiguous()")
        if given.shape[-1] > 1 and given.stride(-1) != 1:
            raise OperandError(f"{name} is not contiguous along K (strides {given.stride()}); use .contiguous()")


def check_row_ends(row_ends: Any, n: int) -> None:
    """Raise :class:`OperandError` unless these are the ends of ranges that make up ``n`` rows."""
    whole = isinstance(row_ends, (tuple, list)) and all(isinstance(end, numbers.Integral) for end in row_ends)
    if not whole or not row_ends or row_ends[-1] != n or any(b >= e for b, e in pairwise((0, *row_ends))):
        raise OperandError(f"row_ends is {row_ends!r}; it must be whole numbers that ascend from above 0 to N = {n}")


def check_scale_shape(global_scale: torch.Tensor, batch: tuple[int, ...], row_ends: tuple[int, ...] | None) -> None:
    """Raise :class:`OperandError` unless a global scale fits a batch of matrices of these row ranges."""
    ranges = () if row_ends is None else (len(row_ends),)
    allowed = [ranges] if not batch else [ranges, batch + ranges]
    if tuple(global_scale.shape) not in allowed:
        what = "one per row range" if ranges else "one per tensor; for one per row range also give row_ends"
        raise OperandError(
            f"global_scale has shape {list(global_scale.shape)}; allowed: "
            f"{' or '.join(str(list(s)) for s in allowed)} ({what}{'; or one per matrix of a batch' if batch else ''})"
        )


def check_nvfp4(name: str, given: object) -> None:
    """Raise :class:`OperandError` unless ``given`` is quantized."""
    if not isinstance(given, NVFP4Tensor):
        raise OperandError(f"{name} is a {type(given).__name__}; it must be an NVFP4Tensor: call quantize first")


def _check_values(t: NVFP4Tensor) -> None:
    bits = t.scale.view(torch.uint8) if not STORAGES[t.layout].encoded else t.scale.new_zeros(1, dtype=torch.uint8)
    # Hardware ignores a scale's sign, so a negative one would mean one thing here and another there; -0 is harmless.
    good = (bits < 0x7F) | (bits == 0x80)
    if not bool(good.all()):
        index = (~good).nonzero()[0].tolist()
        raise OperandError(
            f"scale{index} is {t.scale[tuple(index)].float().item()}; block scales must be finite and nonnegative. "
            "A checkpoint with such a scale is damaged, or its scales were never filled"
        )
    good = torch.isfinite(t.global_scale) & (t.global_scale >= FP32_MIN_NORMAL)
    if not bool(good.all()):
        index = (~good).nonzero()[0].tolist()
        raise OperandError(
            f"global_scale{index or ''} is {t.global_scale[tuple(index)].item()}; a global scale must be finite, "
            "positive and not subnormal (1 for a matrix of zeros)"
        )
