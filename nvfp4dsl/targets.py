"""Targets (instruction sets) and devices (cards), one row each. Every shared-memory number lives here.

A :class:`Target` is what the compiler needs to know: shared memory, inner loops, minimum versions. A :class:`Device`
is a card: multiprocessors, clock, bandwidth. Compiled code depends on the target only: one object serves all its cards.
"""

from __future__ import annotations

from dataclasses import dataclass

from nvfp4dsl.errors import TargetError

KIB = 1024


@dataclass(frozen=True)
class Target:
    """An instruction set as a row of facts.

    Attributes:
        name: the architecture as ptxas spells it.
        mainloops: inner loops that run on it, best first, per activation mode.
        smem_per_block: bytes of shared memory one block may use (the per-SM size less what the driver reserves).
        tmem_columns: 32-bit columns of tensor memory; 0 where the silicon has none.
        max_cluster: most CTAs of a cluster that pays (1 where the chip has no multicast).
        min_ptx: least PTX ISA that knows ``.target <name>``.
        min_driver: least driver, for CUDA 13.0 objects.
        min_dsl: least nvidia-cutlass-dsl that compiles for it without help.
        layouts: numeric mode -> layout tag of the weights its kernels read; the first mode is the target's own.
    """

    name: str
    chips: str
    mainloops: dict[str, tuple[str, ...]]
    smem_per_block: int
    tmem_columns: int
    max_cluster: int
    min_ptx: tuple[int, int]
    min_driver: int
    min_dsl: str
    layouts: dict[str, str]

    @property
    def capability(self) -> tuple[int, int]:
        """CUDA compute capability (major, minor)."""
        digits = self.name.removeprefix("sm_").rstrip("a")
        return int(digits[:-1]), int(digits[-1])


@dataclass(frozen=True)
class Device:
    """A card. Rates are the vendor's: boost clock in GHz, memory in GB/s, dense FP4 (``None``: no FP4) and dense bf16
    with fp32 accumulators in TFLOP/s."""

    name: str
    target: str
    sms: int
    clock_ghz: float
    memory_gbps: float
    fp4_tflops: float | None
    bf16_tflops: float


TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target(
            name="sm_90a",
            chips="H100, H200",
            mainloops={"bf16": ("hmma", "wgmma")},
            smem_per_block=227 * KIB,
            tmem_columns=0,
            max_cluster=8,
            min_ptx=(8, 0),
            min_driver=580,
            min_dsl="4.4.2",
            layouts={"bf16": "fragments"},
        ),
        Target(
            name="sm_100a",
            chips="B200",
            mainloops={"nvfp4": ("utcomma",), "bf16": ("hmma",)},
            smem_per_block=227 * KIB,
            tmem_columns=512,
            max_cluster=8,
            min_ptx=(8, 6),
            min_driver=580,
            min_dsl="4.4.2",
            layouts={"nvfp4": "blackwell", "bf16": "fragments"},
        ),
        Target(
            name="sm_120a",
            chips="RTX 5090, RTX PRO 6000",
            mainloops={"nvfp4": ("omma",), "bf16": ("hmma",)},
            smem_per_block=99 * KIB,
            tmem_columns=0,
            max_cluster=1,
            min_ptx=(8, 7),
            min_driver=580,
            min_dsl="4.4.2",
            layouts={"nvfp4": "blackwell", "bf16": "fragments"},
        ),
        Target(
            name="sm_121a",
            chips="GB10 (DGX Spark)",
            mainloops={"nvfp4": ("omma",), "bf16": ("hmma",)},
            smem_per_block=99 * KIB,
            tmem_columns=0,
            max_cluster=1,
            min_ptx=(8, 8),
            min_driver=580,
            min_dsl="4.5.1",
            layouts={"nvfp4": "blackwell", "bf16": "fragments"},
        ),
    )
}

# Dense FP4 peak of the sm_12x cards: SMs x 4096 FLOP/clk x clock (one m16n8k64 OMMA per 16 clk and sub-core).
DEVICES: tuple[Device, ...] = (
    Device("RTX 5090", "sm_120a", 170, 2.407, 1792, 1676, 209.5),
    Device("RTX PRO 6000", "sm_120a", 188, 2.617, 1792, 2015, 503.8),
    Device("GB10", "sm_121a", 48, 2.5, 273, 490, 125),
    Device("B200", "sm_100a", 148, 1.85, 8000, 9000, 2250),
    Device("H200", "sm_90a", 132, 1.98, 4800, None, 989),
)


def get_device(name: str) -> Device:
    """The card called ``name``, e.g. ``"RTX 5090"``; case does not matter.

    Raises:
        TargetError: there is no such row; the message lists the known ones.
    """
    for device in DEVICES:
        if device.name.lower() == name.lower():
            return device
    raise TargetError(f"unknown device {name!r}; known devices: {', '.join(device.name for device in DEVICES)}")


def get_target(name: str) -> Target:
    """The row called ``name``, e.g. ``"sm_121a"``.

    Raises:
        TargetError: there is no such row; the message lists the known ones.
    """
    try:
        return TARGETS[name]
    except (KeyError, TypeError):
        raise TargetError(f"unknown target {name!r}; known targets: {', '.join(TARGETS)}") from None


def target_of_capability(major: int, minor: int) -> Target:
    """The target that a CUDA device of compute capability ``major.minor`` runs.

    Raises:
        TargetError: no target of this project fits that device.
    """
    for target in TARGETS.values():
        if target.capability == (major, minor):
            return target
    known = ", ".join(f"{t.name} ({t.chips})" for t in TARGETS.values())
    raise TargetError(f"no target for compute capability {major}.{minor}; supported: {known}")
