"""Tensor maps: the 128-byte descriptor, the box of elements it moves, and the copies made of it.

Layout of a descriptor, little-endian: the global address in bytes 0-7; in the word at byte 8 the version (bits 0-3),
rank - 1 (4-6), element type (7-10), interleave (11-12) and swizzle (13-14); from byte 12 the strides of dimensions 1..
in units of 16 bytes, a word each; from byte 32 the extents minus one, a word each; from byte 55 the box minus one, a
byte each. A packed-FP4 descriptor counts 4-bit elements, in coordinates too.

In shared memory a box is dense, dimension 0 fastest, with address bits 4.. exchanged by the swizzle: an XOR with bits
7.. of the *address*, so the pattern repeats every 256, 512 or 1024 bytes of shared memory and not of the box.
Elements outside the tensor read as zero, and are not stored; their bytes count in the transaction all the same.
Not modelled: interleaved layouts, im2col, element strides, reductions.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nvfp4dsl.emulator.async_copies import Operation
from nvfp4dsl.emulator.faults import BarrierMisuse, OutOfBounds, TensormapMisuse
from nvfp4dsl.emulator.memory import PARAM_WINDOW, RANK_SHIFT, SHARED_BASE, Author

ELEMENT_BITS = {0: 8, 1: 16, 2: 32, 3: 32, 4: 64, 5: 64, 6: 16, 7: 32, 8: 32, 9: 64, 10: 16, 11: 4}
"""Bits of an element, by the descriptor's type code."""
SWIZZLE_MASK = {0: 0, 1: 0x10, 2: 0x30, 3: 0x70}
"""Address bits that a swizzle mode exchanges with the bits three higher."""
SWIZZLE_SPAN = {0: 256 * 16, 1: 32, 2: 64, 3: 128}
"""Most bytes of a box's dimension 0."""


@dataclass(frozen=True)
class Descriptor:
    """A decoded tensor map. Extents and box in elements, strides (of dimensions 1..) in bytes."""

    address: int
    bits: int
    swizzle: int
    extents: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


@lru_cache(maxsize=256)
def decode(blob: bytes) -> Descriptor:
    """The descriptor in 128 bytes; :class:`TensormapMisuse` for what the hardware or the emulator does not take."""
    (address, word) = struct.unpack_from("<QI", blob, 0)
    rank = (word >> 4 & 7) + 1
    kind, interleave, swizzle = word >> 7 & 15, word >> 11 & 3, word >> 13 & 3
    if rank > 5 or kind not in ELEMENT_BITS or interleave:
        raise TensormapMisuse(
            f"tensor map with rank {rank}, element type {kind}, interleave {interleave}: not known here"
        )
    strides = tuple(16 * s for s in struct.unpack_from(f"<{rank - 1}I", blob, 12)) if rank > 1 else ()
    extents = tuple(e + 1 for e in struct.unpack_from(f"<{rank}I", blob, 32))
    box = tuple(b + 1 for b in struct.unpack_from(f"<{rank}B", blob, 55))
    descriptor = Descriptor(address, ELEMENT_BITS[kind], swizzle, extents, strides, box)
    row = box[0] * descriptor.bits
    if address % 16 or row % 128:
        raise TensormapMisuse(f"{descriptor}: the address and a box's row must be multiples of 16 bytes")
    if row // 8 > SWIZZLE_SPAN[swizzle]:
        raise TensormapMisuse(
            f"{descriptor}: a box's row of {row // 8} bytes exceeds the swizzle's {SWIZZLE_SPAN[swizzle]}"
        )
    if swizzle and row // 8 < SWIZZLE_SPAN[swizzle]:
        raise TensormapMisuse(
            f"{descriptor}: a box's row shorter than the swizzle's {SWIZZLE_SPAN[swizzle]} bytes is not known here"
        )
    return descriptor


def descriptor_at(machine, address: int, warp: int) -> Descriptor:
    """The tensor map behind a generic or parameter address."""
    if address % 64:
        raise TensormapMisuse(f"a tensor map at {address:#x}: it must be a multiple of 64", warp=warp)
    where = np.array([address % PARAM_WINDOW if address >= PARAM_WINDOW else address], np.uint64)
    space = machine.params.load if address >= PARAM_WINDOW else machine.memory.read
    return decode(space(where, 128, np.array([warp])).tobytes())


