"""Loads, stores and atomics: values, and every way in which an access can be wrong."""

import numpy as np
import pytest
from harness import Launch, execute, kernel, run

from nvfp4dsl.emulator.faults import (
    DataRace,
    LaunchMismatch,
    Misaligned,
    OutOfBounds,
    PtxSyntaxError,
    ReadOnlyStore,
    StepLimit,
    UninitialisedRead,
    UnknownInstruction,
    UnwrittenRegister,
)

OUT = {"out": np.zeros(32, np.uint32)}
OWN = "mul.wide.u32 %d1, %r0, 4; add.s64 %d1, %out, %d1;"
SHARED = "mov.u32 %r1, smem; mad.lo.s32 %r2, %r0, 4, %r1;"


def test_widths_and_vectors():
    source = np.arange(32 * 16, dtype=np.uint8) * 7
    body = """
    mul.wide.u32 %d1, %r0, 16; add.s64 %d2, %src, %d1; add.s64 %d3, %out, %d1;
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d2];
    mov.u32 %r5, smem; mad.lo.s32 %r6, %r0, 16, %r5;
    st.shared.v2.b32 [%r6], {%r1, %r2}; st.shared.v2.b32 [%r6+8], {%r3, %r4};
    ld.shared.s8 %r7, [%r6+1]; ld.shared.u16 %h1, [%r6+2]; ld.shared.b64 %d4, [%r6+8];
    cvt.u64.u32 %d6, %r6; cvta.shared.u64 %d6, %d6;
    ld.b8 %h2, [%d6];
    st.global.b32 [%d3], %r7; st.global.b16 [%d3+4], %h1; st.global.b8 [%d3+6], %h2; st.global.b8 [%d3+7], %h2;
    st.global.b64 [%d3+8], %d4;
    """
    out, _ = execute(body, {"src": source}, outputs={"out": np.zeros((32, 16), np.uint8)})
    rows = source.reshape(32, 16)
    np.testing.assert_array_equal(out["out"][:, :4].copy().view(np.int32)[:, 0], rows[:, 1].astype(np.int8))
    np.testing.assert_array_equal(out["out"][:, 4:6], rows[:, 2:4])
    np.testing.assert_array_equal(out["out"][:, 6:8], rows[:, [0, 0]])
    np.testing.assert_array_equal(out["out"][:, 8:], rows[:, 8:])


def test_sub_words_of_one_word_by_two_warps():
    """Bytes of one word belong to different warps: no race."""
    body = """
    mov.u32 %r1, smem; shr.u32 %r3, %r0, 5; and.b32 %r4, %r0, 31; mad.lo.s32 %r5, %r4, 2, %r3; add.s32 %r5, %r5, %r1;
    st.shared.b8 [%r5], %r0;
    bar.sync 0;
    setp.gt.u32 %p1, %r0, 31; @%p1 ret;
    mad.lo.s32 %r6, %r0, 2, %r1; ld.shared.b16 %h1, [%r6]; cvt.u32.u16 %r7, %h1;
    """ + OWN + "st.global.b32 [%d1], %r7;"  # fmt: skip
    out, _ = execute(body, outputs=OUT, block=64)
    lane = np.arange(32)
    np.testing.assert_array_equal(out["out"], lane | (lane + 32) << 8)


def test_atomics_on_shared_memory():
    body = (
        SHARED
        + """
    st.shared.b32 [%r2], %r0;
    bar.sync 0;
    red.shared.add.u32 [%r1], 3;
    atom.shared.cas.b32 %r9, [%r2], 5, 77;                  // lane 5 only
    cvt.u64.u32 %d6, %r1; cvta.shared.u64 %d6, %d6;
    atom.acq_rel.cta.max.u32 %r10, [%d6+4], %r0;            // generic
    bar.sync 0;
    mul.wide.u32 %d1, %r0, 4; add.s64 %d1, %out, %d1;
    ld.shared.b32 %r11, [%r2]; st.global.b32 [%d1], %r11;
    """
    )
    out, _ = execute(body, outputs={"out": np.zeros(64, np.uint32)}, block=64)
    expected = np.arange(64)
    expected[[0, 1, 5]] = 3 * 64, 63, 77
    np.testing.assert_array_equal(out["out"], expected)
    with pytest.raises(UninitialisedRead, match="0x400"):
        execute(SHARED + "atom.shared.add.u32 %r9, [%r1], 1;")
    with pytest.raises(Misaligned, match="0x402"):
        execute(SHARED + "st.shared.b32 [%r2], %r0; atom.shared.add.u32 %r9, [%r1+2], 1;")


