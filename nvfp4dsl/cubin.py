"""What machine code says about itself: registers, shared memory, stack, parameter sizes.

A cubin is an ELF file. Per-kernel facts are in its ``.nv.info`` sections, as the driver reads them (the attribute
numbers are the ``EIATTR_*`` that ``cuobjdump -elf`` prints), so none of this needs a CUDA toolkit. Counting spill
instructions does need a disassembler: :func:`spills` uses ``nvdisasm`` of the PyPI wheel ``nvidia-cuda-nvdisasm``.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nvfp4dsl.errors import CompileError

_FATBIN_MAGIC = b"\x50\xed\x55\xba"
_ELF_MAGIC = b"\x7fELF"
_REGCOUNT, _FRAME_SIZE, _KPARAM_INFO = 0x2F, 0x11, 0x17

SYSTEM_SMEM = 1024
"""Bytes of shared memory that the system keeps at the start of every CTA's window (sm_90 and later). The linker counts
them in a kernel's ``.nv.shared`` section; they are outside of what a block may use."""


@dataclass(frozen=True)
class KernelInfo:
    """Facts of one kernel in a cubin.

    Attributes:
        name: the PTX entry's name.
        registers: per thread.
        stack_bytes: stack frame of a thread; 0 means that nothing lives in local memory.
        static_smem: bytes a CTA uses besides dynamic shared memory and :data:`SYSTEM_SMEM`.
        param_sizes: bytes of each parameter, in the PTX entry's order.
    """

    name: str
    registers: int
    stack_bytes: int
    static_smem: int
    param_sizes: tuple[int, ...]


@dataclass(frozen=True)
class Cubin:
    """A parsed cubin: ``sm`` (121 for sm_121a) and its kernels by name."""

    sm: int
    kernels: dict[str, KernelInfo]


@dataclass(frozen=True)
class _Section:
    name: str
    kind: int
    size: int
    data: bytes
    link: int
    info: int


def _sections(image: bytes) -> list[_Section]:
    """The sections of a 64-bit little-endian ELF."""
    offset, entry_size, count, names = struct.unpack_from("<40xQ10xHHH", image)
    headers = [struct.unpack_from("<IIQQQQIIQQ", image, offset + i * entry_size) for i in range(count)]
    strings = image[headers[names][4] : headers[names][4] + headers[names][5]]
    no_bits = 8
    return [
        _Section(_string(strings, h[0]), h[1], h[5], b"" if h[1] == no_bits else image[h[4] : h[4] + h[5]], h[6], h[7])
        for h in headers
    ]


def _string(table: bytes, offset: int) -> str:
    return table[offset : table.index(b"\0", offset)].decode()


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(attribute, payload) pairs of an ``.nv.info`` section: a format byte, the attribute, then a size or a value."""
    sized, position = 4, 0
    while position + 4 <= len(data):
        form, attribute, value = struct.unpack_from("<BBH", data, position)
        size = value if form == sized else 0
        yield attribute, data[position + 4 : position + 4 + size]
        position += 4 + size


def parse(image: bytes) -> Cubin:
    """Reads a cubin. :class:`CompileError` if the bytes are not one."""
    try:
        return _parse(image)
    except (struct.error, IndexError, OverflowError, ValueError, UnicodeDecodeError) as error:
        raise CompileError(f"not a readable cubin ({len(image)} bytes): {error}") from error


def _parse(image: bytes) -> Cubin:
    if image[:4] != _ELF_MAGIC:
        raise ValueError("no ELF header")
    sections = _sections(image)
    by_name = {s.name: s for s in sections}
    symtab = by_name[".symtab"] if ".symtab" in by_name else _Section("", 0, 0, b"", 0, 0)
    strings = sections[symtab.link].data
    symbols = [_string(strings, struct.unpack_from("<I", symtab.data, i)[0]) for i in range(0, len(symtab.data), 24)]

    per_kernel: dict[int, dict[str, int]] = {_REGCOUNT: {}, _FRAME_SIZE: {}}
    for attribute, payload in _attributes(by_name[".nv.info"].data if ".nv.info" in by_name else b""):
        if attribute in per_kernel:
            symbol, value = struct.unpack("<II", payload)
            per_kernel[attribute][symbols[symbol]] = value

    kernels = {}
    for section in sections:
        if not section.name.startswith(".nv.info."):
            continue
        name = section.name.removeprefix(".nv.info.")
        sizes = {}
        for attribute, payload in _attributes(section.data):
            if attribute == _KPARAM_INFO:
                _, ordinal, _, packed = struct.unpack("<IHHI", payload)
                sizes[ordinal] = packed >> 18
        shared = by_name.get(f".nv.shared.{name}")
        kernels[name] = KernelInfo(
            name=name,
            registers=per_kernel[_REGCOUNT].get(name, 0),
            stack_bytes=per_kernel[_FRAME_SIZE].get(name, 0),
            static_smem=max(0, shared.size - SYSTEM_SMEM) if shared else 0,
            param_sizes=tuple(sizes[i] for i in range(len(sizes))),
        )
    flags = struct.unpack_from("<I", image, 48)[0]
    abi = image[8]  # CUDA 13 writes ABI 8, which moved the SM number up a byte
    return Cubin(sm=(flags >> 8 if abi >= 8 else flags) & 0xFF, kernels=kernels)


def images_in(data: bytes) -> list[bytes]:
    """The cubins inside the fat binaries that ``data`` (an object file's bytes, say) carries, in order."""
    images, start = [], data.find(_FATBIN_MAGIC)
    while start >= 0:
        header, size = struct.unpack_from("<4x2xHQ", data, start)
        position, end = start + header, start + header + size
        while position < end:
            entry_header, payload = struct.unpack_from("<4xIQ", data, position)
            body = data[position + entry_header : position + entry_header + payload]
            if body[:4] == _ELF_MAGIC:
                images.append(body)
            position += entry_header + payload
        start = data.find(_FATBIN_MAGIC, end)
    return images


@functools.cache
def nvdisasm_path() -> str | None:
    """The disassembler of the ``nvidia-cuda-nvdisasm`` wheel, else the one on ``PATH``, else None."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "nvdisasm" and os.access(path := str(file.locate()), os.X_OK):
            return path
    return shutil.which("nvdisasm")


def disassemble(image: bytes, encodings: bool = False) -> str:
    """The machine code of a cubin as text, with the 128-bit ``encodings`` if asked for.

    Raises:
        CompileError: there is no disassembler, or it fails.
    """
    tool = nvdisasm_path()
    if tool is None:
        raise CompileError("reading machine code needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(image)
        done = subprocess.run([tool, "-c", *(["-hex"] if encodings else []), str(path)], capture_output=True, text=True)
    if done.returncode != 0:
        raise CompileError(f"nvdisasm failed: {done.stderr.strip()}")
    return done.stdout


def spills(image: bytes) -> int:
    """How many instructions of a cubin touch local memory (``STL``, ``LDL``): register spills, or arrays indexed at
    run time, which cost the same."""
    return len(re.findall(r"\b(?:STL|LDL)(?:\.\w+)*\s", disassemble(image)))
