"""Targets, legality and the shared-memory plan."""

import dataclasses
import itertools

import pytest

from nvfp4dsl.config import TILES, GemmSpec, TileConfig, legal, legal_tiles, nearest, omma, plan, total_bytes, wgmma
from nvfp4dsl.config.omma import LAUNCH_REGISTERS, MAX_ACCUMULATORS, MMA_REGISTERS, PRODUCER_REGISTERS, PRODUCER_WARPS
from nvfp4dsl.config.quantize import QuantizeSpec, QuantizeTile
from nvfp4dsl.config.spec import MMA_WARPS
from nvfp4dsl.errors import SpecError, TargetError, TileError
from nvfp4dsl.targets import DEVICES, TARGETS, get_target, target_of_capability

SM12X = ("sm_120a", "sm_121a")


def test_every_device_names_a_target():
    for device in DEVICES:
        assert device.target in TARGETS


def test_unknown_target_is_refused_with_the_known_ones():
    with pytest.raises(TargetError, match="sm_121a"):
        get_target("sm_89")
    with pytest.raises(TargetError, match=r"8\.9"):
        target_of_capability(8, 9)


@pytest.mark.parametrize("name", TARGETS)
def test_capability_finds_the_target_again(name):
    assert target_of_capability(*TARGETS[name].capability) is TARGETS[name]


def test_registers_that_change_hands_are_there():
    """setmaxnreg never wakes a warp whose registers nobody gives back."""
    after = PRODUCER_WARPS * PRODUCER_REGISTERS + MMA_WARPS * MMA_REGISTERS
    assert after <= (PRODUCER_WARPS + MMA_WARPS) * LAUNCH_REGISTERS


@pytest.mark.parametrize("target", SM12X)
@pytest.mark.parametrize("tile", TILES["nvfp4"], ids=str)
@pytest.mark.parametrize("out_dtype", ["bf16", "fp16", "fp32"])
def test_shipped_tiles_are_legal_and_fill_shared_memory(target, tile, out_dtype):
    spec = GemmSpec(out_dtype=out_dtype)
    assert legal(spec, tile, target) == []
    planned = plan(spec, tile, target)
    capacity = get_target(target).smem_per_block
    assert planned.smem_bytes <= capacity
    one_more = dataclasses.replace(tile, stages=planned.stages + 1)
    assert any(str(capacity) in reason for reason in legal(spec, one_more, target))


def test_stage_count_includes_barriers_and_alignment():
    """128x128x128 with bf16 output: 5 stages and one store buffer are the 101,376 bytes to the last one."""
    planned = plan(GemmSpec(), TileConfig(128, 128, 128), "sm_121a")
    assert (planned.stages, planned.epilogue_stages, planned.smem_bytes) == (5, 1, 101_376)
    assert planned.smem[0].name == "barriers"
    assert planned.smem[0].bytes == 2 * 5 * 8
    # 80 bytes of barriers push the first buffer to the next 1024: forgetting that is how tiles overflow
    assert planned.smem_bytes == 1024 + sum(field.bytes for field in planned.smem[1:])
    assert total_bytes(planned.smem[:1]) == 80


