"""Executes a captured launch on a Hopper GPU: PTX for sm_90a as it is, sm_12x with its block-scaled MMA substituted.

    python -m nvfp4dsl.emulator.hopper PTX LAUNCH [--out FILE] [--json]

It takes the pair that the emulator takes, and like it leaves the results in the launch's buffers. It needs the driver,
ctypes and numpy: no compiler and no CUDA toolkit, the driver assembles the PTX.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nvfp4dsl.emulator.launch import Buffer, Launch
from nvfp4dsl.emulator.ptx import Parameter, parse
from nvfp4dsl.emulator.substitute import TARGET, retarget, substitute
from nvfp4dsl.errors import LaunchError, NVFP4Error, TargetError

CAPABILITY = (9, 0)
DESCRIPTOR_BYTES, DESCRIPTOR_ALIGN = 128, 64
BLACKWELL_DESCRIPTOR, PACKED_FP4 = 2, 11
"""Of a TMA descriptor's word at byte 8: bits 0-3 (the version; Hopper's is 0), and the element type in bits 7-10."""
GUARD = 4096
"""Bytes before and after each buffer that the kernel must leave alone."""
GUARD_BYTE = 0xA5

DEADLOCK_SECONDS = 20.0
"""A kernel that runs longer counts as hung; those worth checking take less than a millisecond."""

# CUdevice_attribute, CUfunction_attribute and CUjit_option of cuda.h.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _SMEM_OPTIN = 75, 76, 97
_MAX_DYNAMIC_SMEM, _NON_PORTABLE_CLUSTER = 8, 14
_NUM_REGS = 4
_CLUSTER_DIMENSION = 4  # CUlaunchAttributeID
_JIT_ERROR_LOG, _JIT_ERROR_LOG_BYTES = 5, 6
_NOT_READY = 600


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_uint32), ("padding", ctypes.c_uint32), ("value", ctypes.c_uint32 * 16))


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("smem_bytes", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("attribute_count", ctypes.c_uint32),
    )


def _config(launch: Launch) -> _LaunchConfig:
    """The launch as the driver takes it; an attribute says what clusters it has."""
    value = (ctypes.c_uint32 * 16)(*launch.cluster)
    attributes = (_LaunchAttribute * 1)(_LaunchAttribute(_CLUSTER_DIMENSION, 0, value))
    grid, block = (ctypes.c_uint32 * 3)(*launch.grid), (ctypes.c_uint32 * 3)(*launch.block)
    return _LaunchConfig(grid, block, launch.smem_bytes, None, attributes, int(math.prod(launch.cluster) > 1))


@dataclass
class HopperReport:
    """What one run tells.

    Attributes:
        device: its name.
        kernel: the PTX entry.
        registers: a thread's, in the kernel that ran.
        seconds: the launch with synchronisation, host clock; not a measure of speed.
    """

    device: str
    kernel: str
    registers: int
    seconds: float


def run(ptx: str, launch: Launch, *, device: int = 0) -> HopperReport:
    """Substitute where need be, assemble, launch and wait. Writable buffers receive what the kernel stored.

    Raises:
        TargetError: no Hopper GPU, or PTX that cannot be substituted.
        LaunchError: the driver refused something, the kernel hung, or it stored outside its buffers or into read-only
            ones. A process whose kernel hung cannot use the device again: end it.
    """
    text = retarget(ptx) if all(k.target == TARGET for k in parse(ptx).values()) else substitute(ptx)
    entries = parse(text)
    if launch.kernel not in entries:
        raise LaunchError(f"the PTX has no entry {launch.kernel!r}; it has {', '.join(entries)}")
    with _Driver(device) as driver:
        addresses = {buffer.name: driver.upload(buffer) for buffer in launch.buffers}
        params = relocate(entries[launch.kernel].params, launch, addresses)
        function = driver.load(text, launch.kernel)
        seconds = driver.launch(function, launch, params)
        for buffer in launch.buffers:
            driver.download(buffer, addresses[buffer.name])
        return HopperReport(driver.name, launch.kernel, driver.registers(function), seconds)


def relocate(entry: Sequence[Parameter], launch: Launch, addresses: dict[str, int]) -> list[bytes]:
    """The launch's parameters for buffers at real addresses, descriptors marked as Hopper's.

    A captured address is known by its value: a word that lies within a buffer is a pointer into it. Looked at are the
    first word of a TMA descriptor and the 8-byte words of parameters aligned as pointers are.

    Raises:
        LaunchError: parameters do not fit the entry, or a descriptor is one that Hopper cannot read.
    """
    sizes = [parameter.bytes for parameter in entry]
    if sizes != [len(value) for value in launch.params]:
        raise LaunchError(
            f"the entry takes parameters of {sizes} bytes, the launch has {[len(p) for p in launch.params]}"
        )
    moved = []
    for parameter, value in zip(entry, launch.params, strict=True):
        words = bytearray(value)
        is_descriptor = parameter.bytes == DESCRIPTOR_BYTES and parameter.align == DESCRIPTOR_ALIGN
        if is_descriptor:
            _mark_as_hopper(words, parameter.name)
        if is_descriptor or parameter.align >= 8:
            for at in range(0, 8 if is_descriptor else len(words) - 7, 8):
                _move_address(words, at, launch.buffers, addresses)
        moved.append(bytes(words))
    return moved


def _move_address(words: bytearray, at: int, buffers: Sequence[Buffer], addresses: dict[str, int]) -> None:
    (word,) = struct.unpack_from("<Q", words, at)
    for buffer in buffers:
        if buffer.address <= word < buffer.end:
            struct.pack_into("<Q", words, at, word - buffer.address + addresses[buffer.name])
            return


def _mark_as_hopper(descriptor: bytearray, name: str) -> None:
    (word,) = struct.unpack_from("<I", descriptor, 8)
    if word & 0xF != BLACKWELL_DESCRIPTOR:
        return
    if word >> 7 & 0xF == PACKED_FP4:
        raise LaunchError(f"parameter {name} is a TMA descriptor of packed FP4, which Hopper does not know; move bytes")
    struct.pack_into("<I", descriptor, 8, word & ~0xF)


class _Driver:
    """The few calls of the CUDA driver API that a launch takes, on one device's primary context."""

    def __init__(self, ordinal: int) -> None:
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise TargetError(f"no CUDA driver here ({error}); run the same pair with nvfp4dsl emulate") from error
        if status := self._cuda.cuInit(0):
            raise TargetError(f"no CUDA device here (cuInit: {status}); run the same pair with nvfp4dsl emulate")
        handle = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(handle), ordinal)
        self._device = handle
        name = ctypes.create_string_buffer(128)
        self._call("cuDeviceGetName", name, 128, handle)
        self.name = name.value.decode()
        capability = (self._attribute(_CAPABILITY_MAJOR), self._attribute(_CAPABILITY_MINOR))
        if capability != CAPABILITY:
            raise TargetError(
                f"{self.name} has compute capability {capability[0]}.{capability[1]}; substituted kernels run on "
                f"{CAPABILITY[0]}.{CAPABILITY[1]} (H100, H200)"
            )
        self._module = ctypes.c_void_p()
        self._memory: list[int] = []
        self._hung = False

    def __enter__(self) -> _Driver:
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._call("cuCtxPushCurrent_v2", context)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After a fault in the kernel the context is lost: every call fails, and the first error is the one to report.
        if self._hung:
            return  # each of these calls would wait for the kernel
        check = kind is None
        for address in self._memory:
            self._call("cuMemFree_v2", ctypes.c_uint64(address), check=check)
        if self._module:
            self._call("cuModuleUnload", self._module, check=check)
        self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()), check=check)
        self._call("cuDevicePrimaryCtxRelease_v2", self._device, check=check)

    def upload(self, buffer: Buffer) -> int:
        """Device address of a copy of the buffer, with a guard before and after it."""
        image = np.full(buffer.data.size + 2 * GUARD, GUARD_BYTE, np.uint8)
        image[GUARD : GUARD + buffer.data.size] = buffer.data
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(image.size))
        self._memory.append(address.value)
        self._call("cuMemcpyHtoD_v2", address, ctypes.c_void_p(image.ctypes.data), ctypes.c_size_t(image.size))
        return address.value + GUARD

    def download(self, buffer: Buffer, address: int) -> None:
        """Copy a writable buffer back; whatever else the kernel changed is an error."""
        image = np.empty(buffer.data.size + 2 * GUARD, np.uint8)
        self._call(
            "cuMemcpyDtoH_v2",
            ctypes.c_void_p(image.ctypes.data),
            ctypes.c_uint64(address - GUARD),
            ctypes.c_size_t(image.size),
        )
        inside = image[GUARD : GUARD + buffer.data.size]
        if np.any(image[:GUARD] != GUARD_BYTE) or np.any(image[GUARD + buffer.data.size :] != GUARD_BYTE):
            raise LaunchError(f"the kernel stored outside buffer {buffer.name!r}")
        if buffer.writable:
            buffer.data[:] = inside
        elif not np.array_equal(inside, buffer.data):
            raise LaunchError(f"the kernel stored into read-only buffer {buffer.name!r}")

    def load(self, ptx: str, kernel: str) -> ctypes.c_void_p:
        """Assemble the PTX and find the kernel."""
        log = ctypes.create_string_buffer(16384)
        options = (ctypes.c_int * 2)(_JIT_ERROR_LOG, _JIT_ERROR_LOG_BYTES)
        values = (ctypes.c_void_p * 2)(ctypes.addressof(log), len(log))
        image = ctypes.c_char_p(ptx.encode())
        try:
            self._call("cuModuleLoadDataEx", ctypes.byref(self._module), image, 2, options, values)
        except LaunchError as error:
            raise LaunchError(f"{error}: {log.value.decode(errors='replace').strip()}") from None
        function = ctypes.c_void_p()
        self._call("cuModuleGetFunction", ctypes.byref(function), self._module, ctypes.c_char_p(kernel.encode()))
        return function

    def launch(self, function: ctypes.c_void_p, launch: Launch, params: Sequence[bytes]) -> float:
        """Launch and wait; seconds by the host's clock."""
        allowed = self._attribute(_SMEM_OPTIN)
        if launch.smem_bytes > allowed:
            raise LaunchError(f"the launch wants {launch.smem_bytes} bytes of shared memory; {self.name} has {allowed}")
        self._call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SMEM, launch.smem_bytes)
        # Descriptors among the parameters are 64-byte aligned in the driver's copy; here any address serves.
        images = [ctypes.create_string_buffer(value, len(value)) for value in params]
        pointers = (ctypes.c_void_p * len(images))(*map(ctypes.addressof, images))
        if launch.attributes.get("non_portable_cluster"):
            self._call("cuFuncSetAttribute", function, _NON_PORTABLE_CLUSTER, 1)
        started = time.perf_counter()
        self._call("cuLaunchKernelEx", ctypes.byref(_config(launch)), function, pointers, None)
        while (status := self._cuda.cuStreamQuery(None)) == _NOT_READY:
            if time.perf_counter() - started > DEADLOCK_SECONDS:
                self._hung = True
                raise LaunchError(
                    f"{launch.kernel} did not end within {DEADLOCK_SECONDS:g} s: a deadlock. nvfp4dsl emulate names "
                    "the warps that wait. If it passes there, look at setmaxnreg: a block that asks for more registers "
                    "than it was launched with waits for ever"
                )
        self._check("cuStreamQuery", status)
        return time.perf_counter() - started

    def registers(self, function: ctypes.c_void_p) -> int:
        """Registers of a thread."""
        value = ctypes.c_int()
        self._call("cuFuncGetAttribute", ctypes.byref(value), _NUM_REGS, function)
        return value.value

    def _attribute(self, attribute: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, self._device)
        return value.value

    def _call(self, name: str, *args: Any, check: bool = True) -> None:
        status = getattr(self._cuda, name)(*args)
        if check:
            self._check(name, status)

    def _check(self, name: str, status: int) -> None:
        if status:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(status, ctypes.byref(text))
            raise LaunchError(f"{name} failed with CUDA error {status} ({(text.value or b'unknown').decode()})")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m nvfp4dsl.emulator.hopper", description=__doc__.split("\n")[0])
    parser.add_argument("ptx", type=Path)
    parser.add_argument("launch", type=Path, help="a launch saved by nvfp4dsl (.npz)")
    parser.add_argument("--out", type=Path, help="write the launch with its buffers as the kernel left them")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    launch = Launch.load(args.launch)
    try:
        report = run(args.ptx.read_text(), launch)
    except NVFP4Error as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # an ordinary exit waits for a kernel that hangs
    if args.out:
        launch.save(args.out)
    fields = asdict(report)
    print(json.dumps(fields) if args.json else "\n".join(f"{key:10} {value}" for key, value in fields.items()))


if __name__ == "__main__":
    main()