@dataclass(frozen=True)
class Transfer:
    """What one copy moves: runs of contiguous bytes.

    ``globals`` [runs] are global addresses, ``run`` their length in bytes, ``smem`` [runs, run] the shared addresses of
    their bytes; ``filled`` the shared addresses of bytes outside the tensor; ``bytes`` the size of the whole.
    """

    globals: np.ndarray
    smem: np.ndarray
    filled: np.ndarray
    bytes: int

    @property
    def run(self) -> int:
        return self.smem.shape[1]


def box(descriptor: Descriptor, coordinates: list[int], smem: int, warp: int) -> Transfer:
    """The transfer of one box at ``coordinates`` to or from shared address ``smem``."""
    if len(coordinates) != len(descriptor.box):
        raise TensormapMisuse(
            f"{len(coordinates)} coordinates for a tensor map of rank {len(descriptor.box)}", warp=warp
        )
    if smem % 128:
        raise TensormapMisuse(f"shared address {smem:#x} of a tensor copy must be a multiple of 128", warp=warp)
    unit = 16 if descriptor.bits == 4 else 1  # packed FP4 moves 16 elements at a time
    if descriptor.bits == 4 and coordinates[0] % 32:
        raise TensormapMisuse(
            f"coordinate {coordinates[0]} of packed 4-bit elements must be a multiple of 32", warp=warp
        )
    index = np.indices(descriptor.box[:0:-1]).reshape(len(descriptor.box) - 1, -1)[::-1]  # dimensions 1.. of each row
    at = index + np.array(coordinates[1:], np.int64).reshape(-1, 1)
    inside = np.ones(at.shape[1] if at.size else 1, bool)
    offset = np.zeros_like(inside, np.int64)
    for position, extent, stride in zip(at, descriptor.extents[1:], descriptor.strides, strict=True):
        inside &= (position >= 0) & (position < extent)
        offset += position * stride
    row_bytes = descriptor.box[0] * descriptor.bits // 8
    first = max(0, -coordinates[0])
    last = min(descriptor.box[0], descriptor.extents[0] - coordinates[0])
    last = max(first, last)
    if descriptor.bits == 4 and (first % unit or last % unit):
        raise TensormapMisuse(
            f"packed 4-bit tensor of extent {descriptor.extents[0]}: the edge splits a unit of {unit}", warp=warp
        )
    lo, hi = first * descriptor.bits // 8, last * descriptor.bits // 8
    linear = smem + np.arange(inside.size)[:, None] * row_bytes + np.arange(row_bytes)
    swizzled = linear ^ (linear >> 3 & SWIZZLE_MASK[descriptor.swizzle])
    starts = descriptor.address + coordinates[0] * descriptor.bits // 8 + lo + offset[inside]
    kept = np.zeros(swizzled.shape, bool)
    kept[inside, lo:hi] = True
    return Transfer(starts, swizzled[inside, lo:hi], swizzled[~kept], linear.size)


def line(address: int, smem: int, size: int) -> Transfer:
    """The transfer of ``size`` contiguous bytes."""
    return Transfer(np.array([address]), smem + np.arange(size)[None, :], np.zeros(0, np.int64), size)


def _flat(machine, cta: int, addresses: np.ndarray, warp: int) -> np.ndarray:
    """Indices of shared addresses, taken as offsets in one CTA's shared memory."""
    shared = machine.shared
    addresses = addresses & (1 << RANK_SHIFT) - 1
    if addresses.size and (addresses.min() < SHARED_BASE or addresses.max() >= shared.span):
        raise OutOfBounds(
            f"an asynchronous copy at shared addresses [{addresses.min():#x}, {addresses.max() + 1:#x}); the CTA's "
            f"shared memory is [{SHARED_BASE:#x}, {shared.span:#x})",
            warp=warp,
        )
    return addresses.reshape(-1) + cta * shared.span


