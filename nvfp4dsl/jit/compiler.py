"""From a spec, a tile and a target to a compiled kernel, through the cache."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nvfp4dsl import cubin, patches
from nvfp4dsl.config import GemmSpec, TileConfig
from nvfp4dsl.config.quantize import QuantizeSpec, QuantizeTile
from nvfp4dsl.config.spec import Tile
from nvfp4dsl.errors import CompileError, LaunchError, SpecError
from nvfp4dsl.jit.key import KeyInputs, observed
from nvfp4dsl.jit.pool import pool
from nvfp4dsl.jit.store import CUBIN, OBJECT, PTX, Entry, Store
from nvfp4dsl.jit.worker import Product, Request
from nvfp4dsl.settings import settings
from nvfp4dsl.targets import get_target

log = logging.getLogger(__name__)

#: what can be compiled: the builder of each kind of spec, and its kind of tile
BUILDERS: dict[type, tuple[str, type[Tile]]] = {
    GemmSpec: ("nvfp4dsl.kernels:build", TileConfig),
    QuantizeSpec: ("nvfp4dsl.kernels.quantize:build", QuantizeTile),
}


class CompiledKernel:
    """A kernel out of the cache.

    Attributes:
        spec, tile, target: what it was compiled for.
        key: its cache key.
        symbol: the name its object exports it under; it carries the key.
        ptx: the PTX as text.
        cubin: the machine code.
        meta: what ``meta.json`` holds: ``registers`` per thread, ``spills`` (instructions that touch local memory),
            ``smem_bytes`` (dynamic shared memory of a CTA, None if the builder does not say), ``kernels``,
            ``compile_seconds``, ``cuda``, ``tile`` (as text), ``inputs`` (of the key), and the store's own.
        object_path: the loadable object; :func:`nvfp4dsl.emulator.capture.capture` takes it.
        cached: whether it was there already.
    """

    def __init__(self, spec: Any, tile: Any, target: str, entry: Entry, cached: bool) -> None:
        self.spec, self.tile, self.target, self.cached = spec, tile, target, cached
        self.key, self.meta, self.ptx, self.cubin = entry.key, entry.meta, entry.ptx, entry.cubin
        self.symbol: str = entry.meta["symbol"]
        self.object_path: Path = entry.object_path

    def __repr__(self) -> str:
        return f"CompiledKernel({self.spec}, tile {self.tile}, {self.target}, {self.key[:12]})"

    @functools.cached_property
    def function(self) -> Any:
        """The loaded function, a ``tvm_ffi.Function``. Needs a GPU of the kernel's target.

        Raises:
            LaunchError: there is none; the message names :func:`nvfp4dsl.emulate`.
        """
        self._require_device()
        if not self.object_path.exists():
            raise LaunchError(f"{self.object_path} was removed from the cache since; call nvfp4dsl.compile again")
        import cutlass.cute as cute

        return getattr(cute.runtime.load_module(str(self.object_path), enable_tvm_ffi=True), self.symbol)

    def __call__(self, *args: Any) -> None:
        """Launches the kernel on the current stream, with CUDA tensors in the order the kernel class documents."""
        self.function(*args)

    def _require_device(self) -> None:
        import torch

        wanted = get_target(self.target).capability
        if not torch.cuda.is_available():
            here = "there is no CUDA device"
        elif (found := torch.cuda.get_device_capability()) != wanted:
            here = f"{torch.cuda.get_device_name()} has {found[0]}.{found[1]}"
        else:
            return
        raise LaunchError(
            f"a kernel for {self.target} needs a GPU of compute capability {wanted[0]}.{wanted[1]}, and {here}. "
            f"To execute it without one: with nvfp4dsl.emulate({self.target!r}): ..."
        )


def store() -> Store:
    """The cache that the settings name."""
    return Store(settings.cache_dir / "kernels", settings.cache_bytes)


def compile(spec: Any, tile: Any, target: str, *, builder: str | None = None) -> CompiledKernel:
    """The kernel for ``spec`` and ``tile`` on ``target``, from the cache or compiled now. Needs no GPU.

    Args:
        spec, tile: a :class:`~nvfp4dsl.config.GemmSpec` with a :class:`~nvfp4dsl.config.TileConfig`, or a
            :class:`~nvfp4dsl.config.quantize.QuantizeSpec` with a :class:`~nvfp4dsl.config.quantize.QuantizeTile`; of
            tiles the text will do, e.g. ``"128x128x128"``.
        target: e.g. ``"sm_121a"``.
        builder: ``"module:function"`` that makes the kernel out of these three, importable by a new process; by default
            the one that :data:`BUILDERS` has for the spec.

    Raises:
        SpecError: ``spec`` is none of these.
        TargetError: unknown target.
        TileError: the tile is not legal for the spec on the target.
        CompileError: the installed DSL cannot compile for the target (:mod:`nvfp4dsl.patches` says why); or the
            compiler refused, died, or overran ``NVFP4DSL_COMPILE_TIMEOUT``.
        CacheError: the cache cannot be read or written.
    """
    get_target(target)
    if builder is None:
        if type(spec) not in BUILDERS:
            raise SpecError(f"{spec!r} is no spec; allowed: {', '.join(kind.__name__ for kind in BUILDERS)}")
        builder, kind = BUILDERS[type(spec)]
        tile = kind.of(tile)
    try:
        patches.check(target, observed())
    except patches.RefusedError as error:
        raise CompileError(str(error)) from None
    inputs = KeyInputs.of(builder, spec, tile, target)
    key, timeout = inputs.key(), settings.compile_timeout

    def build() -> tuple[dict[str, bytes], dict[str, Any]]:
        log.info("cache miss: compiling %s tile %s for %s (%s)", spec, tile, target, key[:12])
        start = time.perf_counter()
        request = Request(builder, spec, tile, symbol=f"nvfp4dsl_{key}", options=inputs.options)
        sources = hashlib.sha256(json.dumps(inputs.closure).encode()).hexdigest()
        product = pool.compile(request, target, sources, timeout, settings.compile_workers)
        if product.patches != inputs.patches:
            raise CompileError(f"patches {product.patches} were applied where {inputs.patches} were expected")
        meta = _facts(product, target) | {"symbol": request.symbol, "tile": str(tile), "inputs": vars(inputs)}
        log.info(
            "compiled %s tile %s for %s in %.1f s: %d registers, %d spills (%s)",
            *(spec, tile, target, time.perf_counter() - start, meta["registers"], meta["spills"], key[:12]),
        )
        return {OBJECT: product.object, PTX: product.ptx.encode(), CUBIN: product.cubin}, meta

    entry, cached = store().get(key, target, inputs.host, build, wait_seconds=timeout)
    return CompiledKernel(spec, tile, target, entry, cached)


def compile_many(requests: Iterable[Sequence[Any]], **options: Any) -> list[CompiledKernel]:
    """:func:`compile` of each (spec, tile, target), in parallel; the first error is raised after all have ended. Each
    kernel that is ready is a line at INFO."""
    rows = list(requests)

    def one(row: Sequence[Any]) -> CompiledKernel:
        kernel = compile(*row, **options)
        log.info("%d of %d kernels: %s", next(ready), len(rows), kernel)
        return kernel

    ready = itertools.count(1)
    with ThreadPoolExecutor(max_workers=max(1, len(rows))) as threads:
        return [future.result() for future in [threads.submit(one, row) for row in rows]]


def _facts(product: Product, target: str) -> dict[str, Any]:
    """What the machine code says about itself, checked to be the target's."""
    parsed = cubin.parse(product.cubin)
    major, minor = get_target(target).capability
    if parsed.sm != 10 * major + minor:
        raise CompileError(f"the compiler was asked for {target} and emitted machine code for sm_{parsed.sm}")
    kernels = list(parsed.kernels.values())
    return {
        "kernels": [vars(kernel) for kernel in kernels],
        "registers": max(kernel.registers for kernel in kernels),
        "spills": cubin.spills(product.cubin),
        "smem_bytes": product.smem_bytes,
        "compile_seconds": round(product.seconds, 3),
        "cuda": product.cuda,
    }
