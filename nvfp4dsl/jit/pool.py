"""Compiler processes, kept for the next compilation: importing the compiler costs more than compiling a kernel.

One target a process, since the architecture is latched when the compiler is imported. A process that has read other
sources than the present ones is of no use either, so processes are kept apart by the digest of the sources too, and
idle ones of other sources end.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from multiprocessing import Pipe
from typing import Any

from nvfp4dsl.errors import CompileError
from nvfp4dsl.jit.worker import Product, Request

log = logging.getLogger(__name__)

_TAIL_BYTES = 4000
_START = "from nvfp4dsl.jit.worker import main; main()"
_OWN_VARIABLES = ("CUTE_DSL_", "CUTLASS_DSL_")


class WorkerDiedError(CompileError):
    """A compiler process ended without an answer."""


class Worker:
    """One compiler process."""

    def __init__(self, target: str) -> None:
        self._connection, theirs = Pipe()
        self._folder = tempfile.mkdtemp(prefix="nvfp4dsl-")  # all it writes, gone with it however it ends
        self._stderr = open(os.path.join(self._folder, "stderr"), "w+b")  # noqa: SIM115 - lives as long as the process
        # The caller's own settings of the DSL are not part of the cache key, so they must not reach the compiler.
        environment = {k: v for k, v in os.environ.items() if not k.startswith(_OWN_VARIABLES)}
        environment["TMPDIR"] = self._folder
        # It imports what this process would. ``-c`` looks in the current folder first, so that is its own, which holds
        # no modules: a file in the caller's that happens to be called torch.py is not ours.
        environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, target, str(theirs.fileno()), self._folder],
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            stdout=self._stderr,
            stderr=self._stderr,
            env=environment,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,  # an interrupt from the keyboard is the parent's to act on
        )
        theirs.close()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def compile(self, request: Request, timeout: float) -> Product:
        """Compiles one kernel. A worker that died or overran the time is not alive afterwards."""
        try:
            self._connection.send(request)
            answered = self._connection.poll(timeout)
            answer: Any = self._connection.recv() if answered else None
        except (EOFError, ConnectionError) as error:
            status = self._end(grace_seconds=5.0)
            raise WorkerDiedError(f"the compiler process died with status {status}.{self._said()}") from error
        except BaseException:  # an interrupt: its answer is still to come, so it cannot be asked again
            self._end(grace_seconds=0.0)
            raise
        if not answered:
            self._end(grace_seconds=0.0)
            raise CompileError(
                f"compiling took longer than {timeout:g} s and was stopped; NVFP4DSL_COMPILE_TIMEOUT sets the limit."
                + self._said()
            )
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _said(self) -> str:
        """The end of what the process wrote."""
        end = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, end - _TAIL_BYTES))
        text = self._stderr.read().decode(errors="replace").strip()
        return f" It wrote:\n{text}" if text else " It wrote nothing."

    def _end(self, grace_seconds: float) -> int:
        """Waits for the process, then kills it; its status."""
        try:
            return self._process.wait(grace_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._process.terminate()
        self._end(grace_seconds=5.0)


class Pool:
    """At most ``size`` workers at a time for each (target, sources); idle ones are kept."""

    def __init__(self) -> None:
        self._idle: dict[tuple[str, str], list[Worker]] = {}
        self._busy: dict[tuple[str, str], int] = {}
        self._changed = threading.Condition()

    def compile(self, request: Request, target: str, sources: str, timeout: float, size: int) -> Product:
        """Compiles in an idle worker, a new one, or the next to become idle.

        Raises:
            CompileError: the compiler refused, died, or overran ``timeout`` seconds; with what it wrote.
            NVFP4Error: what the builder raised, e.g. :class:`TileError`.
        """
        kind = (target, sources)
        worker, fresh = self._take(kind, size)
        try:
            try:
                return worker.compile(request, timeout)
            except WorkerDiedError:
                if fresh:
                    raise
            worker = Worker(target)  # it may have left for want of work just as it was taken
            return worker.compile(request, timeout)
        finally:
            self._give_back(kind, worker)

    def _take(self, kind: tuple[str, str], size: int) -> tuple[Worker, bool]:
        """A worker, and whether it is a new one."""
        with self._changed:
            while self._busy.get(kind, 0) >= size:
                self._changed.wait()
            self._busy[kind] = self._busy.get(kind, 0) + 1
            idle = self._idle.setdefault(kind, [])
            while idle:
                if (worker := idle.pop()).alive:
                    return worker, False
            outdated = [w for k, ws in self._idle.items() if k[0] == kind[0] and k != kind for w in ws]
            self._idle = {k: ws for k, ws in self._idle.items() if k[0] != kind[0] or k == kind}
        for worker in outdated:
            worker.close()
        log.debug("starting a compiler process for %s", kind[0])
        try:
            return Worker(kind[0]), True
        except BaseException:
            self._release(kind)
            raise

    def _give_back(self, kind: tuple[str, str], worker: Worker) -> None:
        with self._changed:
            if worker.alive:
                self._idle.setdefault(kind, []).append(worker)
        self._release(kind)

    def _release(self, kind: tuple[str, str]) -> None:
        with self._changed:
            self._busy[kind] -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the idle workers."""
        with self._changed:
            for worker in (w for workers in self._idle.values() for w in workers):
                worker.close()
            self._idle.clear()

    def forget(self) -> None:
        """In a forked child: the workers are the parent's."""
        self.__init__()  # type: ignore[misc]


pool = Pool()
atexit.register(pool.close)
os.register_at_fork(after_in_child=pool.forget)
