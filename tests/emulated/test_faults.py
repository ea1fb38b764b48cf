"""Break the dense kernel's PTX, one way at a time: the emulator must name each.

Two launches go round the kernel's rings differently: more K tiles than stages, one CTA for many tiles, and fewer.
"""

import copy
import re

import numpy as np
import pytest
import torch

import nvfp4dsl as nv
from nvfp4dsl import emulator, reference
from nvfp4dsl.emulator import faults, mutate


def _dumped(m, n, k, max_ctas, **kwargs):
    """(kernel, launch with the expected output) of a GEMM that runs right."""
    generator = torch.Generator().manual_seed(m)
    a, b = (nv.quantize(torch.randn(rows, k, generator=generator)) for rows in (m, n))
    with nv.emulate("sm_121a", max_ctas=max_ctas) as emulation:
        nv.mm(nv.prepare(a, "sm_121a"), nv.prepare(b, "sm_121a"), **kwargs)
    (run,) = emulation.runs
    model = reference.gemm_model(a, b, out_dtype=torch.bfloat16)
    run.launch.expected["c"] = model.view(-1).view(torch.uint8).numpy()
    return run.kernel, run.launch


@pytest.fixture(scope="module")
def dense():
    kernel, long = _dumped(130, 264, 1040, 1, tile="64x128x128x3")
    _, short = _dumped(140, 136, 272, 2, tile="64x128x128x3")
    return kernel.ptx, [long, short]


@pytest.fixture(scope="module")
def predicated():
    kernel, launch = _dumped(70, 133, 80, 4, tile="64x128x128x3")
    return kernel.ptx, launch


def test_every_deleted_barrier_fence_and_wait_is_noticed(dense):
    """No survivors: the kernel has no synchronisation that it could do without."""
    outcomes = mutate.survey(*dense)
    kinds = {o.mutant.instruction.split()[0].split(".")[0] for o in outcomes}
    assert {"mbarrier", "bar", "fence", "cp"} <= kinds
    assert len(outcomes) >= 30
    survivors = [f"line {o.mutant.line}: {o.mutant.instruction} ({o.mutant.change})" for o in outcomes if not o.verdict]
    assert survivors == []
    unnamed = [o.mutant.instruction for o in outcomes if o.verdict == "wrong result"]
    assert unnamed == []


def _edit(ptx, pattern, replacement, count=1):
    edited, found = re.subn(pattern, replacement, ptx, count=count)
    assert found, pattern
    return edited


def _fault(ptx, launch, *kinds):
    with pytest.raises(kinds) as error:
        emulator.run(ptx, copy.deepcopy(launch))
    return error.value


def test_the_unbroken_kernel_passes(dense):
    ptx, launches = dense
    for launch in launches:
        emulator.run(ptx, copy.deepcopy(launch), seed=5)


@pytest.mark.parametrize("change", ["-16", "+16"])
def test_wrong_transaction_bytes(dense, change):
    ptx, launches = dense
    edited = _edit(
        ptx,
        r"(mbarrier\.arrive\.expect_tx\.shared\.b64 \s*)(%rd\d+), (\[.*?\]), (%r\d+);",
        rf"{{ .reg .b32 wrong; add.s32 wrong, \4, {int(change)}; \1\2, \3, wrong; }}",
    )
    fault = _fault(edited, launches[0], faults.Deadlock, faults.TransactionMismatch, faults.LostPhase)
    assert "bytes" in str(fault)


def test_wrong_phase(dense):
    ptx, launches = dense
    edited = _edit(
        ptx,
        r"mbarrier\.try_wait\.parity\.shared\.b64 P1, (\[%r\d+\]), (%r\d+), 10000000;",
        r"xor.b32 phase, \2, 1; mbarrier.try_wait.parity.shared.b64 P1, \1, phase, 10000000;",
        count=0,
    )
    edited = _edit(edited, r"\.reg \.pred\s+P1;", ".reg .pred P1; .reg .b32 phase;", count=0)
    fault = _fault(edited, launches[0], faults.Fault)
    assert type(fault).__name__ in {"Deadlock", "LostPhase", "DataRace", "UninitialisedRead", "BarrierMisuse"}


def test_shared_read_past_the_end(dense):
    ptx, launches = dense
    edited = _edit(ptx, r"(ldmatrix\S* \{[^}]*\}, )\[(%r\d+)\]", r"\1[\2+200000]")
    assert "shared" in str(_fault(edited, launches[0], faults.OutOfBounds))


def test_shared_read_before_any_write(dense):
    ptx, launches = dense
    edited = _edit(ptx, r"(mbarrier\.init[^\n]*\n)", r"\1 ld.shared.b32 %r0, [__dynamic_shmem__0+40960];\n")
    edited = edited.replace("%r0,", "%r1,") if "%r0," not in ptx else edited
    _fault(edited, launches[0], faults.UninitialisedRead)


def test_wrong_scale_address(dense):
    ptx, launches = dense
    edited = _edit(ptx, r"(ld\.shared\.b32 %r\d+, )\[(%r\d+)\]", r"\1[\2+4]")
    fault = _fault(edited, launches[0], faults.WrongResult)
    assert "'c'" in str(fault)


def test_store_past_the_tensor(predicated):
    ptx, launch = predicated
    # no bounds check ever skips a store: rows past the end leave the buffer, columns past it run into the next row
    edited = _edit(ptx, r"\t@%p\d+ bra\s+\S+;\n((?:\t[^\n]*\n){1,3}?\tst\.global)", r"\1", count=0)
    assert re.search(r"\bc\b", str(_fault(edited, launch, faults.OutOfBounds, faults.DataRace)))


def test_result_is_held_to_what_the_launch_expects(predicated):
    ptx, launch = predicated
    other = copy.deepcopy(launch)
    other.expected["c"] = np.bitwise_xor(other.expected["c"], np.eye(1, other.expected["c"].size, 2 * 135, np.uint8)[0])
    assert "1 of 9310" in str(_fault(ptx, other, faults.WrongResult))
    assert "(0, 1, 2)" in str(_fault(ptx, other, faults.WrongResult))


def test_registers_must_fit_the_multiprocessor(dense):
    """More registers asked for than the launch owns: on silicon the taking warps never wake up."""
    ptx, launches = dense
    edited = _edit(ptx, r"setmaxnreg\.dec\.sync\.aligned\.u32 \s*40;", "setmaxnreg.dec.sync.aligned.u32 160;")
    fault = _fault(edited, launches[0], faults.Fault)
    assert type(fault) in (faults.RegisterBudget, faults.Deadlock)
