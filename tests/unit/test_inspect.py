"""The issue model: parsing, control flow, and cycles on machine code written by hand; then on a compiled kernel."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from nvfp4dsl import cubin, jit
from nvfp4dsl.cli import main
from nvfp4dsl.config import GemmSpec, TileConfig, plan
from nvfp4dsl.errors import InspectError
from nvfp4dsl.inspect import inspect, issue, predict, rates, report, sass, shapes
from nvfp4dsl.inspect.flow import Graph
from nvfp4dsl.targets import get_device

OMMA = "OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X"


def line(text, stall=1, writes=7, reads=7, waits=0):
    """An instruction as nvdisasm prints it; ``line.address`` counts on."""
    address, line.address = line.address, line.address + 16
    upper = stall << 41 | 1 << 45 | writes << 46 | reads << 49 | waits << 52
    return f"        /*{address:04x}*/    {text} ;    /* 0x{0:016x} */\n    /* 0x{upper:016x} */\n"


def listing(*parts):
    line.address = 0
    lines = [line(*part) if isinstance(part, tuple) else f"{part}:\n" for part in parts]
    return ".text.k:\n" + "".join(lines)


def function(*parts):
    (parsed,) = sass.parse(listing(*parts))
    return parsed


def omma(d, stall=11):
    return (f"{OMMA} R{d}, R200, R204.reuse, R{d}, R208, R209, URZ", stall)


def test_control_codes_are_read_off_their_bits():
    (load,) = function(("@!P0 LDS.128 R4, [R2+0x10]", 4, 2, 5, 0b100001)).instructions
    assert load.guard == "!P0"
    assert (load.opcode, load.name) == ("LDS.128", "LDS")
    assert load.operands == ("R4", "[R2+0x10]")
    assert load.control == sass.Control(stall=4, writes=2, reads=5, waits=(0, 5))
    (plain,) = function(("EXIT", 5)).instructions
    assert plain.control == sass.Control(stall=5, writes=None, reads=None, waits=())
    assert plain.operands == ()


def test_text_without_encodings_is_refused():
    with pytest.raises(InspectError, match="no instruction"):
        sass.parse(".text.k:\n        /*0000*/    EXIT ;\n")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("LDSM.16.M88.4 R4, [R2]", 512),
        ("LDSM.16.MT88.2 R4, [R2]", 256),
        ("LDSM.16.M88 R4, [R2]", 128),
        ("LDS R4, [R2]", 128),
        ("LDS.U8 R4, [R2]", 32),
        ("LDS.128 R4, [R2]", 512),
        ("STS.64 [R2], R4", 256),
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0", (64 + 128) * 32 // 4),
        ("HGMMA.64x32x16.F32.BF16 R24, R4, gdesc[UR4], R24", 32 * 32 // 4),
        ("IADD3 R4, R5, R6, RZ", 0),
    ],
)
def test_shared_memory_bytes(text, count):
    if "gdesc" in text and "R4, gdesc" not in text:
        text = text.replace("gdesc[UR4]", "gdesc[UR4], gdesc[UR6]")
    (instruction,) = function((text,)).instructions
    assert rates.smem_bytes(instruction) == count


def test_mma_rates():
    cases = {
        (f"{OMMA} R0, R1, R2, R0, R3, R4, URZ", 121): (16, (16, 8, 64)),
        ("HMMA.16816.F32.BF16 R0, R4, R8, R0", 90): (6, (16, 8, 16)),
        ("HGMMA.64x256x16.F32.BF16 R24, R4, gdesc[UR8], R24", 90): (128, (64, 256, 16)),
        ("UTCOMMA.4X gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UP0", 100): (None, None),
    }
    for (text, sm), (cycles, shape) in cases.items():
        (instruction,) = function((text,)).instructions
        assert rates.is_mma(instruction)
        assert (rates.mma_cycles(instruction, sm), rates.mma_shape(instruction, sm)) == (cycles, shape)


LOOP = (
    ("MOV R1, R2",),
    ".L_x_1",
    ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1], R2", 2, 0),
    ("@P0 BRA `(.L_x_3)", 5, 7, 7, 1),
    ".L_x_2",
    ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1], R2", 2, 0),
    ("@!P0 BRA `(.L_x_2)", 5, 7, 7, 1),
    ".L_x_3",
    omma(4),
    ("@!P1 BRA `(.L_x_4)", 5),
    omma(8),
    ("@P2 BRA `(.L_x_4)", 5),
    ("STS [R1], R2", 1),
    ".L_x_4",
    ("BRA.U UP0, `(.L_x_1)", 5),
    ".L_x_5",
    omma(4),
    ("EXIT", 5),
)


def test_steady_path_skips_waits_takes_every_mma_and_what_one_lane_does():
    graph = Graph(function(*LOOP))
    assert len(graph.loops) == 2
    (loop,) = graph.innermost(rates.is_mma)
    names = [i.name for block in graph.steady_path(loop, rates.is_mma) for i in block.instructions]
    assert names == ["SYNCS", "BRA", "OMMA", "BRA", "OMMA", "BRA", "STS", "BRA"]


def test_mmas_are_spaced_by_the_tensor_pipe():
    body = [omma(4), omma(8), omma(12), ("BRA `(.L_x_1)", 5)]
    (block,) = [b for b in Graph(function(".L_x_1", *body)).blocks if len(b.instructions) == 4]
    # 16 + 16 + the last one's stall of 11 and the branch's 5, which is 16 again
    assert issue.stall_cycles([block.instructions], 121) == [48]
    slower = [*body[:2], omma(12, stall=15), body[3]]
    assert issue.stall_cycles([function(*slower).instructions], 121) == [16 + 16 + 15 + 5]
    # a block that begins right after another's MMA waits for the pipe
    first, second = function(omma(4, stall=2)).instructions, function(omma(8, stall=2)).instructions
    assert issue.stall_cycles([first, second], 121) == [16, 16]


def test_a_second_warp_fills_what_the_first_leaves_idle():
    path = function(omma(4), ("NOP", 15), ("NOP", 15)).instructions
    assert issue.simulate(path, 121, 1) == 41
    assert issue.simulate(path, 121, 2) == 41
    assert issue.simulate(path, 121, 4) == pytest.approx(64, abs=1)
    assert issue.bounds(path, 121, 4)["tensor"] == 64
    assert issue.bounds(path, 121, 4)["issue"] == 12


def test_exposed_latency_counts():
    load, use = ("LDS R4, [R2]", 1, 0), ("IADD R5, R4, R3", 1, 7, 7, 1)
    waiting = issue.simulate(function(load, use, omma(8, stall=1)).instructions, 121, 1)
    free = issue.simulate(function(load, (use[0], 1), omma(8, stall=1)).instructions, 121, 1)
    assert waiting > rates.latency(function(load).instructions[0])
    assert free == 16


def test_shared_memory_bounds_a_sub_core():
    path = function(*(("LDSM.16.M88.4 R4, [R2]", 1, 0) for _ in range(4)), ("NOP", 1, 7, 7, 1)).instructions
    # 2048 bytes at a quarter of 128 bytes a cycle
    assert issue.bounds(path, 121, 1)["smem"] == 64
    assert issue.simulate(path, 121, 2) == pytest.approx(128, rel=0.1)


def test_k_steps_follow_accumulators_through_moves():
    two = [omma(4), omma(8), (f"{OMMA} R16, R200, R204, R4, R208, R209, URZ",), ("MOV R4, R16",), omma(8)]
    assert report.k_steps(function(*two).instructions) == 2
    assert report.k_steps(function(*two, omma(4)).instructions) == 3
    wgmma = [(f"HGMMA.64x128x16.F32.BF16 R24, gdesc[UR{u}], R24, gsb0",) for u in (4, 8, 12)]
    assert report.k_steps(function(*wgmma).instructions) == 3


@pytest.fixture(scope="module")
def kernel():
    spec, tile = GemmSpec(), TileConfig(128, 128, 128)
    return jit.compile(spec, tile, "sm_121a"), plan(spec, tile, "sm_121a")


def test_a_compiled_kernel(kernel):
    compiled, planned = kernel
    found = inspect(compiled.cubin, planned)
    assert found.sm == 121
    assert found.mma.startswith("OMMA.SF.16864")
    blocks_m, blocks_n = planned.blocks
    assert found.mma_per_kstep == blocks_m * blocks_n
    assert found.mma_per_iteration % found.mma_per_kstep == 0
    assert (found.registers, found.spills, found.stages) == (compiled.meta["registers"], 0, planned.stages)
    assert sum(b.mmas for b in found.blocks) == found.mma_per_iteration
    assert sum(b.instructions for b in found.blocks) == found.instructions_per_iteration
    assert found.cycles_per_mma == pytest.approx(sum(b.cycles for b in found.blocks) / found.mma_per_iteration)
    assert 16 <= found.predicted_cycles_per_mma <= found.cycles_per_mma * 1.3
    # a step reads its A and B codes and scale words once: (2 A + 4 B) ldmatrix of 512 bytes, 3 words a lane
    step = (blocks_m + blocks_n // 2) * 512 + (-(-blocks_m // 2) - (-blocks_n // 4)) * 128
    assert found.smem_bytes_per_mma == pytest.approx(step / (blocks_m * blocks_n))


def test_prediction_scales_with_the_problem(kernel):
    compiled, planned = kernel
    found, card = inspect(compiled.cubin, planned), get_device("GB10")
    big = predict(found, planned, card, 4096, 4096, 4096)
    assert (big.tiles, big.ctas, big.waves) == (1024, 48, 22)
    assert big.bytes == 2 * 4096 * 4096 * 9 // 16 + 2 * 4096 * 4096
    ideal = 2 * 4096**3 / (card.fp4_tflops * 1e6)
    assert ideal < big.predicted_us < 1.5 * ideal
    assert big.bf16_overtakes_at_m is None
    longer = predict(found, planned, card, 4096, 4096, 8192)
    assert longer.compute_us == pytest.approx(2 * big.compute_us, rel=0.1)
    small = predict(found, planned, card, 16, 4096, 4096)
    assert small.bound == "memory"
    assert small.predicted_us > small.memory_us == pytest.approx(small.bytes / 273e3 / shapes.MEMORY_EFFICIENCY)


@pytest.mark.parametrize(
    ("target", "activation", "tile", "warps"),
    [
        ("sm_121a", "nvfp4", "128x128x128", 8),
        ("sm_121a", "nvfp4", "128x128x128-pingpong", 8),
        ("sm_121a", "nvfp4", "8x64x256", 4),
        ("sm_90a", "bf16", "64x128x128", 16),  # two warpgroups side by side, twice: they share K
        ("sm_90a", "bf16", "128x192x128", 12),
        ("sm_90a", "bf16", "256x128x64", 8),
        ("sm_90a", "bf16", "8x16x4096", 16),
    ],
)
def test_warps_that_multiply(target, activation, tile, warps):
    assert plan(GemmSpec(activation=activation), TileConfig.parse(tile), target).mma_warps == warps


def test_tokens_that_the_kernel_quantizes_come_with_16_bits(kernel):
    compiled, planned = kernel
    found, card = inspect(compiled.cubin, planned), get_device("GB10")
    quantizing = replace(planned, spec=replace(planned.spec, quantizes="bf16"))
    more = predict(found, quantizing, card, 16, 2880, 7680).bytes - predict(found, planned, card, 16, 2880, 7680).bytes
    assert more == 16 * 7680 * 2 - 16 * 7680 * 9 // 16


def as_json(*args, status=0):
    result = CliRunner().invoke(main, ["inspect", *map(str, args), "--json"])
    assert result.exit_code == status, (result.output, result.exception)
    return json.loads(result.output)


def test_the_command_prints_one_object(kernel, tmp_path):
    one = as_json("--tile", "128x128x128", "--mnk", "512,512,512", "--device", "gb10")
    wanted = {"target", "tile", "registers", "spills", "stages", "predicted_peak_fraction", "blocks"}
    wanted |= {"omma_per_kstep", "other_per_omma", "cycles_per_omma", "smem_bytes_per_omma"}
    assert wanted <= set(one)
    assert one["target"] == "sm_121a"
    assert one["omma_per_kstep"] == 16
    assert "model" in one["note"]
    assert one["prediction"]["tiles"] == 16
    file = tmp_path / "own.cubin"
    file.write_bytes(kernel[0].cubin)
    other = as_json("--cubin", f"theirs={file}")
    assert (other["name"], other["stages"], other["tile"]) == ("theirs", None, None)
    assert other["cycles_per_omma"] == one["cycles_per_omma"]
    both = as_json("--tile", "128x128x128", "--beside", f"theirs={file}")
    assert [row["name"] for row in both["kernels"]] == ["nvfp4dsl", "theirs"]
    table = CliRunner().invoke(main, ["inspect", "--cubin", str(file)]).output
    assert "not a measurement" in table


def test_bad_input(tmp_path):
    junk = tmp_path / "junk.cubin"
    junk.write_bytes(b"not a cubin")
    assert as_json("--cubin", junk, status=1)["error"] == "CompileError"
    assert as_json("--device", "GTX 480", "--mnk", "1,2,3", status=1)["error"] == "TargetError"
    for lone in (["--mnk", "1,2,3"], ["--device", "GB10"]):
        assert CliRunner().invoke(main, ["inspect", *lone]).exit_code == 2
    assert as_json("--device", "H200", "--mnk", "1,2,16", status=1)["error"] == "InspectError"
    assert as_json("--device", "GB10", "--mnk", "1,2,17", status=1)["error"] == "OperandError"
    with pytest.raises(InspectError, match="no loop"):
        report.main_loop_of([function(("EXIT",))])
    assert cubin.nvdisasm_path()


@pytest.mark.parametrize("tile", ["128x128x128", "128x128x256"])
def test_the_main_loop_meets_its_bar(tile):
    """Of the issue peak 0.95, by one warp alone and with the others; NVIDIA's example takes 17.2 and 16.8 cycles."""
    found = as_json("--tile", tile)
    assert found["predicted_peak_fraction"] >= 0.95
    assert found["one_warp_fraction"] >= 0.95
    assert found["cycles_per_omma"] <= 16.84
    assert found["spills"] == 0
