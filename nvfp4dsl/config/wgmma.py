"""How long a WGMMA tile takes on an H200 (:mod:`nvfp4dsl.config.mixed_input`), and the choice by that."""

from __future__ import annotations

import math
from dataclasses import replace

from nvfp4dsl.config.spec import TileConfig
from nvfp4dsl.layouts import FRAGMENT_K, ceil_div

#: of CTAs that share K.
SPLITS = (1, 2, 3, 4, 5, 6, 7, 8)
#: what :func:`choose` takes, split as it says; the first is the default.
TILES = (
    TileConfig(64, 128, 128),
    TileConfig(16, 64, 128),
    TileConfig(32, 64, 128),
    TileConfig(64, 64, 128),
    TileConfig(16, 192, 128),
    TileConfig(32, 192, 128),
    TileConfig(64, 192, 128),
    TileConfig(16, 128, 128),
    TileConfig(32, 128, 128),
    TileConfig(96, 128, 128),
    TileConfig(128, 128, 128),
    TileConfig(128, 192, 128),
    TileConfig(176, 128, 64),
    TileConfig(192, 128, 64),
    TileConfig(256, 128, 64),
    TileConfig(192, 192, 64),
)
#: most tokens of a tile whose K :func:`choose` splits: beyond, adding the sums takes longer than it saves.
MAX_SPLIT_TOKENS = 128
#: H200, microseconds a step of 64 k (docs/measured.md), by tokens and rows.
STEP_US = {
    (16, 64): 0.072,
    (32, 64): 0.082,
    (64, 64): 0.115,
    (16, 128): 0.140,
    (32, 128): 0.160,
    (64, 128): 0.200,
    (96, 128): 0.245,
    (128, 128): 0.284,
    (176, 128): 0.394,
    (192, 128): 0.430,
    (256, 128): 0.560,
    (16, 192): 0.212,
    (32, 192): 0.232,
    (64, 192): 0.291,
    (128, 192): 0.440,
    (192, 192): 0.640,
}
#: H200, microseconds: of a call; what it takes more where all SMs work; of a tile; of 16384 outputs of it, and what
#: these take more where CTAs share K.
LAUNCH_US, BUSY_US, TILE_US, OUTPUT_US, SHARED_OUTPUT_US = 0.2, 2.1, 1.2, 1.1, 1.9
#: H200, CTAs that run at a time, of 132, by the size of their clusters: not every group of SMs is a multiple of it.
RESIDENT = {1: 132, 2: 132, 3: 117, 4: 120, 5: 110, 6: 102, 7: 105, 8: 120}


def estimate_us(tile: TileConfig, m: int, n: int, k: int, sms: int) -> float:
    """A model of the time for ``m`` tokens and an ``n`` x ``k`` weight on ``sms`` multiprocessors of an H200.

    Rounds of CTAs, each as long as its k steps and its outputs take in short calls. Good to a tenth or so for these;
    long ones take up to a fourth more, much the same for all tiles. Clusters that split K must all run at once:
    infinite where they do not.
    """
    tiles = ceil_div(m, tile.m) * ceil_div(n, tile.n)
    at_a_time = max(1, RESIDENT[tile.split] * sms // RESIDENT[1] // tile.split)
    if tile.split > 1 and tiles > at_a_time:
        return math.inf
    steps = ceil_div(k, tile.k * tile.split) * (tile.k // FRAGMENT_K)
    round_us = steps * STEP_US[tile.m, tile.n] + TILE_US
    round_us += tile.m * tile.n / 16384 * (OUTPUT_US + (SHARED_OUTPUT_US if tile.split > 1 else 0.0))
    return launch_us(tiles * tile.split / sms) + ceil_div(tiles, at_a_time) * round_us


def launch_us(ctas: float) -> float:
    """What a call takes before its CTAs, so many an SM, have data: the more of them start, the longer each waits."""
    return LAUNCH_US + BUSY_US * min(ctas, 1.0) ** 2


def choose(m: int, n: int, k: int, sms: int) -> TileConfig:
    """The tile, and into how many parts K is split, with the least estimated time."""
    candidates = (
        replace(tile, split=split) for tile in TILES for split in (SPLITS if tile.m <= MAX_SPLIT_TOKENS else SPLITS[:1])
    )
    return min(candidates, key=lambda tile: estimate_us(tile, m, n, k, sms))