def issue_load(machine, warp: int, pc: int, transfer: Transfer, barrier: tuple[int, int]) -> None:
    """Global to shared memory of the CTA where the mbarrier (CTA, offset) is; completes ``transfer.bytes`` there."""
    (cta, _), shared = barrier, machine.shared
    body, filled = _flat(machine, cta, transfer.smem, warp), _flat(machine, cta, transfer.filled, warp)
    whole = np.concatenate([body, filled])

    def write_shared(operation: Operation) -> None:
        visit(machine, cta, operation)
        write_order(machine, whole, operation)
        shared.data[filled] = 0
        if body.size:
            addresses = transfer.globals.astype(np.uint64)
            machine.memory.check_read_order(addresses, transfer.run, author(machine, operation, addresses.size))
            shared.data[body] = machine.memory.read(addresses, transfer.run, None).reshape(-1)

    def complete(operation: Operation) -> None:
        machine.mbarriers.complete(operation, barrier, transfer.bytes)

    operation = machine.copies.load(warp, pc, [write_shared, complete], uses=[cta])
    visit(machine, cta, operation)
    machine.mbarriers.of_copy(operation, barrier)


def issue_peer_copy(machine, warp: int, pc: int, source: np.ndarray, target: int, barrier: tuple[int, int]) -> None:
    """Own shared memory, addresses ``source`` [bytes], to ``target`` in that of the CTA where the mbarrier is."""
    shared, own, (cta, _) = machine.shared, machine.cta_of(warp), barrier
    read = _flat(machine, own, source, warp)
    written = _flat(machine, cta, target + np.arange(source.size), warp)
    latched: list[np.ndarray] = []

    def read_shared(operation: Operation) -> None:
        machine.shared.residency.visit_by_copy(own, operation)
        shared.shadow.async_read(read, operation)
        latched.append(shared.data[read])

    def write_shared(operation: Operation) -> None:
        visit(machine, cta, operation)
        write_order(machine, written, operation)
        shared.data[written] = latched[0]

    def complete(operation: Operation) -> None:
        machine.mbarriers.complete(operation, barrier, source.size)

    operation = machine.copies.load(warp, pc, [read_shared, write_shared, complete], uses=[own, cta])
    visit(machine, cta, operation)
    machine.mbarriers.of_copy(operation, barrier)


def visit(machine, cta: int, operation: Operation) -> None:
    """A copy touches a CTA's shared memory: if it is not the issuer's own, that CTA must be there."""
    if cta != operation.cta:
        machine.shared.residency.visit_by_copy(cta, operation)


def write_order(machine, flat: np.ndarray, operation: Operation) -> None:
    """A copy writes shared memory, which must be ordered after all other accesses, and hit no mbarrier."""
    if machine.shared.barrier_bytes[flat].any():
        raise BarrierMisuse("an asynchronous copy overwrites an mbarrier", warp=operation.warp)
    machine.shared.shadow.async_write(flat, operation)


def issue_store(machine, warp: int, lanes: list[int], pc: int, transfer: Transfer) -> None:
    """Shared to global memory, as part of a bulk group."""
    cta, shared = machine.cta_of(warp), machine.shared
    body = _flat(machine, cta, transfer.smem, warp)
    latched: list[np.ndarray] = []

    def read_shared(operation: Operation) -> None:
        shared.shadow.async_read(body, operation)
        latched.append(shared.data[body].reshape(transfer.smem.shape))

    def write_global(operation: Operation) -> None:
        if body.size:
            addresses = transfer.globals.astype(np.uint64)
            machine.memory.write(addresses, latched[0], None, author(machine, operation, addresses.size))

    machine.copies.store(warp, lanes, pc, [read_shared, write_global])


def author(machine, operation: Operation, count: int) -> Author:
    """A copy as the author of ``count`` global accesses."""
    happened = operation.knowledge.happened

    def known(rows: np.ndarray, agents: np.ndarray) -> np.ndarray:
        size = max(int(agents.max(initial=0)) + 1, happened.size)
        padded = np.pad(happened, (0, size - happened.size))
        return padded[agents]

    fill = lambda value: np.full(count, value, np.int64)  # noqa: E731
    cluster = (operation.cta + machine.first_cta) // machine.clocks.cluster
    return Author(
        "an asynchronous copy", fill(operation.write_agent), fill(operation.event), fill(cluster), known,
        machine.clocks.group,
    )  # fmt: skip
