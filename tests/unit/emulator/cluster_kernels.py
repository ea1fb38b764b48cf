"""Kernels of clusters, right as written: what the emulator's tests break, and a Hopper GPU is compared on."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from harness import prepare, tensor_map

SYNC = "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n"
RELAXED_SYNC = "barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;\n"

# --- accesses: two clusters of two CTAs of 64 threads

ACCESS_START = """
    mov.u32 %r1, smem; mad.lo.s32 %r2, %r0, 4, %r1;                  // this thread's word
    mov.u32 %r3, %cluster_ctarank; mov.u32 %r4, %ctaid.x;
    mad.lo.s32 %r5, %r4, 64, %r0; mul.wide.u32 %d1, %r5, 4; add.s64 %d1, %out, %d1;
    xor.b32 %r6, %r3, 1; mapa.shared::cluster.u32 %r7, %r2, %r6;     // the same word of the peer
"""
WRITE_OWN = "add.s32 %r8, %r5, 1000; st.shared.b32 [%r2], %r8;\n"
READ_PEER = "ld.shared::cluster.b32 %r9, [%r7];\n"
STORE = "st.global.b32 [%d1], %r9;\n"

PULL = WRITE_OWN + SYNC + READ_PEER + SYNC + STORE
PUSH = (
    SYNC + "add.s32 %r8, %r5, 1000; st.shared::cluster.b32 [%r7], %r8;\n" + SYNC + "ld.shared.b32 %r9, [%r2];" + STORE
)

VECTORS = "mad.lo.s32 %r10, %r0, 12, %r2; st.shared.v4.b32 [%r10], {%r5, %r0, %r3, %r4};" + SYNC + """
    mad.lo.s32 %r11, %r0, 12, %r7; ld.shared::cluster.v4.b32 {%r12, %r13, %r14, %r15}, [%r11];
    ld.shared::cluster.u8 %h1, [%r11+8]; cvt.u32.u16 %r16, %h1;              // the peer's rank
    cvt.u64.u32 %d2, %r10; cvta.shared.u64 %d2, %d2; mapa.u64 %d3, %d2, %r6;
    ld.b64 %d4, [%d3+8]; cvt.u32.u64 %r17, %d4;                               // generic: its rank again
    getctarank.shared::cluster.u32 %r18, %r11; getctarank.u64 %r19, %d3;
    isspacep.shared::cluster %p1, %d3; isspacep.shared::cta %p2, %d3; isspacep.shared %p3, %d2;
    selp.b32 %r20, 1, 0, %p1; @%p2 mov.b32 %r20, 9; @!%p3 mov.b32 %r20, 9;
    cvt.u64.u32 %d5, %r11; cvta.shared::cluster.u64 %d5, %d5; setp.ne.b64 %p4, %d5, %d3; @%p4 mov.b32 %r20, 9;
    cvta.to.shared::cluster.u64 %d5, %d5; cvt.u32.u64 %r21, %d5; sub.s32 %r21, %r21, %r11;
    mad.lo.s32 %r9, %r16, 10, %r17; mad.lo.s32 %r9, %r9, 10, %r18; mad.lo.s32 %r9, %r9, 10, %r19;
    mad.lo.s32 %r9, %r9, 10, %r20; mad.lo.s32 %r9, %r9, 1000, %r12; add.s32 %r9, %r9, %r21;
""" + SYNC + STORE  # fmt: skip

ATOMICS = (
    "st.shared.b32 [%r2], 5;" + SYNC + "mov.b32 %r10, 0; mapa.shared::cluster.u32 %r11, %r1, %r10;"
    "red.shared::cluster.add.u32 [%r11], %r0; atom.shared::cluster.add.u32 %r12, [%r11+4], 1;"
    "cvt.u64.u32 %d2, %r11; cvta.shared::cluster.u64 %d2, %d2; red.relaxed.cluster.max.u32 [%d2+8], %r5;"
    + SYNC + "ld.shared.b32 %r9, [%r2];" + STORE
)  # fmt: skip
"""All threads of a cluster change three words of rank 0."""

ADDRESSES = (
    """
    setp.eq.u32 %p1, %r0, 0; and.b32 %r10, %r0, 1; mapa.shared::cluster.u32 %r9, %r1, %r10; @%p1 mov.b32 %r9, %r1;
