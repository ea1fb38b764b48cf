"""A producer, a consumer, a ring of two stages and a bulk store: right as written, and a typed fault for every way of
breaking it."""

import re

import numpy as np
import pytest
from harness import execute, prepare

from nvfp4dsl.emulator import faults
from nvfp4dsl.emulator.mutate import survey

TILES, STAGES = 5, 2
SOURCE = np.arange(TILES * 32, dtype=np.uint32) * 3 + 1

# Shared memory: full[2] at 0, empty[2] at 16, stages at 128 and 256, the result at 384.
PIPELINE = f"""
    mov.u32 %r1, smem;
    setp.ne.u32 %p0, %r0, 0;
    @%p0 bra READY;
    mbarrier.init.shared.b64 [%r1], 1;
    mbarrier.init.shared.b64 [%r1+8], 1;
    mbarrier.init.shared.b64 [%r1+16], 1;
    mbarrier.init.shared.b64 [%r1+24], 1;
    fence.mbarrier_init.release.cluster;
READY:
    bar.sync 0;
    mov.b32 %r2, 0;                          // tile
    mov.b32 %r3, 0;                          // stage
    mov.b32 %r4, 0;                          // phase
    mov.b32 %r9, 0;                          // sum
    setp.gt.u32 %p1, %r0, 31;
    @%p1 bra CONSUME;
PRODUCE:
    elect.sync %r8|%p2, -1;
    mad.lo.s32 %r5, %r3, 8, %r1;             // full barrier; empty is 16 further
    mad.lo.s32 %r6, %r3, 128, %r1;
    xor.b32 %r7, %r4, 1;
WAIT_EMPTY:
    mbarrier.try_wait.parity.shared.b64 %p3, [%r5+16], %r7;
    @!%p3 bra WAIT_EMPTY;
    @!%p2 bra ISSUED;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r5], 128;
    mul.wide.u32 %d1, %r2, 128;
    add.s64 %d1, %src, %d1;
    cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r6+128], [%d1], 128, [%r5];
ISSUED:
    add.s32 %r2, %r2, 1;
    add.s32 %r3, %r3, 1;
    setp.eq.u32 %p4, %r3, {STAGES};
    @%p4 xor.b32 %r4, %r4, 1;
    @%p4 mov.b32 %r3, 0;
    setp.lt.u32 %p5, %r2, {TILES};
    @%p5 bra PRODUCE;
    bra.uni END;
CONSUME:
    and.b32 %r10, %r0, 31;
    mad.lo.s32 %r11, %r10, 4, %r1;
NEXT:
    mad.lo.s32 %r5, %r3, 8, %r1;
    mad.lo.s32 %r6, %r3, 128, %r11;
WAIT_FULL:
    mbarrier.try_wait.parity.shared.b64 %p3, [%r5], %r4;
    @!%p3 bra WAIT_FULL;
    ld.shared.b32 %r12, [%r6+128];
    add.s32 %r9, %r9, %r12;
    bar.warp.sync -1;
    setp.ne.u32 %p2, %r10, 0;
    @%p2 bra RELEASED;
    mbarrier.arrive.shared.b64 _, [%r5+16];
RELEASED:
    add.s32 %r2, %r2, 1;
    add.s32 %r3, %r3, 1;
    setp.eq.u32 %p4, %r3, {STAGES};
    @%p4 xor.b32 %r4, %r4, 1;
    @%p4 mov.b32 %r3, 0;
    setp.lt.u32 %p5, %r2, {TILES};
    @%p5 bra NEXT;
    st.shared.b32 [%r11+384], %r9;
    fence.proxy.async.shared::cta;
    bar.warp.sync -1;
    @%p2 bra END;
    cp.async.bulk.global.shared::cta.bulk_group [%out], [%r1+384], 128;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
END:
"""
EXPECTED = SOURCE.reshape(TILES, 32).sum(axis=0)


