"""Small kernels of one warpgroup: a matrix product by ``wgmma`` (or of one warp, by ``mma.sync``), in every layout.

Shared memory receives an image made here, from the canonical layouts as CUTLASS writes them: independent of how the
emulator reads descriptors. The same kernels run on a GPU.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from harness import prepare

STEPS = 4
K = 16 * STEPS
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
MODES = {0: 0, 128: 1, 64: 2, 32: 3}  # swizzle width in bytes -> code


@dataclass(frozen=True)
class Layout:
    """Where element (row, k) of a tile lies: ``major`` "K" or "MN", swizzle width in bytes (0: none)."""

    major: str
    swizzle: int
    padding: int = 0
    """Bytes added to the outer stride."""
    shift: int = 0
    """Where the swizzle pattern begins, past a multiple of 1024: a multiple of 128."""

    def __str__(self):
        extras = [f"+{self.padding}"] * bool(self.padding) + [f"@{self.shift}"] * bool(self.shift)
        return f"{self.major}{self.swizzle}" + "".join(extras)

    def strides(self, rows):
        """(leading, stride, bytes from one K step to the next within the tile as a function of the step)."""
        width = self.swizzle or 16
        if self.major == "K":
            stride = 8 * width + self.padding
            leading = rows // 8 * stride  # the next 8 k (no swizzle), or the next swizzle width of k
            per_step = lambda s: 16 * s // (width // 2) * leading + 16 * s % (width // 2) * 2  # noqa: E731
        elif self.swizzle:
            stride = 8 * width + self.padding  # the next 8 k
            leading = K // 8 * stride  # the next swizzle width of rows
            per_step = lambda s: 2 * s * stride  # noqa: E731
        else:
            leading = 128 + self.padding  # the next 8 k
            stride = K // 8 * leading  # the next 8 rows
            per_step = lambda s: 2 * s * leading  # noqa: E731
        return leading, stride, per_step

    def offsets(self, rows):
        """Byte offset of every element [rows, K], from an address that is a multiple of 1024."""
        r, k = np.indices((rows, K))
        leading, stride, _ = self.strides(rows)
        width = self.swizzle or 16
        if self.major == "K":
            linear = k // (width // 2) * leading + r // 8 * stride + r % 8 * width + k % (width // 2) * 2
        elif self.swizzle:
            linear = r // (width // 2) * leading + k // 8 * stride + k % 8 * width + r % (width // 2) * 2
        else:
            linear = r // 8 * stride + k // 8 * leading + k % 8 * 16 + r % 8 * 2
        period = {0: 0, 32: 1, 64: 3, 128: 7}[self.swizzle]
        return self.shift + (linear ^ ((linear >> 7 & period) << 4))

    def size(self, rows):
        return -(-int(self.offsets(rows).max() + 2 + 128) // 2048) * 2048

    def descriptor(self, rows):
        leading, stride, _ = self.strides(rows)
        return leading >> 4 << 16 | stride >> 4 << 32 | (self.shift >> 7 & 7) << 49 | MODES[self.swizzle] << 62


@dataclass(frozen=True)
class Product:
    """D = +-A @ B^T (+ C) for 64 x 64 A and n x 64 B; ``a`` None: from registers."""

    n: int
    a: Layout | None
    b: Layout
    dtype: str = "bf16"
    accumulate: bool = True
    scale_a: int = 1
    scale_b: int = 1
    values: str = "normal"

    def __str__(self):
        name = lambda x: "registers" if x is None else str(x)  # noqa: E731
        parts = [f"n{self.n}", self.dtype, f"a-{name(self.a)}", f"b-{name(self.b)}", self.values]
        parts += ["fresh"] if not self.accumulate else []
        parts += [f"{self.scale_a}{self.scale_b}"] if (self.scale_a, self.scale_b) != (1, 1) else []
        return "-".join(parts)

    def operands(self):
        """A [64, K] and B [n, K] as 16-bit patterns, C [64, n] float32."""
        rng = np.random.default_rng([self.n, K])
        if self.values == "wild":  # any bits, infinities and NaN included, of a mostly finite kind
            a, b = (rng.integers(0, 1 << 16, (rows, K), np.uint16) for rows in (64, self.n))
            c = rng.integers(0, 1 << 32, (64, self.n), np.uint32).view(np.float32)
            return a, b, c
        scale = {"normal": 0, "tiny": -65, "vanishing": -75}[self.values]
        if self.values == "tiny" and self.dtype == "f16":
            scale = -12
        bits = lambda x: torch.from_numpy(x).to(DTYPES[self.dtype]).view(torch.int16).numpy().view(np.uint16)  # noqa: E731
        # Magnitudes over many binades, so that truncation shows.
        draw = lambda rows: rng.standard_normal((rows, K)) * 2.0 ** (scale + rng.integers(-6, 7, (rows, K)))  # noqa: E731
        c = rng.standard_normal((64, self.n)) * 2.0 ** (2 * scale + rng.integers(-6, 12, (64, self.n)))
        return bits(draw(64)), bits(draw(self.n)), c.astype(np.float32)

    def image(self):
        """Shared memory: A, if it is there, then B. (bytes, where B begins)."""
        a, b, _ = self.operands()
        start = self.a.size(64) if self.a else 0
        image = np.zeros(start + self.b.size(self.n), np.uint8)
        for layout, matrix, at in ((self.a, a, 0), (self.b, b, start)):
            if layout:
                where = at + layout.offsets(len(matrix))
                image[where], image[where + 1] = matrix & 0xFF, matrix >> 8
        return image, start

    def prepare(self):
        """(PTX, launch)."""
        a, _, c = self.operands()
        image, _ = self.image()
        arrays = {"image": image, "fragments": a_fragments(a), "c": to_registers(c)}
        out = {"out": np.zeros((128, self.n // 2), np.float32)}
        return prepare(self.body(), arrays, outputs=out, block=128, smem=image.size, target="sm_90a")

    def body(self):
        image, b_start = self.image()
        count = self.n // 2
        names = ", ".join(f"%acc{i}" for i in range(count))
        load = "".join(
            f"ld.global.v4.f32 {{%acc{i}, %acc{i + 1}, %acc{i + 2}, %acc{i + 3}}}, [%d3+{4 * i}];\n"
            for i in range(0, count, 4)
        )
        fragments = "".join(
            "ld.global.v4.b32 {" + ", ".join(f"%frag{4 * s + i}" for i in range(4)) + f"}}, [%d4+{16 * s}];\n"
            for s in range(STEPS)
        )
        store = "".join(
            f"st.global.v4.f32 [%d5+{4 * i}], {{%acc{i}, %acc{i + 1}, %acc{i + 2}, %acc{i + 3}}};\n"
            for i in range(0, count, 4)
        )
        return f"""
    {{
    .reg .f32 %acc<{count}>; .reg .b32 %frag<{4 * STEPS}>;
    mov.u32 %r1, smem;
    mad.lo.s32 %r2, %r0, 16, %r1;
    mul.wide.u32 %d1, %r0, 16;
    add.s64 %d1, %image, %d1;
    {copy_lines(image.size)}
    mul.wide.u32 %d2, %r0, {4 * count};
    add.s64 %d3, %c, %d2;
    add.s64 %d5, %out, %d2;
    mul.wide.u32 %d4, %r0, {16 * STEPS};
    add.s64 %d4, %fragments, %d4;
    {load}{fragments}
    setp.ne.b32 %p1, {int(self.accumulate)}, 0;
    setp.eq.b32 %p2, 0, 0;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    wgmma.fence.sync.aligned;
    {"".join(self.step(s, names, b_start) for s in range(STEPS))}
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    {store}
    }}
