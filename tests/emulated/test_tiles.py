"""The whole tile space of the W4A4 kernel, on shapes that no tile divides, bit for bit against the model."""

import random

import pytest
import torch
from split_model import gemm_model

import nvfp4dsl as nv
from nvfp4dsl import emulator, reference
from nvfp4dsl.config import GemmSpec, TileConfig, legal_tiles
from nvfp4dsl.emulator.faults import DataRace
from nvfp4dsl.errors import TileError
from nvfp4dsl.testing import assert_close, bits_differing

TARGETS = ("sm_120a", "sm_121a")
SEED = 20260
EVERY = [(target, tile) for target in TARGETS for tile in legal_tiles(GemmSpec(out_dtype="fp32"), target)]
SAMPLE = random.Random(SEED).sample(EVERY, 8)
NORM, ELEMENT = {torch.bfloat16: 2e-3, torch.float32: 1e-5}, 4


def shapes(tile):
    """Extents that the tile's own do not divide: a little more than a tile, a model's N, a model's K."""
    return (tile.m + 3, tile.n + 40, 336), (3, 2880, 80), (3, tile.n + 8, 7680)


def run(target, tile, shape, operands, out_dtype=torch.float32, seed=0, max_ctas=None):
    a, b = operands(*shape)
    with nv.emulate(target, seed=seed, max_ctas=max_ctas) as emulation:
        y = nv.mm(nv.prepare(a, target), nv.prepare(b, target), out_dtype=out_dtype, tile=tile)
    (done,) = emulation.runs
    assert done.kernel.meta["spills"] == 0
    return y, a, b, done


def check(target, tile, shape, operands, out_dtype=torch.float32, **options):
    y, a, b, _ = run(target, tile, shape, operands, out_dtype, **options)
    assert bits_differing(y, gemm_model(a, b, out_dtype=out_dtype, tile=tile)) == 0
    magnitude = reference.dequantize(a, torch.float64).abs() @ reference.dequantize(b, torch.float64).abs().mT
    tolerance = NORM[out_dtype]
    assert_close(y, reference.gemm(a, b), norm=tolerance, element=ELEMENT * tolerance, magnitude=magnitude)


def names(rows):
    return [f"{target}-{tile}" for target, tile in rows]


@pytest.mark.parametrize(("target", "tile"), SAMPLE, ids=names(SAMPLE))
def test_sampled_tiles(target, tile, random_operands):
    """Which shape follows from the tile's place in the sample."""
    place = SAMPLE.index((target, tile))
    check(target, tile, shapes(tile)[place % 3], random_operands, seed=SEED + place)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "tile"), EVERY, ids=names(EVERY))
def test_every_tile(target, tile, random_operands):
    place = EVERY.index((target, tile))
    check(target, tile, shapes(tile)[0], random_operands, torch.bfloat16, seed=place)
    check(target, tile, shapes(tile)[1 + place % 2], random_operands, seed=place)


@pytest.mark.parametrize("tile", ["8x64x256", "16x128x64", "32x128x128"])
@pytest.mark.parametrize("n", [200, 203])
def test_decode_tiles_turn_the_output_round(tile, n, random_operands):
    """Through shared memory where rows are aligned, one by one where not; fewer tokens than the tile, and more."""
    for m in (1, 37):
        check("sm_121a", TileConfig.parse(tile), (m, n, 144), random_operands, torch.bfloat16)


@pytest.mark.parametrize("seed", range(3))
def test_ping_pong_groups_take_turns(seed, random_operands):
    """An odd number of tiles a CTA: one group has a tile more than the other."""
    check("sm_121a", TileConfig.parse("64x64x64-pingpong"), (190, 136, 272), random_operands, seed=seed, max_ctas=1)


@pytest.mark.parametrize("tile", ["8x64x64/4", "64x64x128/2", "128x128x64/8"])
def test_split_k_does_not_depend_on_who_is_last(tile, random_operands):
    tile = TileConfig.parse(tile)
    for seed in range(3):
        check("sm_121a", tile, (tile.m + 3, 136, 336), random_operands, seed=seed, max_ctas=3)


def test_split_k_leaves_its_counters_zero_and_hands_over_in_order(random_operands):
    """The PTX again: counters wrap to zero; a relaxed count, which orders nothing, is a race."""
    *_, done = run("sm_121a", TileConfig.parse("8x64x64/4"), (8, 72, 336), random_operands)
    launch = done.launch
    counted = "atom.acq_rel.gpu.global.inc"
    assert counted in done.kernel.ptx
    again = emulator.run(done.kernel.ptx, launch, seed=1)
    assert again.seconds > 0
    assert not launch.buffer("arrivals").data.any()
    with pytest.raises(DataRace, match="partials"):
        emulator.run(done.kernel.ptx.replace(counted, "atom.relaxed.gpu.global.inc"), launch)


def test_an_illegal_tile_names_the_nearest_legal_ones(random_operands):
    a, b = random_operands(8, 72, 64)
    with (
        nv.emulate("sm_121a"),
        pytest.raises(TileError, match=r"256 fp32 accumulator .*Nearest legal tiles: 128x256x128"),
    ):
        nv.mm(nv.prepare(a, "sm_121a"), nv.prepare(b, "sm_121a"), tile="256x256x128")
