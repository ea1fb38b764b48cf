"""Tensor maps: boxes, swizzles, edges, packed FP4, and what is refused."""

import numpy as np
import pytest
from harness import execute, tensor_map

from nvfp4dsl.emulator import faults, tma

LOAD = """
    mov.u32 %r1, smem;
    mov.u64 %d1, map;
    cvta.param.u64 %d1, %d1;
    setp.ne.u32 %p0, %r0, 0;
    @!%p0 mbarrier.init.shared.b64 [%r1], 1;
    fence.mbarrier_init.release.cluster;
    bar.sync 0;
    @%p0 bra WAIT;
    mov.b32 %r2, {c0}; mov.b32 %r3, {c1}; mov.b32 %r4, {c2};
    mbarrier.arrive.expect_tx.shared.b64 _, [%r1], {bytes};
    cp.async.bulk.tensor.{rank}d.shared::cta.global.tile.mbarrier::complete_tx::bytes
      [%r1+{at}], [%d1, {{{coordinates}}}], [%r1];
WAIT:
    mbarrier.try_wait.parity.shared.b64 %p1, [%r1], 0;
    @!%p1 bra WAIT;
    mov.b32 %r5, 0;
COPY:
    mad.lo.s32 %r6, %r0, 4, %r5; add.s32 %r7, %r6, %r1;
    ld.shared.b32 %r8, [%r7+{at}];
    cvt.u64.u32 %d2, %r6; add.s64 %d2, %out, %d2; st.global.b32 [%d2], %r8;
    add.s32 %r5, %r5, 128;
    setp.lt.u32 %p2, %r5, {bytes};
    @%p2 bra COPY;
"""


def load(source, extents, strides, box, coordinates, *, kind=0, swizzle=0, at=1024, bytes_=None, bits=8, **options):
    """The shared memory that one box load leaves, as bytes."""
    size = int(np.prod(box)) * bits // 8
    names = ", ".join(f"%r{2 + n}" for n in range(len(box)))
    padded = (*coordinates, 0, 0)[:3]
    body = LOAD.format(
        c0=padded[0], c1=padded[1], c2=padded[2], bytes=bytes_ or size, rank=len(box), at=at, coordinates=names
    )
    make = lambda addresses: tensor_map(addresses["src"], extents, strides, box, kind, swizzle)  # noqa: E731
    out, _ = execute(
        body, {"src": source}, outputs={"out": np.zeros(size, np.uint8)}, maps={"map": make}, smem=16384, **options
    )
    return out["out"]


