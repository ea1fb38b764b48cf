"""Programmatic dependent launch of the W4A4 kernel: what it touches before the kernel before it has ended.

The emulator runs one kernel at a time, so it cannot see a wait that is missing: here the PTX is walked instead.
"""

import pytest
import torch

import nvfp4dsl as nv
from nvfp4dsl.emulator import ptx
from nvfp4dsl.testing import bits_differing

TARGET = "sm_121a"
WAIT = ("griddepcontrol", "wait")
#: TMA descriptors of codes and scales of the instruction's A, among the kernel's parameters: a decode tile's weights
WEIGHTS = {("tma", 0), ("tma", 4)}


def before_the_wait(text):
    """Global accesses that some path reaches without a griddepcontrol.wait: (kind, parameter of the descriptor)."""
    (kernel,) = ptx.parse(text).values()
    names = [parameter.name for parameter in kernel.params]
    origin = {}  # register -> parameter whose address it holds
    for instruction in kernel.instructions:
        if instruction.parts[0] in ("mov", "cvta") and len(instruction.operands) == 2:
            to, source = instruction.operands
            name = getattr(source, "name", None)
            origin[to] = names.index(name) if name in names else origin.get(source)
    reached, touched, todo = set(), set(), [0]
    while todo:
        at = todo.pop()
        if at in reached or at >= len(kernel.instructions):
            continue
        reached.add(at)
        instruction = kernel.instructions[at]
        if instruction.parts[:2] == WAIT:
            continue
        if instruction.parts[:4] == ("cp", "async", "bulk", "tensor"):
            addresses = [o for o in instruction.operands if isinstance(o, ptx.Address) and o.coordinates]
            touched.add(("tma", origin[addresses[0].base]))
        elif "global" in instruction.parts:
            touched.add((instruction.opcode, None))
        if instruction.parts[0] in ("ret", "exit") and instruction.predicate is None:
            continue
        if instruction.target >= 0:
            todo.append(instruction.target)
        if not (instruction.parts[0] == "bra" and instruction.predicate is None):
            todo.append(at + 1)
    return touched


def operands(m, n=72, k=336):
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, k, generator=generator).bfloat16()
    return x, nv.prepare(nv.quantize(torch.randn(n, k, generator=generator)), TARGET)


@pytest.mark.parametrize(("m", "decode"), [(3, True), (70, False)])
@pytest.mark.parametrize("overlap", ["weights", "launch", "none"])
def test_only_weights_are_read_early_and_nothing_is_written(overlap, m, decode):
    """And by decode tiles alone."""
    x, weight = operands(m)
    with nv.emulate(TARGET, max_ctas=4) as emulation:
        y = nv.linear(x, weight, activation="nvfp4", overlap=overlap)
        expected = nv.mm(nv.quantize(x), weight)
    gemm = next(run for run in emulation.runs if run.kernel.spec.__class__ is nv.GemmSpec)
    assert (gemm.kernel.tile.m <= 32) == decode
    assert before_the_wait(gemm.kernel.ptx) == (WEIGHTS if overlap == "weights" and decode else set())
    assert bool(gemm.launch.attributes.get("programmatic_stream_serialization")) == (overlap != "none")
    assert bits_differing(y, expected) == 0


def test_mm_reads_nothing_early():
    """Either operand may be what the kernel before wrote."""
    x, weight = operands(3)
    with nv.emulate(TARGET, max_ctas=4) as emulation:
        nv.mm(nv.quantize(x), weight)
    assert before_the_wait(emulation.runs[-1].kernel.ptx) == set()


@pytest.mark.parametrize("m", [3, 70])
def test_a_wait_that_is_missing_is_noticed(m):
    """Of each role, one at a time: the producer's and the MMA warps'."""
    x, weight = operands(m)
    with nv.emulate(TARGET, max_ctas=4) as emulation:
        nv.linear(x, weight, activation="nvfp4")
    text = emulation.runs[-1].kernel.ptx
    (kernel,) = ptx.parse(text).values()
    waits = [i for i in kernel.instructions if i.parts[:2] == WAIT]
    assert len(waits) == 2
    whole = before_the_wait(text)
    for wait in waits:
        start, end = wait.span
        assert before_the_wait(text[:start] + text[end:]) > whole


@pytest.mark.parametrize("overlap", ["weights", "launch", "none"])
def test_a_kernel_that_quantizes_reads_tokens_and_their_scale_after_the_wait(overlap):
    x, weight = operands(3)
    with nv.emulate(TARGET) as emulation:
        nv.linear(x, weight, activation="nvfp4", overlap=overlap, activation_scale=2.0**-9)
    (run,) = emulation.runs
    early = {("tma", 0), ("tma", 3)} if overlap == "weights" else set()  # there are no descriptors of tokens
    assert before_the_wait(run.kernel.ptx) == early
    whole = run.kernel.ptx
    waits = [i.span for i in next(iter(ptx.parse(whole).values())).instructions if i.parts[:2] == WAIT]
    missed = [before_the_wait(whole[:start] + whole[end:]) > early for start, end in waits]
    # those of the quantizing and the MMA warps; the producer's only where it touches weights after it alone
    assert sum(missed) >= 2
    assert overlap == "weights" or all(missed)
