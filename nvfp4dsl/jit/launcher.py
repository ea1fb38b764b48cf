"""Calls of a compiled W4A16 kernel in as little of the host's time as they may take: ``launcher.c``, compiled once.

A :class:`Launcher` keeps a plan for each shape of x that it has been called with. It wants a C compiler at run time, as
Triton does.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

Watch = tuple[Any, "str | None", Any]
"""An object, the name of an attribute or None to call it without arguments, and the answer that must come back."""

CODES, Y, ARGUMENTS = 1, 5, 7
MOST_WATCHES, MOST_RANKS = 8, 8
MOST_PLANS = 32
"""Calls that a weight remembers: those that decode, and CUDA graphs, come back to. Beyond, it starts afresh."""

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
        ("owner", ctypes.c_void_p),
        ("activation", ctypes.py_object),
        ("overlap", ctypes.py_object),
        ("rank", ctypes.c_int64),
        ("shape", ctypes.c_int64 * MOST_RANKS),
        ("bias_type", ctypes.c_int64),
        ("watches", ctypes.py_object * MOST_WATCHES),
        ("attributes", ctypes.py_object * MOST_WATCHES),
        ("quiet", ctypes.py_object * MOST_WATCHES),
        ("torch_watches", ctypes.c_int64),
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


class _Table(ctypes.Structure):
    """``table`` of launcher.c."""

    _fields_ = (
        ("tensor_types", ctypes.py_object * 2),
        ("torch", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("plans", ctypes.c_void_p * MOST_PLANS),
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
    loaded.launcher_takes.argtypes = [ctypes.c_void_p, ctypes.py_object]
    loaded.launcher_plan_bytes.restype = loaded.launcher_table_bytes.restype = ctypes.c_int64
    if (loaded.launcher_plan_bytes(), loaded.launcher_table_bytes()) != (ctypes.sizeof(_Plan), _Table.plans.offset):
        raise AssertionError(f"{source.name} and {__name__} differ in the layout of a plan or a table")
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


def _data_type(dtype: Any) -> int:
    """A DLDataType of one lane, as a number."""
    code, bits = _DTYPES[str(dtype).removeprefix("torch.")]
    return code | bits << 8 | 1 << 16


class Launcher:
    """Launches of one weight.

    Attributes:
        launch: a builtin function, ``launch(x, bias, activation, overlap) -> y``. It gives NotImplemented if nothing
            was :meth:`add`-ed for such a call; and None where torch has to see the call (an operator, a mode, a
            gradient), or where the kernel refuses what it is given: alignment, strides or device of x or bias.
    """

    def __init__(self) -> None:
        import torch

        loaded = library()
        assert loaded is not None, "ask available() first"
        self._table, self._plans = _Table(torch=_torch_api()), list[_Plan]()
        self._table.tensor_types[:] = torch.Tensor, torch.nn.Parameter
        self.launch = loaded.launcher_new(ctypes.addressof(self._table), (self._table, self._plans))

    @staticmethod
    def available() -> bool:
        """Whether there is a compiler and all that is wanted of torch; a warning says what is missing."""
        return library() is not None and _torch_api() is not None

    @staticmethod
    def addressed(tensor: Any, view: Any) -> tuple[tuple[Any, Any], list[Watch]]:
        """Of :meth:`add`, one of its ``weights`` and what must be watched for it. An older torch does not tell DLPack
        about float8, so there the view's address is taken, and the tensor's watched."""
        loaded, api = library(), _torch_api()
        if loaded is not None and api is not None and loaded.launcher_takes(api, tensor):
            return (tensor, view), []
        return (view, view), [(tensor.data_ptr, None, tensor.data_ptr())]

    def add(
        self,
        function: Any,
        weights: Sequence[tuple[Any, Any]],
        x: Any,
        bias: Any | None,
        activation: str | None,
        overlap: str,
        max_ctas: int,
        watches: Sequence[Watch] = (),
    ) -> None:
        """Calls with an x and a bias like these will launch ``function``; y has x's dtype and device.

        Args:
            function: a ``tvm_ffi.Function`` of x (rows, K), codes, scales, alpha, bias or None, y (rows, N), max_ctas.
            weights: codes, scales and alpha (L, N), each as the tensor whose address is read at each call, and as a
                tensor that tells type, shape and strides. See :meth:`addressed`.
            watches: what else must hold. If it does not, this is out of date, and forgotten.
        """
        import torch
        from torch._C._dynamo import guards

        *outer, k = x.shape
        rows, n = torch.Size(outer).numel(), weights[-1][1].shape[-1]
        shape, y = (*outer, n), torch.empty(rows, n, dtype=x.dtype, device="meta")
        plan = _Plan(torch=_torch_api(), function=function.__chandle__(), rows=rows, k=k, max_ctas=max_ctas)
        for field, address in _tvm_ffi()[1].items():
            setattr(plan, field, address)
        plan.owner, plan.activation, plan.overlap = id(plan), activation, overlap
        plan.rank, plan.shape[: x.ndim] = x.ndim, x.shape
        plan.bias_type = -1 if bias is None else _data_type(bias.dtype)
        torch_watches = _watches()
        plan.torch_watches = len(torch_watches)
        for i, (watch, attribute, quiet) in enumerate((*torch_watches, *watches)):
            plan.watches[i], plan.quiet[i] = watch, quiet
            if attribute is not None:
                plan.attributes[i] = sys.intern(attribute)
        plan.is_grad_enabled, plan.requires_grad = torch.is_grad_enabled, "requires_grad"
        # How Inductor's code allocates: torch.empty takes 1.8 us longer.
        plan.empty = getattr(guards, f"_empty_strided_{x.device.type}")
        plan.empty_arguments = (shape, torch.empty(shape, device="meta").stride(), x.dtype)
        plan.empty_elsewhere = functools.partial(torch.empty, shape, dtype=x.dtype, device=x.device)
        plan.weights[:] = [tensor for tensor, _ in weights]
        for index, view in ({CODES + i: view for i, (_, view) in enumerate(weights)} | {Y: y}).items():
            tensor, rank = plan.tensors[index], view.ndim
            plan.shapes[index][:rank], plan.strides[index][:rank] = view.shape, view.stride()
            tensor.shape, tensor.strides = ctypes.addressof(plan.shapes[index]), ctypes.addressof(plan.strides[index])
            tensor.ndim, tensor.dtype = rank, _data_type(view.dtype)
        plan.function_object = function  # whose handle it has
        if len(self._plans) == MOST_PLANS:
            self.clear()
        self._plans.append(plan)
        self._table.plans[self._table.count] = ctypes.addressof(plan)
        self._table.count += 1

    def clear(self) -> None:
        """Forget all plans."""
        self._table.count = 0
        self._plans.clear()
