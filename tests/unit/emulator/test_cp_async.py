"""``cp.async``: two stages in flight, zeros where asked, and a typed fault for every order that is missing."""

import numpy as np
import pytest
from harness import execute

from nvfp4dsl.emulator import faults

SOURCE = np.arange(2 * 64 * 4, dtype=np.uint32) + 1  # two stages of 64 threads with 16 bytes each

BODY = """
    mov.u32 %r1, smem;
    mad.lo.s32 %r2, %r0, 16, %r1;
    mul.wide.u32 %d1, %r0, 16;
    add.s64 %d2, %src, %d1;
    add.s64 %d3, %out, %d1;
    cp.async.cg.shared.global [%r2], [%d2], 16;
    cp.async.commit_group;
    and.b32 %r3, %r0, 7;                                 // bytes of the second stage: 0 to 7
    cp.async.ca.shared.global.L2::128B [%r2+1024], [%d2+1024], 16, %r3;
    cp.async.commit_group;
    cp.async.wait_group 1;
    bar.sync 0;
    xor.b32 %r4, %r2, 512;                               // what the other warp copied
    ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r4];
    st.global.v4.b32 [%d3], {%r10, %r11, %r12, %r13};
    cp.async.wait_all;
    bar.sync 0;
    ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r4+1024];
    st.global.v4.b32 [%d3+1024], {%r10, %r11, %r12, %r13};
"""


def copies(body=BODY, seed=0):
    out, _ = execute(body, {"src": SOURCE}, outputs={"out": np.zeros_like(SOURCE)}, block=64, seed=seed)
    return out["out"].reshape(2, 64, 4)


@pytest.mark.parametrize("seed", range(6))
def test_right_in_any_order(seed):
    stages = SOURCE.reshape(2, 64, 4).copy()
    keep = np.arange(64) & 7
    stages[1].view(np.uint8)[np.arange(16) >= keep[:, None]] = 0
    np.testing.assert_array_equal(copies(seed=seed), np.roll(stages, 32, axis=1))


EDITS = {
    "no wait": ("cp.async.wait_group 1;", "", (faults.UninitialisedRead, faults.DataRace), "shared address"),
    "a wait for too few": (
        "cp.async.wait_group 1;", "cp.async.wait_group 2;", (faults.UninitialisedRead, faults.DataRace), "shared",
    ),
    "no barrier": (
        "cp.async.wait_group 1;\n    bar.sync 0;", "cp.async.wait_group 1;",
        (faults.UninitialisedRead, faults.DataRace), "shared address",
    ),
    "overwritten too early": (
        "cp.async.wait_group 1;", "st.shared.b32 [%r2], 0; cp.async.wait_group 1;", faults.DataRace, "overwrites",
    ),
    "a misaligned copy": ("cg.shared.global [%r2]", "cg.shared.global [%r2+8]", faults.Misaligned, "multiple of 16"),
    "a copy past the tensor": ("[%d2+1024]", "[%d2+4096]", faults.OutOfBounds, "nearest is src"),
    "a size that does not exist": ("[%d2], 16;", "[%d2], 8;", faults.UnknownInstruction, "a copy of 8 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_wrong_use(name):
    before, after, fault, text = EDITS[name]
    assert BODY.count(before) == 1
    for seed in range(3):
        with pytest.raises(fault, match=text):
            copies(BODY.replace(before, after), seed)
