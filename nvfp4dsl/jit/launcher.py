"""Calls of a compiled W4A16 kernel in as little of the host's time as they may take: ``launcher.c``, compiled once.

:func:`launcher` gives a builtin function for one shape of x. It wants a C compiler at run time, as Triton does.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

Launch = Callable[[Any, Any], Any]
Watch = tuple[Any, "str | None", Any]
"""An object, the name of an attribute or None to call it without arguments, and the answer that must come back."""

X, CODES, BIAS, Y, ARGUMENTS = 0, 1, 4, 5, 7
MOST_WATCHES = 8
_CAPSULE = b"dlpack_exchange_api"
_DTYPES = {"uint8": (1, 8), "float32": (2, 32), "float16": (2, 16), "bfloat16": (4, 16)}
"""DLDataType: code and bits."""


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint32),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _Plan(ctypes.Structure):
    """``plan`` of launcher.c."""

    _fields_ = (
        ("tensor_types", ctypes.py_object * 2),
        ("watches", ctypes.py_object * MOST_WATCHES),
        ("attributes", ctypes.py_object * MOST_WATCHES),
        ("quiet", ctypes.py_object * MOST_WATCHES),
        ("is_grad_enabled", ctypes.py_object),
        ("requires_grad", ctypes.py_object),
        ("empty", ctypes.py_object),
        ("empty_arguments", ctypes.py_object),
        ("empty_elsewhere", ctypes.py_object),
        ("weights", ctypes.py_object * 3),
        ("torch", ctypes.c_void_p),
        ("function", ctypes.c_void_p),
        ("call", ctypes.c_void_p),
        ("set_stream", ctypes.c_void_p),
        ("move_error", ctypes.c_void_p),
        ("release", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("tensors", _DLTensor * ARGUMENTS),
        ("shapes", (ctypes.c_int64 * 4) * ARGUMENTS),
        ("strides", (ctypes.c_int64 * 4) * ARGUMENTS),
        ("max_ctas", ctypes.c_int64),
    )


@functools.cache
def library() -> ctypes.PyDLL | None:
    """``launcher.c`` compiled and loaded; None, and a warning, where that cannot be. The file is gone once loaded."""
    import tvm_ffi.libinfo as libinfo

    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        log.warning("no C compiler: each eager linear takes the host some 70 us rather than 5; install gcc")
        return None
    source = Path(__file__).with_suffix(".c")
    includes = [f"-I{path}" for path in (libinfo.find_include_path(), libinfo.find_dlpack_include_path())]
    with tempfile.TemporaryDirectory(prefix="nvfp4dsl-") as folder:
        file = str(Path(folder, "launcher.so"))
        command = [compiler, "-shared", "-fPIC", "-O2", "-w", *includes, "-o", file, str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            log.warning("eager linear stays slow: %s does not compile: %s", source.name, done.stderr.strip()[-2000:])
            return None
        loaded = ctypes.PyDLL(file)
    loaded.launcher_new.restype, loaded.launcher_new.argtypes = ctypes.py_object, [ctypes.py_object] * 2
    loaded.launcher_plan_bytes.restype = ctypes.c_int64
    if loaded.launcher_plan_bytes() != ctypes.sizeof(_Plan):
        raise AssertionError(f"{source.name} and {__name__} differ in the layout of a plan")
    return loaded


@functools.cache
def _torch_api() -> int | None:
    """Address of torch's DLPack exchange functions; None, and a warning, where this torch has not the needed one."""
    import torch
    import tvm_ffi  # noqa: F401 - gives an older torch.Tensor the attribute, by torch-c-dlpack-ext

    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    address = capsule and pointer(capsule, _CAPSULE)
    # version, previous; allocator, from object, to object, then DLTensor from object and stream
    words = ctypes.cast(address, ctypes.POINTER(ctypes.c_void_p)) if address else None
    if words is None or not words[5] or not words[6]:
        log.warning("torch %s lacks a DLPack function: each eager linear takes the host some 70 us", torch.__version__)
        return None
    return address


