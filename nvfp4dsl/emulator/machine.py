"""The machine: a wave of resident CTAs, whole clusters of them, and the scheduler that runs their warps.

Warps of all resident CTAs that stand at one instruction execute it together. Which of them run next, for how long, and
when asynchronous copies take effect is drawn from a seed: the order is adversarial, not fair. Copies are late: most
take effect only when nothing else can run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nvfp4dsl.emulator import isa
from nvfp4dsl.emulator.async_copies import AsyncCopies
from nvfp4dsl.emulator.clocks import Clocks
from nvfp4dsl.emulator.clusters import ClusterBarriers
from nvfp4dsl.emulator.faults import (
    Deadlock,
    DivergentSync,
    Fault,
    RegisterBudget,
    StepLimit,
    TransactionMismatch,
)
from nvfp4dsl.emulator.launch import Launch
from nvfp4dsl.emulator.mbarrier import Mbarriers
from nvfp4dsl.emulator.memory import GlobalMemory, ParamMemory, SharedMemory
from nvfp4dsl.emulator.named_barriers import NamedBarriers
from nvfp4dsl.emulator.registers import RegisterFile
from nvfp4dsl.emulator.report import Report
from nvfp4dsl.emulator.specials import special_registers, symbols_of
from nvfp4dsl.emulator.syntax import Instruction, Kernel
from nvfp4dsl.emulator.tensorcore import TensorCore
from nvfp4dsl.emulator.warpgroups import Warpgroups
from nvfp4dsl.emulator.warps import BLOCKED, EXITED, LANES, NOWHERE, PARKED, Group, WarpTable

REGISTER_FILE = 65536
"""32-bit registers of one SM, which one CTA's warps share."""
MEAN_BURST = 150
"""Instructions that a group of warps runs, on average, before others are drawn."""
SPLIT = 0.25
"""How often only some of the warps that stand together run."""
IDLE_ROUNDS = 3
"""Rounds in which every timed wait failed and nothing changed, before that is a deadlock."""


@dataclass(eq=False)
class Wait:
    """Lanes of one warp that cannot go on until ``ready``; ``may_time_out`` for waits that may report failure."""

    warp: int
    mask: np.ndarray
    pc: int
    ready: Callable[[], bool]
    describe: Callable[[], str]
    may_time_out: bool
    barriers: tuple = ()


