"""The launch that a compiled kernel's own host code makes, captured on a machine with no GPU.

The host half of a compiled kernel is ordinary machine code of this computer: it checks the arguments, encodes the TMA
descriptors, computes the grid, and calls about ten CUDA functions. An object exported with ``--enable-tvm-ffi``
(``export_to_c``) leaves just those functions undefined. Linked with ``recorder.c``, which defines them, it becomes a
library that needs neither CUDA nor the compiler that made it, so capturing happens in this process and for any number
of targets: no architecture is latched, because nothing of the compiler is imported.

The library keeps to itself: only its entry and the recorder's own functions are exported, symbols bind inside it
first, and it is loaded ``RTLD_LOCAL``. A process that has the real CUDA runtime loaded as well is not affected.
"""

from __future__ import annotations

import ctypes
import functools
import operator
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from nvfp4dsl import cubin
from nvfp4dsl.emulator.launch import Buffer, Launch
from nvfp4dsl.errors import LaunchError
from nvfp4dsl.targets import target_of_capability

FIRST_ADDRESS = 0x5A_5A5A_0000_0000
"""High enough that no pair of extents among a launch's parameters looks like a pointer into a buffer."""
GUARD = 1 << 20
"""Bytes of unmapped addresses between two buffers, so that a stray access falls into nothing."""
ALIGNMENT = 256
"""What ``cudaMalloc`` promises; a buffer is put on an odd multiple of it, so that nothing can rely on more."""
VECTOR = 16
"""The longest access of a thread, and what TMA asks of an address: a tensor that starts off a multiple of it keeps its
distance. Not that to a multiple of ALIGNMENT, which CPU allocators do not promise."""

# DLDataType (code, bits, lanes) by torch's name, from dlpack.h.
_DTYPES = {
    "int8": (0, 8, 1),
    "int16": (0, 16, 1),
    "int32": (0, 32, 1),
    "int64": (0, 64, 1),
    "uint8": (1, 8, 1),
    "uint16": (1, 16, 1),
    "uint32": (1, 32, 1),
    "uint64": (1, 64, 1),
    "float16": (2, 16, 1),
    "float32": (2, 32, 1),
    "float64": (2, 64, 1),
    "bfloat16": (4, 16, 1),
    "bool": (6, 8, 1),
    "float8_e4m3fn": (10, 8, 1),
    "float8_e5m2": (12, 8, 1),
    "float8_e8m0fnu": (14, 8, 1),
    "float4_e2m1fn_x2": (17, 4, 2),
}

_CUDA = 2  # kDLCUDA
_NONE, _INT, _BOOL, _FLOAT, _POINTER, _TENSOR = 0, 1, 2, 3, 4, 7  # TVMFFITypeIndex

# cudaLaunchAttributeID, cudaFuncAttribute, cudaDeviceAttr, CUfunction_attribute: the numbers the host half uses.
_CLUSTER_DIMENSION = 4
_LAUNCH_ATTRIBUTES = {
    2: "cooperative",
    5: "cluster_scheduling_policy",
    6: "programmatic_stream_serialization",
    8: "priority",
    14: "smem_carveout",
}
_MAX_DYNAMIC_SMEM = 8
_FUNCTION_ATTRIBUTES = {
    _MAX_DYNAMIC_SMEM: "max_dynamic_smem",
    9: "smem_carveout",
    14: "non_portable_cluster",
    15: "cluster_scheduling_policy",
}
_DEVICE_SMEM_PER_BLOCK_OPTIN = 97
_KERNEL_STATIC_SMEM = 1
_DEFAULT_DYNAMIC_SMEM = 48 * 1024


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Value(ctypes.Union):
    _fields_ = (("integer", ctypes.c_int64), ("real", ctypes.c_double), ("pointer", ctypes.c_void_p))


class _Any(ctypes.Structure):
    _fields_ = (("type_index", ctypes.c_int32), ("padding", ctypes.c_uint32), ("value", _Value))


class _LaunchAttribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int32), ("padding", ctypes.c_uint32), ("value", ctypes.c_int32 * 16))


