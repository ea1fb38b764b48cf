"""Tensor-core instructions, evaluated late and many at a time.

``mma.sync`` only gathers its operands and queues. The queue is evaluated, in one call for all warps, when an
instruction touches a result register, so arithmetic costs little however finely the scheduler interleaves warps.

Fragments of m16n8k64 with e2m1 (lane = 4 g + t): A registers hold rows g, g + 8, g, g + 8, with k = 8 t .. 8 t + 7,
the last two at k + 32; B registers column g at k = 8 t and 32 + 8 t; C rows g, g, g + 8, g + 8 at columns 2 t, 2 t + 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from nvfp4dsl.emulator.half_dot import dot16
from nvfp4dsl.emulator.registers import RegisterFile
from nvfp4dsl.mma_model import omma_k64

_LANE = np.arange(32)
_G, _T = _LANE // 4, _LANE % 4
_NIBBLES = np.arange(8, dtype=np.uint32) * 4
_BYTES = np.arange(4, dtype=np.uint32) * 8


@dataclass(frozen=True)
class _Queued:
    kind: Callable  # evaluates a batch
    operands: tuple[np.ndarray, ...]  # [warps, ..]
    warps: np.ndarray
    results: tuple[int, ...]  # indices of 32-bit registers


class TensorCore:
    """The queue. ``pending`` holds the registers whose value is still to be computed."""

    def __init__(self, registers: RegisterFile) -> None:
        self.registers = registers
        self.queue: list[_Queued] = []
        self.pending: set[int] = set()
        self.count = 0

    def enqueue(
        self, kind: Callable, operands: tuple[np.ndarray, ...], warps: np.ndarray, results: tuple[int, ...]
    ) -> None:
        self.queue.append(_Queued(kind, operands, warps, results))
        self.pending.update(results)
        self.count += len(warps)

    def flush(self) -> None:
        """Evaluate everything queued."""
        for kind in {q.kind for q in self.queue}:
            items = [q for q in self.queue if q.kind is kind]
            batch = [np.concatenate(parts) for parts in zip(*(q.operands for q in items), strict=True)]
            output = kind(*batch)  # [all warps, results, 32] uint32
            at = 0
            for item in items:
                for n, register in enumerate(item.results):
                    self.registers.banks[32][register][item.warps] = output[at : at + len(item.warps), n]
                at += len(item.warps)
        self.queue.clear()
        self.pending.clear()


def accumulators(c: np.ndarray) -> np.ndarray:
    """Four f32 registers [w, 4, 32] to a matrix [w, 16, 8]."""
    values = np.ascontiguousarray(c).view(np.float32)
    matrix = np.empty((c.shape[0], 16, 8), np.float32)
    for n in range(4):
        matrix[:, _G + 8 * (n // 2), 2 * _T + n % 2] = values[:, n]
    return matrix


def accumulator_registers(d: np.ndarray) -> np.ndarray:
    """A matrix [w, 16, 8] to four registers [w, 4, 32]."""
    parts = [d[:, _G + 8 * (n // 2), 2 * _T + n % 2] for n in range(4)]
    return np.ascontiguousarray(np.stack(parts, axis=1)).view(np.uint32)


def _codes(words: np.ndarray, rows: int) -> np.ndarray:
    """Fragment registers [w, n, 32] of e2m1 to codes uint8 [w, rows, 64]."""
    nibbles = (words[..., None] >> _NIBBLES & 15).astype(np.uint8)  # [w, n, 32, 8]
    codes = np.empty((words.shape[0], rows, 8, 8), np.uint8)  # [w, row, k / 8, k % 8]
    halves = rows // 8
    for n in range(words.shape[1]):
        codes[:, _G + 8 * (n % halves), _T + 4 * (n // halves)] = nibbles[:, n]
    return codes.reshape(words.shape[0], rows, 64)


def omma(a: np.ndarray, b: np.ndarray, c: np.ndarray, row_scales: np.ndarray, column_scales: np.ndarray) -> np.ndarray:
    """m16n8k64 of e2m1: a [w, 4, 32], b [w, 2, 32], c [w, 4, 32]; words of four ue4m3 scales [w, 16] and [w, 8]."""
    a_sf = (row_scales[..., None] >> _BYTES & 255).astype(np.uint8)
    b_sf = (column_scales[..., None] >> _BYTES & 255).astype(np.uint8)
    tensors = map(torch.from_numpy, (_codes(a, 16), a_sf, _codes(b, 8), b_sf, accumulators(c)))
    return accumulator_registers(omma_k64(*tensors).numpy())


def row_scale_words(word: np.ndarray, thread: np.ndarray) -> np.ndarray:
    """Scale words of rows 0..15 [w, 16]: row g from lane 4 g + 2 thread, row g + 8 from the next lane."""
    lane = 4 * np.arange(8) + 2 * thread[:, None].astype(np.int64)
    both = np.concatenate([lane, lane + 1], axis=1)
    return np.take_along_axis(word, both, axis=1)


def column_scale_words(word: np.ndarray, thread: np.ndarray) -> np.ndarray:
    """Scale words of columns 0..7 [w, 8]: column g from lane 4 g + thread."""
    return np.take_along_axis(word, 4 * np.arange(8) + thread[:, None].astype(np.int64), axis=1)


def half_fragments(words: np.ndarray, rows: int) -> np.ndarray:
    """Fragment registers [w, n, 32] of m16n8k8 or m16n8k16 to 16-bit elements [w, rows, K]."""
    halves = np.ascontiguousarray(words)[..., None].view(np.uint16)  # [w, n, 32, 2]
    count = rows // 8
    columns = words.shape[1] // count
    matrix = np.empty((words.shape[0], rows, 4 * columns, 2), np.uint16)
    for n in range(words.shape[1]):
        matrix[:, _G + 8 * (n % count), _T + 4 * (n // count)] = halves[:, n]
    return matrix.reshape(words.shape[0], rows, 8 * columns)


def _half_mma(dtype: torch.dtype) -> Callable:
    def evaluate(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        as_half = lambda w, rows: torch.from_numpy(half_fragments(w, rows).view(np.int16)).view(dtype)  # noqa: E731
        return accumulator_registers(dot16(as_half(a, 16), as_half(b, 8), torch.from_numpy(accumulators(c))).numpy())

    return evaluate


mma_f16 = _half_mma(torch.float16)
mma_bf16 = _half_mma(torch.bfloat16)
"""m16n8k16 with f32 accumulators: a [w, 4, 32], b [w, 2, 32], c [w, 4, 32]; m16n8k8 with half of each operand."""