def test_reductions_of_floats():
    body = """
    cvt.rn.f32.u32 %f1, %r0; mov.f32 %f2, 0f3F800000; mov.f32 %f3, 0f00000001; mov.f32 %f4, 0fC0000000;
    red.relaxed.gpu.global.add.v4.f32 [%out], {%f1, %f2, %f3, %f4};
    atom.acq_rel.gpu.global.add.f32 %f5, [%out+16], %f2;
    """
    out, _ = execute(body, outputs={"out": np.zeros(5, np.float32)}, initialised=True)
    np.testing.assert_array_equal(out["out"], [31 * 16, 32, 0, -64, 32])  # the subnormal is flushed


def test_atomics():
    body = """
    red.global.add.u32 [%out], %r0;
    atom.global.add.u32 %r1, [%out+4], 1;
    mul.wide.u32 %d1, %r1, 4; add.s64 %d1, %slots, %d1; st.global.b32 [%d1], 1;
    """
    outputs = {"out": np.zeros(2, np.uint32), "slots": np.zeros(128, np.uint32)}
    out, _ = execute(body, outputs=outputs, block=64, grid=2, initialised=True)
    assert out["out"].tolist() == [2 * sum(range(64)), 128]
    assert (out["slots"] == 1).all()


FAULTS = {
    "shared read before any write": (SHARED + "ld.shared.b32 %r9, [%r2];", UninitialisedRead, "0x400"),
    "shared read past the end": (SHARED + "ld.shared.b32 %r9, [%r2+4096];", OutOfBounds, "0x1400"),
    "shared store below the start": (SHARED + "st.shared.b32 [%r2+-64], %r0;", OutOfBounds, "0x3c0"),
    "misaligned shared": (SHARED + "st.shared.b32 [%r2+2], %r0;", Misaligned, "0x402"),
    "misaligned global vector": (OWN + "st.global.v2.b32 [%d1], {%r0, %r0};", Misaligned, "multiple of 8"),
    "store past the tensor": (OWN + "st.global.b32 [%d1+64], %r0;", OutOfBounds, "nearest is out"),
    "global read before any write": (OWN + "ld.global.b32 %r9, [%d1];", UninitialisedRead, "buffer out"),
    "store to an input": ("st.global.b32 [%src], %r0;", ReadOnlyStore, "src"),
    "store to a null pointer": ("mov.b64 %d1, 0; st.global.b32 [%d1], %r0;", OutOfBounds, "no buffer"),
    "two lanes store to one byte": ("st.global.b32 [%out], %r0;", DataRace, "two lanes"),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_faults(name, seed):
    body, fault, text = FAULTS[name]
    with pytest.raises(fault, match=text) as caught:
        execute(body, {"src": np.zeros(4, np.uint32)}, outputs=OUT, seed=seed)
    assert caught.value.line is not None
    assert "PTX line" in str(caught.value)


def test_races_between_warps():
    write = SHARED + "xor.b32 %r3, %r0, 32; mad.lo.s32 %r4, %r3, 4, %r1; st.shared.b32 [%r2], %r0;"
    read = "ld.shared.b32 %r9, [%r4];"
    execute(write + "bar.sync 0;" + read, block=64)
    for seed in range(4):  # whichever warp runs first
        with pytest.raises((DataRace, UninitialisedRead)):
            execute(write + read, block=64, seed=seed)
        with pytest.raises(DataRace):
            execute(write + "bar.sync 0;" + read + "st.shared.b32 [%r2], %r9;", block=64, seed=seed)


def test_a_store_that_two_warps_make():
    with pytest.raises(DataRace, match="nothing orders"):
        execute("mov.u32 %r1, smem; st.shared.b32 [%r1], 1;", block=64)
    with pytest.raises(DataRace, match="of the same CTA"):
        execute("st.global.b32 [%out], 1;", outputs=OUT, block=64)


def test_a_store_that_two_ctas_make():
    with pytest.raises(DataRace, match="another CTA"):
        execute("st.global.b32 [%out], 1;", outputs=OUT, grid=2)


HAND_OVER = """
    mov.u32 %r1, %ctaid.x; shl.b32 %r2, %r1, 6; add.s32 %r2, %r2, %r0;
    mul.wide.u32 %d1, %r2, 4; add.s64 %d1, %parts, %d1; st.global.b32 [%d1], %r2;
    bar.sync 0; // before
    setp.ne.s32 %p1, %r0, 0; mov.u32 %r3, smem;
    @%p1 bra counted;
    atom.acq_rel.gpu.global.inc.u32 %r4, [%count], 1; st.shared.b32 [%r3], %r4;
    counted:
    bar.sync 0; // after
    ld.shared.b32 %r4, [%r3]; setp.eq.s32 %p2, %r4, 0;
    @%p2 bra done;
    xor.b32 %r5, %r2, 127; mul.wide.u32 %d2, %r5, 4; add.s64 %d3, %parts, %d2; ld.global.b32 %r6, [%d3];
    mul.wide.u32 %d2, %r0, 4; add.s64 %d2, %out, %d2; st.global.b32 [%d2], %r6;
    done:
"""


def test_an_atomic_hands_over_what_another_cta_wrote():
    """The last of two CTAs reads what the other's warps wrote, crosswise; the counter is zero again."""
    outputs = {"parts": np.zeros(128, np.uint32), "out": np.zeros(64, np.uint32), "count": np.zeros(1, np.uint32)}
    options = {"outputs": outputs, "block": 64, "grid": 2, "initialised": True}
    for seed in range(4):
        out, _ = execute(HAND_OVER, **options, seed=seed)
        assert out["count"] == 0
        assert out["out"].tolist() in (list(range(127, 63, -1)), list(range(63, -1, -1)))
        for needed, instead in (
            ("atom.acq_rel.gpu", "atom.relaxed.gpu"),
            ("atom.acq_rel.gpu", "atom.release.gpu"),
            ("atom.acq_rel.gpu", "atom.acquire.gpu"),
            ("bar.sync 0; // before", ""),
        ):
            with pytest.raises(DataRace, match="another CTA"):
                execute(HAND_OVER.replace(needed, instead), **options, seed=seed)


def test_programs_that_are_refused():
    with pytest.raises(UnknownInstruction, match=r"frobnicate\.b32.*tcgen05\.fence") as caught:
        execute("frobnicate.b32 %r1, %r0; tcgen05.fence::before_thread_sync;")
    assert "nothing was executed" in str(caught.value)
    with pytest.raises(UnwrittenRegister, match="%r55"):
        execute("add.s32 %r1, %r55, 1;")
    _, report = execute("add.s32 %r1, %r55, 1;", tolerate=(UnwrittenRegister,))
    assert len(report.tolerated) == 1
    with pytest.raises(StepLimit):
        execute("LOOP: bra.uni LOOP;", max_steps=1000)
    with pytest.raises(PtxSyntaxError, match="undeclared"):
        execute("@%nosuch add.s32 %r1, %r0, 1;")
    with pytest.raises(LaunchMismatch, match="reqntid"):
        run(kernel("", []), Launch("k", (1, 1, 1), (64, 1, 1), (1, 1, 1), 0, [], []))
