"""Divergence, exchange between lanes, matrix loads and stores, tensor-core fragments."""

import numpy as np
import pytest
import torch
from harness import evaluate, execute

from nvfp4dsl.emulator.faults import DivergentSync
from nvfp4dsl.mma_model import omma_k64

LANE = np.arange(32, dtype=np.uint32)
STORE = "mul.wide.u32 %d1, %r0, 4; add.s64 %d1, %out, %d1; st.global.b32 [%d1], %r9;"


def lanes(body, seed=0, block=32, **options):
    """Run a body that leaves its result in %r9."""
    out, _ = execute(body + STORE, outputs={"out": np.zeros(block, np.uint32)}, block=block, seed=seed, **options)
    return out["out"]


@pytest.mark.parametrize("seed", range(3))
def test_divergent_loops_meet_again(seed):
    """Each lane goes round a loop lane times, then all meet in a shuffle."""
    body = """
    mov.b32 %r9, 0;
    and.b32 %r1, %r0, 31;
    setp.eq.u32 %p1, %r1, 0;
    @%p1 bra OUT;
    LOOP:
    add.s32 %r9, %r9, 2;
    sub.s32 %r1, %r1, 1;
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra LOOP;
    OUT:
    shfl.sync.bfly.b32 %r9, %r9, 1, 31, -1;
    """
    np.testing.assert_array_equal(lanes(body, seed, block=96), np.tile(2 * (LANE ^ 1), 3))


def test_branches_to_both_sides():
    body = """
    and.b32 %r1, %r0, 1;
    setp.eq.u32 %p1, %r1, 0;
    @%p1 bra EVEN;
    mov.b32 %r9, 111;
    bra.uni JOIN;
    EVEN: mov.b32 %r9, 222;
    JOIN: @!%p1 add.s32 %r9, %r9, 1;
    """
    np.testing.assert_array_equal(lanes(body), np.where(LANE % 2, 112, 222))


@pytest.mark.parametrize(
    ("mode", "amount", "clamp", "source"),
    [
        ("idx", 5, 31, np.full(32, 5)),
        ("up", 3, 0, np.where(LANE >= 3, LANE - 3, LANE)),
        ("down", 4, 31, np.where(LANE < 28, LANE + 4, LANE)),
        ("bfly", 6, 31, LANE ^ 6),
        ("idx", 1, 0x181F, LANE & 24 | 1),
    ],
)
def test_shuffles(mode, amount, clamp, source):
    values = np.random.default_rng(0).integers(0, 2**32, 32, dtype=np.uint32)
    got = evaluate(f"shfl.sync.{mode}.b32 {{d}}, {{a}}, {amount}, {clamp}, -1;", values)
    np.testing.assert_array_equal(got, values[source.astype(int)])


def test_votes_and_election():
    odd = "and.b32 %r1, %r0, 1; setp.ne.u32 %p1, %r1, 0;"
    assert (lanes(odd + "vote.sync.ballot.b32 %r9, %p1, -1;") == 0xAAAAAAAA).all()
    assert (lanes(odd + "vote.sync.any.pred %p2, %p1, -1; selp.b32 %r9, 1, 0, %p2;") == 1).all()
    assert (lanes(odd + "vote.sync.all.pred %p2, %p1, -1; selp.b32 %r9, 1, 0, %p2;") == 0).all()
    assert (lanes("redux.sync.add.u32 %r9, %r0, -1;") == 496).all()
    leaders = set()
    for seed in range(6):
        elected = lanes("elect.sync %r8|%p1, -1; selp.b32 %r9, 1, 0, %p1;", seed)
        assert elected.sum() == 1
        leaders.add(int(elected.argmax()))
    assert len(leaders) > 1  # a kernel may not rely on lane 0


def test_lanes_that_never_come():
    with pytest.raises(DivergentSync, match=r"shfl\.sync"):
        lanes("""
        setp.lt.u32 %p1, %r0, 4;
        @%p1 bra SKIP;
        shfl.sync.idx.b32 %r9, %r0, 3, 31, -1;
        SKIP: mov.b32 %r9, 0;
        """)


def test_matrices():
    """stmatrix of known fragments, read back by ldmatrix straight and transposed."""
    body = """
    mov.u32 %r1, smem;
    mad.lo.s32 %r2, %r0, 16, %r1;
    mul.lo.s32 %r3, %r0, 0x20002; add.s32 %r3, %r3, 0x10000;
    add.s32 %r4, %r3, 0x1000100; add.s32 %r5, %r3, 0x2000200; add.s32 %r6, %r3, 0x3000300;
    stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r2], {%r3, %r4, %r5, %r6};
    ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r10, %r11, %r12, %r13}, [%r2];
    mul.wide.u32 %d1, %r0, 16; add.s64 %d1, %out, %d1;
    st.global.v4.b32 [%d1], {%r10, %r11, %r12, %r13};
    """
    out, _ = execute(body, outputs={"out": np.zeros((32, 4, 2), np.uint16)})
    for m in range(4):
        matrix = 0x100 * m + np.arange(64).reshape(8, 8)
        np.testing.assert_array_equal(out["out"][:, m].reshape(8, 8), matrix.T)


