"""From a main loop to the time of a problem on a card: waves, bytes, and who would be faster in bf16."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from nvfp4dsl.config import FLOAT_BYTES, GemmSpec, Plan, hmma, wgmma
from nvfp4dsl.constants import BLOCK
from nvfp4dsl.errors import InspectError
from nvfp4dsl.formats import check_k
from nvfp4dsl.inspect.report import NOTE, Report
from nvfp4dsl.layouts import ceil_div, round_up
from nvfp4dsl.targets import Device

#: bytes of an NVFP4 element: half a byte of code and its share of a block scale.
NVFP4_BYTES = 0.5 + 1 / BLOCK
#: share of the vendor's memory bandwidth that a streaming kernel reaches (4.3 of 4.8 TB/s on an H200).
MEMORY_EFFICIENCY = 0.9
#: share of the dense bf16 peak that cuBLAS reaches (790 of 989 TFLOP/s on an H200).
BF16_EFFICIENCY = 0.8
#: share of the tensor pipe's rate, and of issue slots, that main loops reach: wgmma kernels on an H200, and HMMA.
TENSOR_EFFICIENCY, HMMA_EFFICIENCY, ISSUE_EFFICIENCY = 0.975, 0.925, 0.525
#: GHz that a card holds under tensor load, where that is known to be less than its boost clock.
LOAD_CLOCK_GHZ = {"H200": 1.755}
#: microseconds of a bf16 GEMM's call before its first loads have landed.
BF16_LAUNCH_US = 2.2
#: bytes of output that a multiprocessor stores a cycle, bytes that it draws from L2 while all of them do.
STORE_BYTES_PER_CLOCK, L2_BYTES_PER_CLOCK = 16, 33
#: largest M that the search for the point where bf16 overtakes looks at.
MAX_M = 1 << 16


@dataclass(frozen=True)
class Prediction:
    """The model's figures for one problem on one card.

    Attributes:
        device, m, n, k: what was asked.
        tiles, ctas, waves: tasks (output tiles, times the CTAs that split K); CTAs that run at a time; tasks of each.
        bytes: read and written once.
        compute_us, l2_us, memory_us: what each would take alone, without the launch.
        bound: which of them is the longest.
        predicted_us: launch, fill, and the longest.
        bf16_us: the same work by a good bf16 GEMM.
        bf16_overtakes_at_m: least M from which on that is faster; None if it never is.
    """

    device: str
    m: int
    n: int
    k: int
    tiles: int
    ctas: int
    waves: int
    bytes: int
    compute_us: float
    l2_us: float
    memory_us: float
    bound: str
    predicted_us: float
    tflops: float
    bf16_us: float
    bf16_overtakes_at_m: int | None

    def as_json(self) -> dict[str, Any]:
        """A flat mapping."""
        return {**asdict(self), "note": NOTE}


def predict(report: Report, plan: Plan, device: Device, m: int, n: int, k: int) -> Prediction:
    """What ``M x N x K`` takes with this kernel on ``device``. A model; nothing is measured.

    Raises:
        InspectError: the rate of the kernel's MMA is unknown.
        OperandError: K is not a multiple of 16.
    """
    check_k(k)
    parts = _parts(report, plan, device, m, n, k)
    tiles, ctas, waves = _waves(plan, device, m, n)
    total, bf16 = _total_us(parts, ctas, device), bf16_us(device, m, n, k)
    return Prediction(
        device=device.name,
        m=m,
        n=n,
        k=k,
        tiles=tiles,
        ctas=ctas,
        waves=waves,
        bytes=round(_bytes(plan.spec, m, n, k)),
        compute_us=parts["compute"],
        l2_us=parts["l2"],
        memory_us=parts["memory"],
        bound=max(parts, key=parts.__getitem__),
        predicted_us=total,
        tflops=2 * m * n * k / total * 1e-6,
        bf16_us=bf16,
        bf16_overtakes_at_m=_overtaken(report, plan, device, n, k),
    )


def bf16_us(device: Device, m: int, n: int, k: int) -> float:
    """The same problem with bf16 weights, by a GEMM that reaches the usual share of the card's peaks."""
    memory = 2 * (m * k + n * k + m * n) / (device.memory_gbps * MEMORY_EFFICIENCY) * 1e-3
    compute = 2 * m * n * k / (device.bf16_tflops * BF16_EFFICIENCY) * 1e-6
    return BF16_LAUNCH_US + max(memory, compute)


