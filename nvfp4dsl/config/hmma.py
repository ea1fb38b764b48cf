"""How long an HMMA tile takes (:mod:`nvfp4dsl.config.mixed_input`), by the rates of the card, and the choice by that.

Nothing of this was measured on a card that has no other inner loop: it is the arithmetic of published rates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from nvfp4dsl.config.spec import MMA_K, MMA_M, MMA_N, Plan, TileConfig
from nvfp4dsl.config.wgmma import RESIDENT
from nvfp4dsl.layouts import ceil_div, round_up
from nvfp4dsl.targets import DEVICES, Device, Target

#: what :func:`choose` takes where legal, split as it says; the first is the default.
TILES = (
    TileConfig(64, 128, 64),
    TileConfig(32, 128, 128),
    TileConfig(128, 128, 64),
    TileConfig(256, 128, 64),
    TileConfig(32, 64, 128),
)
#: CTAs of a cluster that may share K where there are clusters.
SPLITS = (1, 2, 4, 8)
#: k of an MMA, its multiply-adds, and the cycles that a sub-core's tensor pipe takes for one with fp32 accumulators, by
#: target: how far apart ptxas puts independent ones. A card whose published rate is lower takes more.
MMA_DEPTH, MMA_MACS, MMA_CYCLES = (
    16,
    MMA_M * MMA_N * 16,
    {"sm_90a": 6.0, "sm_100a": 8.0, "sm_120a": 16.0, "sm_121a": 16.0},
)
SUB_CORES, WARPS_A_SUB_CORE = 4, 2
#: issue slots of a k16: to decode an m16k16 of weights, and beside everything else; share of all slots that kernels
#: use; cycles of a k16 in which a warp's MMAs wait (the main loops of :data:`TILES` by the issue model).
DECODE_SLOTS, OTHER_SLOTS, ISSUE_EFFICIENCY, EDGE_CYCLES = 15.5, 6, 0.8, 5
#: tokens and rows of the skinny kernel's largest tile, and cycles of a sub-core for one of its MMAs, by the same model.
SKINNY_TOKENS, SKINNY_ROWS, SKINNY_CYCLES = 32, 16, 50
#: share of the memory's bandwidth that kernels reach; bytes a cycle that an SM draws from L2 while all of them do, and
#: stores; microseconds of a launch with its first loads, and of a tile beside its loop.
MEMORY_EFFICIENCY, L2_BYTES, STORE_BYTES = 0.9, 32, 16
LAUNCH_US, TILE_US = 2.2, 1.2
#: bytes of a row and 64 k of weights.
STEP_BYTES = MMA_K * 9 // 16


def device_like(target: Target, sms: int) -> Device:
    """The known card of ``target`` whose number of multiprocessors is nearest."""
    return min((card for card in DEVICES if card.target == target.name), key=lambda card: abs(card.sms - sms))


def mma_cycles(device: Device) -> float:
    """Cycles of a sub-core's tensor pipe for one MMA: by the instruction set, or more by the card's published rate.

    GeForce cards accumulate in fp32 at half the rate: 32 cycles on an RTX 5090, 16 on an RTX PRO 6000.
    """
    flops_per_clock = device.bf16_tflops * 1e3 / (device.clock_ghz * device.sms * SUB_CORES)
    return max(MMA_CYCLES[device.target], 2 * MMA_MACS / flops_per_clock)


def estimate_us(plan: Plan, m: int, n: int, k: int, device: Device, sms: int) -> float:
    """A model of the time for ``m`` tokens and an ``n`` x ``k`` weight: the longest of what sub-cores take in rounds of
    CTAs, of reads from L2, and of memory traffic; and a tenth of the others, which never hide entirely."""
    tile, (row_blocks, token_blocks) = plan.tile, plan.blocks
    row_tiles, token_tiles = ceil_div(n, tile.n), ceil_div(m, tile.m)
    # of clusters, no card is known to run more than an H200 does
    tiles, clusters = row_tiles * token_tiles, RESIDENT[tile.split] * sms // RESIDENT[1] // tile.split
    if tile.split > 1 and tiles > clusters:
        return math.inf  # clusters that split K must all run at once
    cycles_us, outputs = 1e-3 / device.clock_ghz, tile.m * tile.n
    # a k16 of one warp: its MMAs, or its issue slots; two warps share a sub-core
    mmas = row_blocks * token_blocks
    issue = (DECODE_SLOTS * row_blocks + mmas + token_blocks / 2 + OTHER_SLOTS) / ISSUE_EFFICIENCY
    k16 = WARPS_A_SUB_CORE * max(mmas * mma_cycles(device) + EDGE_CYCLES, issue)
    loop = round_up(ceil_div(k, tile.split), tile.k) // MMA_DEPTH * k16
    add = 0.6 + outputs * 4 / STORE_BYTES * cycles_us if tile.split > 1 else 0
    compute = ceil_div(tiles, clusters) * ((loop + outputs * 2 / STORE_BYTES) * cycles_us + TILE_US + add)
    steps = ceil_div(k, MMA_K)
    reads = tiles * steps * (tile.n * STEP_BYTES + tile.m * MMA_K * 2)
    l2 = reads / (min(sms, tiles * tile.split) * L2_BYTES) * cycles_us + TILE_US
    moved = n * steps * STEP_BYTES + 2 * m * (k + n)
    return _longest(compute, l2, moved, device)


def skinny_us(m: int, n: int, k: int, device: Device, sms: int) -> float:
    """The skinny kernel's time by the same rates, in tiles of 32 tokens: the warps of a CTA split K, so a small weight
    makes more CTAs; but they issue at a third of the rate, and read the weight again every 32 tokens."""
    tiles = ceil_div(n, SKINNY_ROWS) * ceil_div(m, SKINNY_TOKENS)
    cycles_us = 1e-3 / device.clock_ghz
    mmas = ceil_div(k, MMA_DEPTH) * (SKINNY_TOKENS // MMA_N) / SUB_CORES
    compute = ceil_div(tiles, sms) * (mmas * max(SKINNY_CYCLES, mma_cycles(device)) * cycles_us + TILE_US)
    reads = tiles * k * (SKINNY_ROWS * STEP_BYTES / MMA_K + SKINNY_TOKENS * 2)
    moved = n * k * STEP_BYTES / MMA_K + 2 * m * (k + n)
    return _longest(compute, reads / (min(sms, tiles) * L2_BYTES) * cycles_us, moved, device)


def _longest(compute: float, l2: float, moved: float, device: Device) -> float:
    """A call that takes these microseconds of sub-cores and of L2, and moves so many bytes."""
    parts = (compute, l2, moved / (device.memory_gbps * MEMORY_EFFICIENCY) * 1e-3)
    return LAUNCH_US + 0.9 * max(parts) + 0.1 * sum(parts)


def choose(plans: Iterable[Plan], m: int, n: int, k: int, target: Target, sms: int) -> tuple[Plan, bool]:
    """The plan with the least estimated time, of equals the first; and whether it beats the skinny kernel."""
    device = device_like(target, sms)
    best = min(plans, key=lambda plan: estimate_us(plan, m, n, k, device, sms))
    return best, estimate_us(best, m, n, k, device, sms) <= skinny_us(m, n, k, device, sms)