def test_block_scaled_mma():
    """Fragments made by the rule of the manual against the arithmetic model on the matrices."""
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 16, (16, 64)), rng.integers(0, 16, (8, 64))
    sa, sb = rng.integers(0x20, 0x50, (16, 4)), rng.integers(0x20, 0x50, (8, 4))
    c = rng.standard_normal((16, 8)).astype(np.float32)
    word = lambda codes: sum(int(x) << 4 * j for j, x in enumerate(codes))  # noqa: E731
    scale = lambda s: sum(int(x) << 8 * j for j, x in enumerate(s))  # noqa: E731
    table = np.zeros((32, 12), np.uint32)
    for lane in range(32):
        g, t = lane // 4, lane % 4
        table[lane, 0:4] = [
            word(a[r, k : k + 8]) for r, k in ((g, 8 * t), (g + 8, 8 * t), (g, 32 + 8 * t), (g + 8, 32 + 8 * t))
        ]
        table[lane, 4:6] = [word(b[g, k : k + 8]) for k in (8 * t, 32 + 8 * t)]
        table[lane, 6:10] = [
            c[r, n].view(np.uint32) for r, n in ((g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1))
        ]
        table[lane, 10] = scale(sa[g + 8 * (t % 2)]) if t >= 2 else 0xDEADBEEF  # thread-id 1: lanes 2 and 3 of a quad
        table[lane, 11] = scale(sb[g]) if t == 3 else 0xDEADBEEF
    body = """
    mul.wide.u32 %d1, %r0, 48; add.s64 %d1, %table, %d1;
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d1]; ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%d1+16];
    ld.global.v4.b32 {%r9, %r10, %r11, %r12}, [%d1+32];
    mov.b16 %h0, 0; mov.b16 %h1, 1; mov.b16 %h3, 3;
    mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X.m16n8k64.row.col.f32.e2m1.e2m1.f32.ue4m3
      {%r20, %r21, %r22, %r23}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%r7, %r8, %r9, %r10},
      {%r11}, {%h0, %h1}, {%r12}, {%h0, %h3};
    mul.wide.u32 %d2, %r0, 16; add.s64 %d2, %out, %d2; st.global.v4.b32 [%d2], {%r20, %r21, %r22, %r23};
    """
    out, report = execute(body, {"table": table}, outputs={"out": np.zeros((32, 4), np.float32)})
    u8 = lambda x: torch.from_numpy(x.astype(np.uint8))  # noqa: E731
    expected = omma_k64(u8(a), u8(sa), u8(b), u8(sb), torch.from_numpy(c)).numpy()
    d = np.zeros((16, 8), np.float32)
    for lane in range(32):
        g, t = lane // 4, lane % 4
        d[g, 2 * t : 2 * t + 2], d[g + 8, 2 * t : 2 * t + 2] = out["out"][lane, :2], out["out"][lane, 2:]
    np.testing.assert_array_equal(d.view(np.uint32), expected.view(np.uint32))
    assert report.mmas == 1


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_mma(kind, dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 8, s, generator=generator).to(dtype) for s in ((16, 16), (8, 16)))
    bits = lambda x: x.contiguous().view(torch.int16).numpy().view(np.uint16)  # noqa: E731
    table = np.zeros((32, 6, 2), np.uint16)
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for n, (row, k) in enumerate(((g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8))):
            table[lane, n] = bits(a)[row, k : k + 2]
        table[lane, 4], table[lane, 5] = bits(b)[g, 2 * t : 2 * t + 2], bits(b)[g, 2 * t + 8 : 2 * t + 10]
    body = f"""
    mul.wide.u32 %d1, %r0, 24; add.s64 %d1, %table, %d1;
    ld.global.v2.b32 {{%r1, %r2}}, [%d1]; ld.global.v2.b32 {{%r3, %r4}}, [%d1+8];
    ld.global.v2.b32 {{%r5, %r6}}, [%d1+16];
    mov.b32 %r7, 0f00000000;
    mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32
      {{%r20, %r21, %r22, %r23}}, {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}}, {{%r7, %r7, %r7, %r7}};
    mul.wide.u32 %d2, %r0, 16; add.s64 %d2, %out, %d2; st.global.v4.b32 [%d2], {{%r20, %r21, %r22, %r23}};
    """
    out, _ = execute(body, {"table": table}, outputs={"out": np.zeros((8, 4, 2, 2), np.float32)})
    d = out["out"].transpose(2, 0, 1, 3).reshape(16, 8)
    np.testing.assert_array_equal(d, (a.float() @ b.float().T).numpy())  # small integers: exact
