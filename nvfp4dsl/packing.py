"""Tensors into what kernels read, and back: permutation and zero padding, nothing rounded.

The maps themselves are integers, in :mod:`nvfp4dsl.layouts`; here they are applied.
"""

from __future__ import annotations

import itertools

import torch
from torch.nn.functional import pad

from nvfp4dsl.constants import BLOCK, NIBBLES
from nvfp4dsl.errors import OperandError, TargetError
from nvfp4dsl.formats import CANONICAL, STORAGES, NVFP4Tensor, Storage, check_nvfp4, pack_codes, unpack_codes
from nvfp4dsl.layouts import (
    FRAGMENT_CODES,
    FRAGMENT_K,
    FRAGMENT_ROWS,
    FRAGMENT_SCALE_BIAS,
    FRAGMENT_SCALE_BYTES,
    FRAGMENT_SCALE_ZERO,
    FRAGMENT_SCALES,
    FRAGMENT_STEP_BYTES,
    SCALE_ATOM_BYTES,
    IntLayout,
    ceil_div,
    fragment_code_bit,
    packed_k,
    scale_offset,
    scale_tiles,
)
from nvfp4dsl.targets import get_target

BLACKWELL = "blackwell"
FRAGMENTS = "fragments"


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


def _code_table(device: torch.device) -> torch.Tensor:
    """int32 [8, 16]: what the i-th code of a word contributes to it, for each of the 16 codes."""
    table = torch.zeros(8, 16, dtype=torch.int64)
    for i, code, bit in itertools.product(range(8), range(16), range(4)):
        table[i, code] |= (code >> bit & 1) << fragment_code_bit(i, bit)
    return table.to(torch.int32).to(device)  # bit 31 wraps into the sign


def _scale_table(device: torch.device) -> torch.Tensor:
    """uint8 [256]: e4m3 byte -> the byte with a 5-bit exponent (nvfp4dsl.layouts). Negative scales do not occur."""
    table = torch.zeros(256, dtype=torch.uint8)
    for byte in range(1, 0x7F):
        exponent, mantissa = (byte >> 3) - 7, byte & 7
        if byte < 8:  # subnormal: m/8 * 2^-6
            shift = 4 - mantissa.bit_length()
            exponent, mantissa = -6 - shift, (mantissa << shift) & 7
        table[byte] = (exponent + FRAGMENT_SCALE_BIAS) << 3 | mantissa
    table[0x00], table[0x80] = FRAGMENT_SCALE_ZERO, FRAGMENT_SCALE_ZERO + 1  # the sign of zero is kept for the way back
    return table.to(device)


def _fragment_tiles(n: int, k: int) -> tuple[int, int]:
    """(tiles of 16 rows, an even number since kernels may take two at a time; steps of 64 k)."""
    return 2 * ceil_div(n, 2 * FRAGMENT_ROWS), ceil_div(k, FRAGMENT_K)


def _steps(matrix: torch.Tensor, k: int) -> torch.Tensor:
    """[..., R, C], whose C columns are k values, to [..., R/16, k/64, 16, C / (k/64)]: the steps of a matrix."""
    steps = k // FRAGMENT_K
    return matrix.unflatten(-1, (steps, -1)).unflatten(-3, (-1, FRAGMENT_ROWS)).transpose(-3, -2)