def _total_us(parts: dict[str, float], ctas: int, device: Device) -> float:
    return wgmma.launch_us(ctas / device.sms) + max(parts.values())


def _parts(report: Report, plan: Plan, device: Device, m: int, n: int, k: int) -> dict[str, float]:
    """Microseconds of each resource."""
    if report.mma_shape is None or report.mma_cycles is None:
        raise InspectError(f"the rate of {report.mma} on sm_{report.sm} is unknown, so no time can be predicted")
    tile, clock = plan.tile, LOAD_CLOCK_GHZ.get(device.name, device.clock_ghz)
    tasks, ctas, waves = _waves(plan, device, m, n)
    resident = ceil_div(ctas, device.sms)
    mmas = tile.m * tile.n * round_up(ceil_div(k, tile.split), tile.k) / math.prod(report.mma_shape) / report.mma_pipes
    issue = report.bounds["issue"] / report.bounds["tensor"] * report.mma_cycles / ISSUE_EFFICIENCY
    cycles, efficiency = report.cycles_per_mma_with(resident), TENSOR_EFFICIENCY
    if report.mma.startswith("HMMA"):
        cycles = max(cycles, hmma.mma_cycles(device))  # GeForce cards have half the rate of their instruction set
        efficiency = HMMA_EFFICIENCY
    loop = resident * mmas * max(cycles / efficiency, issue)
    outputs = resident * tile.m * tile.n
    store = max(outputs * FLOAT_BYTES[plan.spec.out_dtype] / STORE_BYTES_PER_CLOCK, report.tile_overhead_cycles)
    sums_us = wgmma.SHARED_OUTPUT_US * outputs / 16384 if tile.split > 1 else 0.0
    wave = (loop + store) / clock * 1e-3 + wgmma.TILE_US + sums_us
    operands = tasks / tile.split * (_x_bytes(plan.spec, tile.m, k) + tile.n * k * NVFP4_BYTES)
    return {
        "compute": waves * wave,
        # on an H200 never the limit of a single wave, whose CTAs all read the same tokens at about the same time
        "l2": operands / (device.sms * L2_BYTES_PER_CLOCK * clock) * 1e-3 + wgmma.TILE_US if waves > 1 else 0.0,
        "memory": _bytes(plan.spec, m, n, k) / (device.memory_gbps * MEMORY_EFFICIENCY) * 1e-3,
    }


def _waves(plan: Plan, device: Device, m: int, n: int) -> tuple[int, int, int]:
    """(tasks, CTAs that run at a time, tasks of the busiest of them); a task is a CTA's part of an output tile."""
    tile = plan.tile
    tasks = ceil_div(m, tile.m) * ceil_div(n, tile.n) * tile.split
    places = device.sms * plan.ctas_per_sm
    if tile.split > 1 and device.target == "sm_90a":
        places = places * wgmma.RESIDENT[tile.split] // wgmma.RESIDENT[1]
    ctas = min(tasks, places)
    return tasks, ctas, ceil_div(tasks, ctas)


def _x_bytes(spec: GemmSpec, m: int, k: int) -> float:
    return m * k * (NVFP4_BYTES if spec.activation == "nvfp4" and not spec.quantizes else 2)


def _bytes(spec: GemmSpec, m: int, n: int, k: int) -> float:
    return _x_bytes(spec, m, k) + n * k * NVFP4_BYTES + m * n * FLOAT_BYTES[spec.out_dtype]


def _overtaken(report: Report, plan: Plan, device: Device, n: int, k: int) -> int | None:
    """Least multiple of the tile's M from which on bf16 stays ahead, looked for by doubling and halving."""

    def behind(m: int) -> bool:
        ctas = _waves(plan, device, m, n)[1]
        return _total_us(_parts(report, plan, device, m, n, k), ctas, device) > bf16_us(device, m, n, k)

    step, high = plan.tile.m, plan.tile.m
    while high <= MAX_M and not behind(high):
        high *= 2
    if high > MAX_M:
        return None
    low = high // 2
    while high - low > step:
        middle = (low + high) // 2 // step * step
        low, high = (low, middle) if behind(middle) else (middle, high)
    return high
