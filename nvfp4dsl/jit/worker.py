"""The compiler process: latches one target, then compiles what it is sent until the connection closes.

:func:`main` is called with a target, a file descriptor and a scratch folder on the command line. The descriptor is a
:class:`multiprocessing.connection.Connection`, on which it receives :class:`Request` and sends :class:`Product`, or the
exception that came instead. Whatever the compiler prints goes to stderr. It leaves when the connection closes, or when
it has had nothing to do for :data:`IDLE_SECONDS`. :mod:`nvfp4dsl.jit.pool` is the other end.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

IDLE_SECONDS = 300.0


@dataclass(frozen=True)
class Request:
    """One kernel to compile: ``builder`` is ``"module:function"``, called with spec, tile and target; it returns what
    ``cute.compile`` takes, a jitted callable and its arguments."""

    builder: str
    spec: Any
    tile: Any
    symbol: str
    options: str


@dataclass(frozen=True)
class Product:
    """What came out.

    Attributes:
        object, ptx, cubin: the exported object, the PTX, the machine code.
        smem_bytes: dynamic shared memory as the kernel's plan has it, None if it has none.
        seconds: spent building, compiling and exporting.
        cuda: version of the toolkit inside the DSL.
        patches: names of the patches in force.
    """

    object: bytes
    ptx: str
    cubin: bytes
    smem_bytes: int | None
    seconds: float
    cuda: str
    patches: list[str]


def compile_kernel(request: Request, target: str) -> Product:
    """Builds, compiles and exports one kernel. The architecture must have been latched."""
    import cutlass
    import cutlass.cute as cute

    from nvfp4dsl import patches

    active = patches.apply(checked=True)  # by the process that sent the request
    module, _, function = request.builder.partition(":")
    start = time.perf_counter()
    kernel, args = getattr(importlib.import_module(module), function)(request.spec, request.tile, target)
    compiled = cute.compile(kernel, *args, options=request.options)
    with TemporaryDirectory(prefix="nvfp4dsl-") as folder:
        path = Path(folder, "kernel.o")
        compiled.export_to_c(str(path), function_name=request.symbol)
        exported = path.read_bytes()
    return Product(
        object=exported,
        ptx=compiled.__ptx__.rstrip("\0"),  # some releases leave a NUL at the end
        cubin=compiled.__cubin__,
        smem_bytes=getattr(getattr(kernel, "plan", None), "smem_bytes", None),
        seconds=time.perf_counter() - start,
        cuda=f"{cutlass.CUDA_VERSION.major}.{cutlass.CUDA_VERSION.minor}",
        patches=active,
    )


def serve(connection: Connection, target: str) -> None:
    """Answers requests until the connection closes."""
    while connection.poll(IDLE_SECONDS):
        try:
            request = connection.recv()
        except EOFError:
            return
        try:
            connection.send(compile_kernel(request, target))
        except BaseException as error:
            connection.send(_sendable(error))


def _sendable(error: BaseException) -> BaseException:
    """Errors of this package travel as they are; others may not survive pickling, so their text does."""
    from nvfp4dsl.errors import CompileError, NVFP4Error

    traceback.print_exc()
    if isinstance(error, NVFP4Error):
        return error
    return CompileError(f"{type(error).__name__}: {error}")


def main() -> None:
    target, fd, folder = sys.argv[1:]
    os.dup2(2, 1)  # the compiler's prints
    os.environ["CUTE_DSL_ARCH"] = target
    os.environ["CUTE_DSL_DUMP_DIR"] = folder  # --keep-ptx and --keep-cubin also write files
    serve(Connection(int(fd)), target)
    shutil.rmtree(folder, ignore_errors=True)
