"""The arithmetic of a GEMM whose tiles split K: each slice from a zero accumulator, their fp32 sum in K's order."""

from itertools import pairwise

import torch

from nvfp4dsl import reference
from nvfp4dsl.formats import NVFP4Tensor


def _slice(t, begin, end):
    """Columns ``begin`` to ``end`` of a canonical tensor, with a global scale of one."""
    parts = (t.qdata[..., begin // 2 : end // 2], t.scale[..., begin // 16 : end // 16])
    return NVFP4Tensor(*(part.contiguous() for part in parts), torch.tensor(1.0))


def gemm_model(a, b, bias=None, out_dtype=torch.float32, *, tile):
    """:func:`reference.gemm_model`, where ``tile`` may split K; then without a bias."""
    if tile.split == 1:
        return reference.gemm_model(a, b, bias, out_dtype=out_dtype)
    assert bias is None
    steps = -(-a.k // tile.k)
    slices = min(tile.split, steps)
    edges = [min(a.k, steps * i // slices * tile.k) for i in range(slices + 1)]
    parts = [reference.gemm_model(_slice(a, begin, end), _slice(b, begin, end)) for begin, end in pairwise(edges)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return (total * (a.row_scale().unsqueeze(-1) * b.row_scale().unsqueeze(-2))).to(out_dtype)
