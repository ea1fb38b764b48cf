"""Clusters: their registers and addresses, distributed shared memory, the cluster barrier; and every way to get them
wrong."""

import numpy as np
import pytest
from harness import execute

from nvfp4dsl.emulator import faults

SEEDS = range(4)
PAIR = {"grid": 4, "cluster": (2, 1, 1), "block": 64}
"""Two clusters of two CTAs of two warps."""

START = """
    mov.u32 %r1, smem; mad.lo.s32 %r2, %r0, 4, %r1;                  // this thread's word
    mov.u32 %r3, %cluster_ctarank; mov.u32 %r4, %ctaid.x;
    mad.lo.s32 %r5, %r4, 64, %r0; mul.wide.u32 %d1, %r5, 4; add.s64 %d1, %out, %d1;
    xor.b32 %r6, %r3, 1; mapa.shared::cluster.u32 %r7, %r2, %r6;     // the same word of the peer
"""
WRITE_OWN = "add.s32 %r8, %r5, 1000; st.shared.b32 [%r2], %r8;\n"
SYNC = "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n"
READ_PEER = "ld.shared::cluster.b32 %r9, [%r7];\n"
STORE = "st.global.b32 [%d1], %r9;\n"
OUT = {"out": np.zeros((4, 64), np.uint32)}
SWAPPED = (np.arange(256).reshape(2, 2, 64)[:, ::-1] + 1000).reshape(4, 64)


def pair(body, seed=0, **options):
    out, report = execute(START + body, outputs=OUT, seed=seed, **{**PAIR, **options})
    return out["out"], report