"""
    + STORE
)
"""The addresses themselves: thread 0 has that of its own CTA's memory, the others have mapa's of either rank."""

# --- asynchronous traffic: clusters of CTAs of one warp, an mbarrier at 0 of each, what comes at 128.. or 1024..

ASYNC_START = """
    mov.u32 %r1, smem; mad.lo.s32 %r2, %r0, 4, %r1;
    mov.u32 %r3, %cluster_ctarank; mov.u32 %r4, %ctaid.x;
    mad.lo.s32 %r5, %r4, 32, %r0; mul.wide.u32 %d1, %r5, 4; add.s64 %d1, %out, %d1;
    setp.eq.u32 %p0, %r0, 0; setp.eq.u32 %p1, %r3, 0; and.pred %p2, %p0, %p1;         // p2: lane 0 of rank 0
    xor.b32 %r6, %r3, 1; mapa.shared::cluster.u32 %r7, %r1, %r6; mapa.shared::cluster.u32 %r8, %r2, %r6;
    @%p0 mbarrier.init.shared::cta.b64 [%r1], ARRIVALS;
    fence.mbarrier_init.release.cluster;
"""
WAIT = "W: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p4, [%r1], 0; @!%p4 bra W;\n"
READ = "ld.shared.b32 %r9, [%r2+128]; st.global.b32 [%d1], %r9;\n"


def expect(count: int) -> str:
    """Lane 0 arrives at its own CTA's barrier, where that many bytes will come."""
    return f"@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], {count};\n"


REMOTE = (
    RELAXED_SYNC
    + "st.shared::cluster.b32 [%r8+128], %r5; mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r7];\n"
    + WAIT + READ
)  # fmt: skip
"""The peer's 32 lanes arrive when they have stored."""

REMOTE_EXPECT = RELAXED_SYNC + "@!%p1 bra RECEIVE;" + """
    @%p0 mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64 _, [%r7], 128;
    st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r8+128], %r5, [%r7];
    st.global.b32 [%d1], 0; bra.uni END; RECEIVE:
""" + WAIT + READ + "END:" + SYNC  # fmt: skip
"""Rank 0 announces bytes at rank 1's barrier and sends them."""

STORES = (
    expect(128) + RELAXED_SYNC
    + "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r8+128], %r5, [%r7];\n"
    + WAIT + READ
)  # fmt: skip

VECTOR_STORES = (
    expect(512) + RELAXED_SYNC + "mad.lo.s32 %r10, %r0, 12, %r8; mov.b32 %r11, 7; mov.b32 %r12, 9;"
    "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%r10+128], {%r5, %r11, %r12, %r3}, [%r7];"
    + WAIT + "mad.lo.s32 %r10, %r0, 12, %r2; ld.shared.v4.b32 {%r13, %r14, %r15, %r16}, [%r10+128];"
    "mad.lo.s32 %r13, %r13, 10, %r14; mad.lo.s32 %r13, %r13, 10, %r15; mad.lo.s32 %r9, %r13, 10, %r16;"
    "st.global.b32 [%d1], %r9;"
)  # fmt: skip

REDUCTIONS = (
    "@%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 256; @%p2 st.shared.b32 [%r1+128], 5;" + SYNC
    + "mov.b32 %r10, 0; mapa.shared::cluster.u32 %r11, %r1, %r10;"
    "red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [%r11+128], %r0, [%r11];"
    "mov.b32 %r9, 0; @!%p1 bra END;" + WAIT + "ld.shared.b32 %r9, [%r1+128]; END: st.global.b32 [%d1], %r9;" + SYNC
)  # fmt: skip
"""All lanes of both CTAs add to one word of rank 0."""

BULK = (
    expect(128)
    + "st.shared.b32 [%r2+1024], %r5; fence.proxy.async.shared::cta; bar.warp.sync -1;\n" + RELAXED_SYNC
    + "@%p0 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r7+128], [%r1+1024], 128, [%r7];\n"
    + WAIT + READ + SYNC
)  # fmt: skip
"""The last barrier tells the sender that its source has been read."""

MULTICAST = (
    expect(512) + RELAXED_SYNC + """
    shl.b32 %r10, %r3, 7; add.s32 %r11, %r1, %r10; shr.u32 %r12, %r4, 2; shl.b32 %r12, %r12, 9;
    add.s32 %r12, %r12, %r10; cvt.u64.u32 %d2, %r12; add.s64 %d2, %src, %d2; mov.b16 %h1, 15;
    @%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
      [%r11+128], [%d2], 128, [%r1], %h1;
    """ + WAIT + """
    mad.lo.s32 %r13, %r0, 12, %r2; ld.shared.v4.b32 {%r14, %r15, %r16, %r17}, [%r13+128];
    mad.lo.s32 %r18, %r4, 32, %r0; mul.wide.u32 %d3, %r18, 16; add.s64 %d3, %out, %d3;
    st.global.v4.b32 [%d3], {%r14, %r15, %r16, %r17};
    """ + SYNC
)  # fmt: skip
"""Each CTA of a cluster of four loads a quarter of 512 bytes for all."""