@pytest.mark.parametrize(
    ("tile", "words"),
    [
        (TileConfig(256, 256, 128), [str(MAX_ACCUMULATORS), "256"]),
        (TileConfig(128, 128, 256, stages=3), ["101376", "bytes"]),
        (TileConfig(96, 128, 128), ["M=96", "64"]),
        (TileConfig(128, 96, 128), ["N=96", "128"]),
        (TileConfig(128, 128, 32), ["K=32", "64"]),
        (TileConfig(128, 128, 128, stages=1), ["1 stages"]),
        (TileConfig(32, 64, 128), ["32x64", "8, 16 tokens"]),
        (TileConfig(8, 256, 128), ["8x256", "128 weight rows"]),
        (TileConfig(128, 128, 128, split=3), ["split=3"]),
    ],
    ids=str,
)
def test_illegal_tiles_say_why(tile, words):
    reasons = legal(GemmSpec(), tile, "sm_121a")
    assert reasons
    with pytest.raises(TileError) as error:
        plan(GemmSpec(), tile, "sm_121a")
    assert error.value.reasons == reasons
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("out_dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("tile", wgmma.TILES, ids=str)
def test_whatever_split_wgmma_may_be_chosen_with_is_legal(tile, out_dtype):
    splits = wgmma.SPLITS if tile.m <= wgmma.MAX_SPLIT_TOKENS else (1,)
    for split in splits:
        assert legal(GemmSpec("bf16", out_dtype=out_dtype), dataclasses.replace(tile, split=split), "sm_90a") == []


@pytest.mark.parametrize(
    ("tile", "words"),
    [
        (TileConfig(96, 64, 128), ["96x64x128", "up to 64 tokens"]),
        (TileConfig(16, 64, 64), ["16x64x64", "K=128"]),
        # groups of warps that share K wait for each other for ever where each keeps a stage and there is no other
        (TileConfig(16, 128, 128, stages=2), ["2 stages", "4 to 8"]),
        (TileConfig(16, 64, 128, stages=4), ["4 stages", "8 to 16"]),
        # and must not meet in a stage
        (TileConfig(16, 128, 128, stages=5), ["5 stages", "2 groups"]),
        (TileConfig(64, 64, 128, split=2, stages=10), ["10 stages", "4 groups"]),
        (TileConfig(128, 128, 128, split=2, stages=6), ["shared memory"]),
        (TileConfig(256, 128, 64, split=2), ["128 fp32 accumulator registers", "at most 96"]),
        (TileConfig(256, 192, 64), ["128 fp32 accumulator registers", "at most 96"]),
        (TileConfig(16, 128, 128, split=9), ["split=9"]),
    ],
    ids=str,
)
def test_illegal_w4a16_tiles_say_why(tile, words):
    with pytest.raises(TileError) as error:
        plan(GemmSpec("bf16"), tile, "sm_90a")
    for word in words:
        assert word in str(error.value)


def test_the_whole_tile_space_is_there():
    """Every (M, N) of 64, 128, 256 whose accumulators fit, with every K that leaves two stages; decode; ping-pong."""
    admitted = {str(tile) for tile in legal_tiles(GemmSpec(), "sm_121a")}
    extents = (64, 128, 256)
    cooperative = {(m, n) for m, n in itertools.product(extents, extents) if m * n <= 32768}
    assert {f"{m}x{n}x{k}" for m, n in cooperative for k in (64, 128)} <= admitted
    assert {f"{m}x{n}x{k}" for m, n in cooperative if m + n <= 256 for k in (256,)} <= admitted
    assert {
        f"{m}x{n}x{k}" for n, ms in {128: (8, 16, 32), 64: (8, 16)}.items() for m in ms for k in (64, 128, 256)
    } <= (admitted)
    assert {f"{m}x{n}x64-pingpong" for m, n in cooperative if m * n <= 16384} <= admitted
    assert {"8x64x256/8", "64x128x128/4", "128x128x64/2"} <= admitted
    assert not any("/" in tile and "pingpong" in tile for tile in admitted)


def test_an_illegal_tile_comes_with_the_nearest_legal_ones():
    for wrong, near in (("128x256x256", "128x256x128"), ("100x128x128", "128x128x128"), ("32x64x128", "32x128x128")):
        with pytest.raises(TileError, match=f"Nearest legal tiles: .*{near}"):
            plan(GemmSpec(), TileConfig.parse(wrong), "sm_121a")
    assert nearest(GemmSpec(), TileConfig(64, 64, 64), "sm_120a", 1) == (TileConfig(64, 64, 64),)


@pytest.mark.parametrize("sms", [48, 170])
def test_the_chosen_w4a4_tile_suits_the_shape(sms):
    shapes = list(itertools.product((1, 8, 17, 32, 64, 100, 512, 4096), (512, 2880, 7680, 14336), (80, 2880, 14336)))
    for m, n, k in shapes:
        tile = omma.choose(m, n, k, sms)
        assert all(legal(GemmSpec(out_dtype=out), tile, "sm_121a") == [] for out in ("bf16", "fp16", "fp32"))
        assert m > 32 or tile.m <= 32, "few tokens take a decode tile"
        assert tile.m // 2 < max(m, 8), "a tile half empty has a smaller neighbour"
        assert tile.split == 1 or -(-m // tile.m) * -(-n // tile.n) < sms, "K is split only where tiles are few"
        assert omma.cycles(tile, m, n, k, sms) <= omma.cycles(omma.TILES[0], m, n, k, sms) or m <= 64
    assert omma.choose(8, 512, 14336, sms).split > 1
    assert omma.choose(8192, 8192, 8192, sms).m >= 128


@pytest.mark.parametrize("target", ["sm_90a", "sm_100a"])
def test_targets_without_a_kernel_say_so(target):
    assert any("nvfp4" in reason for reason in legal(GemmSpec(), TILES["nvfp4"][0], target))


def test_spec_refuses_unknown_types():
    refused = [(GemmSpec, name, "int8") for name in ("activation", "out_dtype", "bias", "quantizes")]
    refused += [(QuantizeSpec, name, "int8") for name in ("dtype", "source", "layout")]
    refused += [(GemmSpec, "out_dtype", ["bf16"])]
    for kind, field, value in refused:
        with pytest.raises(SpecError, match=rf"{field} .*{value}.* is not offered.*; allowed: ") as caught:
            kind(**{field: value})
        assert isinstance(caught.value, ValueError)
    with pytest.raises(SpecError, match="mode 'bf16'; allowed: None"):
        GemmSpec(activation="bf16", quantizes="fp16")


def test_tile_text_round_trips():
    named = (TileConfig(128, 128, 128, 3), TileConfig(64, 128, 64, 4, split=2), TileConfig(128, 64, 128, pingpong=True))
    for tile in (*TILES["nvfp4"], *TILES["bf16"], *named):
        assert TileConfig.parse(str(tile)) == tile
    for text in ("128", "128x128", "axbxc", "1x2x3x4x5", "1x2x3/", "1x2x3-pong", f"{'9' * 5000}x128x128"):
        with pytest.raises(TileError, match="MxNxK"):
            TileConfig.parse(text)
    with pytest.raises(TileError, match="BLOCKSxROWS"):
        QuantizeTile.parse(f"{'9' * 5000}x1/256")


def test_extents_of_a_tile_are_positive_ints():
    for text, name in (("64x64x64/0", "split"), ("64x64x64x0", "stages"), ("0x64x64", "m"), ("64x64x999999999", "k")):
        with pytest.raises(TileError, match=f"{name} of a tile is "):
            TileConfig.parse(text)
    for value in ("64", 64.0, True, None, -64, 10**400):
        with pytest.raises(TileError, match="n of a tile is "):
            TileConfig(64, value, 64)


@pytest.mark.parametrize("asked", [legal, plan])
def test_text_stands_for_a_tile_and_nothing_else_does(asked):
    assert asked(GemmSpec(), "64x128x128", "sm_121a") == asked(GemmSpec(), TileConfig(64, 128, 128), "sm_121a")
    for tile in (128, (128, 128, 128), [128, 128, 128], QuantizeTile()):
        with pytest.raises(TileError, match=r"give a TileConfig, or text, e\.g\. '128x128x128'"):
            asked(GemmSpec(), tile, "sm_121a")