def _unsteps(steps: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`_steps`."""
    return steps.transpose(-3, -2).flatten(-2).flatten(-3, -2)


def _fragment_index(layout: IntLayout, columns: int, device: torch.device) -> torch.Tensor:
    """Place of each (row, column) of a step: int64 [16, columns]."""
    row = torch.arange(FRAGMENT_ROWS, device=device).unsqueeze(-1)
    return layout(row, torch.arange(0, FRAGMENT_K, FRAGMENT_K // columns, device=device))


def _to_fragments(t: NVFP4Tensor) -> NVFP4Tensor:
    n, k = t.shape[-2:]
    tiles, steps = _fragment_tiles(n, k)
    pad_rows, pad_k = tiles * FRAGMENT_ROWS - n, steps * FRAGMENT_K - k
    device = t.device

    codes = _steps(pad(unpack_codes(t.qdata), (0, pad_k, 0, pad_rows)), steps * FRAGMENT_K)
    placed = torch.empty(*codes.shape[:-2], FRAGMENT_STEP_BYTES * NIBBLES, dtype=torch.uint8, device=device)
    placed[..., _fragment_index(FRAGMENT_CODES, FRAGMENT_K, device)] = codes
    placed = placed.unflatten(-1, (-1, 8))
    table = _code_table(device)
    words = table[0][placed[..., 0].int()]
    for i in range(1, 8):
        words |= table[i][placed[..., i].int()]

    scales = _steps(pad(t.scale.view(torch.uint8), (0, pad_k // BLOCK, 0, pad_rows)), steps * FRAGMENT_K)
    strip = torch.empty(*scales.shape[:-2], FRAGMENT_SCALE_BYTES, dtype=torch.uint8, device=device)
    strip[..., _fragment_index(FRAGMENT_SCALES, FRAGMENT_K // BLOCK, device)] = _scale_table(device)[scales.int()]
    return t._with(qdata=words.view(torch.uint8), scale=strip.view(torch.float8_e4m3fn), layout=FRAGMENTS)


def _from_fragments(t: NVFP4Tensor) -> NVFP4Tensor:
    (n, k), device = t.shape[-2:], t.device
    words = t.qdata.view(torch.int32)
    placed = torch.zeros(*words.shape, 8, dtype=torch.uint8, device=device)
    for i, bit in itertools.product(range(8), range(4)):
        placed[..., i] |= ((words >> fragment_code_bit(i, bit) & 1) << bit).to(torch.uint8)
    codes = _unsteps(placed.flatten(-2)[..., _fragment_index(FRAGMENT_CODES, FRAGMENT_K, device)])[..., :n, :k]

    table = _scale_table(device)
    back = torch.zeros(256, dtype=torch.uint8, device=device)
    known = torch.tensor([*range(0x7F), 0x80], device=device)
    back[table[known].int()] = known.to(torch.uint8)
    encoded = t.scale.view(torch.uint8)[..., _fragment_index(FRAGMENT_SCALES, FRAGMENT_K // BLOCK, device)]
    scale = _unsteps(back[encoded.int()])[..., :n, : k // BLOCK]
    return t._with(
        qdata=pack_codes(codes).contiguous(), scale=scale.contiguous().view(torch.float8_e4m3fn), layout=CANONICAL
    )


STORAGES[FRAGMENTS] = Storage(
    FRAGMENTS,
    shapes=lambda n, k: (
        (*_fragment_tiles(n, k), FRAGMENT_STEP_BYTES),
        (*_fragment_tiles(n, k), FRAGMENT_SCALE_BYTES),
    ),
    canonicalize=_from_fragments,
    rank=3,
    encoded=True,
)


_PACK = {CANONICAL: lambda t: t, BLACKWELL: _to_blackwell, FRAGMENTS: _to_fragments}


def layout_for(target: str, activation: str | None = None) -> str:
    """The layout tag of weights that a target's kernels read in a numeric mode (by default the target's own mode).

    Raises:
        TargetError: unknown target, or one that has no kernels for the mode.
    """
    row = get_target(target)
    mode = next(iter(row.layouts)) if activation is None else activation
    if mode not in tuple(row.layouts):  # which may be asked about what has no hash
        raise TargetError(f"{target} has no layout for activation={mode!r}; it has {', '.join(row.layouts)}")
    return row.layouts[mode]


def prepare(tensor: NVFP4Tensor, target: str, *, activation: str | None = None) -> NVFP4Tensor:
    """The layout that a target's kernels read. ``prepare(t, target).canonical()`` is ``t``, bit for bit.

    Args:
        tensor: in any layout.
        target: ``"sm_90a"``, ``"sm_100a"``, ``"sm_120a"``, ``"sm_121a"``, or ``"canonical"``.
        activation: the numeric mode the tensor will be used in: ``"nvfp4"`` (W4A4) or ``"bf16"`` (W4A16, weights only);
            by default the target's own: bf16 on sm_90a, nvfp4 on Blackwell.

    Returns:
        The tensor in that layout, on the same device; itself if it is so already.

        * ``blackwell``: qdata uint8 [..., N, Kp/2], Kp = K rounded up to 32; scale float8_e4m3fn
          [..., ceil(N/128), ceil(K/64), 512]; pads are zeros.
        * ``fragments``: qdata uint8 [..., 2 ceil(N/32), ceil(K/64), 512], scale [..., 2 ceil(N/32), ceil(K/64), 64],
          both re-encoded bit for bit (:mod:`nvfp4dsl.layouts`).

    Raises:
        OperandError: ``tensor`` is not quantized.
        TargetError: unknown target, or one that has no layout for the mode.
    """
    check_nvfp4("tensor", tensor)
    layout = CANONICAL if target == CANONICAL else layout_for(target, activation)
    return tensor if tensor.layout == layout else _PACK[layout](tensor.canonical())