TENSOR_MULTICAST = expect(1024) + RELAXED_SYNC + """
    shl.b32 %r10, %r3, 9; add.s32 %r11, %r1, %r10; shl.b32 %r12, %r3, 3; mov.b32 %r13, 0; mov.b16 %h1, 3;
    mov.u64 %d2, map; cvta.param.u64 %d2, %d2;
    @%p0 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster
      [%r11+1024], [%d2, {%r13, %r12}], [%r1], %h1;
""" + WAIT + """
    mov.b32 %r14, 0; COPY: add.s32 %r15, %r2, %r14; ld.shared.b32 %r16, [%r15+1024];
    cvt.u64.u32 %d4, %r14; mul.wide.u32 %d5, %r4, 1024; add.s64 %d4, %d4, %d5; mul.wide.u32 %d5, %r0, 4;
    add.s64 %d4, %d4, %d5; add.s64 %d4, %out, %d4; st.global.b32 [%d4], %r16;
    add.s32 %r14, %r14, 128; setp.lt.u32 %p5, %r14, 1024; @%p5 bra COPY;
""" + SYNC  # fmt: skip
"""Each CTA of a pair loads eight rows of 64 bytes, swizzled, for both."""

LOAD = expect(128) + RELAXED_SYNC + """
    mul.wide.u32 %d2, %r4, 128; add.s64 %d2, %src, %d2;
    @%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r7+128], [%d2], 128, [%r7];
""" + WAIT + READ  # fmt: skip
"""A copy that is not multicast, into the peer."""

# --- special registers

VECTORS_OF_THREE = ("cluster_ctaid", "cluster_nctaid", "clusterid", "nclusterid", "ctaid")
SPECIALS = ["%cluster_ctarank", "%cluster_nctarank", *(f"%{v}.{axis}" for v in VECTORS_OF_THREE for axis in "xyz")]
SPECIAL_REGISTERS = """
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z;
    mad.lo.s32 %r2, %r3, 2, %r2; mad.lo.s32 %r1, %r2, 4, %r1; mul.wide.u32 %d1, %r1, 72; add.s64 %d1, %out, %d1;
    setp.ne.u32 %p0, %r0, 0; @%p0 ret;
    mov.pred %p1, %is_explicit_cluster; selp.b32 %r9, 1, 0, %p1; st.global.b32 [%d1], %r9;
""" + "".join(f"mov.u32 %r9, {name}; st.global.b32 [%d1+{4 * n}], %r9;\n" for n, name in enumerate(SPECIALS, 1))


@dataclass(frozen=True)
class ClusterKernel:
    """A body with what :func:`harness.prepare` needs; ``out`` is the shape of the words that it stores."""

    name: str
    body: str
    out: tuple[int, ...]
    options: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def prepare(self, body: str | None = None, target: str = "sm_90a", **changes):
        """(PTX, launch), with another body if one is given."""
        options = {**self.options, **changes}
        outputs = {"out": np.zeros(self.out, np.uint32)}
        return prepare(self.body if body is None else body, outputs=outputs, target=target, **options)


def _access(name: str, body: str) -> ClusterKernel:
    return ClusterKernel(name, ACCESS_START + body, (4, 64), {"grid": 4, "cluster": (2, 1, 1), "block": 64})


def _async(name: str, body: str, *, arrivals: int = 1, ctas: int = 4, cluster: int = 2, words: int = 32, **options):
    text = ASYNC_START.replace("ARRIVALS", str(arrivals)) + body
    return ClusterKernel(name, text, (ctas, words), {"grid": ctas, "cluster": (cluster, 1, 1), **options})


WORDS = np.arange(256, dtype=np.uint32) * 3 + 1
ROWS = np.random.default_rng(0).integers(0, 256, (16, 64), dtype=np.uint8)


def _rows_map(addresses: dict[str, int]) -> bytes:
    return tensor_map(addresses["src"], (64, 16), (64,), (64, 8), swizzle=2)


KERNELS = {
    kernel.name: kernel
    for kernel in (
        ClusterKernel("special-registers", SPECIAL_REGISTERS, (4, 2, 4, 18), {"grid": (4, 2, 4), "cluster": (2, 1, 2)}),
        _access("addresses", ADDRESSES),
        _access("pull", PULL),
        _access("push", PUSH),
        _access("vectors", VECTORS),
        _access("atomics", ATOMICS),
        _async("remote-arrivals", REMOTE, arrivals=32),
        _async("remote-expect", REMOTE_EXPECT),
        _async("stores", STORES),
        _async("vector-stores", VECTOR_STORES),
        _async("reductions", REDUCTIONS),
        _async("bulk", BULK),
        _async("multicast", MULTICAST, ctas=8, cluster=4, words=128, arrays={"src": WORDS}),
        _async("tensor-multicast", TENSOR_MULTICAST, ctas=2, words=256, arrays={"src": ROWS}, maps={"map": _rows_map}),
        _async("load-into-peer", LOAD, arrays={"src": WORDS[:128]}),
    )
}
