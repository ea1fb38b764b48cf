"""Compiled kernels on disk: one folder an entry, complete or not there at all.

Layout below the root (mode 0700, owned by the user who runs this)::

    <key>/           kernel.o  kernel.ptx  kernel.cubin  meta.json
    .staging/        entries being built; each is renamed whole into its place
    .damaged/        entries put aside because they did not check out
    .locks/<key>     held while an entry is built, so that others wait instead of building it too

Readers take no lock: they see a whole entry or none, and check each file against the digest in ``meta.json``. The lock
saves double work and nothing else; where it cannot be had, two processes build the same entry and the second rename
finds it there. Code is loaded from here, so folders and files of another owner are refused.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from nvfp4dsl.errors import CacheError

log = logging.getLogger(__name__)

FORMAT = 1
"""Version of an entry's layout; another version's entry is a miss."""

OBJECT, PTX, CUBIN, META = "kernel.o", "kernel.ptx", "kernel.cubin", "meta.json"
FILES = (OBJECT, PTX, CUBIN)

_STAGING, _DAMAGED, _LOCKS = ".staging", ".damaged", ".locks"
_STALE_SECONDS = 3600.0
_KEY_DIGITS = 64


class _DamagedError(Exception):
    """An entry does not check out; the text says how."""


@dataclass(frozen=True)
class Entry:
    """A checked entry. ``ptx`` and ``cubin`` are in memory; the object is loaded from ``folder``."""

    key: str
    folder: Path
    meta: dict[str, Any]
    ptx: str
    cubin: bytes

    @property
    def object_path(self) -> Path:
        return self.folder / OBJECT


@dataclass(frozen=True)
class Listing:
    """One row of :meth:`Store.ls`; ``used`` is the time of last use in seconds since the epoch, ``meta`` is empty where
    it cannot be read."""

    key: str
    bytes: int
    used: float
    meta: dict[str, Any]


class Store:
    """The entries below ``root``, kept to at most ``limit`` bytes."""

    def __init__(self, root: Path, limit: int) -> None:
        self.root, self.limit = Path(root), limit

    # --- reading ---

    def load(self, key: str, target: str, host: str) -> Entry | None:
        """The entry, or None where there is none that is whole.

        Raises:
            CacheError: the folder or entry belongs to someone else or cannot be read, or the entry holds an object for
                another target or host.
        """
        try:
            entry = self._read(key)
        except _DamagedError as why:
            log.info("cache entry %s is damaged and counts as missing: %s", key[:12], why)
            return None
        if entry is None:
            return None
        for what, wanted in (("target", target), ("host", host)):
            if entry.meta[what] != wanted:
                raise CacheError(
                    f"cache entry {entry.folder} holds an object for {what} {entry.meta[what]!r}, not for {wanted!r}: "
                    "it was not put there by this package. Remove that folder, or run 'nvfp4dsl cache clear'"
                )
        with contextlib.suppress(OSError):  # a read-only cache serves all the same
            os.utime(entry.folder)
        return entry

    def _read(self, key: str) -> Entry | None:
        with self._explained("read"):
            if not self._owned_folder(self.root) or not self._owned_folder(folder := self.root / key):
                return None
            meta = self._meta(folder)
            if meta.get("format") != FORMAT or meta.get("key") != key:
                raise _DamagedError("meta.json is of another entry or version")
            contents = {name: self._file(folder / name) for name in FILES}
        contents[META] = _canonical(meta)
        digests = meta.get("sha256")
        for name, data in contents.items():
            if not isinstance(digests, dict) or _sha256(data) != digests.get(name):
                raise _DamagedError(f"{name} is not what was written")
        if not {"target", "host", "symbol"} <= meta.keys():
            raise _DamagedError("meta.json is incomplete")
        return Entry(key, folder, meta, contents[PTX].decode(), contents[CUBIN])

    def _meta(self, folder: Path) -> dict[str, Any]:
        try:
            meta = json.loads(self._file(folder / META))
        except ValueError as error:
            raise _DamagedError(f"{META}: {error}") from None
        if not isinstance(meta, dict):
            raise _DamagedError(f"{META} holds no object")
        return meta

    def _file(self, path: Path) -> bytes:
        try:
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
                self._refuse_foreign(path, os.fstat(file.fileno()))
                return file.read()
        except FileNotFoundError:
            raise _DamagedError(f"{path.name} is missing") from None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR):
                raise _DamagedError(f"{path.name} is not a plain file") from None
            raise

    def _owned_folder(self, path: Path) -> bool:
        """Whether the folder is there. A foreign owner, or something that is no folder, is refused."""
        try:
            found = path.lstat()
        except FileNotFoundError:
            return False
        self._refuse_foreign(path, found)
        if not stat.S_ISDIR(found.st_mode):
            raise CacheError(f"{path} is in the way of the kernel cache: it is not a folder. Remove it")
        return True

    @staticmethod
    def _refuse_foreign(path: Path, found: os.stat_result) -> None:
        if found.st_uid != os.geteuid():
            raise CacheError(
                f"{path} belongs to user {found.st_uid}, and this is user {os.geteuid()}: code is not loaded from "
                "another user's cache. Remove it, or set NVFP4DSL_CACHE_DIR to a folder of your own"
            )

    # --- writing ---

    def get(
        self,
        key: str,
        target: str,
        host: str,
        build: Callable[[], tuple[dict[str, bytes], dict[str, Any]]],
        wait_seconds: float = 600.0,
    ) -> tuple[Entry, bool]:
        """The entry, built if need be, and whether it was there already.

        Args:
            build: returns the contents of the files of :data:`FILES`, and the rest of ``meta.json`` (``symbol`` at
                least). Not called when the entry is there, or appears while waiting for its lock.
            wait_seconds: how long another builder is waited for before building regardless.

        Raises:
            CacheError: the cache cannot be read or written. Entries that were there stay as they were.
        """
        if entry := self.load(key, target, host):
            return entry, True
        self._prepare()
        with self._lock(key, wait_seconds):
            if entry := self.load(key, target, host):  # built by another while we waited
                return entry, True
            self._put_aside(key)
            files, meta = build()
            self._publish(files, {"format": FORMAT, "key": key, "target": target, "host": host, **meta})
        entry = self.load(key, target, host)
        if entry is None:
            raise CacheError(f"cache entry {self.root / key} vanished as soon as it was written; try again")
        try:
            self.prune(keep=key)
        except CacheError as error:
            log.warning("%s", error)
        return entry, False

    def _prepare(self) -> None:
        """The folders, private to this user; found out before time is spent on compiling."""
        with self._explained("write to"):
            self.root.parent.mkdir(parents=True, exist_ok=True)
            for folder in (self.root, *(self.root / name for name in (_STAGING, _DAMAGED, _LOCKS))):
                with contextlib.suppress(FileExistsError):
                    folder.mkdir(mode=0o700)
                self._owned_folder(folder)
                if (mode := stat.S_IMODE(folder.stat().st_mode)) & 0o077:
                    folder.chmod(mode & 0o700)
            if not os.access(self.root / _STAGING, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    @contextlib.contextmanager
    def _lock(self, key: str, wait_seconds: float) -> Iterator[None]:
        lock = filelock.FileLock(self.root / _LOCKS / key, mode=0o600)
        try:
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                log.info("another process is building %s; waiting up to %.0f s", key[:12], wait_seconds)
                lock.acquire(timeout=wait_seconds)
        except (filelock.Timeout, NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and not isinstance(error, filelock.Timeout) and _is_full(error):
                raise self._error("write to", error) from error
            log.warning("no lock for cache entry %s (%s); building it without", key[:12], error)
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def _staging(self) -> Iterator[Path]:
        """A new folder in the staging area, gone afterwards."""
        folder = Path(tempfile.mkdtemp(dir=self.root / _STAGING))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _publish(self, files: dict[str, bytes], meta: dict[str, Any]) -> None:
        meta["sha256"] = {name: _sha256(files[name]) for name in FILES} | {META: _sha256(_canonical(meta))}
        with self._explained("write to"), self._staging() as stage:
            folder = stage / meta["key"]
            folder.mkdir(mode=0o700)
            for name in FILES:
                (folder / name).write_bytes(files[name])
            (folder / META).write_text(json.dumps(meta, indent=1) + "\n")
            try:
                folder.rename(self.root / meta["key"])
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                log.debug("cache entry %s was published by another process meanwhile", meta["key"][:12])

    def _put_aside(self, key: str) -> None:
        """Moves a damaged entry out of the way. Called under the entry's lock, after it failed to load."""
        with self._explained("write to"), contextlib.suppress(FileNotFoundError):
            aside = Path(tempfile.mkdtemp(prefix=f"{key[:12]}-", dir=self.root / _DAMAGED)) / key
            try:
                (self.root / key).rename(aside)
                log.warning("damaged cache entry put aside: %s", aside)
            finally:
                with contextlib.suppress(OSError):
                    aside.parent.rmdir()  # empty where there was nothing to put aside

    # --- housekeeping ---

    def ls(self) -> list[Listing]:
        """The entries, most recently used first."""
        rows = []
        with self._explained("read"):
            for folder in self._entries():
                try:
                    used = folder.stat().st_mtime
                    size = _size(folder)
                    meta = self._meta(folder)
                except FileNotFoundError:
                    continue  # removed meanwhile
                except (_DamagedError, CacheError):
                    meta = {}
                rows.append(Listing(folder.name, size, used, meta))
        return sorted(rows, key=lambda row: row.used, reverse=True)

    def info(self) -> dict[str, Any]:
        """``path``, ``entries``, ``bytes``, ``limit_bytes``, and how many ``damaged`` entries were put aside."""
        rows = self.ls()
        with self._explained("read"):
            damaged = len(list((self.root / _DAMAGED).glob("*")))
        return {
            "path": str(self.root),
            "entries": len(rows),
            "bytes": sum(row.bytes for row in rows),
            "limit_bytes": self.limit,
            "damaged": damaged,
        }

    def remove(self, key: str) -> bool:
        """Removes one entry; whether it was there."""
        self._prepare()
        with self._explained("write to"), self._staging() as trash:
            try:
                (self.root / key).rename(trash / key)  # first out of sight, so that nobody sees half of it
            except FileNotFoundError:
                return False
        return True

    def prune(self, limit: int | None = None, keep: str | None = None) -> list[str]:
        """Removes entries, least recently used first, until at most ``limit`` bytes (the store's own limit if None)
        are left; ``keep`` stays. Leftovers of crashed builders and old damaged entries go too. Returns the keys."""
        limit = self.limit if limit is None else limit
        self._sweep(_STALE_SECONDS)
        rows, removed = self.ls(), []
        total = sum(row.bytes for row in rows)
        for row in reversed(rows):
            if total <= limit:
                break
            if row.key != keep and self.remove(row.key):
                total -= row.bytes
                removed.append(row.key)
        if removed:
            log.info("kernel cache pruned to %d bytes: %d entries removed", total, len(removed))
        return removed

    def clear(self) -> int:
        """Removes every entry and everything put aside; returns how many entries there were."""
        removed = sum(self.remove(row.key) for row in self.ls())
        self._sweep(0.0)
        return removed

    def _sweep(self, age_seconds: float) -> None:
        """Removes what crashed builders left, what was put aside, and locks, if older than that. A lock that is in use
        costs no more than a second build."""
        oldest = time.time() - age_seconds
        with self._explained("write to"):
            for path in (p for name in (_STAGING, _DAMAGED, _LOCKS) for p in (self.root / name).glob("*")):
                with contextlib.suppress(FileNotFoundError):
                    if path.lstat().st_mtime > oldest:
                        continue
                    if path.is_dir():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink()

    def _entries(self) -> Iterator[Path]:
        if not self._owned_folder(self.root):
            return
        for folder in self.root.iterdir():
            if len(folder.name) == _KEY_DIGITS:
                yield folder

    # --- errors ---

    @contextlib.contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        """Turns an operating-system error into a :class:`CacheError` that says what to do."""
        try:
            yield
        except OSError as error:
            raise self._error(doing, error) from error

    def _error(self, doing: str, error: OSError) -> CacheError:
        if _is_full(error):
            remedy = "Free space there ('nvfp4dsl cache prune'), or set NVFP4DSL_CACHE_DIR to another disk"
        else:
            remedy = "Set NVFP4DSL_CACHE_DIR to a folder that you may write to"
        return CacheError(f"cannot {doing} the kernel cache {self.root}: {error.strerror or error}. {remedy}")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _canonical(meta: dict[str, Any]) -> bytes:
    """``meta.json`` but for the digests it holds."""
    return json.dumps({k: v for k, v in meta.items() if k != "sha256"}, sort_keys=True).encode()


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _size(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.iterdir())
