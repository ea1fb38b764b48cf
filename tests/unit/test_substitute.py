"""The stand-in for an OMMA, executed lane by lane on the CPU and compared with exact arithmetic."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from nvfp4dsl.constants import E2M1_VALUES
from nvfp4dsl.emulator.ptx import Immediate, Register, Vector, parse
from nvfp4dsl.emulator.substitute import OMMA, substitute
from nvfp4dsl.errors import TargetError

LANES = np.arange(32)
G, T = LANES // 4, LANES % 4


def module(thread_a: int = 0, thread_b: int = 0, target: str = "sm_121a", mma: str = OMMA, guard: str = "") -> str:
    return f"""
.version 9.4
.target {target}
.address_size 64
.visible .entry one(.param .u64 p)
{{
	.reg .pred %p<1>;
	.reg .b16 %rs<3>;
	.reg .b32 %r<32>;
	mov.b16 %rs0, 0;
	mov.b16 %rs1, {thread_a};
	mov.b16 %rs2, {thread_b};
	{guard}{mma} {{%r0, %r1, %r2, %r3}}, {{%r4, %r5, %r6, %r7}}, {{%r8, %r9}}, {{%r10, %r11, %r12, %r13}},
		{{%r14}}, {{%rs0, %rs1}}, {{%r15}}, {{%rs0, %rs2}};
	ret;
}}
"""


# --- the few instructions of the block, on 32 lanes


def _u32(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(np.uint64).astype(np.uint32)


def _halves(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.float16).reshape(32, 2)


def _e4m3_pair(x: np.ndarray) -> np.ndarray:
    pair = np.stack([x & 0xFF, x >> 8 & 0xFF], -1).astype(np.uint8)
    return torch.from_numpy(pair).view(torch.float8_e4m3fn).to(torch.float16).numpy().view(np.uint32).reshape(32)


def _prmt(a: np.ndarray, b: np.ndarray, selector: int) -> np.ndarray:
    table = np.ascontiguousarray(np.stack([a, b], -1)).view(np.uint8).reshape(32, 8)
    picked = [table[:, selector >> 4 * i & 7] for i in range(4)]
    return np.ascontiguousarray(np.stack(picked, -1)).view(np.uint32).reshape(32)


def _mma_f16(a: list[np.ndarray], b: list[np.ndarray], c: list[np.ndarray]) -> list[np.ndarray]:
    """m16n8k16 by the fragment layout of the PTX ISA, in float64."""
    matrix_a, matrix_b, matrix_c = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    for i in range(4):
        for half in range(2):
            matrix_a[G + 8 * (i % 2), 2 * T + 8 * (i // 2) + half] = _halves(a[i])[:, half]
    for i in range(2):
        for half in range(2):
            matrix_b[2 * T + 8 * i + half, G] = _halves(b[i])[:, half]
    at = [(G + 8 * (i // 2), 2 * T + i % 2) for i in range(4)]
    for i in range(4):
        matrix_c[at[i]] = c[i].view(np.float32)
    d = (matrix_a @ matrix_b + matrix_c).astype(np.float32)
    return [d[at[i]].view(np.uint32) for i in range(4)]


def execute(ptx: str, registers: dict[str, np.ndarray]) -> None:
    """Run the one kernel of a module on 32 lanes; ``registers`` holds and receives uint32 values by name."""
    (kernel,) = parse(ptx).values()

    def read(operand: object) -> np.ndarray:
        if isinstance(operand, Register):
            return registers[operand.name]
        if isinstance(operand, Immediate):
            return np.full(32, operand.value & 0xFFFFFFFF, np.uint32)
        assert operand.name == "%laneid"
        return LANES.astype(np.uint32)

    binary = {"and": np.bitwise_and, "or": np.bitwise_or, "shl": np.left_shift, "shr": np.right_shift, "add": np.add}
    for i in kernel.instructions:
        if i.parts[0] == "ret":
            return
        if i.parts[0] == "mma":
            d, a, b, c = (operand.items if isinstance(operand, Vector) else operand for operand in i.operands)
            values = _mma_f16([read(x) for x in a], [read(x) for x in b], [read(x) for x in c])
            registers.update({x.name: v for x, v in zip(d, values, strict=True)})
            continue
        out, *sources = i.operands
        x = [read(s) for s in sources]
        if i.opcode == "mul.rn.f16x2":
            value = np.ascontiguousarray(_halves(x[0]) * _halves(x[1])).view(np.uint32).reshape(32)
        elif i.opcode == "cvt.rn.f16x2.e4m3x2":
            value = _e4m3_pair(x[0])
        elif i.parts[0] == "prmt":
            value = _prmt(x[0], x[1], int(x[2][0]))
        elif i.parts[0] == "shfl":
            value = x[0][x[1]]
        elif i.parts[0] == "mad":
            value = _u32(x[0].astype(np.uint64) * x[1] + x[2])
        elif i.parts[0] in binary:
            value = binary[i.parts[0]](x[0], x[1])
        else:
            assert i.parts[0] in ("mov", "cvt"), i.opcode
            value = x[0] & (0xFFFF if "u16" in i.parts or "b16" in i.parts else 0xFFFFFFFF)
        registers[out.name] = value


# --- fragments of one OMMA


def fragments(a, sf_a, b, sf_b, c, thread_a: int, thread_b: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A [16, 64], B [8, 64] codes, scale bytes [16, 4], [8, 4], C [16, 8] fp32 to registers. Scale registers of lanes
    that are not asked hold noise."""

    def codes(matrix: np.ndarray, rows: np.ndarray, k: np.ndarray) -> np.ndarray:
        return _u32(sum(matrix[rows, k + i].astype(np.uint64) << 4 * i for i in range(8)))

    def scales(sf: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(sf).view(np.uint32).reshape(-1)

    lane_a, lane_b = rng.integers(0, 2**32, (2, 32)).astype(np.uint32)
    g = np.arange(8)
    lane_a[4 * g + 2 * thread_a], lane_a[4 * g + 2 * thread_a + 1] = scales(sf_a)[:8], scales(sf_a)[8:]
    lane_b[4 * g + thread_b] = scales(sf_b)
    registers = {f"%r{4 + i}": codes(a, G + 8 * (i % 2), 8 * T + 32 * (i // 2)) for i in range(4)}
    registers |= {f"%r{8 + i}": codes(b, G, 8 * T + 32 * i) for i in range(2)}
    registers |= {f"%r{10 + i}": c[G + 8 * (i // 2), 2 * T + i % 2].view(np.uint32) for i in range(4)}
    return registers | {"%r14": lane_a, "%r15": lane_b}


def omma(a, sf_a, b, sf_b, c, thread_a: int = 0, thread_b: int = 0) -> np.ndarray:
    """One OMMA through its stand-in, [16, 8] fp32."""
    registers = fragments(a, sf_a, b, sf_b, c, thread_a, thread_b, np.random.default_rng(1))
    execute(substitute(module(thread_a, thread_b)), registers)
    d = np.zeros((16, 8), np.float32)
    for i in range(4):
        d[G + 8 * (i // 2), 2 * T + i % 2] = registers[f"%r{i}"].view(np.float32)
    return d


def values(codes: np.ndarray, sf: np.ndarray) -> np.ndarray:
    scale = torch.from_numpy(sf & 0x7F).view(torch.float8_e4m3fn).double().numpy()
    return np.array(E2M1_VALUES)[codes] * np.repeat(scale, 16, axis=1)


@pytest.mark.parametrize(("thread_a", "thread_b"), [(0, 0), (1, 0), (0, 3), (1, 2)])
def test_matches_exact_arithmetic(thread_a: int, thread_b: int) -> None:
    rng = np.random.default_rng(7)
    a, b = rng.integers(0, 16, (16, 64)).astype(np.uint8), rng.integers(0, 16, (8, 64)).astype(np.uint8)
    sf_a, sf_b = (rng.integers(0x30, 0x40, (n, 4)).astype(np.uint8) for n in (16, 8))
    c = rng.standard_normal((16, 8)).astype(np.float32)
    exact = values(a, sf_a) @ values(b, sf_b).T + c
    np.testing.assert_allclose(omma(a, sf_a, b, sf_b, c, thread_a, thread_b), exact, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("probe", range(0, 64, 7))
def test_every_code_and_scale_is_exact(probe: int) -> None:
    """One-hot B: the result is one column of A's values, bit for bit, for every e4m3 magnitude and ignored signs."""
    rng = np.random.default_rng(probe)
    a = rng.integers(0, 16, (16, 64)).astype(np.uint8)
    b = np.zeros((8, 64), np.uint8)
    b[:, probe] = [2, 10, 1, 2, 2, 2, 2, 7]  # 1, -1, 0.5, .., 6
    sf_b = np.full((8, 4), 0x38, np.uint8)  # 1
    zero = np.zeros((16, 8), np.float32)
    for start in range(0, 256, 16):
        sf_a = np.repeat(np.arange(start, start + 16, dtype=np.uint8)[:, None], 4, axis=1)
        got = omma(a, sf_a, b, sf_b, zero)
        expected = (values(a, sf_a)[:, probe : probe + 1] * np.array(E2M1_VALUES)[b[:, probe]]).astype(np.float32)
        np.testing.assert_array_equal(got, expected)  # NaN where the scale is NaN (0x7f, 0xff)


def test_only_the_mma_the_target_and_the_version_change() -> None:
    source = module()
    rewritten = substitute(source + "\0")
    assert ".target sm_90a" in rewritten
    assert ".version 8.8" in rewritten
    assert "block_scale" not in rewritten
    assert rewritten.count("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32") == 4
    kept = [
        line
        for line in source.splitlines()
        if line.strip() and not line.strip().startswith((".v", ".t", "mma", "{%r14"))
    ]
    assert [line for line in kept if line in rewritten.splitlines()] == kept


def test_qualifiers_in_another_order() -> None:
    shape = "m16n8k64.row.col."
    moved = OMMA.replace(shape, "").replace("aligned.", "aligned." + shape)
    assert moved != OMMA
    assert substitute(module(mma=moved)) == substitute(module())


def test_two_mmas_on_one_line() -> None:
    one = module()
    mma = one[one.index("mma.sync") : one.index("\tret;")]
    assert substitute(one.replace(mma, mma.strip() + " " + mma)).count("mma.sync.aligned.m16n8k16") == 8


@pytest.mark.parametrize(
    ("source", "named"),
    [
        (module(target="sm_100a"), "sm_100a"),
        (module(mma=OMMA.replace("scale_vec::4X", "scale_vec::2X").replace("ue4m3", "ue8m0")), "scale_vec::2X"),
        (module(guard="@%p0 "), "predicated"),
        ("// nothing", "no target"),
    ],
)
def test_what_cannot_be_substituted_is_refused_by_name(source: str, named: str) -> None:
    with pytest.raises(TargetError, match=named):
        substitute(source)


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="no ptxas on PATH")
def test_ptxas_accepts_the_result(tmp_path: Path) -> None:
    file = tmp_path / "one.ptx"
    file.write_text(substitute(module(1, 3)))
    done = subprocess.run(
        ["ptxas", "-arch=sm_90a", str(file), "-o", str(tmp_path / "one.cubin")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
