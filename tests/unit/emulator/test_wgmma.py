"""``wgmma``: every layout against mmasim, and a typed fault for every way of using it wrongly."""

import numpy as np
import pytest
import torch
from harness import execute
from mmasim.nv_ptx.sim import MMA, WGMMA
from wgmma_kernels import K128, LAYOUTS, SIZES, STEPS, VARIANTS, Product, from_registers

from nvfp4dsl.emulator import faults, run
from nvfp4dsl.emulator.half_dot import dot16

BITS = {"bf16": torch.bfloat16, "f16": torch.float16}


def result(product, edit=lambda text: text, seed=0):
    ptx, launch = product.prepare()
    edited = edit(ptx)
    run(edited, launch, seed=seed)
    return from_registers(launch.buffer("out").data.view(np.float32).reshape(128, -1))


def assert_same_bits(actual, expected):
    np.testing.assert_array_equal(actual.view(np.uint32), np.ascontiguousarray(expected).view(np.uint32))


@pytest.mark.parametrize("product", LAYOUTS + VARIANTS, ids=str)
def test_layouts_and_variants(product):
    model = WGMMA("Hopper", f"m64n{product.n}k16.f32.{product.dtype}.{product.dtype}")
    assert_same_bits(result(product), product.expected(model.dpa))


@pytest.mark.parametrize("product", SIZES[::5], ids=str)
def test_sizes(product):
    whole = product.expected(lambda a, b, c: dot16(a[:, 0], b[0], c))
    assert_same_bits(result(product, seed=3), whole)


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("chip", ["Hopper", "Blackwell", "RTX Blackwell"])
@pytest.mark.parametrize("kind", ["any bits", "normal", "tiny", "small integers"])
def test_dot_products_are_mmasims(name, chip, kind):
    dtype = BITS[name]
    generator = torch.Generator().manual_seed(7)
    shapes = (6, 32, 16), (6, 8, 16), (6, 32, 8)
    if kind == "any bits":
        a, b = (torch.randint(-(2**15), 2**15, s, generator=generator).to(torch.int16).view(dtype) for s in shapes[:2])
        c = torch.randint(-(2**31), 2**31, shapes[2], generator=generator).to(torch.int32).view(torch.float32)
    elif kind == "small integers":  # products cancel, and are zero
        a, b, c = (torch.randint(-3, 4, s, generator=generator).float() for s in shapes)
    else:
        a, b, c = (torch.randn(s, generator=generator) for s in shapes)
        scale = 1.0 if kind == "normal" else 2.0**-12 if name == "f16" else 2.0**-68
        a, b, c = a * scale, b * scale, c * scale * scale
    a, b = a.to(dtype), b.to(dtype)
    shape = (6, 32, 8, 16)
    model = MMA(chip, f"m16n8k16.f32.{name}.{name}.f32")
    expected = model.dpa(a[:, :, None].expand(shape), b[:, None].expand(shape), c)
    assert_same_bits(dot16(a, b, c).numpy(), expected.numpy())
    shorter = MMA(chip, f"m16n8k8.f32.{name}.{name}.f32")
    expected = shorter.dpa(a[:, :, None, :8].expand(6, 32, 8, 8), b[:, None, :, :8].expand(6, 32, 8, 8), c)
    assert_same_bits(dot16(a[..., :8], b[..., :8], c).numpy(), expected.numpy())


def test_older_chips_are_refused():
    """They keep fewer bits, and add eight products at a time."""
    fragments = "{%f1, %f2, %f3, %f4}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%f1, %f2, %f3, %f4}"
    zeros = "".join(f"mov.b32 %r{i}, 0; mov.b32 %f{i}, 0;" for i in range(1, 7))
    body = f"{zeros} mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {fragments};"
    with pytest.raises(faults.UnknownInstruction, match="the arithmetic of sm_89"):
        execute(body, target="sm_89")
    for target in ("sm_90a", "sm_100a", "sm_120a", "sm_121a"):
        assert execute(body, target=target)[1].mmas == 1


# --- order


SMALL = Product(8, None, K128)
SHARED = Product(8, K128, K128)
FENCE, COMMIT, WAIT = (f"wgmma.{name}.sync.aligned" for name in ("fence", "commit_group", "wait_group"))
LAST_STEP = f"%d11, %p2, 1, 1, 0;\n\n    {COMMIT};"