@functools.cache
def _tvm_ffi() -> tuple[ctypes.CDLL, dict[str, int]]:
    import tvm_ffi.libinfo as libinfo

    loaded = ctypes.CDLL(libinfo.find_libtvm_ffi())
    names = {
        "call": "TVMFFIFunctionCall",
        "set_stream": "TVMFFIEnvSetStream",
        "move_error": "TVMFFIErrorMoveFromRaised",
        "release": "TVMFFIObjectDecRef",
    }
    return loaded, {field: ctypes.cast(loaded[name], ctypes.c_void_p).value or 0 for field, name in names.items()}


def _watches() -> list[Watch]:
    """What torch answers while it looks at nothing that a call does: modes, transforms, tracing, forward gradients."""
    import torch
    from torch._C._functorch import peek_interpreter_stack
    from torch.autograd import forward_ad

    return [
        (torch._C._len_torch_dispatch_stack, None, 0),
        (torch._C._len_torch_function_stack, None, 0),
        (peek_interpreter_stack, None, None),
        (torch._C._is_tracing, None, False),
        (forward_ad, "_current_level", -1),
    ]


def launcher(
    function: Any,
    weights: Sequence[tuple[Any, Any]],
    shape: tuple[int, ...],
    dtype: Any,
    device: Any,
    k: int,
    max_ctas: int,
    watches: Sequence[Watch] = (),
) -> Launch | None:
    """``launch(x, bias) -> y`` for an x [..., k] and a y of ``shape``, or None where that cannot be had.

    A call gives None where torch has to see it (an operator, a mode, a gradient), or where ``function`` refuses what it
    is given: type, alignment, strides or device of x or bias.

    Args:
        function: a ``tvm_ffi.Function`` of x (rows, k), codes, scales, alpha, bias or None, y (rows, n), max_ctas.
        weights: codes, scales and alpha, each as the tensor whose address is read at each call, and as a tensor that
            tells type, shape and strides.
        dtype, device: of y.
        watches: what else must hold for the launch to be used.
    """
    import torch
    from torch._C._dynamo import guards

    loaded, api = library(), _torch_api()
    if loaded is None or api is None:
        return None
    rows, n = torch.Size(shape[:-1]).numel(), shape[-1]
    plan = _Plan(torch=api, function=function.__chandle__(), rows=rows, k=k, max_ctas=max_ctas, **_tvm_ffi()[1])
    plan.tensor_types[:] = torch.Tensor, torch.nn.Parameter
    for i, (watch, attribute, quiet) in enumerate((*_watches(), *watches)):
        plan.watches[i], plan.quiet[i] = watch, quiet
        if attribute is not None:
            plan.attributes[i] = sys.intern(attribute)
    plan.is_grad_enabled, plan.requires_grad = torch.is_grad_enabled, "requires_grad"
    # How Inductor's code allocates: torch.empty takes 1.8 us longer.
    plan.empty = getattr(guards, f"_empty_strided_{device.type}")
    plan.empty_arguments = (shape, torch.empty(shape, device="meta").stride(), dtype)
    plan.empty_elsewhere = functools.partial(torch.empty, shape, dtype=dtype, device=device)
    plan.weights[:] = [tensor for tensor, _ in weights]
    views = {CODES + i: view for i, (_, view) in enumerate(weights)}
    for index, view in (views | {Y: torch.empty(rows, n, dtype=dtype, device="meta")}).items():
        tensor, rank = plan.tensors[index], view.ndim
        plan.shapes[index][:rank], plan.strides[index][:rank] = view.shape, view.stride()
        tensor.shape, tensor.strides = ctypes.addressof(plan.shapes[index]), ctypes.addressof(plan.strides[index])
        code, bits = _DTYPES[str(view.dtype).removeprefix("torch.")]
        tensor.ndim, tensor.dtype = rank, code | bits << 8 | 1 << 16  # one lane
    return loaded.launcher_new(ctypes.addressof(plan), (plan, function))