@pytest.mark.parametrize(("swizzle", "width"), [(0, 64), (1, 32), (2, 64), (3, 128)])
def test_swizzles(swizzle, width):
    """Chunk c of 16 bytes of row r lies at chunk c ^ f(r): the pattern that shared-memory layouts are built on."""
    rows = 16
    source = np.random.default_rng(0).integers(0, 256, (40, 256), dtype=np.uint8)
    got = load(source, (256, 40), (256,), (width, rows), (32, 5), swizzle=swizzle).reshape(rows, width // 16, 16)
    expected = source[5 : 5 + rows, 32 : 32 + width].reshape(rows, width // 16, 16)
    row = np.arange(rows)
    exchange = {0: 0 * row, 1: row // 4 % 2, 2: row // 2 % 4, 3: row % 8}[swizzle]
    for r in range(rows):
        for c in range(width // 16):
            np.testing.assert_array_equal(got[r, c ^ exchange[r]], expected[r, c])


def test_the_swizzle_follows_the_address():
    """At an address that is no multiple of 1024, the pattern starts in its middle."""
    source = np.random.default_rng(0).integers(0, 256, (8, 128), dtype=np.uint8)
    got = load(source, (128, 8), (128,), (128, 8), (0, 0), swizzle=3, at=1024 + 384).reshape(8, 8, 16)
    expected = source.reshape(8, 8, 16)
    for r in range(8):
        for c in range(8):
            np.testing.assert_array_equal(got[r, c ^ ((r + 3) % 8)], expected[r, c])


@pytest.mark.parametrize(("x", "y"), [(-16, -3), (80, 36), (0, 100), (16, 0)])
def test_outside_is_zero(x, y):
    source = np.random.default_rng(1).integers(1, 256, (40, 112), dtype=np.uint8)
    got = load(source, (100, 40), (112,), (32, 8), (x, y)).reshape(8, 32)
    expected = np.zeros((8, 32), np.uint8)
    for r in range(8):
        for c in range(32):
            if 0 <= y + r < 40 and 0 <= x + c < 100:
                expected[r, c] = source[y + r, x + c]
    np.testing.assert_array_equal(got, expected)


def test_three_dimensions_of_words():
    source = np.random.default_rng(2).integers(0, 2**32, (3, 6, 20), dtype=np.uint32)
    got = load(source, (20, 6, 3), (80, 480), (8, 4, 2), (4, 1, 1), kind=2, bits=32).view(np.uint32).reshape(2, 4, 8)
    np.testing.assert_array_equal(got, source[1:3, 1:5, 4:12])


def test_packed_fp4():
    """Extents, box and coordinates count 4-bit elements."""
    source = np.random.default_rng(3).integers(0, 256, (16, 64), dtype=np.uint8)
    got = load(source, (128, 16), (64,), (64, 8), (32, 4), kind=11, swizzle=1, bits=4)
    rows = got.reshape(8, 2, 16)
    for r in range(8):
        for c in range(2):
            np.testing.assert_array_equal(rows[r, c ^ (r // 4 % 2)], source[4 + r, 16 + 16 * c : 32 + 16 * c])


STORE = """
    mov.u32 %r1, smem; mov.u64 %d1, map;
    mad.lo.s32 %r2, %r0, 4, %r1; st.shared.b32 [%r2], %r0; st.shared.b32 [%r2+128], %r2;
    fence.proxy.async.shared::cta;
    bar.warp.sync -1;
    setp.ne.u32 %p0, %r0, 0;
    @%p0 ret;
    mov.b32 %r3, {x}; mov.b32 %r4, {y};
    cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%d1, {{%r3, %r4}}], [%r1];
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
"""


def test_store_clips_at_the_edge():
    make = lambda addresses: tensor_map(addresses["out"], (12, 9), (64,), (8, 8), 2)  # noqa: E731
    out, _ = execute(
        STORE.format(x=8, y=4), outputs={"out": np.zeros((9, 16), np.uint32)}, maps={"map": make}, initialised=True
    )
    box = np.concatenate([np.arange(32), 1024 + 4 * np.arange(32)]).reshape(8, 8)
    expected = np.zeros((9, 16), np.uint32)
    expected[4:9, 8:12] = box[:5, :4]
    np.testing.assert_array_equal(out["out"], expected)


def test_a_map_larger_than_its_buffer():
    make = lambda addresses: tensor_map(addresses["out"], (12, 10), (64,), (8, 8), 2)  # noqa: E731
    with pytest.raises(faults.OutOfBounds, match="nearest is out"):
        execute(STORE.format(x=8, y=4), outputs={"out": np.zeros((9, 16), np.uint32)}, maps={"map": make})


def test_a_store_to_an_input():
    make = lambda addresses: tensor_map(addresses["src"], (16, 9), (64,), (8, 8), 2)  # noqa: E731
    with pytest.raises(faults.ReadOnlyStore, match="src"):
        execute(STORE.format(x=0, y=0), {"src": np.zeros((9, 16), np.uint32)}, maps={"map": make})


SOURCE = np.zeros((16, 256), np.uint8)
REFUSED = {
    "a shared address that is no multiple of 128": ({"at": 1024 + 64}, "multiple of 128"),
    "a row longer than the swizzle": ({"box": (128, 8), "swizzle": 2}, "exceeds"),
    "an unknown element type": ({"kind": 12}, "element type 12"),
    "a row that is no multiple of 16 bytes": ({"box": (24, 8)}, "multiples of 16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    change, text = REFUSED[name]
    options = {"box": (64, 8), **change}
    with pytest.raises(faults.TensormapMisuse, match=text):
        load(SOURCE, (256, 16), (256,), options.pop("box"), (0, 0), **options)


def test_the_wrong_number_of_bytes():
    with pytest.raises(faults.TransactionMismatch, match="transaction bytes"):
        load(SOURCE, (256, 16), (256,), (64, 8), (0, 0), bytes_=512 + 128)


def test_reading_uninitialised_global_memory():
    make = lambda addresses: tensor_map(addresses["src"], (256, 16), (256,), (64, 8))  # noqa: E731
    body = LOAD.format(c0=0, c1=0, c2=0, bytes=512, rank=2, at=1024, coordinates="%r2, %r3")
    outputs = {"src": SOURCE, "out": np.zeros(512, np.uint8)}
    with pytest.raises(faults.UninitialisedRead, match="buffer src"):
        execute(body, outputs=outputs, maps={"map": make}, smem=4096)


def test_decoding():
    descriptor = tma.decode(tensor_map(0x70000100, (384, 77, 3), (192, 16384), (128, 64, 1), kind=11, swizzle=2))
    assert descriptor == tma.Descriptor(0x70000100, 4, 2, (384, 77, 3), (192, 16384), (128, 64, 1))
