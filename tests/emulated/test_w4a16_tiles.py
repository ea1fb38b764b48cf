"""The tile space of W4A16, on shapes that no tile divides and on few and many k steps: right values, no hang."""

import random
from dataclasses import replace

import pytest
import torch

import nvfp4dsl as nv
from nvfp4dsl import dispatch
from nvfp4dsl.config import GemmSpec, k_limit, legal, legal_tiles, mixed_input, plan
from nvfp4dsl.targets import TARGETS, get_target
from nvfp4dsl.testing import assert_close

SPEC, SEED = GemmSpec("bf16"), 20261
# a stage or less, odd numbers of stages, more than there are stages
K = (16, 80, 128, 208, 320, 848, 4112)


def variants(target, tile):
    """A tile with every inner loop, by itself and with a split drawn from those that are legal; skinny tiles are listed
    with theirs."""
    if tile.k not in mixed_input.TILE_K:
        return [tile]
    every = []
    for loop in mixed_input.mainloops(get_target(target)):
        tiles = [replace(tile, split=split, mainloop=loop) for split in mixed_input.SPLITS]
        built = [tile for tile in tiles if not legal(SPEC, tile, target)]
        every += [*built[:1], *random.Random(f"{SEED} {tile} {loop}").sample(built[1:], min(1, len(built[1:])))]
    return every


EVERY = {
    target: [variant for tile in legal_tiles(SPEC, target) for variant in variants(target, tile)]
    for target in sorted(TARGETS)
}
SAMPLE = [(target, tile) for target in EVERY for tile in random.Random(f"{SEED} {target}").sample(EVERY[target], 2)]
PAIRS = [(target, tile) for target in EVERY for tile in EVERY[target]]


def check(target, tile, k):
    k = min(k, k_limit(tile) or k)
    m, n = min(tile.m, 32) + tile.m // 2 + 1, tile.n + 8
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(m, k, generator=generator).bfloat16()
    weight = nv.quantize(torch.randn(n, k, generator=generator))
    kernel = dispatch.kernel_for(dispatch.linear_spec(n, k, x.dtype, None), tile, target)
    assert kernel.meta["spills"] == 0
    y = torch.full((m, n), float("nan"), dtype=x.dtype)
    # two CTAs, or clusters, for all tiles: rings and buffers go round
    ctas = 2 * tile.split // plan(SPEC, tile, target).ctas_per_sm
    with nv.emulate(target, max_ctas=ctas, seed=SEED):
        operands = dispatch.linear_operands(nv.prepare(weight, target, activation="bf16"))
        dispatch.run(kernel, (x, *operands, None, y))
    dense = nv.dequantize(weight, torch.float64)
    magnitude = x.double().abs() @ dense.abs().mT
    assert_close(y, x.double() @ dense.mT, norm=3e-3, element=5e-3, magnitude=magnitude)


def names(rows):
    return [f"{target}-{tile}" for target, tile in rows]


@pytest.mark.parametrize(("target", "tile"), SAMPLE, ids=names(SAMPLE))
def test_sampled_tiles(target, tile):
    for k in random.Random(f"{SEED} {tile}").sample(K[:-1], 2):
        check(target, tile, k)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "tile"), PAIRS, ids=names(PAIRS))
def test_every_tile(target, tile):
    for k in K:
        check(target, tile, k)