"""

    def step(self, s, names, b_start):
        code = point("%d11", b_start + self.b.shift + self.b.strides(self.n)[2](s), self.b.descriptor(self.n))
        if self.a:
            code += point("%d10", self.a.shift + self.a.strides(64)[2](s), self.a.descriptor(64))
        a = "%d10" if self.a else "{" + ", ".join(f"%frag{4 * s + i}" for i in range(4)) + "}"
        transposes = [self.a.major] if self.a else []
        constants = [self.scale_a, self.scale_b, *(int(m == "MN") for m in [*transposes, self.b.major])]
        opcode = f"wgmma.mma_async.sync.aligned.m64n{self.n}k16.f32.{self.dtype}.{self.dtype}"
        predicate = "%p1" if s == 0 else "%p2"
        return f"{code}{opcode} {{{names}}}, {a}, %d11, {predicate}, {', '.join(map(str, constants))};\n"

    def expected(self, dpa):
        """D as ``dpa(a, b, c)`` computes it, K step after K step; a and b [64, n, 16]."""
        a, b, c = self.operands()
        if self.scale_a * self.scale_b < 0:
            a = a ^ 0x8000
        x, y = (torch.from_numpy(m.view(np.int16)).view(DTYPES[self.dtype]) for m in (a, b))
        d = torch.from_numpy(c if self.accumulate else np.zeros_like(c))
        for s in range(0, K, 16):
            shape = (64, self.n, 16)
            d = dpa(x[:, None, s : s + 16].expand(shape), y[None, :, s : s + 16].expand(shape), d)
        return d.numpy()


def copy_lines(size):
    """``size`` bytes, a multiple of 2048, from [%d1] to shared [%r2]; each of 128 threads moves 16 at a time."""
    return "".join(
        f"ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%d1+{at}];\n"
        f"st.shared.v4.b32 [%r2+{at}], {{%r10, %r11, %r12, %r13}};\n"
        for at in range(0, size, 2048)
    )


def point(register, offset, constants):
    """A descriptor of the matrix at ``smem + offset``."""
    return (
        f"add.s32 %r5, %r1, {offset}; shr.u32 %r5, %r5, 4; and.b32 %r5, %r5, 0x3fff; "
        f"cvt.u64.u32 {register}, %r5; or.b64 {register}, {register}, {constants:#x};\n"
    )


_THREAD = np.arange(128)
_ROW = _THREAD // 32 * 16 + _THREAD % 32 // 4  # of an accumulator's first half
_COLUMN = _THREAD % 4 * 2


def to_registers(matrix):
    """[64, n] to accumulators [128 threads, n / 2]."""
    return np.ascontiguousarray(matrix[_places(matrix.shape[1])])


def from_registers(registers):
    """The inverse of :func:`to_registers`."""
    n = registers.shape[1] * 2
    matrix = np.empty((64, n), registers.dtype)
    matrix[_places(n)] = registers
    return matrix


def _places(n):
    i = np.arange(n // 2)
    return _ROW[:, None] + i // 2 % 2 * 8, i // 4 * 8 + _COLUMN[:, None] + i % 2


def a_fragments(a):
    """[64, K] 16-bit patterns to words [128 threads, STEPS, 4]: rows g and g + 8, at k = 2 t, then at k + 8."""
    words = np.empty((128, STEPS, 4), np.uint32)
    for s in range(STEPS):
        for i in range(4):
            k = 16 * s + _COLUMN + i // 2 * 8
            row = _ROW + i % 2 * 8
            words[:, s, i] = a[row, k] | a[row, k + 1].astype(np.uint32) << 16
    return words


K0, K32, K64, K128 = (Layout("K", w) for w in (0, 32, 64, 128))
MN0, MN32, MN64, MN128 = (Layout("MN", w) for w in (0, 32, 64, 128))

LAYOUTS = [
    *(Product(64, a, K128) for a in (None, K0, K32, K64, K128, MN0, MN32, MN64, MN128)),
    *(Product(64, K128, b) for b in (K0, K32, K64, MN0, MN32, MN64, MN128)),
    *(Product(n, None, b) for n in (8, 24) for b in (K0, K32, MN0, MN32, MN64, MN128)),
    Product(64, replace(K128, padding=1024), replace(K0, padding=32)),
    Product(72, replace(MN128, padding=2048), replace(MN0, padding=48)),
    Product(64, replace(K128, shift=256), replace(K64, shift=128)),
    Product(64, replace(MN128, shift=640), replace(MN32, shift=128)),
]
"""Every way for a matrix to lie in shared memory."""

VARIANTS = [
    Product(16, K128, K128, "f16"),
    Product(16, None, K128, "f16", accumulate=False),
    Product(16, None, MN64, scale_a=-1),
    Product(16, K128, K64, scale_a=-1, scale_b=-1, dtype="f16"),
    Product(16, K64, K64, scale_b=-1, accumulate=False),
    Product(8, None, K128, values="tiny"),
    Product(8, None, K128, "f16", values="tiny"),
    Product(64, None, K128, values="vanishing", accumulate=False),
    Product(8, K128, K128, values="wild"),
    Product(8, K128, K128, "f16", values="wild"),
]
"""Types, signs and values."""

SIZES = [Product(n, None if n % 16 else K128, K128) for n in range(8, 257, 8)]
"""Every N."""