def test_special_registers():
    names = ["%cluster_ctarank", "%cluster_nctarank", "%is_explicit_cluster"]
    names += [
        f"%{r}.{a}" for r in ("cluster_ctaid", "cluster_nctaid", "clusterid", "nclusterid", "ctaid") for a in "xyz"
    ]
    body = """
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z;
    mad.lo.s32 %r2, %r3, 2, %r2; mad.lo.s32 %r1, %r2, 4, %r1; mul.wide.u32 %d1, %r1, 72; add.s64 %d1, %out, %d1;
    setp.ne.u32 %p0, %r0, 0; @%p0 ret;
    """
    body += "".join(f"mov.u32 %r9, {name}; st.global.b32 [%d1+{4 * n}], %r9;\n" for n, name in enumerate(names))
    outputs = {"out": np.zeros((4, 2, 4, 18), np.uint32)}
    out, _ = execute(body, outputs=outputs, grid=(4, 2, 4), cluster=(2, 1, 2))
    for (z, y, x), row in zip(np.ndindex(4, 2, 4), out["out"].reshape(-1, 18).tolist(), strict=True):
        expected = [x % 2 + z % 2 * 2, 4, 1, x % 2, 0, z % 2, 2, 1, 2, x // 2, y, z // 2, 2, 2, 2, x, y, z]
        assert row == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_peers_exchange_words(seed):
    out, report = pair(WRITE_OWN + SYNC + READ_PEER + SYNC + STORE, seed)
    np.testing.assert_array_equal(out, SWAPPED)
    assert report.opcodes["barrier.cluster.wait.aligned"] >= 16


@pytest.mark.parametrize("seed", SEEDS)
def test_words_pushed_to_the_peer(seed):
    push = "add.s32 %r8, %r5, 1000; st.shared::cluster.b32 [%r7], %r8;\n"
    out, _ = pair(SYNC + push + SYNC + "ld.shared.b32 %r9, [%r2];" + STORE, seed)
    np.testing.assert_array_equal(out, SWAPPED)


def test_vectors_narrow_words_and_generic_addresses():
    body = """
    mad.lo.s32 %r10, %r0, 12, %r2; st.shared.v4.b32 [%r10], {%r5, %r0, %r3, %r4};
    """ + SYNC + """
    mad.lo.s32 %r11, %r0, 12, %r7; ld.shared::cluster.v4.b32 {%r12, %r13, %r14, %r15}, [%r11];
    ld.shared::cluster.u8 %h1, [%r11+8]; cvt.u32.u16 %r16, %h1;              // the peer's rank
    cvt.u64.u32 %d2, %r10; cvta.shared.u64 %d2, %d2; mapa.u64 %d3, %d2, %r6;
    ld.b64 %d4, [%d3+8]; cvt.u32.u64 %r17, %d4;                               // generic: its rank again
    getctarank.shared::cluster.u32 %r18, %r11; getctarank.u64 %r19, %d3;
    isspacep.shared::cluster %p1, %d3; isspacep.shared::cta %p2, %d3; isspacep.shared %p3, %d2;
    selp.b32 %r20, 1, 0, %p1; @%p2 mov.b32 %r20, 9; @!%p3 mov.b32 %r20, 9;
    mov.b64 %d6, {%r11, %r17}; cvt.u64.u32 %d5, %r11; cvta.shared::cluster.u64 %d5, %d5; setp.ne.b64 %p4, %d5, %d3;
    @%p4 mov.b32 %r20, 9; cvta.to.shared::cluster.u64 %d5, %d5; cvt.u32.u64 %r21, %d5; sub.s32 %r21, %r21, %r11;
    mad.lo.s32 %r9, %r16, 10, %r17; mad.lo.s32 %r9, %r9, 10, %r18; mad.lo.s32 %r9, %r9, 10, %r19;
    mad.lo.s32 %r9, %r9, 10, %r20; mad.lo.s32 %r9, %r9, 1000, %r12; add.s32 %r9, %r9, %r21;
    """ + SYNC + STORE  # fmt: skip
    out, _ = pair(body)
    thread = np.arange(256).reshape(2, 2, 64)[:, ::-1].reshape(4, 64)
    rank = np.array([1, 0, 1, 0])[:, None]
    np.testing.assert_array_equal(out, (rank * 11110 + 1) * 1000 + thread)


@pytest.mark.parametrize("seed", SEEDS)
def test_atomics_on_rank_0(seed):
    body = (
        "st.shared.b32 [%r2], 5;" + SYNC + "mov.b32 %r10, 0; mapa.shared::cluster.u32 %r11, %r1, %r10;"
        "red.shared::cluster.add.u32 [%r11], %r0; atom.shared::cluster.add.u32 %r12, [%r11+4], 1;"
        "cvt.u64.u32 %d2, %r11; cvta.shared.u64 %d2, %d2; red.relaxed.cluster.max.u32 [%d2+8], %r5;"
        + SYNC + "ld.shared.b32 %r9, [%r2];" + STORE
    )  # fmt: skip
    out, _ = pair(body, seed)
    expected = np.full((4, 64), 5)
    expected[[0, 2], 0] += 2 * sum(range(64))
    expected[[0, 2], 1] += 128
    expected[[0, 2], 2] = [127, 255]
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_global_memory_is_ordered_by_the_cluster_barrier(seed):
    body = "st.global.b32 [%d1], %r5;" + SYNC + """
    mad.lo.s32 %r10, %r6, 64, %r0; shr.u32 %r11, %r4, 1; mad.lo.s32 %r10, %r11, 128, %r10; mul.wide.u32 %d2, %r10, 4;
    add.s64 %d2, %out, %d2; ld.global.b32 %r9, [%d2];
    """  # fmt: skip
    pair(body, seed)
    with pytest.raises((faults.DataRace, faults.UninitialisedRead), match=r"cluster|nothing has written"):
        pair(body.replace(SYNC, ""), seed)


RELAXED = "barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;\n"
WRONG = {
    "no barrier before the peer's word is read": (
        SYNC + WRITE_OWN + READ_PEER + SYNC, (faults.UninitialisedRead, faults.DataRace), "rank",
    ),
    "a relaxed barrier before it": (
        WRITE_OWN + RELAXED + READ_PEER + SYNC, faults.DataRace, "of CTA rank",
    ),
    "the fence after the arrival": (
        WRITE_OWN + RELAXED.replace("\n", "\nfence.acq_rel.cluster;\n", 1) + READ_PEER + SYNC,
        faults.DataRace, "of CTA rank",
    ),
    "a fence of the CTA's scope": (
        WRITE_OWN + "fence.acq_rel.cta;" + RELAXED + READ_PEER + SYNC, faults.DataRace, "of CTA rank",
    ),
    "a word that the peer has not written": (
        SYNC + READ_PEER + SYNC, faults.UninitialisedRead, "rank",
    ),
    "a peer that may not have started": (
        WRITE_OWN + READ_PEER + SYNC, faults.AbsentPeer, "has started",
    ),
    "a peer that may have exited": (
        WRITE_OWN + SYNC + READ_PEER, faults.AbsentPeer, "has exited|nothing orders its exit",
    ),
    "a peer that may have exited before a store": (
        SYNC + "st.shared::cluster.b32 [%r7], %r0;", faults.AbsentPeer, "has exited|nothing orders its exit",
    ),
    "an arrival without a wait at the end": (
        WRITE_OWN + SYNC + READ_PEER + "barrier.cluster.arrive.aligned;",
        faults.AbsentPeer, "has exited|nothing orders its exit",
    ),
    "two stores to one word": (
        SYNC + WRITE_OWN + "st.shared::cluster.b32 [%r7], %r0;" + SYNC, faults.DataRace, "overwrites shared address",
    ),
    "the peer's address in ld.shared": (
        WRITE_OWN + SYNC + "ld.shared.b32 %r9, [%r7];" + SYNC, faults.OutOfBounds, "reaches only its own",
    ),
    "a rank that the cluster lacks": (
        WRITE_OWN + SYNC + "mov.b32 %r6, 2; mapa.shared::cluster.u32 %r7, %r2, %r6;" + READ_PEER + SYNC,
        faults.ClusterMisuse, "CTA rank 2, but the cluster has 2",
    ),
    "past the peer's shared memory": (
        WRITE_OWN + SYNC + "ld.shared::cluster.b32 %r9, [%r7+4096];" + SYNC, faults.OutOfBounds, "outside the CTA's",
    ),
    "a misaligned word": (
        WRITE_OWN + SYNC + "ld.shared::cluster.b32 %r9, [%r7+2];" + SYNC, faults.Misaligned, "multiple of 4",
    ),
    "two arrivals": (
        "barrier.cluster.arrive.aligned;" + SYNC, faults.ClusterMisuse, "arrives at the cluster barrier twice",
    ),
    "no arrival": ("barrier.cluster.wait.aligned;", faults.ClusterMisuse, "without having arrived"),
    "a barrier for some lanes": (
        "setp.lt.u32 %p1, %r0, 5; @%p1 barrier.cluster.arrive;", faults.DivergentSync, "some lanes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name):
    body, fault, text = WRONG[name]
    for seed in SEEDS:
        with pytest.raises(fault, match=text):
            pair(body, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_fence_before_a_relaxed_arrival(seed):
    out, _ = pair(WRITE_OWN + "fence.acq_rel.cluster;" + RELAXED + READ_PEER + SYNC + STORE, seed)
    np.testing.assert_array_equal(out, SWAPPED)


def test_a_cluster_of_one():
    out, _ = execute(
        START + WRITE_OWN + SYNC + "ld.shared::cluster.b32 %r9, [%r2];" + STORE, outputs=OUT, block=64, grid=4
    )
    np.testing.assert_array_equal(out["out"].reshape(-1), np.arange(256) + 1000)


def test_warps_that_have_exited_count_as_arrived():
    for seed in SEEDS:
        pair("setp.gt.u32 %p1, %r0, 31; @%p1 ret;" + WRITE_OWN + SYNC + READ_PEER + SYNC, seed)


def test_a_deadlock_names_who_has_not_arrived():
    stuck = (
        "setp.gt.u32 %p1, %r0, 31; setp.eq.u32 %p2, %r3, 1; and.pred %p1, %p1, %p2; @!%p1 bra GO; bar.sync 1, 64; GO:"
    )
    with pytest.raises(faults.Deadlock) as caught:
        pair(stuck + SYNC)
    assert "waits for the cluster barrier (phase 0; not arrived: CTA rank 1 warps 1)" in str(caught.value)
    assert "CTA (1, 0, 0) warp 1 waits for barrier 1" in str(caught.value)


def test_launches_that_are_refused():
    with pytest.raises(faults.LaunchMismatch, match="not a multiple of the cluster"):
        pair("", grid=3)
    with pytest.raises(faults.LaunchMismatch, match="more than 8"):
        pair("", grid=16, cluster=(16, 1, 1))
