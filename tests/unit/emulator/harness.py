"""Small PTX kernels, launched by hand: the body of an entry whose parameters are the addresses of named arrays."""

import struct

import numpy as np

from nvfp4dsl.emulator import Buffer, Launch, run

HEADER = """
.version 8.8
.target sm_120a
.address_size 64
.extern .shared .align 1024 .b8 smem[];
"""
REGISTERS = """
.reg .pred %p<32>; .reg .b16 %h<32>; .reg .b32 %r<128>; .reg .f32 %f<64>; .reg .b64 %d<64>;
"""


def kernel(body, params, block=32, maps=(), target="sm_120a"):
    """PTX whose entry takes one 64-bit address per name in ``params`` and a tensor map per name in ``maps``."""
    header = HEADER.replace("sm_120a", target)
    declared = [f".param .b64 {name}" for name in params] + [f".param .align 64 .b8 {name}[128]" for name in maps]
    registers = "".join(f".reg .b64 %{name}; ld.param.b64 %{name}, [{name}];\n" for name in params)
    return (
        f"{header}.visible .entry k({', '.join(declared)})\n.reqntid {block}, 1, 1\n"
        f"{{{REGISTERS}{registers}\nmov.u32 %r0, %tid.x;\n{body}\nret;\n}}\n"
    )


def prepare(
    body,
    arrays=None,
    *,
    outputs=None,
    block=32,
    grid=1,
    cluster=(1, 1, 1),
    smem=4096,
    maps=None,
    initialised=False,
    target="sm_120a",
):
    """(PTX, launch) of ``body``: ``arrays`` are read-only, ``outputs`` written (uninitialised, unless ``initialised``).

    ``grid`` is three extents, or that of x. ``maps`` gives 128-byte tensor maps, or functions that make one from the
    addresses.
    """
    arrays, outputs, maps = arrays or {}, outputs or {}, maps or {}
    buffers, addresses = [], {}
    address = 0x7_0000_0100
    for name, array in {**arrays, **outputs}.items():
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy()
        written = name in outputs
        init = initialised or not written
        buffers.append(Buffer(name, address, data, str(array.dtype), array.shape, (1,) * array.ndim, written, init))
        addresses[name] = address
        address += (data.size + (1 << 20)) & ~0xFF
    params = [struct.pack("<Q", a) for a in addresses.values()]
    params += [make(addresses) if callable(make) else make for make in maps.values()]
    extents = (grid, 1, 1) if isinstance(grid, int) else grid
    launch = Launch("k", extents, (block, 1, 1), cluster, smem, params, buffers)
    return kernel(body, list(addresses), block, list(maps), target), launch


LAUNCH = ("block", "grid", "cluster", "smem", "maps", "initialised", "target")


def execute(body, arrays=None, *, outputs=None, **options):
    """Run ``body``, given what :func:`prepare` and ``run`` take. Returns (outputs, report)."""
    outputs = outputs or {}
    ptx, launch = prepare(body, arrays, outputs=outputs, **{k: options.pop(k) for k in LAUNCH if k in options})
    report = run(ptx, launch, **options)
    return {n: launch.buffer(n).data.view(a.dtype).reshape(a.shape) for n, a in outputs.items()}, report


def evaluate(instruction, *inputs, result=np.uint32, seed=0):
    """One instruction on 32 lanes: ``{d}`` is its result, ``{a}``, ``{b}``, ``{c}`` its sources."""
    registers = {1: "%h", 2: "%h", 4: "%r", 8: "%d"}
    names, body = {}, "mul.wide.u32 %d60, %r0, 8;\n"
    arrays = {}
    for n, values in enumerate(inputs):
        letter = "abc"[n]
        values = np.broadcast_to(np.asarray(values), (32,))
        padded = np.zeros((32, 8), np.uint8)
        padded[:, : values.itemsize] = np.ascontiguousarray(values).view(np.uint8).reshape(32, -1)
        arrays[f"in{letter}"] = padded
        names[letter] = f"{registers[values.itemsize]}{10 + n}"
        body += f"add.s64 %d61, %in{letter}, %d60; ld.global.b{values.itemsize * 8} {names[letter]}, [%d61];\n"
    size = np.dtype(result).itemsize
    names["d"] = f"{registers[size]}9"
    body += f"{instruction.format(**names)}\nadd.s64 %d61, %out, %d60; st.global.b{size * 8} [%d61], {names['d']};\n"
    out, _ = execute(body, arrays, outputs={"out": np.zeros((32, 8), np.uint8)}, seed=seed)
    return np.ascontiguousarray(out["out"][:, :size]).view(result).reshape(32)


def tensor_map(address, extents, strides, box, kind=0, swizzle=0):
    """A TMA descriptor as the hardware reads it: extents and box in elements, strides of dimensions 1.. in bytes."""
    blob = bytearray(128)
    struct.pack_into("<QI", blob, 0, address, 2 | (len(extents) - 1) << 4 | kind << 7 | swizzle << 13)
    for n, stride in enumerate(strides):
        struct.pack_into("<I", blob, 12 + 4 * n, stride // 16)
    for n, (extent, size) in enumerate(zip(extents, box, strict=True)):
        struct.pack_into("<I", blob, 32 + 4 * n, extent - 1)
        blob[55 + n] = size - 1
    return bytes(blob)