class Machine:
    """One wave of resident CTAs executing one kernel."""

    def __init__(
        self,
        kernel: Kernel,
        launch: Launch,
        ctas: list[tuple[int, int, int]],
        first_cta: int,
        memory: GlobalMemory,
        rng: np.random.Generator,
        report: Report,
        tolerate: tuple[type[Fault], ...],
    ) -> None:
        self.kernel, self.launch, self.ctas, self.first_cta = kernel, launch, ctas, first_cta
        self.memory, self.rng, self.report, self.tolerate = memory, rng, report, tolerate
        threads = int(np.prod(launch.block))
        self.warps_per_cta = -(-threads // LANES)
        self.warp_count = len(ctas) * self.warps_per_cta
        self.changes = 0
        self.waits: list[Wait] = []
        self.timed_out: set[tuple[int, int]] = set()
        self.register_requests: dict[int, list[int]] = {}
        self.elect_from = int(rng.integers(LANES))
        self.eagerness = float(rng.choice([0.0, 0.02, 0.2]))
        # Copies may overtake each other by any distance, but random choices alone hardly ever hold one back for long.
        lateness = float(rng.choice([0.0, 0.05]))

        self.clocks = Clocks(len(ctas), self.warps_per_cta, int(np.prod(launch.cluster)))
        self.params = ParamMemory(kernel, launch)
        symbols, static_bytes = symbols_of(kernel, self.params)
        self.shared = SharedMemory(self.clocks, len(ctas), static_bytes + launch.smem_bytes, self._line)
        self.mbarriers = Mbarriers(self.clocks, self.shared, self.note_change)
        self.copies = AsyncCopies(self.clocks, self.note_change, rng, lateness)
        self.bars = NamedBarriers(self.clocks, threads)
        self.cluster_barriers = ClusterBarriers(self.clocks, self.warp_count, self.note_change)
        specials = special_registers(kernel, launch, ctas, first_cta, symbols)
        self.registers = RegisterFile(kernel, self.warp_count, symbols, specials)
        self.tensor = TensorCore(self.registers)
        self.warps = WarpTable(self.warp_count, threads - (self.warps_per_cta - 1) * LANES, self.warps_per_cta)
        self.warpgroups = Warpgroups(self, kernel.instructions)
        self.program = isa.compile_program(self, kernel.instructions)
        self.executed = np.zeros(len(self.program), np.int64)

    def _line(self, pc: int) -> int:
        return self.kernel.instructions[pc].line

    # --- services for instructions

    def note_change(self) -> None:
        """Something happened that waiting lanes may be waiting for."""
        self.changes += 1

    def cta_of(self, warp: int) -> int:
        return int(warp) // self.warps_per_cta

    def tolerated(self, fault: Fault, pc: int) -> None:
        """Raise a fault, or record it if the caller tolerates its kind."""
        self._locate(fault, self.kernel.instructions[pc])
        if not isinstance(fault, self.tolerate):
            raise fault
        if str(fault) not in self.report.tolerated:
            self.report.tolerated.append(str(fault))

    def block(self, group: Group, row: int, pc: int, ready, describe, may_time_out: bool = False, barriers=()) -> None:
        """Stop the active lanes of one row until ``ready``; they then run at ``pc``."""
        warp, mask = int(group.warps[row]), group.mask[row]
        self.warps.state[warp, mask] = BLOCKED
        self.warps.pc[warp, mask] = pc
        self.waits.append(Wait(warp, mask.copy(), pc, ready, describe, may_time_out, barriers))

    def times_out(self, warp: int, pc: int) -> bool:
        """Whether a wait at ``pc`` must report failure now, because nothing else could run."""
        if (warp, pc) in self.timed_out:
            self.timed_out.discard((warp, pc))
            return True
        return False

    # --- the scheduler

    def run(self, max_steps: int, progress: Callable[[Report], None] | None) -> None:
        """Run until every lane has exited."""
        seen = -1
        idle_rounds = 0
        self.warps.refresh(np.arange(self.warp_count))
        for burst in itertools.count():
            if self.changes != seen:
                idle_rounds = 0
                seen = self.changes
                self._wake()
            ready = np.flatnonzero(self.warps.next != NOWHERE)
            if ready.size:
                self._burst(self._choose(ready))
                if self.copies.in_flight and self.rng.random() < self.eagerness:
                    self._advance_copy(idle=False)
            elif self.copies.in_flight:
                for _ in range(int(self.rng.integers(1, len(self.copies.in_flight) + 1))):
                    if not self.copies.in_flight or not self._advance_copy(idle=True):
                        break
            elif not self.waits:
                break
            else:
                idle_rounds += 1
                self._time_out(idle_rounds)
            if self.report.steps > max_steps:
                raise StepLimit(f"the kernel is still running after {max_steps} steps")
            if progress is not None and burst % 64 == 0:
                progress(self.report)
        if (self.warps.state != EXITED).any():
            self._report_parked()
        self._finish()

    def _choose(self, ready: np.ndarray) -> Group:
        """The warps at a randomly chosen counter; sometimes only some of them."""
        first = int(self.rng.choice(ready))
        pc = int(self.warps.next[first])
        together = ready[self.warps.next[ready] == pc]
        if together.size > 1 and self.rng.random() < SPLIT:
            together = together[(self.rng.random(together.size) < 0.5) | (together == first)]
        return self.warps.group(together, pc)

    def _burst(self, group: Group) -> None:
        """Run a group until it blocks, splits, meets other lanes, or its random budget is spent."""
        horizon = self.warps.horizon(group)
        for _ in range(int(self.rng.geometric(1 / MEAN_BURST))):
            step = self.program[group.pc]
            try:
                together = self._execute(step, group)
            except Fault as fault:
                if fault.warp is None and len(group.warps) == 1:
                    fault.warp = int(group.warps[0])
                self._locate(fault, step.instruction)
                raise
            if not together:
                return
            if group.pc >= horizon:
                break
        self.warps.move(group, group.mask, group.pc)
        self.warps.refresh(group.warps)

    def _execute(self, step: isa.Step, group: Group) -> bool:
        """Execute one instruction; whether the group is still together."""
        if step.convergent and not group.full and not self._gather(step, group):
            return False
        self.executed[group.pc] += len(group.warps)
        self.report.steps += 1
        if self.tensor.pending and not step.touched.isdisjoint(self.tensor.pending):
            self.tensor.flush()
        if group.pc in self.warpgroups.watched:
            active = step.active(group)
            if active is not None:
                self.warpgroups.access(active)
        return step.execute(self, group)

    def _gather(self, step: isa.Step, group: Group) -> bool:
        """Whether all lanes are here that a warp-synchronous instruction needs; if not, these are parked."""
        needed = step.members(group) & self.warps.live(group.warps)
        missing = (needed & ~group.mask).any(axis=1)
        if not missing.any():
            return True
        self.warps.move(group, group.mask, group.pc)
        self.warps.set_state(group, group.mask & missing[:, None], PARKED)
        self.warps.refresh(group.warps)
        return False

    def _wake(self) -> None:
        still = []
        for wait in self.waits:
            if wait.ready():
                self._resume(wait)
            else:
                still.append(wait)
        self.waits = still

    def _resume(self, wait: Wait) -> None:
        self.warps.state[wait.warp, wait.mask] = 0
        self.warps.refresh(np.array([wait.warp]))

    def _advance_copy(self, idle: bool) -> bool:
        """Let a copy do a step; whether there may be more to do at once."""
        try:
            return self.copies.advance(idle)
        except Fault as fault:
            operation = self.copies.current
            assert operation is not None
            fault.warp = operation.warp if fault.warp is None else fault.warp
            self.tolerated(fault, operation.pc)
            return True

    def _time_out(self, rounds: int) -> None:
        """Nothing can run: let timed waits fail, unless that has not helped before."""
        waits = [w for w in self.waits if w.may_time_out]
        if not waits or rounds > IDLE_ROUNDS:
            self._deadlock()
        for wait in waits:
            self.timed_out.add((wait.warp, wait.pc))
            self._resume(wait)
        self.waits = [w for w in self.waits if not w.may_time_out]

    # --- the end, and what went wrong

    def _deadlock(self) -> None:
        lines = []
        for wait in sorted(self.waits, key=lambda w: w.warp):
            cta = self.ctas[self.cta_of(wait.warp)]
            instruction = self.kernel.instructions[min(wait.pc, len(self.kernel.instructions) - 1)]
            lines.append(
                f"CTA {cta} warp {self.clocks.number[wait.warp]} waits for {wait.describe()} "
                f"near PTX line {instruction.line}"
            )
        unbalanced = [b for w in self.waits for b in w.barriers if b.bytes and b.pending == 0]
        kind = TransactionMismatch if unbalanced else Deadlock
        reason = f"{unbalanced[0]} can never complete; " if unbalanced else ""
        exited = [int(self.clocks.number[w]) for w in np.flatnonzero((self.warps.state == EXITED).all(axis=1))]
        note = f" (exited warps: {sorted(set(exited))})" if exited else ""
        parked = np.flatnonzero((self.warps.state == PARKED).any(axis=1)).size
        note += f" ({parked} warps hold lanes at a warp-synchronous instruction)" if parked else ""
        raise kind(f"{reason}nothing can run{note}:\n  " + "\n  ".join(lines))

    def _report_parked(self) -> None:
        warp, lane = np.argwhere(self.warps.state != EXITED)[0]
        instruction = self.kernel.instructions[int(self.warps.pc[warp, lane])]
        fault = DivergentSync(
            "some lanes wait here for lanes of their warp that went elsewhere or exited", warp=int(warp)
        )
        self._locate(fault, instruction)
        raise fault

    def exit_lanes(self, group: Group) -> None:
        """The active lanes leave; the last lane of a CTA ends it."""
        for row in group.rows():
            try:
                self.copies.threads_exit(int(group.warps[row]), np.flatnonzero(group.mask[row]).tolist())
                self.warpgroups.threads_exit(int(group.warps[row]))
            except Fault as fault:
                self.tolerated(fault, group.pc)
        self.warps.set_state(group, group.mask, EXITED)
        for warp in group.warps[(self.warps.state[group.warps] == EXITED).all(axis=1)]:
            self.cluster_barriers.exits(int(warp))
        self.note_change()
        for cta in {self.cta_of(w) for w in group.warps}:
            first = cta * self.warps_per_cta
            if (self.warps.state[first : first + self.warps_per_cta] == EXITED).all():
                self._end_cta(cta)

    def _end_cta(self, cta: int) -> None:
        self.copies.cta_ends(cta)
        self.mbarriers.finish(cta)
        self.shared.residency.leave(cta)
        first = cta * self.warps_per_cta
        requests = [self.register_requests.get(first + w, []) for w in range(self.warps_per_cta)]
        for start in range(0, self.warps_per_cta, 4):
            group = requests[start : start + 4]
            if any(r != group[0] for r in group):
                raise RegisterBudget(
                    f"setmaxnreg must be executed by every warp of a warpgroup; warps {start}.. asked for {group}",
                    warp=first + start,
                )
        if all(requests) and sum(r[-1] * LANES for r in requests) > REGISTER_FILE:
            raise RegisterBudget(
                f"the warps ask for {sum(r[-1] * LANES for r in requests)} registers, the SM has {REGISTER_FILE}",
                warp=first,
            )

    def _finish(self) -> None:
        self.tensor.flush()
        self.report.instructions += int(self.executed.sum())
        for step, count in zip(self.program, self.executed, strict=True):
            if count:
                self.report.opcodes[step.instruction.opcode] += int(count)
        self.report.mmas += self.tensor.count
        self.report.copies += self.copies.count

    def _locate(self, fault: Fault, instruction: Instruction | None) -> None:
        warp = fault.warp
        cta = None if warp is None else self.ctas[self.cta_of(warp)]
        fault.locate(instruction, cta, None if warp is None else int(self.clocks.number[warp]))
