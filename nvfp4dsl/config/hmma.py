"""How long an HMMA tile takes (:mod:`nvfp4dsl.config.mixed_input`), by the rates of the card, and the choice by that.

Nothing of this was measured on a card that has no other inner loop: it is the arithmetic of published rates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import replace

from nvfp4dsl.config.spec import MMA_K, MMA_M, MMA_N, TileConfig
from nvfp4dsl.layouts import ceil_div, round_up
from nvfp4dsl.targets import DEVICES, Device, Target

#: what :func:`choose` takes where legal, split as it says; the first is the default.
TILES = tuple(
    TileConfig(m, n, k)
    for m, n, k in (
        (64, 128, 64),
        (16, 128, 128),
        (32, 128, 128),
        (64, 128, 128),
        (128, 128, 64),
        (256, 128, 64),
        (128, 256, 64),
        (32, 64, 128),
        (64, 64, 128),
        (128, 64, 64),
    )
)
#: CTAs of a cluster that may share K where there are clusters.
SPLITS = (1, 2, 4, 8)
#: multiply-adds of an MMA's k16, and the cycles that a sub-core's tensor pipe takes for one m16n8k16 with fp32
#: accumulators, by target: how far apart ptxas puts independent ones. A card whose published rate is lower takes more.
MMA_MACS, MMA_CYCLES = MMA_M * MMA_N * 16, {"sm_90a": 6.0, "sm_100a": 8.0, "sm_120a": 16.0, "sm_121a": 16.0}
SUB_CORES = 4
#: share of the tensor pipe's rate and of the memory's bandwidth that kernels reach; bytes a cycle that an SM draws from
#: L2 while all of them do, and stores; microseconds of a launch with its first loads, and of a tile beside its loop.
TENSOR_EFFICIENCY, MEMORY_EFFICIENCY, L2_BYTES, STORE_BYTES = 0.95, 0.9, 32, 16
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


def estimate_us(tile: TileConfig, m: int, n: int, k: int, device: Device, sms: int) -> float:
    """A model of the time for ``m`` tokens and an ``n`` x ``k`` weight: the longest of what the tensor pipes take in
    rounds of CTAs, of reads from L2, and of memory traffic; and a tenth of the others, which never hide entirely."""
    row_tiles, token_tiles = ceil_div(n, tile.n), ceil_div(m, tile.m)
    tiles, clusters = row_tiles * token_tiles, sms // tile.split
    if tile.split > 1 and tiles > clusters:
        return math.inf  # clusters that split K must all run at once
    cycles_us = 1e-3 / device.clock_ghz
    macs = tile.m * tile.n * round_up(ceil_div(k, tile.split), tile.k)
    loop = macs / MMA_MACS / SUB_CORES * mma_cycles(device) / TENSOR_EFFICIENCY
    store = tile.m * tile.n * 2 / STORE_BYTES
    add = 0.6 + tile.m * tile.n * 4 / STORE_BYTES * cycles_us if tile.split > 1 else 0
    compute = ceil_div(tiles, clusters) * ((loop + store) * cycles_us + TILE_US + add)
    steps = ceil_div(k, MMA_K)
    reads = tiles * steps * (tile.n * STEP_BYTES + tile.m * MMA_K * 2)
    l2 = reads / (min(sms, tiles * tile.split) * L2_BYTES) * cycles_us + TILE_US
    moved = n * steps * STEP_BYTES + 2 * m * (k + n)
    parts = (compute, l2, moved / (device.memory_gbps * MEMORY_EFFICIENCY) * 1e-3)
    return LAUNCH_US + 0.9 * max(parts) + 0.1 * sum(parts)


def choose(legal: Iterable[TileConfig], m: int, n: int, k: int, target: Target, sms: int) -> TileConfig:
    """Of the ``legal`` tiles, and into how many parts K is split, the least estimated time; of equals, the first."""
    device = device_like(target, sms)
    splits = [split for split in SPLITS if split <= target.max_cluster]
    candidates = (replace(tile, split=split) for tile, split in itertools.product(legal, splits))
    return min(candidates, key=lambda tile: estimate_us(tile, m, n, k, device, sms))
