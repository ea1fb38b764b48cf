"""Address spaces: global buffers, shared memory of the resident CTAs, kernel parameters, and generic addressing.

Addresses are integers. Global addresses are those of the launch; whatever lies between its buffers is a guard gap.
A CTA's shared memory begins at :data:`SHARED_BASE` of the shared space, as on the hardware, which keeps the first KiB
to itself. In a cluster, bits 24.. of a shared address are the rank of the CTA that it belongs to, also in the address
of a CTA's own variables: again as on the hardware. In generic space shared memory and parameters have windows of their
own, far above every buffer.

Each access names its warps, so that the history (:mod:`~nvfp4dsl.emulator.races`) knows who did it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nvfp4dsl.emulator.clocks import PC_BITS, Clocks
from nvfp4dsl.emulator.clusters import Residency
from nvfp4dsl.emulator.faults import (
    BarrierMisuse,
    ClusterMisuse,
    DataRace,
    LaunchMismatch,
    Misaligned,
    OutOfBounds,
    ReadOnlyStore,
    UninitialisedRead,
)
from nvfp4dsl.emulator.handover import Handover
from nvfp4dsl.emulator.races import Shadow

if TYPE_CHECKING:
    from nvfp4dsl.emulator.launch import Buffer, Launch
    from nvfp4dsl.emulator.syntax import Kernel

SHARED_BASE = 1024
SHARED_WINDOW = 1 << 56
PARAM_WINDOW = 1 << 57
WINDOW_SIZE = 1 << 32
RANK_SHIFT = 24
"""A shared address is the rank of its CTA above this bit, and the offset in the CTA's shared memory below."""


def require_aligned(addresses: np.ndarray, size: int, warps: np.ndarray, space: str) -> None:
    wrong = addresses % np.uint64(size) != 0
    if wrong.any():
        first = int(np.argmax(wrong))
        raise Misaligned(
            f"{space} address {int(addresses[first]):#x} must be a multiple of {size}", warp=int(warps[first])
        )


def _lanes_clash(space: str, address: int, warp: int | None) -> DataRace:
    return DataRace(f"two lanes store different values to {space} byte {address:#x} in one instruction", warp=warp)


