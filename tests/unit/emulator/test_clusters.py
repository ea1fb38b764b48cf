"""Clusters: their registers and addresses, distributed shared memory, the cluster barrier; and every way to get them
wrong."""

import numpy as np
import pytest
from cluster_kernels import (
    ACCESS_START,
    KERNELS,
    PULL,
    READ_PEER,
    RELAXED_SYNC,
    STORE,
    SYNC,
    WRITE_OWN,
)
from harness import execute, run

from nvfp4dsl.emulator import faults

SEEDS = range(4)
PAIR = KERNELS["pull"]
THREADS = np.arange(256).reshape(2, 2, 64)[:, ::-1].reshape(4, 64)
"""The thread whose word each thread gets."""


def pair(body, seed=0, **options):
    """What each thread stored when two clusters of two CTAs of two warps execute ``body``, and the report."""
    return outcome(PAIR, ACCESS_START + body, seed, **options)


def outcome(kernel, body=None, seed=0, **options):
    ptx, launch = kernel.prepare(body, **options)
    report = run(ptx, launch, seed=seed)
    return launch.buffer("out").data.view(np.uint32).reshape(kernel.out), report


def test_special_registers():
    out, _ = outcome(KERNELS["special-registers"])
    for (z, y, x), row in zip(np.ndindex(4, 2, 4), out.reshape(-1, 18).tolist(), strict=True):
        expected = [1, x % 2 + z % 2 * 2, 4, x % 2, 0, z % 2, 2, 1, 2, x // 2, y, z // 2, 2, 2, 2, x, y, z]
        assert row == expected


def test_addresses():
    """Bits 24.. of a shared address are the rank, also in a CTA's own."""
    out, _ = outcome(KERNELS["addresses"])
    base = 1 << 10
    assert (out[:, 2::2] == base).all()
    assert (out[:, 1::2] == (1 << 24 | base)).all()
    assert out[:, 0].tolist() == [base, 1 << 24 | base] * 2


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["pull", "push"])
def test_peers_exchange_words(name, seed):
    out, report = outcome(KERNELS[name], seed=seed)
    np.testing.assert_array_equal(out, THREADS + 1000)
    assert report.opcodes["barrier.cluster.wait.aligned"] >= 16


def test_vectors_narrow_words_and_generic_addresses():
    out, _ = outcome(KERNELS["vectors"])
    rank = np.array([1, 0, 1, 0])[:, None]
    np.testing.assert_array_equal(out, (rank * 11110 + 1) * 1000 + THREADS)


@pytest.mark.parametrize("seed", SEEDS)
def test_atomics_on_rank_0(seed):
    out, _ = outcome(KERNELS["atomics"], seed=seed)
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


EXIT = r"has exited|nothing orders its exit"
WRONG = {
    "no barrier before the peer's word is read": (
        SYNC + WRITE_OWN + READ_PEER + SYNC, (faults.UninitialisedRead, faults.DataRace), "rank",
    ),
    "a relaxed barrier before it": (
        WRITE_OWN + RELAXED_SYNC + READ_PEER + SYNC, faults.DataRace, "of CTA rank",
    ),
    "the fence after the arrival": (
        WRITE_OWN + RELAXED_SYNC.replace("\n", "\nfence.acq_rel.cluster;\n", 1) + READ_PEER + SYNC,
        faults.DataRace, "of CTA rank",
    ),
    "a fence of the CTA's scope": (
        WRITE_OWN + "fence.acq_rel.cta;" + RELAXED_SYNC + READ_PEER + SYNC, faults.DataRace, "of CTA rank",
    ),
    "a word that the peer has not written": (
        SYNC + READ_PEER + SYNC, faults.UninitialisedRead, "rank",
    ),
    "a peer that may not have started": (
        WRITE_OWN + READ_PEER + SYNC, faults.AbsentPeer, "has started",
    ),
    "a peer that may have exited": (WRITE_OWN + SYNC + READ_PEER, faults.AbsentPeer, EXIT),
    "a peer that may have exited before a store": (
        SYNC + "st.shared::cluster.b32 [%r7], %r0;", faults.AbsentPeer, EXIT,
    ),
    "an arrival without a wait at the end": (
        WRITE_OWN + SYNC + READ_PEER + "barrier.cluster.arrive.aligned;", faults.ClusterMisuse, "and not waited",
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
    out, _ = pair(WRITE_OWN + "fence.acq_rel.cluster;" + RELAXED_SYNC + READ_PEER + SYNC + STORE, seed)
    np.testing.assert_array_equal(out, THREADS + 1000)


def test_a_relaxed_barrier_orders_no_lanes():
    body = (
        WRITE_OWN
        + "mbarrier.init.shared.b64 [%r1+1024], 2;"
        + RELAXED_SYNC
        + "mbarrier.arrive.shared.b64 _, [%r1+1024];"
    )
    body = body.replace("mbarrier", "@%p1 mbarrier")
    body = "and.b32 %r10, %r0, 31; setp.eq.u32 %p1, %r10, 0; and.b32 %r10, %r0, 63; setp.eq.u32 %p1, %r10, 0;" + body
    with pytest.raises(faults.UnorderedLanes, match=r"bar\.warp\.sync"):
        pair(body)
    pair(body.replace(RELAXED_SYNC, SYNC))


def test_a_cluster_of_one():
    body = ACCESS_START + WRITE_OWN + SYNC + "ld.shared::cluster.b32 %r9, [%r2];" + STORE
    out, _ = execute(body, outputs={"out": np.zeros((4, 64), np.uint32)}, block=64, grid=4)
    np.testing.assert_array_equal(out["out"].reshape(-1), np.arange(256) + 1000)


def test_warps_that_have_exited_count_as_arrived():
    for seed in SEEDS:
        pair("setp.gt.u32 %p1, %r0, 31; @%p1 ret;" + PULL, seed)


def test_a_deadlock_names_who_has_not_arrived():
    stuck = "setp.gt.u32 %p1, %r0, 31; setp.eq.and.u32 %p1, %r3, 1, %p1; @!%p1 bra GO; bar.sync 1, 64; GO:"
    with pytest.raises(faults.Deadlock) as caught:
        pair(stuck + SYNC)
    assert "waits for the cluster barrier (phase 0; not arrived: CTA rank 1 warps 1)" in str(caught.value)
    assert "CTA (1, 0, 0) warp 1 waits for barrier 1" in str(caught.value)


def test_launches_that_are_refused():
    with pytest.raises(faults.LaunchMismatch, match="not a multiple of the cluster"):
        pair("", grid=3)
    with pytest.raises(faults.LaunchMismatch, match="more than 8"):
        pair("", grid=16, cluster=(16, 1, 1))


def test_clusters_that_the_kernel_requires():
    ptx, launch = PAIR.prepare()
    ptx = ptx.replace(".reqntid", ".explicitcluster\n.reqnctapercluster 2, 1, 1\n.reqntid")
    launch.cluster = (1, 1, 1)
    run(ptx, launch)
    np.testing.assert_array_equal(launch.buffer("out").data.view(np.uint32).reshape(4, 64), THREADS + 1000)
    launch.cluster = (4, 1, 1)
    with pytest.raises(faults.LaunchMismatch, match="requires clusters of"):
        run(ptx, launch)