EDITS = {
    "no fence": (SMALL, f"{FENCE};", "", faults.MissingWgmmaFence, "before the first wgmma"),
    "a write after the fence": (
        SMALL, f"{FENCE};", f"{FENCE}; add.f32 %acc1, %acc1, %acc1;", faults.MissingWgmmaFence, "no wgmma.fence lies",
    ),
    "a write of A after the fence": (
        SMALL, f"{FENCE};", f"{FENCE}; mov.b32 %frag5, 0;", faults.MissingWgmmaFence, "mov.b32|PTX line",
    ),
    "no wait": (SMALL, f"{WAIT} 0;", "", faults.UnfinishedWgmma, "reads an accumulator"),
    "no commit": (SMALL, f"{COMMIT};", "", faults.UnfinishedWgmma, "reads an accumulator"),
    "a wait for too few": (SMALL, f"{WAIT} 0;", f"{WAIT} 1;", faults.UnfinishedWgmma, "reads an accumulator"),
    "accumulators written too early": (
        SMALL, f"{WAIT} 0;", f"mov.f32 %acc0, 0f00000000; {WAIT} 0;", faults.UnfinishedWgmma, "writes an accumulator",
    ),
    "A written too early": (
        SMALL, f"{WAIT} 0;", f"mov.b32 %frag0, 0; {WAIT} 0;", faults.UnfinishedWgmma, "writes a register read by",
    ),
    "exit too early": (
        SMALL, f"{WAIT} 0;", f"ret; {WAIT} 0;", faults.UnfinishedWgmma, "ends a thread",
    ),
    "no proxy fence": (SHARED, "fence.proxy.async.shared::cta;", "", faults.MissingProxyFence, "wgmma reads"),
    "no barrier": (SHARED, "bar.sync 0;", "", faults.DataRace, "wgmma reads"),
    "the matrix overwritten too early": (
        SHARED, f"{WAIT} 0;", f"st.shared.b32 [%r2], %r0; {WAIT} 0;", faults.DataRace, "overwrites|wgmma reads",
    ),
    "some lanes only": (
        SMALL, f"{FENCE};", f"{FENCE}; setp.lt.u32 %p3, %r0, 5; @%p3 bra SKIP;", faults.Fault, "wgmma|lanes",
    ),
    "one warp stays away": (
        SMALL, "bar.sync 0;", "bar.sync 0; setp.lt.u32 %p3, %r0, 32; @%p3 bra SKIP;",
        faults.Deadlock, "the rest of its warpgroup at a wgmma .arrived: warps 1, 2, 3",
    ),
    "a descriptor that differs": (
        SHARED, "wgmma.fence", "mad.lo.s32 %r1, %r0, 16, %r1; wgmma.fence", faults.DivergentSync, "descriptor of",
    ),
    "a matrix past shared memory": (
        SHARED, "wgmma.fence", "add.s32 %r1, %r1, 16384; wgmma.fence", faults.OutOfBounds, "a wgmma reads",
    ),
    "another chip": (SMALL, "sm_90a", "sm_120a", faults.UnknownInstruction, "sm_90a only"),
    "N that does not exist": (SMALL, "m64n8k16", "m64n12k16", faults.UnknownInstruction, "multiple of 8"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_wrong_use(name):
    product, before, after, fault, text = EDITS[name]

    def edit(ptx):
        assert before in ptx
        return ptx.replace(before, after).replace(f"    {COMMIT}", f"    SKIP: {COMMIT}")

    for seed in range(3):
        with pytest.raises(fault, match=text) as caught:
            result(product, edit, seed)
        assert "line" in str(caught.value)


def test_reading_a_after_the_fence_is_allowed():
    edit = lambda ptx: ptx.replace(f"{WAIT} 0;", f"mov.b32 %r20, %frag0; {WAIT} 0;")  # noqa: E731
    assert_same_bits(result(SMALL, edit), result(SMALL))


def test_overwriting_the_matrix_after_the_wait_is_allowed():
    edit = lambda ptx: ptx.replace(f"{WAIT} 0;", f"{WAIT} 0; bar.sync 0; st.shared.b32 [%r2], %r0;")  # noqa: E731
    assert_same_bits(result(SHARED, edit), result(SHARED))


@pytest.mark.parametrize("seed", range(4))
def test_groups_end_in_order(seed):
    """With one group of two still running, the accumulators of the other may be read."""
    text = SMALL.body()
    lines = [line for line in text.splitlines() if "wgmma.mma_async" in line]
    assert len(lines) == STEPS
    second = lines[2].replace("%acc", "%bcc")
    text = text.replace(".reg .f32 %acc<4>;", ".reg .f32 %acc<4>, %bcc<4>;").replace(lines[3], "")
    text = text.replace(lines[2], f"{COMMIT};\n setp.ne.b32 %p2, 0, 0;\n{second}").replace(f"{WAIT} 0;", f"{WAIT} 1;")
    text = text.rstrip().rstrip("}") + f"{WAIT} 0;\n}}\n"
    ptx, launch = SMALL.prepare()
    ptx = ptx.replace(SMALL.body(), text)
    run(ptx, launch, seed=seed)
    count = iter(range(STEPS))
    first_half = SMALL.expected(lambda a, b, c: dot16(a[:, 0], b[0], c) if next(count) < 2 else c)
    actual = from_registers(launch.buffer("out").data.view(np.float32).reshape(128, -1))
    assert_same_bits(actual, first_half)