def pipeline(text=PIPELINE, seed=0, **options):
    out, _ = execute(text, {"src": SOURCE}, outputs={"out": np.zeros(32, np.uint32)}, block=64, seed=seed, **options)
    return out["out"]


@pytest.mark.parametrize("seed", range(8))
def test_right_in_any_order(seed):
    np.testing.assert_array_equal(pipeline(seed=seed), EXPECTED)


# Barriers 0 and 1 at 0 and 8, what is copied at 128 and 256. The first copy is asked for, then many others, one after
# the other.
OVERTAKEN = """
    mov.u32 %r1, smem;
    setp.ne.u32 %p0, %r0, 0;
    @%p0 bra END;
    mbarrier.init.shared.b64 [%r1], 1;
    mbarrier.init.shared.b64 [%r1+8], 1;
    fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 128;
    cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r1+128], [%src], 128, [%r1];
    mov.b32 %r2, 0;
    mov.b32 %r4, 0;
NEXT:
    mbarrier.arrive.expect_tx.shared.b64 _, [%r1+8], 128;
    cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r1+256], [%src], 128, [%r1+8];
WAIT:
    mbarrier.try_wait.parity.shared.b64 %p3, [%r1+8], %r4;
    @!%p3 bra WAIT;
    xor.b32 %r4, %r4, 1;
    add.s32 %r2, %r2, 1;
    setp.lt.u32 %p5, %r2, 24;
    @%p5 bra NEXT;
    mbarrier.test_wait.parity.shared.b64 %p3, [%r1], 0;
    selp.b32 %r5, 1, 2, %p3;
    st.global.b32 [%out], %r5;
WAIT_FIRST:
    mbarrier.try_wait.parity.shared.b64 %p3, [%r1], 0;
    @!%p3 bra WAIT_FIRST;
END:
"""


def test_a_copy_may_be_overtaken_by_many_that_were_asked_for_later():
    seen = set()
    for seed in range(200):
        out, _ = execute(OVERTAKEN, {"src": SOURCE}, outputs={"out": np.zeros(1, np.uint32)}, block=32, seed=seed)
        seen.add(int(out["out"][0]))
    assert seen == {1, 2}