class SharedMemory:
    """The shared memory of all resident CTAs in one array, ``cta * span + address``."""

    def __init__(self, clocks: Clocks, ctas: int, size: int, line_of) -> None:
        self.clocks = clocks
        self.residency = Residency(clocks, ctas, line_of)
        self.span = SHARED_BASE + size
        self.data = np.zeros(ctas * self.span, np.uint8)
        self.barrier_bytes = np.zeros(ctas * self.span, bool)
        self.shadow = Shadow(clocks, ctas, self.span, line_of)

    def resolve(self, addresses: np.ndarray, warps: np.ndarray, peers: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(CTA, offset) of shared addresses: of the warps' own CTA only, or with ``peers`` of the whole cluster."""
        cluster = self.clocks.cluster
        own = warps // self.clocks.warps_per_cta
        rank = (addresses >> np.uint64(RANK_SHIFT)).astype(np.int64)
        wrong = rank >= cluster if peers else rank != own % cluster
        if wrong.any():
            self._refuse_rank(int(addresses[np.argmax(wrong)]), int(warps[np.argmax(wrong)]))
        return own // cluster * cluster + rank, (addresses & np.uint64((1 << RANK_SHIFT) - 1)).astype(np.int64)

    def place(self, address: int, warp: int, peers: bool = False) -> tuple[int, int]:
        """:meth:`resolve` for one address."""
        cluster, own, rank = self.clocks.cluster, warp // self.clocks.warps_per_cta, address >> RANK_SHIFT
        if rank >= cluster if peers else rank != own % cluster:
            self._refuse_rank(address, warp)
        return own // cluster * cluster + rank, address & (1 << RANK_SHIFT) - 1

    def _refuse_rank(self, address: int, warp: int) -> None:
        cluster, rank = self.clocks.cluster, address >> RANK_SHIFT
        if cluster == 1:
            raise OutOfBounds(
                f"shared address {address:#x} is outside the CTA's shared memory [{SHARED_BASE:#x}, {self.span:#x})",
                warp=warp,
            )
        owner = f"shared address {address:#x} belongs to CTA rank {rank}"
        if rank >= cluster:
            raise ClusterMisuse(f"{owner}, but the cluster has {cluster} CTAs", warp=warp)
        raise OutOfBounds(f"{owner}; this instruction reaches only its own CTA's, not shared::cluster", warp=warp)

    def flat(self, addresses: np.ndarray, size: int, warps: np.ndarray, peers: bool = False) -> np.ndarray:
        """Indices [accesses, size]; checks bounds."""
        cta, offset = self.resolve(addresses, warps, peers)
        outside = (offset < SHARED_BASE) | (offset + size > self.span)
        if outside.any():
            first = int(np.argmax(outside))
            raise OutOfBounds(
                f"shared address {int(addresses[first]):#x}, {size} bytes, is outside the CTA's shared memory "
                f"[{SHARED_BASE:#x}, {self.span:#x})",
                warp=int(warps[first]),
            )
        return (offset + cta * self.span)[:, None] + np.arange(size)

    def visit(self, cta: np.ndarray, warps: np.ndarray, pc: int) -> None:
        """Warps touch the shared memory of ``cta``; :class:`AbsentPeer` where it is another's that may not be there."""
        foreign = cta != warps // self.clocks.warps_per_cta
        for warp, target in set(zip(warps[foreign].tolist(), cta[foreign].tolist(), strict=True)):
            self.residency.visit_by_warp(target, warp, pc)

    def load(self, addresses: np.ndarray, size: int, warps: np.ndarray, pc: int, peers: bool = False) -> np.ndarray:
        """uint8 [accesses, size]."""
        require_aligned(addresses, size, warps, "shared")
        flat = self.flat(addresses, size, warps, peers)
        if peers:
            self.visit(flat[:, 0] // self.span, warps, pc)
        self.shadow.warp_read(flat, warps, pc)
        return self.data[flat]

    def store(self, addresses: np.ndarray, values: np.ndarray, warps: np.ndarray, pc: int, peers: bool = False) -> None:
        """Store uint8 [accesses, size]."""
        require_aligned(addresses, values.shape[1], warps, "shared")
        flat = self.flat(addresses, values.shape[1], warps, peers)
        if peers:
            self.visit(flat[:, 0] // self.span, warps, pc)
        self.refuse_barriers(flat)
        self.shadow.warp_write(flat, warps, pc)
        self.data[flat] = values
        clash = self.data[flat] != values
        if clash.any():
            raise _lanes_clash("shared", int(flat[clash][0]) % self.span, int(warps[np.argmax(clash.any(axis=1))]))

    def exchange(self, flat: np.ndarray, dtype: np.dtype, warp: np.ndarray, function) -> np.ndarray:
        """An atomic by one lane: replace the value at ``flat`` [1, size] by ``function`` of it; the old one, [1].

        Takes part in no race."""
        self.refuse_barriers(flat)
        self.shadow.require_initialised(flat, warp)
        old = self.data[flat].view(dtype)[0]
        self.data[flat] = np.asarray(function(old), dtype)[:, None].view(np.uint8)
        return old

    def refuse_barriers(self, flat: np.ndarray) -> None:
        """A store must not hit an mbarrier."""
        if self.barrier_bytes[flat].any():
            at = int(flat[self.barrier_bytes[flat]][0]) % self.span
            raise BarrierMisuse(f"a store overwrites the mbarrier at shared address {at & ~7:#x}")


class GlobalMemory:
    """The launch's buffers, with the history of what this kernel wrote."""

    def __init__(self, buffers: list[Buffer]) -> None:
        self.buffers = sorted(buffers, key=lambda b: b.address)
        self.starts = np.array([b.address for b in self.buffers], np.uint64)
        self.ends = np.array([b.address + b.data.size for b in self.buffers], np.uint64)
        self.init = [None if b.init else np.zeros(b.data.size, bool) for b in self.buffers]
        self.history: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # buffer -> (agent + 1, event << 20 | cluster)
        self.handover = Handover()

    def locate(self, addresses: np.ndarray, size: int, warps: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """(buffer, offset) of each access, which must lie wholly inside one buffer."""
        index = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
        inside = index >= 0
        inside[inside] = addresses[inside] + np.uint64(size) <= self.ends[index[inside]]
        if not inside.all():
            first = int(np.argmin(inside))
            raise OutOfBounds(
                f"global address {int(addresses[first]):#x}, {size} bytes, is in no buffer; "
                f"{self._nearest(addresses[first])}",
                warp=None if warps is None else int(warps[first]),
            )
        return index, addresses - self.starts[index]

    def _nearest(self, address) -> str:
        if not self.buffers:
            return "the launch has none"
        distance = [max(b.address - int(address), int(address) - b.address - b.data.size + 1) for b in self.buffers]
        b = self.buffers[int(np.argmin(distance))]
        return f"the nearest is {b.name} [{b.address:#x}, {b.address + b.data.size:#x}), {min(distance)} bytes away"

    def read(self, addresses: np.ndarray, size: int, warps: np.ndarray | None) -> np.ndarray:
        """uint8 [accesses, size]; initialised bytes only."""
        index, offsets = self.locate(addresses, size, warps)
        result = np.empty((addresses.size, size), np.uint8)
        for buffer in np.unique(index):
            rows = index == buffer
            at = offsets[rows].astype(np.int64)[:, None] + np.arange(size)
            init = self.init[buffer]
            if init is not None and not init[at].all():
                missing = int(at[~init[at]][0])
                raise UninitialisedRead(
                    f"byte {missing} of buffer {self.buffers[buffer].name} is read, but nothing has written it",
                    warp=None if warps is None else int(warps[rows][0]),
                )
            result[rows] = self.buffers[buffer].data[at]
        return result

    def write(self, addresses: np.ndarray, values: np.ndarray, warps: np.ndarray | None, author: Author) -> None:
        """Store uint8 [accesses, size]; ``author`` says who, for the order check."""
        index, offsets = self.locate(addresses, values.shape[1], warps)
        for buffer in np.unique(index):
            rows = index == buffer
            target = self.buffers[buffer]
            if not target.writable:
                raise ReadOnlyStore(
                    f"a store to buffer {target.name}, which the launch calls read-only",
                    warp=None if warps is None else int(warps[rows][0]),
                )
            at = offsets[rows].astype(np.int64)[:, None] + np.arange(values.shape[1])
            self._order(buffer, at, author.rows(rows), "overwrites")
            self._record(buffer, at, author.rows(rows))
            self._order(buffer, at, author.rows(rows), "overwrites")  # authors of one instruction
            target.data[at] = values[rows]
            clash = target.data[at] != values[rows]
            if clash.any():
                raise _lanes_clash(
                    f"buffer {target.name}", int(at[clash][0]), None if warps is None else int(warps[rows][0])
                )
            if self.init[buffer] is not None:
                self.init[buffer][at] = True

    def write_atomic(self, addresses: np.ndarray, values: np.ndarray, warps: np.ndarray) -> None:
        """A store that takes part in no race: atomics order themselves."""
        index, offsets = self.locate(addresses, values.shape[1], warps)
        target, at = self.buffers[int(index[0])], int(offsets[0])
        if not target.writable:
            raise ReadOnlyStore(f"an atomic on buffer {target.name}, which the launch calls read-only")
        target.data[at : at + values.shape[1]] = values[0]

    def check_read_order(self, addresses: np.ndarray, size: int, author: Author) -> None:
        """Reads of bytes that this kernel wrote must be ordered after the writes."""
        if not self.history:
            return
        index, offsets = self.locate(addresses, size, None)
        for buffer in np.unique(index):
            rows = index == buffer
            at = offsets[rows].astype(np.int64)[:, None] + np.arange(size)
            self._order(buffer, at, author.rows(rows), "reads")

    def _order(self, buffer: int, at: np.ndarray, author: Author, verb: str) -> None:
        if buffer not in self.history:
            return
        agents, stamps = (h[at] for h in self.history[buffer])
        if not agents.any():
            return
        known = author.known(np.maximum(agents, 1) - 1)
        same = (stamps & ((1 << PC_BITS) - 1)) == author.cluster[:, None]
        own = (agents - 1 == author.agent[:, None]) & (stamps == author.stamp[:, None])
        unordered = (agents != 0) & ~own & ~(same & (stamps >> PC_BITS <= known))
        if (unordered & ~same).any():
            unordered &= same | ~self.handover.orders(author.cluster, author.known, np.maximum(agents, 1) - 1, stamps)
        if unordered.any():
            first = np.unravel_index(np.argmax(unordered), unordered.shape)
            raise DataRace(
                f"{author.name} {verb} byte {int(at[first])} of buffer {self.buffers[buffer].name}, which another "
                f"agent of {'the same' if same[first] else 'another'} {author.group} wrote; nothing orders the two"
            )

    def _record(self, buffer: int, at: np.ndarray, author: Author) -> None:
        if buffer not in self.history:
            size = self.buffers[buffer].data.size
            self.history[buffer] = np.zeros(size, np.int32), np.zeros(size, np.int64)
        agents, stamps = self.history[buffer]
        agents[at] = (author.agent + 1)[:, None]
        stamps[at] = author.stamp[:, None]


class Author:
    """Who makes a set of global accesses: per access its agent, event and cluster, and what it knows of other agents.

    ``group`` is what the cluster is called in messages: "CTA" if it is of one.
    """

    def __init__(self, name: str, agent: np.ndarray, event: np.ndarray, cluster: np.ndarray, known, group: str) -> None:
        self.name, self.agent, self.event, self.cluster, self._known = name, agent, event, cluster, known
        self.group = group
        self.stamp = event << PC_BITS | cluster
        self._rows = np.arange(agent.size)

    def rows(self, rows: np.ndarray) -> Author:
        part = Author(self.name, self.agent[rows], self.event[rows], self.cluster[rows], self._known, self.group)
        part._rows = self._rows[rows]
        return part

    def known(self, agents: np.ndarray) -> np.ndarray:
        """The newest event of each of ``agents`` [accesses, bytes] that is ordered before the access."""
        return self._known(self._rows, agents)

    @classmethod
    def of_warps(cls, clocks: Clocks, warps: np.ndarray, first_cta: int) -> Author:
        """Generic accesses, one a row."""
        known = lambda rows, agents: clocks.happened[warps[rows][:, None], agents]  # noqa: E731
        cluster = (warps // clocks.warps_per_cta + first_cta) // clocks.cluster
        return cls("a warp", clocks.own[warps], clocks.event(warps), cluster, known, clocks.group)


class ParamMemory:
    """The entry parameters, laid out one after another, each at an aligned offset."""

    def __init__(self, kernel: Kernel, launch: Launch) -> None:
        sizes = [p.bytes for p in kernel.params]
        if [len(p) for p in launch.params] != sizes:
            raise LaunchMismatch(
                f"the entry's parameters take {sizes} bytes, the launch has {[len(p) for p in launch.params]}"
            )
        self.offsets: dict[str, int] = {}
        blob = bytearray()
        for param, value in zip(kernel.params, launch.params, strict=True):
            blob += bytes(-len(blob) % max(param.align, 128 if param.bytes >= 128 else 1))
            self.offsets[param.name] = len(blob)
            blob += value
        self.data = np.frombuffer(bytes(blob), np.uint8)

    def load(self, addresses: np.ndarray, size: int, warps: np.ndarray) -> np.ndarray:
        """uint8 [accesses, size]."""
        require_aligned(addresses, size, warps, "parameter")
        if (addresses + np.uint64(size) > self.data.size).any():
            raise OutOfBounds(f"parameter address {int(addresses.max()):#x}: there are {self.data.size} bytes")
        return self.data[addresses.astype(np.int64)[:, None] + np.arange(size)]
