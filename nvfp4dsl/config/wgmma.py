"""How long a WGMMA tile takes on an H200 (:mod:`nvfp4dsl.config.mixed_input`), and the choice by that."""

from __future__ import annotations

import math
from dataclasses import replace

from nvfp4dsl.config.spec import TileConfig
from nvfp4dsl.layouts import FRAGMENT_K, ceil_div, round_up

#: of CTAs that share K.
SPLITS = (1, 2, 3, 4, 5, 6, 7, 8)
#: what :func:`choose` takes, split as it says; the first is the default.
TILES = (
    TileConfig(64, 128, 128),
    TileConfig(16, 64, 128),
    TileConfig(32, 64, 128),
    TileConfig(64, 64, 128),
    TileConfig(16, 128, 128),
    TileConfig(32, 128, 128),
    TileConfig(96, 128, 128),
    TileConfig(128, 128, 128),
    TileConfig(192, 128, 64),
    TileConfig(256, 128, 64),
)
#: most tokens of a tile whose K :func:`choose` splits: beyond, adding the sums takes longer than it saves.
MAX_SPLIT_TOKENS = 128
#: H200, microseconds a step of 64 k (docs/measured.md), by tokens and rows.
STEP_US = {
    (16, 64): 0.072,
    (32, 64): 0.082,
    (64, 64): 0.115,
    (16, 128): 0.144,
    (32, 128): 0.162,
    (64, 128): 0.203,
    (96, 128): 0.245,
    (128, 128): 0.284,
    (192, 128): 0.430,
    (256, 128): 0.600,
}
#: H200, microseconds: of a call; what it takes more where all SMs work; of a tile; of 16384 outputs of it, and what
#: these take more where CTAs share K.
LAUNCH_US, BUSY_US, TILE_US, OUTPUT_US, SHARED_OUTPUT_US = 0.2, 2.1, 1.2, 1.1, 1.9
#: H200, CTAs that run at a time, of 132, by the size of their clusters: not every group of SMs is a multiple of it.
RESIDENT = {1: 132, 2: 132, 3: 117, 4: 120, 5: 110, 6: 102, 7: 105, 8: 120}
#: H200, bytes a microsecond from L2 to all SMs.
L2_BYTES_PER_US = 7.2e6
#: of the CTAs that :func:`choose` lets load tokens for each other. More are legal, and not measured yet.
CHOSEN_MULTICASTS = (1,)


def estimate_us(tile: TileConfig, m: int, n: int, k: int, sms: int) -> float:
    """A model of the time for ``m`` tokens and an ``n`` x ``k`` weight on ``sms`` multiprocessors of an H200.

    Rounds of CTAs, each as long as its k steps and its outputs take; or the reads of weights and tokens from L2. Good
    to a tenth or so, which is what choosing among tiles needs. Clusters that split K must all run at once: infinite
    where they do not.
    """
    row_tiles = round_up(ceil_div(n, tile.n), tile.multicast)
    tiles, cluster = ceil_div(m, tile.m) * row_tiles, tile.split * tile.multicast
    at_a_time = max(1, RESIDENT[cluster] * sms // RESIDENT[1] // cluster) * tile.multicast
    if tile.split > 1 and tiles > at_a_time:
        return math.inf
    steps = ceil_div(k, tile.k * tile.split) * (tile.k // FRAGMENT_K)
    round_us = steps * STEP_US[tile.m, tile.n] + TILE_US
    round_us += tile.m * tile.n / 16384 * (OUTPUT_US + (SHARED_OUTPUT_US if tile.split > 1 else 0.0))
    rounds = ceil_div(tiles, at_a_time)
    # of a single round, steps were measured as reads let them be
    read_us = tiles * k * (tile.n * 9 / 16 + tile.m * 2 / tile.multicast) / L2_BYTES_PER_US if rounds > 1 else 0.0
    return launch_us(tiles * tile.split / sms) + max(rounds * round_us, read_us + TILE_US)


def launch_us(ctas: float) -> float:
    """What a call takes before its CTAs, so many an SM, have data: the more of them start, the longer each waits."""
    return LAUNCH_US + BUSY_US * min(ctas, 1.0) ** 2


def choose(m: int, n: int, k: int, sms: int) -> TileConfig:
    """The tile, and into how many parts K is split, with the least estimated time."""
    candidates = (
        replace(tile, split=split, multicast=multicast)
        for tile in TILES
        for split in (SPLITS if tile.m <= MAX_SPLIT_TOKENS else SPLITS[:1])
        for multicast in CHOSEN_MULTICASTS
        if split * multicast in RESIDENT
    )
    return min(candidates, key=lambda tile: estimate_us(tile, m, n, k, sms))
