"""What the emulator reports, one class per kind of fault.

A fault is raised where the access happens, with what that place knows (an address, a buffer, an agent). The machine
adds the rest before it leaves :func:`~nvfp4dsl.emulator.machine.run`: the PTX line and its text, the CTA and the warp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nvfp4dsl.errors import EmulationError

if TYPE_CHECKING:
    from nvfp4dsl.emulator.syntax import Instruction


class Fault(EmulationError):
    """Base of every fault.

    Attributes:
        problem: what went wrong, without the place.
        warp: global index of the warp at fault, if one is known.
        line, text: the PTX line (1-based) and instruction, once known.
        cta: coordinates of the CTA, once known.
    """

    def __init__(self, problem: str, *, warp: int | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.warp = warp
        self.line: int | None = None
        self.text: str | None = None
        self.cta: tuple[int, int, int] | None = None
        self.warp_in_cta: int | None = None

    def locate(
        self, instruction: Instruction | None, cta: tuple[int, int, int] | None, warp_in_cta: int | None
    ) -> None:
        """Add the place, unless a more exact one is there already."""
        if self.line is None and instruction is not None:
            self.line, self.text = instruction.line, instruction.text
        if self.cta is None and cta is not None:
            self.cta, self.warp_in_cta = cta, warp_in_cta

    def __str__(self) -> str:
        place = []
        if self.cta is not None:
            place.append(f"CTA {self.cta}" + ("" if self.warp_in_cta is None else f" warp {self.warp_in_cta}"))
        if self.line is not None:
            place.append(f"PTX line {self.line}: {self.text}")
        return f"{type(self).__name__}: {self.problem}" + (f" [{'; '.join(place)}]" if place else "")


# --- the program


class PtxSyntaxError(Fault):
    """The PTX text could not be parsed."""


class UnknownInstruction(Fault):
    """The program holds instructions that the emulator does not know; every one is named."""


class UnwrittenRegister(Fault):
    """A register is read that no instruction writes."""


class LaunchMismatch(Fault):
    """The launch does not fit the kernel: entry name, block size, parameters, clusters."""


class StepLimit(Fault):
    """The kernel ran for longer than the caller allowed."""


class DivergentSync(Fault):
    """A warp-synchronous instruction was reached by only some of the lanes that it names."""


class MissingWgmmaFence(Fault):
    """No ``wgmma.fence`` lies between an access to registers and the ``wgmma`` that uses them."""


class UnfinishedWgmma(Fault):
    """Registers of a ``wgmma`` are touched, or its thread ends, before ``wgmma.wait_group`` has waited for it."""


class RegisterBudget(Fault):
    """``setmaxnreg`` asks for a count that is not allowed, or was not executed by the whole warpgroup."""


# --- memory


class OutOfBounds(Fault):
    """An access outside every buffer, or outside the CTA's shared memory."""


class Misaligned(Fault):
    """An address that its access does not allow."""


class UninitialisedRead(Fault):
    """A byte is read that nothing has written."""


class ReadOnlyStore(Fault):
    """A store to a buffer that the launch calls read-only."""


class TensormapMisuse(Fault):
    """A TMA descriptor, or the request that uses it, breaks a rule of the hardware."""


class DescriptorMisuse(Fault):
    """The descriptor of a ``wgmma`` matrix breaks a rule of the hardware, or is not known here."""


# --- order


class DataRace(Fault):
    """Two accesses to one byte, at least one a write, that nothing orders."""


class UnorderedLanes(Fault):
    """One lane releases for its warp, but other lanes accessed shared memory with no ``bar.warp.sync`` since."""


class AbsentPeer(Fault):
    """A CTA's shared memory is used by another of its cluster that does not know it to have started and not exited."""


class MissingProxyFence(Fault):
    """Generic and asynchronous accesses are ordered, but no proxy fence lies between them."""


# --- barriers


class BarrierMisuse(Fault):
    """An mbarrier that is not initialised, initialised twice, written over, or over-arrived."""


class TransactionMismatch(Fault):
    """The bytes that an mbarrier was told to expect are not the bytes that came."""


class LostPhase(Fault):
    """An mbarrier phase completed twice before a waiter observed it."""


class BarrierMismatch(Fault):
    """The participants of a ``bar`` disagree on the thread count, or exceed it."""


class ClusterMisuse(Fault):
    """A ``barrier.cluster`` instruction out of turn, or an address or mask that names no CTA of the cluster."""


class Deadlock(Fault):
    """Nothing can run; every waiting warp is named with what it waits for."""


class UnfinishedBulk(Fault):
    """A thread exits with bulk copies that it has not committed, or not waited for."""


# --- the result


class WrongResult(Fault):
    """The kernel ran to its end, and a buffer does not hold what the launch says it must."""
