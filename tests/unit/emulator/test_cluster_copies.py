"""What reaches another CTA of the cluster asynchronously: remote arrivals, st.async, bulk copies, TMA multicast; and
every way to get them wrong."""

import numpy as np
import pytest
from cluster_kernels import KERNELS, READ, RELAXED_SYNC, ROWS, SYNC, WAIT, WORDS
from harness import run

from nvfp4dsl.emulator import faults
from nvfp4dsl.emulator.mutate import survey

SEEDS = range(4)
SWAPPED = np.arange(128, dtype=np.uint32).reshape(2, 2, 32)[:, ::-1].reshape(4, 32)
RANKS = np.array([0, 1, 0, 1])[:, None]
MULTICAST = np.repeat(WORDS.reshape(2, 128), 4, axis=0)


def outcome(name, seed=0, edit=lambda body: body):
    """The words that each CTA stored."""
    kernel = KERNELS[name]
    ptx, launch = kernel.prepare(edit(kernel.body))
    run(ptx, launch, seed=seed)
    return launch.buffer("out").data.view(np.uint32).reshape(kernel.out)


EXPECTED = {
    "remote-arrivals": SWAPPED,
    "remote-expect": SWAPPED * RANKS,
    "stores": SWAPPED,
    "vector-stores": SWAPPED * 1000 + 790 + 1 - RANKS,
    "reductions": (5 + 2 * sum(range(32))) * (1 - RANKS) * np.ones_like(SWAPPED),
    "bulk": SWAPPED,
    "multicast": MULTICAST,
    "load-into-peer": WORDS[SWAPPED],
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", EXPECTED)
def test_right(name, seed):
    np.testing.assert_array_equal(outcome(name, seed), EXPECTED[name])


@pytest.mark.parametrize("seed", SEEDS)
def test_tensor_multicast(seed):
    chunks = outcome("tensor-multicast", seed).view(np.uint8).reshape(2, 16, 4, 16)
    for row in range(16):
        for chunk in range(4):
            expected = ROWS.reshape(16, 4, 16)[row, chunk]
            np.testing.assert_array_equal(chunks[:, row, chunk ^ row // 2 % 4], np.stack([expected] * 2))


START = (faults.AbsentPeer, faults.DataRace, faults.BarrierMisuse)
EXIT = (faults.AbsentPeer, faults.UnfinishedBulk, faults.TransactionMismatch)
LEAVES = r"exit|in flight|the CTA ends"
WRONG = {
    "no start": ("remote-arrivals", RELAXED_SYNC, "", START, "has started|nothing orders"),
    "no fence of the initialisation": (
        "remote-arrivals", "fence.mbarrier_init.release.cluster;", "",
        faults.DataRace, "nothing orders its initialisation by warp 0 of CTA rank",
    ),
    "relaxed arrivals": ("remote-arrivals", "arrive.release", "arrive.relaxed", faults.DataRace, "of CTA rank"),
    "an arrival too few": (
        "remote-arrivals", "mbarrier.arrive.rel", "bar.warp.sync -1; @!%p2 mbarrier.arrive.rel",
        faults.Deadlock, "1 of 32 arrivals missing",
    ),
    "arrivals at one's own barrier": (
        "remote-arrivals", "_, [%r7];", "_, [%r1];", (faults.DataRace, faults.UninitialisedRead), "of CTA rank",
    ),
    "an arrival with a token": (
        "remote-arrivals", "b64 _, [%r7];", "b64 %d9, [%r7];", faults.BarrierMisuse, "returns no state",
    ),
    "a wait at the peer's barrier": (
        "remote-arrivals", "%p4, [%r1]", "%p4, [%r7]", faults.OutOfBounds, "its own CTA's",
    ),
    "an arrival at a peer that may have exited": (
        "remote-arrivals", WAIT + READ, "@%p1 bra.uni E;" + WAIT + READ + "E:", EXIT, LEAVES,
    ),
    "more bytes expected than are stored": (
        "stores", ", 128;\n", ", 132;\n", faults.TransactionMismatch, "4 transaction bytes",
    ),
    "fewer bytes expected than are stored": (
        "stores", ", 128;\n", ", 124;\n", faults.TransactionMismatch, "-4 transaction bytes",
    ),
    "a barrier that is not the destination's": (
        "stores", ", [%r7]", ", [%r1]", faults.BarrierMisuse, "of another CTA",
    ),
    "no wait for a store": ("stores", WAIT, "", faults.Fault, r"shared address|in flight|CTA"),
    "no start before a store": ("stores", RELAXED_SYNC, "", START, "has started"),
    "a word that is in use": (
        "stores", RELAXED_SYNC, RELAXED_SYNC + "st.shared.b32 [%r2+128], %r0;", faults.DataRace, "overwrites",
    ),
    "a source that may be gone": ("bulk", READ + SYNC, READ, EXIT, LEAVES),
    "no proxy fence": ("bulk", "fence.proxy.async.shared::cta;", "", faults.MissingProxyFence, "generic proxy"),
    "no order of lanes": ("bulk", "bar.warp.sync -1;", "", faults.UnorderedLanes, r"bar\.warp\.sync"),
    "an odd size": ("bulk", "], 128, [", "], 100, [", faults.Misaligned, "multiple of 16"),
    "the peer's source": ("bulk", "[%r1+1024], 128", "[%r7+1024], 128", faults.OutOfBounds, "its own CTA's"),
    "a copy over a barrier": ("bulk", "[%r7+128], [%r1", "[%r7], [%r1", faults.BarrierMisuse, "overwrites"),
    "a copy past shared memory": (
        "bulk", "[%r7+128], [%r1", "[%r7+4080], [%r1", faults.OutOfBounds, "asynchronous copy",
    ),
    "a rank that the cluster lacks": (
        "multicast", "%h1, 15;", "%h1, 31;", faults.ClusterMisuse, r"ranks \[0, 1, 2, 3, 4\] of a cluster of 4",
    ),
    "a rank left out": ("multicast", "%h1, 15;", "%h1, 7;", faults.TransactionMismatch, "512 transaction bytes"),
    "fewer bytes expected than are multicast": (
        "multicast", ", 512;", ", 384;",
        (faults.TransactionMismatch, faults.UninitialisedRead, faults.DataRace), "-128|nothing has|nothing orders",
    ),
    "no start before a multicast": ("multicast", RELAXED_SYNC, "", START, "has started"),
    "no wait for a multicast": ("multicast", WAIT, "", faults.Fault, r"shared address|in flight"),
    "an exit before a multicast has come": (
        "multicast", WAIT, "setp.eq.u32 %p5, %r3, 3; @%p5 ret;" + WAIT, EXIT, LEAVES,
    ),
    "a load that completes elsewhere": (
        "load-into-peer", "128, [%r7]", "128, [%r1]", faults.BarrierMisuse, "an mbarrier of another CTA",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name):
    kernel, before, after, fault, text = WRONG[name]
    assert KERNELS[kernel].body.count(before) == 1
    for seed in SEEDS:
        with pytest.raises(fault, match=text):
            outcome(kernel, seed, lambda body: body.replace(before, after))


def test_every_deletion_is_reported():
    ptx, launch = KERNELS["bulk"].prepare()
    outcomes = survey(ptx, [launch], seeds=range(3))
    assert {o.mutant.change for o in outcomes} == {
        "deleted", "deleted with its wait", "relaxed", "always succeeds", "without its bytes",
    }  # fmt: skip
    assert [(o.mutant.instruction, o.mutant.change) for o in outcomes if o.verdict is None] == []