EDITS = {
    "more bytes expected than come": (
        "_, [%r5], 128;", "_, [%r5], 144;",
        faults.TransactionMismatch, "16 transaction bytes",
    ),
    "fewer bytes expected than come": (
        "_, [%r5], 128;", "_, [%r5], 112;",
        faults.TransactionMismatch, "-16 transaction",
    ),
    "no bytes expected": (
        ".expect_tx.shared.b64 _, [%r5], 128;", ".shared.b64 _, [%r5];",
        faults.Fault, "PTX line",
    ),
    "a wrong phase in the consumer": (
        "mov.b32 %r4, 0; ", "setp.gt.u32 %p1, %r0, 31; selp.b32 %r4, 1, 0, %p1; ",
        (faults.UninitialisedRead, faults.DataRace), "shared address",
    ),
    "a wrong phase in the producer": (
        "xor.b32 %r7, %r4, 1;", "mov.b32 %r7, %r4;",
        faults.Deadlock, "parity 0 of mbarrier",
    ),
    "a barrier at another address": (
        "[%r5+16], %r7", "[%r5+40], %r7",
        faults.BarrierMisuse, "no mbarrier is initialised",
    ),
    "a misaligned barrier": ("[%r5+16], %r7", "[%r5+20], %r7", faults.Misaligned, "multiple of 8"),
    "a barrier initialised twice": (
        "mbarrier.init.shared.b64 [%r1+8], 1;", "mbarrier.init.shared.b64 [%r1], 1;",
        faults.BarrierMisuse, "initialised again",
    ),
    "an arrival too many": (
        "RELEASED:", "@!%p2 mbarrier.arrive.shared.b64 _, [%r5+16];\nRELEASED:",
        (faults.BarrierMisuse, faults.DataRace, faults.LostPhase), "mbarrier|nothing orders",
    ),
    "a store over a barrier": ("[%r11+384], %r9", "[%r11], %r9", faults.BarrierMisuse, "overwrites the mbarrier"),
    "a copy past shared memory": (
        "[%r6+128], [%d1], 128", "[%r6+4096], [%d1], 128",
        faults.OutOfBounds, "asynchronous copy",
    ),
    "a copy past the tensor": (
        "add.s64 %d1, %src, %d1;", "add.s64 %d1, %src, %d1; add.s64 %d1, %d1, 16;",
        faults.OutOfBounds, "nearest is src",
    ),
    "a misaligned copy": ("[%r6+128], [%d1]", "[%r6+132], [%d1]", faults.Misaligned, "multiple of 16"),
    "a store that nobody commits": ("cp.async.bulk.commit_group;", "", faults.UnfinishedBulk, "never committed"),
    "a store that nobody waits for": ("cp.async.bulk.wait_group.read 0;", "", faults.UnfinishedBulk, "wait_group"),
    "no proxy fence": ("fence.proxy.async.shared::cta;", "", faults.MissingProxyFence, "generic proxy"),
    "the fence before the store": (
        "st.shared.b32 [%r11+384], %r9;\n    fence.proxy.async.shared::cta;",
        "fence.proxy.async.shared::cta; st.shared.b32 [%r11+384], %r9;",
        faults.MissingProxyFence, "generic proxy",
    ),
    "no barrier-init fence": (
        "fence.mbarrier_init.release.cluster;", "",
        faults.MissingProxyFence, "mbarrier_init",
    ),
    "no order of lanes": ("bar.warp.sync -1;\n    setp", "setp", faults.UnorderedLanes, "bar.warp.sync"),
    "no barrier after initialisation": ("bar.sync 0;", "", (faults.BarrierMisuse, faults.DataRace), "mbarrier"),
    "a consumer that never releases": (
        "mbarrier.arrive.shared.b64 _, [%r5+16];", "",
        faults.Deadlock, "1 of 1 arrivals missing",
    ),
    "a consumer that ends early": (
        f"setp.lt.u32 %p5, %r2, {TILES};\n    @%p5 bra NEXT;", "",
        (faults.Deadlock, faults.UnfinishedBulk), "CTA",
    ),
    "a phase bit that flips too often": (
        "bar.warp.sync -1;\n    setp", "bar.warp.sync -1;\n    xor.b32 %r4, %r4, 1;\n    setp",
        faults.Fault, "mbarrier|shared address",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_a_broken_pipeline(name):
    before, after, fault, text = EDITS[name]
    assert PIPELINE.count(before) == 1
    broken = PIPELINE.replace(before, after)
    with pytest.raises(fault, match=text) as caught:
        [pipeline(broken, seed) for seed in range(4)]
    assert caught.value.line is not None or "PTX line" in str(caught.value)


def test_deadlock_names_every_waiter():
    with pytest.raises(faults.Deadlock) as caught:
        pipeline(PIPELINE.replace("mbarrier.arrive.shared.b64 _, [%r5+16];", ""))
    text = str(caught.value)
    assert re.search(r"CTA \(0, 0, 0\) warp 0 waits for parity 0 of mbarrier 0x410", text)
    assert re.search(r"CTA \(0, 0, 0\) warp 1 waits for parity 1 of mbarrier 0x400", text)
    assert text.count("PTX line") == 2


def test_every_deletion_is_reported():
    """Deleting any barrier operation, fence, wait or group operation is noticed, in one seed or another."""
    ptx, launch = prepare(PIPELINE, {"src": SOURCE}, outputs={"out": np.zeros(32, np.uint32)}, block=64)
    outcomes = survey(ptx, [launch], seeds=range(3))
    assert len(outcomes) == 16
    assert [o.mutant for o in outcomes if o.verdict is None] == []
    assert {o.mutant.change for o in outcomes} == {"deleted", "always succeeds", "without its bytes"}


def test_a_redundant_barrier_survives():
    """The survey can tell what is needed from what is not."""
    body = PIPELINE.replace("bar.sync 0;", "bar.sync 0; bar.sync 0;")
    ptx, launch = prepare(body, {"src": SOURCE}, outputs={"out": np.zeros(32, np.uint32)}, block=64)
    survivors = [o.mutant.instruction for o in survey(ptx, [launch], seeds=range(3)) if o.verdict is None]
    assert survivors == ["bar.sync 0;", "bar.sync 0;"]


def test_lost_phase():
    """The barrier completes twice while a waiter that has already looked once is not looking."""
    body = """
    mov.u32 %r1, smem;
    setp.ne.u32 %p0, %r0, 0;
    @!%p0 mbarrier.init.shared.b64 [%r1], 1;
    bar.sync 0;
    setp.gt.u32 %p1, %r0, 31;
    @%p1 bra WAIT;
    @%p0 ret;
    mbarrier.arrive.shared.b64 _, [%r1];
    mbarrier.arrive.shared.b64 _, [%r1];
    ret;
WAIT:
    mbarrier.try_wait.parity.shared.b64 %p2, [%r1], 0;
    @!%p2 bra WAIT;
    """
    caught = set()
    for seed in range(40):
        try:
            execute(body, block=64, seed=seed)
        except (faults.LostPhase, faults.Deadlock) as fault:
            caught.add(type(fault))
    assert faults.LostPhase in caught


BARS = {
    "counts that differ": (
        "@%p0 bra B; bar.sync 1, 64; bra.uni E; B: bar.sync 1, 32; E:",
        faults.BarrierMismatch,
        "counts",
    ),
    "a count that is no multiple of 32": ("bar.sync 1, 48;", faults.BarrierMismatch, "multiple of 32"),
    "a count larger than the block": ("bar.sync 1, 96;", faults.BarrierMismatch, "at most 64"),
    "a participant that exits": ("@%p0 ret; bar.sync 0;", faults.Deadlock, "exited warps"),
    "a barrier that does not exist": ("bar.sync 16;", faults.BarrierMismatch, "does not exist"),
    "some lanes only": ("setp.lt.u32 %p1, %r0, 5; @%p1 bar.sync 0;", faults.DivergentSync, "aligned"),
}


@pytest.mark.parametrize("name", BARS)
def test_named_barriers(name):
    body, fault, text = BARS[name]
    with pytest.raises(fault, match=text):
        execute("setp.gt.u32 %p0, %r0, 31; " + body, block=64)


def test_bar_arrive_orders_what_came_before():
    body = """
    mov.u32 %r1, smem; and.b32 %r3, %r0, 31; mad.lo.s32 %r2, %r3, 4, %r1; setp.gt.u32 %p0, %r0, 31;
    @%p0 bra READ;
    st.shared.b32 [%r2], %r0; bar.arrive 1, 64; bra.uni END;
    READ: bar.sync 1, 64; ld.shared.b32 %r9, [%r2]; mul.wide.u32 %d1, %r3, 4; add.s64 %d1, %out, %d1;
    st.global.b32 [%d1], %r9;
    END:
    """
    for seed in range(4):
        out, _ = execute(body, outputs={"out": np.zeros(32, np.uint32)}, block=64, seed=seed)
        np.testing.assert_array_equal(out["out"], np.arange(32))


def test_register_requests():
    with pytest.raises(faults.RegisterBudget, match="multiple of 8"):
        execute("setmaxnreg.dec.sync.aligned.u32 30;", block=128)
    with pytest.raises(faults.RegisterBudget, match="every warp of a warpgroup"):
        execute("setp.gt.u32 %p0, %r0, 31; @%p0 bra E; setmaxnreg.dec.sync.aligned.u32 40; E:", block=128)
    with pytest.raises(faults.RegisterBudget, match="the SM has"):
        execute("setmaxnreg.inc.sync.aligned.u32 256;", block=384)