class _LaunchConfig(ctypes.Structure):
    """cudaLaunchConfig_t."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("smem_bytes", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("attribute_count", ctypes.c_uint32),
    )


_DeviceAttribute = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_int))
_KernelAttribute = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.POINTER(ctypes.c_int))
_SetAttribute = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_int)
_LaunchKernel = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(_LaunchConfig), ctypes.POINTER(ctypes.c_void_p)
)


class _Callbacks(ctypes.Structure):
    _fields_ = (
        ("device_attribute", _DeviceAttribute),
        ("kernel_attribute", _KernelAttribute),
        ("set_attribute", _SetAttribute),
        ("launch", _LaunchKernel),
    )


def capture(
    object_path: str | PathLike[str],
    symbol: str,
    args: Sequence[Any],
    names: Sequence[str] | None = None,
    *,
    outputs: Sequence[str] = (),
) -> list[Launch]:
    """Calls the host half of a compiled kernel and returns the launches it makes.

    Args:
        object_path: an object that ``export_to_c`` wrote, for this computer's processor.
        symbol: the ``function_name`` it was exported under.
        args: what the compiled function takes: CPU tensors of torch or numpy, which stand for tensors of the same
            shape, strides and contents on the device; bool, int, float; None; ``ctypes.c_void_p``.
        names: one name an argument; ``arg0``, ``arg1``, ... if left out.
        outputs: names of the tensors that the kernel writes. Their buffers are writable and count as uninitialised;
            all others are read-only.

    Returns:
        One :class:`Launch` a kernel launch, in order; they share their buffers, which hold copies of the tensors.

    Raises:
        LaunchError: the host half refused the arguments (its own text is passed on), the launch asks for more than a
            block may have, or the object cannot be linked or loaded.
    """
    names = [f"arg{i}" for i in range(len(args))] if names is None else list(names)
    if len(names) != len(args) or len(set(names)) != len(names):
        raise LaunchError(f"{len(args)} arguments need as many different names, not {names}")
    if unknown := set(outputs) - set(names):
        raise LaunchError(f"outputs {sorted(unknown)} are not among the arguments {names}")
    buffers: list[Buffer] = []
    packed = [_pack(arg, name, name in outputs, buffers) for arg, name in zip(args, names, strict=True)]
    launches = _host_half(Path(object_path).read_bytes(), symbol).call([value for value, _ in packed])
    for launch in launches:
        launch.buffers = buffers
    return launches


# --- arguments ---


def _pack(arg: Any, name: str, output: bool, buffers: list[Buffer]) -> tuple[_Any, Any]:
    """One argument as a TVMFFIAny, and what must stay alive with it. A tensor also becomes a buffer."""
    if hasattr(arg, "data_ptr") or isinstance(arg, np.ndarray):
        address = _next_address(buffers)
        buffers.append(buffer := _buffer(arg, name, output, address))
        tensor = _dl_tensor(buffer)
        return _Any(_TENSOR, 0, _Value(pointer=ctypes.addressof(tensor))), tensor
    if output:
        raise LaunchError(f"output {name!r} is a {type(arg).__name__}, not a tensor")
    if arg is None:
        return _Any(_NONE, 0, _Value(integer=0)), None
    if isinstance(arg, ctypes.c_void_p):
        return _Any(_POINTER, 0, _Value(pointer=arg.value)), None
    if isinstance(arg, (bool, np.bool_)):
        return _Any(_BOOL, 0, _Value(integer=int(arg))), None
    if isinstance(arg, (float, np.floating)):
        return _Any(_FLOAT, 0, _Value(real=float(arg))), None
    try:
        return _Any(_INT, 0, _Value(integer=operator.index(arg))), None
    except TypeError:
        raise LaunchError(
            f"argument {name!r} is a {type(arg).__name__}; a kernel takes tensors of torch or numpy, bool, int, float, "
            "None, or ctypes.c_void_p"
        ) from None


def _next_address(buffers: Sequence[Buffer]) -> int:
    """An odd multiple of ALIGNMENT, at least GUARD behind the last buffer."""
    free = buffers[-1].end + GUARD if buffers else FIRST_ADDRESS
    return -(-free // (2 * ALIGNMENT)) * 2 * ALIGNMENT + ALIGNMENT


def _buffer(tensor: Any, name: str, output: bool, address: int) -> Buffer:
    """A copy of a CPU tensor's memory, from its first element to the last one that the strides reach."""
    if isinstance(tensor, np.ndarray):
        dtype, start, item = tensor.dtype.name, tensor.ctypes.data, tensor.itemsize
        strides = tuple(s // item for s in tensor.strides)
    else:
        if tensor.device.type != "cpu":
            raise LaunchError(f"argument {name!r} is on {tensor.device}; launches are captured from CPU tensors")
        dtype, start, item = str(tensor.dtype).removeprefix("torch."), tensor.data_ptr(), tensor.element_size()
        strides = tuple(tensor.stride())
    shape = tuple(int(n) for n in tensor.shape)
    if dtype not in _DTYPES:
        raise LaunchError(f"argument {name!r} has dtype {dtype}; allowed are {', '.join(_DTYPES)}")
    if any(s < 0 for s in strides):
        raise LaunchError(f"argument {name!r} has a negative stride {strides}; make it contiguous")
    span = (1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))) * item if 0 not in shape else 0
    data = np.frombuffer(ctypes.string_at(start, span) if span else b"", np.uint8).copy()
    return Buffer(name, address + start % VECTOR, data, dtype, shape, strides, writable=output, init=not output)


def _dl_tensor(buffer: Buffer) -> _DLTensor:
    dims = len(buffer.shape)
    return _DLTensor(
        buffer.address,
        _CUDA,
        0,
        dims,
        *_DTYPES[buffer.dtype],
        (ctypes.c_int64 * dims)(*buffer.shape),
        (ctypes.c_int64 * dims)(*buffer.strides),
        0,
    )


# --- the host half ---


class _HostHalf:
    """An object's host half, linked, loaded, and answered by this class in the device's place."""

    def __init__(self, image: bytes, symbol: str) -> None:
        binaries = [cubin.parse(found) for found in cubin.images_in(image)]
        if not binaries:
            raise LaunchError("the object carries no machine code that can be read; export it with export_to_c")
        self._kernels = {name: info for binary in binaries for name, info in binary.kernels.items()}
        sm = binaries[0].sm  # an object is compiled for one target
        self._smem_per_block = target_of_capability(sm // 10, sm % 10).smem_per_block
        self._function_attributes: dict[str, dict[str, int]] = {name: {} for name in self._kernels}
        self._launches: list[Launch] = []
        self._fault: BaseException | None = None
        self._lock = threading.Lock()

        self._library = _link(image, symbol)
        try:
            self._entry = getattr(self._library, f"__tvm_ffi_{symbol}")
        except AttributeError:
            raise LaunchError(f"the object has no entry {symbol!r}, the name it was exported under") from None
        for text in ("recorder_kind", "recorder_text"):
            getattr(self._library, text).restype = ctypes.c_char_p
        self._callbacks = _Callbacks(
            _DeviceAttribute(self._guarded(self._device_attribute)),
            _KernelAttribute(self._guarded(self._kernel_attribute)),
            _SetAttribute(self._guarded(self._set_attribute)),
            _LaunchKernel(self._guarded(self._launch)),
        )
        self._library.recorder_install(ctypes.byref(self._callbacks))

    def call(self, args: Sequence[_Any]) -> list[Launch]:
        """Runs the host half once."""
        with self._lock:
            self._launches, self._fault = [], None
            self._library.recorder_clear()
            result = _Any(_NONE, 0, _Value(integer=0))
            status = self._entry(None, (_Any * len(args))(*args), ctypes.c_int32(len(args)), ctypes.byref(result))
            if self._fault is not None:
                raise self._fault
            if status != 0:
                raise LaunchError(self._raised())
            return self._launches

    def _raised(self) -> str:
        if number := self._library.recorder_cuda_error():
            return f"the kernel's host code stopped at CUDA error {number}"
        kind, text = self._library.recorder_kind().decode(), self._library.recorder_text().decode()
        return f"the kernel's host code refused the call: {kind}: {text}"

    def _guarded(self, answer: Callable[..., None]) -> Callable[..., int]:
        """An exception cannot cross C: it is kept, and the host half sees cudaErrorUnknown."""

        def call(*args: Any) -> int:
            try:
                answer(*args)
            except BaseException as error:
                self._fault = self._fault or error
                return 999
            return 0

        return call

    def _info(self, kernel: bytes) -> cubin.KernelInfo:
        try:
            return self._kernels[kernel.decode()]
        except KeyError:
            raise LaunchError(f"the object has no kernel {kernel.decode()!r}") from None

    def _device_attribute(self, attribute: int, value: Any) -> None:
        if attribute != _DEVICE_SMEM_PER_BLOCK_OPTIN:
            raise LaunchError(f"the host code asks for device attribute {attribute}, which the recorder does not know")
        value[0] = self._smem_per_block

    def _kernel_attribute(self, kernel: bytes, attribute: int, value: Any) -> None:
        if attribute != _KERNEL_STATIC_SMEM:
            raise LaunchError(f"the host code asks for kernel attribute {attribute}, which the recorder does not know")
        value[0] = self._info(kernel).static_smem

    def _set_attribute(self, kernel: bytes, attribute: int, value: int) -> None:
        name = _FUNCTION_ATTRIBUTES.get(attribute, f"function_attribute_{attribute}")
        self._function_attributes[self._info(kernel).name][name] = value

    def _launch(self, kernel: bytes, config: Any, params: Any) -> None:
        info, config = self._info(kernel), config.contents
        attributes = dict(self._function_attributes[info.name])
        cluster = (1, 1, 1)
        for entry in config.attributes[: config.attribute_count]:
            if entry.id == _CLUSTER_DIMENSION:
                cluster = (entry.value[0], entry.value[1], entry.value[2])
            elif entry.id:  # 0 says "ignore"
                attributes[_LAUNCH_ATTRIBUTES.get(entry.id, f"launch_attribute_{entry.id}")] = entry.value[0]
        launch = Launch(
            kernel=info.name,
            grid=tuple(config.grid),
            block=tuple(config.block),
            cluster=cluster,
            smem_bytes=config.smem_bytes,
            params=[ctypes.string_at(params[i], size) for i, size in enumerate(info.param_sizes)],
            buffers=[],
            attributes=attributes,
        )
        self._check(launch, info)
        self._launches.append(launch)

    def _check(self, launch: Launch, info: cubin.KernelInfo) -> None:
        """What the driver would refuse (CUDA C++ Programming Guide, technical specifications)."""
        x, y, z = launch.block
        if not (0 < x <= 1024 and 0 < y <= 1024 and 0 < z <= 64 and x * y * z <= 1024):
            raise LaunchError(f"{launch.kernel}: block {launch.block}; a block has 1 to 1024 threads")
        if any(not 0 < n <= limit for n, limit in zip(launch.grid, (2**31 - 1, 65535, 65535), strict=True)):
            raise LaunchError(f"{launch.kernel}: grid {launch.grid}; allowed are 1 to 2147483647, 65535, 65535")
        if any(n % c for n, c in zip(launch.grid, launch.cluster, strict=True)):
            raise LaunchError(f"{launch.kernel}: grid {launch.grid} is not a multiple of the cluster {launch.cluster}")
        opened = launch.attributes.get("max_dynamic_smem", _DEFAULT_DYNAMIC_SMEM)
        allowed = min(opened, self._smem_per_block - info.static_smem)
        if launch.smem_bytes > allowed:
            raise LaunchError(
                f"{launch.kernel}: {launch.smem_bytes} bytes of dynamic shared memory; a block may have {allowed}"
            )


@functools.lru_cache(maxsize=64)
def _host_half(image: bytes, symbol: str) -> _HostHalf:
    return _HostHalf(image, symbol)


def _link(image: bytes, symbol: str) -> ctypes.CDLL:
    """Links an object with the recorder and loads it.

    The file is private to this process and gone once it is loaded: linking takes a tenth of a second, and a library
    kept on disk would be one more thing to guard.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise LaunchError("capturing a launch links the kernel's host code: install gcc")
    with tempfile.TemporaryDirectory(prefix="nvfp4dsl-") as folder:
        Path(folder, "kernel.o").write_bytes(image)
        Path(folder, "exports").write_text(f"{{ global: __tvm_ffi_{symbol}; recorder_*; local: *; }};\n")
        recorder = Path(__file__).with_name("recorder.c")
        command = [compiler, "-shared", "-fPIC", "-O1", "-w", "-Wl,-Bsymbolic,-z,defs,--version-script=exports"]
        command += ["-o", "kernel.so", str(recorder), "kernel.o"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode != 0:
            raise LaunchError(f"the object does not link with the recorder: {done.stderr.strip()[-2000:]}")
        deep_bind = getattr(os, "RTLD_DEEPBIND", 0)
        return ctypes.CDLL(str(Path(folder, "kernel.so")), mode=os.RTLD_NOW | os.RTLD_LOCAL | deep_bind)
