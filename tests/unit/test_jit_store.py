"""The cache folder, with a stand-in for the compiler: whole entries or none, whoever races, damages or forbids."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest

from nvfp4dsl.errors import CacheError
from nvfp4dsl.jit.store import FILES, META, Store

TARGET, HOST = "sm_121a", "linux-x86_64-00000000"
KEY, OTHER, THIRD = ("1" * 64, "2" * 64, "3" * 64)
CONTENTS = {"kernel.o": b"object" * 1000, "kernel.ptx": b".version 8.8", "kernel.cubin": b"\x7fELF" * 100}
NOBODY = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changing the user needs root")


class Builder:
    """Counts its calls in a file, so that those of other processes count too."""

    def __init__(self, path, seconds=0.0, error=None):
        self.path, self.seconds, self.error = path, seconds, error

    def __call__(self):
        with open(self.path, "a") as file:
            file.write("x")
        time.sleep(self.seconds)
        if self.error:
            raise self.error
        return dict(CONTENTS), {"symbol": "gemm", "registers": 128}

    @property
    def calls(self):
        return len(self.path.read_text()) if self.path.exists() else 0


def never():
    raise AssertionError("built, though the entry was there")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache" / "kernels", limit=1 << 30)


@pytest.fixture
def builder(tmp_path):
    return Builder(tmp_path / "calls")


def get(store, key=KEY, build=never):
    return store.get(key, TARGET, HOST, build)


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def whole(store, key=KEY):
    """The entry loads, and is what the builder made."""
    entry = store.load(key, TARGET, HOST)
    return (
        entry is not None
        and entry.ptx.encode() == CONTENTS["kernel.ptx"]
        and entry.cubin == CONTENTS["kernel.cubin"]
        and entry.object_path.read_bytes() == CONTENTS["kernel.o"]
        and entry.meta["symbol"] == "gemm"
    )


# --- building and finding ---


def test_an_entry_is_built_once_and_then_found(store, builder):
    entry, cached = get(store, build=builder)
    assert (cached, builder.calls) == (False, 1)
    assert entry.meta["target"] == TARGET
    assert entry.meta["registers"] == 128
    assert whole(store)
    entry, cached = get(store)
    assert cached
    assert entry.folder == store.root / KEY
    assert whole(Store(store.root, 0))  # another process's view


def test_a_key_that_was_never_built_is_a_miss(store, builder):
    assert store.load(KEY, TARGET, HOST) is None
    get(store, build=builder)
    assert store.load(OTHER, TARGET, HOST) is None


def test_folders_are_private_and_nothing_is_left_in_staging(store, builder):
    get(store, build=builder)
    folders = [store.root, *(p for p in store.root.rglob("*") if p.is_dir())]
    assert {stat.S_IMODE(p.stat().st_mode) for p in folders} == {0o700}
    assert list((store.root / ".staging").iterdir()) == []


def test_a_folder_that_others_could_enter_is_closed_to_them(store, builder):
    store.root.mkdir(parents=True)
    store.root.chmod(0o777)
    get(store, build=builder)
    assert stat.S_IMODE(store.root.stat().st_mode) == 0o700


def test_a_builder_that_fails_leaves_nothing_and_the_next_one_succeeds(store, builder):
    builder.error = RuntimeError("no compiler")
    with pytest.raises(RuntimeError, match="no compiler"):
        get(store, build=builder)
    assert store.info()["entries"] == 0
    assert list((store.root / ".staging").iterdir()) == []
    builder.error = None
    assert get(store, build=builder)[1] is False
    assert whole(store)


# --- damage ---


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def link(path):
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved").name)


def folder(path):
    path.unlink()
    path.mkdir()


def without(field):
    def edit(path):
        meta = json.loads(path.read_text())
        del meta[field]
        path.write_text(json.dumps(meta))

    edit.__name__ = f"without_{field}"
    return edit


def value(field, replacement):
    def edit(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | {field: replacement}))

    edit.__name__ = f"{field}_is_{replacement}"
    return edit


def a_list(path):
    path.write_text("[1, 2]")


DAMAGE = [(name, harm) for name in (*FILES, META) for harm in (Path.unlink, truncate, empty, link, folder)]
DAMAGE += [(name, flip) for name in FILES]
DAMAGE += [(META, without(field)) for field in ("format", "key", "target", "host", "symbol", "sha256")]
DAMAGE += [(META, value(*edit)) for edit in (("format", 0), ("key", OTHER), ("sha256", 7), ("registers", 64))]
DAMAGE += [(META, a_list)]


@pytest.mark.parametrize(("name", "harm"), DAMAGE, ids=[f"{n}-{h.__name__}" for n, h in DAMAGE])
def test_a_damaged_entry_is_a_miss_and_put_aside(store, builder, name, harm):
    get(store, build=builder)
    get(store, OTHER, build=builder)
    harm(store.root / KEY / name)
    damaged = snapshot(store.root / KEY)
    assert store.load(KEY, TARGET, HOST) is None
    assert get(store, build=builder)[1] is False
    assert builder.calls == 3
    assert whole(store)
    assert whole(store, OTHER)
    assert store.info()["damaged"] == 1
    (aside,) = (store.root / ".damaged").glob(f"*/{KEY}")
    assert snapshot(aside) == damaged


def test_a_half_written_entry_is_a_miss(store, builder):
    """As a process leaves it that was killed while it wrote straight into place."""
    (store.root / KEY).mkdir(parents=True)
    (store.root / KEY / "kernel.o").write_bytes(CONTENTS["kernel.o"])
    assert get(store, build=builder)[1] is False
    assert whole(store)


def test_a_file_where_the_folder_should_be_is_named(store, builder):
    store.root.parent.mkdir(parents=True)
    store.root.write_text("")
    with pytest.raises(CacheError, match=r"kernels is in the way of the kernel cache"):
        get(store, build=builder)


# --- the wrong object ---


@pytest.mark.parametrize(
    ("target", "host", "text"),
    [
        ("sm_120a", HOST, "holds an object for target 'sm_120a', not for 'sm_121a'"),
        (TARGET, "linux-aarch64-0", "holds an object for host 'linux-aarch64-0', not for 'linux-x86_64-00000000'"),
    ],
)
def test_an_object_for_another_target_or_host_is_refused_by_name(store, builder, target, host, text):
    store.get(KEY, target, host, builder)
    with pytest.raises(CacheError, match=text):
        store.load(KEY, TARGET, HOST)
    with pytest.raises(CacheError, match=text):
        get(store)
    assert store.load(KEY, target, host) is not None  # and it is still there


# --- races ---


def in_processes(count, work):
    """Runs ``work(i)`` in forked processes that start together; their results, or exceptions."""
    start_read, start_write = os.pipe()
    children = []
    for i in range(count):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(start_write)
            os.read(start_read, 1)  # returns when the parent closes its end
            try:
                result = work(i)
            except BaseException as error:
                result = error
            os.write(write, pickle.dumps(result))
            os._exit(0)
        os.close(write)
        children.append((pid, read))
    os.close(start_read)
    os.close(start_write)
    results = []
    for pid, read in children:
        with open(read, "rb") as file:
            results.append(pickle.load(file))
        os.waitpid(pid, 0)
    return results


def test_processes_racing_on_a_cold_key_build_once(store, builder):
    builder.seconds = 0.3
    results = in_processes(8, lambda i: (get(store, build=builder)[1], whole(store)))
    assert builder.calls == 1
    assert sorted(results) == [(False, True)] + [(True, True)] * 7


def test_processes_racing_on_a_damaged_entry_build_once(store, builder):
    get(store, build=builder)
    truncate(store.root / KEY / "kernel.o")
    builder.seconds = 0.3
    results = in_processes(8, lambda i: (get(store, build=builder)[1], whole(store)))
    assert builder.calls == 2
    assert sorted(results) == [(False, True)] + [(True, True)] * 7
    assert store.info()["damaged"] == 1


def test_different_keys_do_not_wait_for_each_other(store, builder):
    builder.seconds = 0.5
    start = time.perf_counter()
    assert in_processes(6, lambda i: get(store, str(i) * 64, builder)[1]) == [False] * 6
    assert time.perf_counter() - start < 2.0  # 3 s one after the other
    assert builder.calls == 6


def test_threads_racing_on_a_cold_key_build_once(store, builder):
    builder.seconds = 0.2
    cached = []
    threads = [threading.Thread(target=lambda: cached.append(get(store, build=builder)[1])) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert builder.calls == 1
    assert sorted(cached) == [False] + [True] * 5


def test_without_a_lock_the_second_to_finish_finds_the_entry_there(store, builder, monkeypatch):
    monkeypatch.setattr(Store, "_lock", lambda *args: contextlib.nullcontext())
    builder.seconds = 0.3
    results = in_processes(4, lambda i: (get(store, build=builder)[1], whole(store)))
    assert builder.calls == 4
    assert results == [(False, True)] * 4
    assert list((store.root / ".staging").iterdir()) == []


def test_a_builder_that_is_killed_holds_nobody_up(store, builder):
    builder.seconds = 60
    pid = os.fork()
    if pid == 0:
        get(store, build=builder)
        os._exit(0)
    while not builder.calls:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    builder.seconds = 0
    assert get(store, build=builder)[1] is False
    assert whole(store)


def test_a_builder_that_never_ends_is_waited_for_only_so_long(store, builder):
    with store_lock_held_elsewhere(store, KEY):
        assert store.get(KEY, TARGET, HOST, builder, wait_seconds=0.2)[1] is False
    assert whole(store)


@contextlib.contextmanager
def store_lock_held_elsewhere(store, key):
    store._prepare()
    ready_read, ready_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with store._lock(key, 0):
            os.write(ready_write, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(ready_read, 1)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# --- forbidden folders ---


def as_nobody(work):
    """The result of ``work()``, or its exception, in a process of another user."""

    def change_user(_):
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        return work()

    (result,) = in_processes(1, change_user)
    return result


@pytest.fixture
def public_store():
    """A cache in a folder that every user can reach."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Store(Path(name) / "cache", limit=1 << 30)


@needs_root
def test_another_users_cache_is_refused(public_store, builder):
    get(public_store, build=builder)
    public_store.root.chmod(0o755)
    before = snapshot(public_store.root)
    error = as_nobody(lambda: get(public_store))
    assert isinstance(error, CacheError)
    assert "belongs to user 0, and this is user 65534" in str(error)
    assert "NVFP4DSL_CACHE_DIR" in str(error)
    assert snapshot(public_store.root) == before


@needs_root
@pytest.mark.parametrize("path", ["", *FILES, META])
def test_an_entry_or_file_of_another_user_is_refused(store, builder, path):
    get(store, build=builder)
    os.chown(store.root / KEY / path, NOBODY, NOBODY)
    before = snapshot(store.root)
    with pytest.raises(CacheError, match=f"{path} belongs to user 65534, and this is user 0"):
        get(store)
    assert snapshot(store.root) == before
    assert [row.key for row in store.ls()] == [KEY]  # still listed, for one to see


def read_only(store):
    """Fills the cache as nobody, and takes the right to write away."""
    builder = Builder(store.root.parent / "calls")
    as_nobody(lambda: get(store, build=builder))
    for path in (store.root, *store.root.rglob("*")):
        path.chmod(0o500 if path.is_dir() else 0o400)
    return builder


@needs_root
def test_a_read_only_cache_serves_what_it_has_and_says_what_it_cannot(public_store):
    builder = read_only(public_store)
    before = snapshot(public_store.root)
    assert as_nobody(lambda: (get(public_store)[1], whole(public_store))) == (True, True)
    error = as_nobody(lambda: get(public_store, OTHER, builder))
    assert isinstance(error, CacheError)
    assert "cannot write to the kernel cache" in str(error)
    assert "Permission denied. Set NVFP4DSL_CACHE_DIR" in str(error)
    assert builder.calls == 1  # found out before it compiled
    assert as_nobody(lambda: public_store.info()["entries"]) == 1
    for housekeeping in (public_store.clear, lambda: public_store.prune(limit=0)):
        assert isinstance(as_nobody(housekeeping), CacheError)
    assert snapshot(public_store.root) == before


@needs_root
def test_a_cache_folder_that_cannot_be_made_is_named(public_store, builder):
    public_store.root.parent.chmod(0o755)
    error = as_nobody(lambda: get(public_store, build=builder))
    assert isinstance(error, CacheError)
    assert str(public_store.root) in str(error)
    assert builder.calls == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; the test above covers it")
def test_a_read_only_cache_without_root(store, builder):
    get(store, build=builder)
    for path in (store.root, *store.root.rglob("*")):
        path.chmod(0o500 if path.is_dir() else 0o400)
    assert get(store)[1]
    with pytest.raises(CacheError, match="cannot write to the kernel cache"):
        get(store, OTHER, builder)
    assert builder.calls == 1


# --- a full disk ---


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 KiB, or None where one cannot be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        yield None
        return
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_and_loses_nothing(small_disk, tmp_path, builder, monkeypatch):
    store = Store((small_disk or tmp_path) / "kernels", limit=1 << 30)
    get(store, build=builder)
    before = snapshot(store.root)
    if small_disk:
        (small_disk / "ballast").write_bytes(b"x" * 40 * 1024)
    else:

        def write_bytes(path, data):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", write_bytes)

    with pytest.raises(CacheError, match=r"No space left on device\..* cache prune"):
        get(store, OTHER, builder)
    assert {k: v for k, v in snapshot(store.root).items() if not k.startswith(".locks")} == {
        k: v for k, v in before.items() if not k.startswith(".locks")
    }
    assert list((store.root / ".staging").iterdir()) == []
    assert whole(store)

    if small_disk:
        (small_disk / "ballast").unlink()
    monkeypatch.undo()
    assert get(store, OTHER, builder)[1] is False
    assert whole(store, OTHER)


# --- housekeeping ---


def fill(store, builder):
    """Three entries, used a minute apart, the first one longest ago."""
    for age, key in ((180, KEY), (120, OTHER), (60, THIRD)):
        get(store, key, builder)
        os.utime(store.root / key, (time.time() - age,) * 2)
    return store.ls()[0].bytes


def test_the_least_recently_used_go_first(store, builder):
    size = fill(store, builder)
    assert [row.key for row in store.ls()] == [THIRD, OTHER, KEY]
    get(store, KEY)  # used now
    assert [row.key for row in store.ls()] == [KEY, THIRD, OTHER]
    assert store.prune(limit=2 * size) == [OTHER]
    assert whole(store, KEY)
    assert whole(store, THIRD)
    assert not whole(store, OTHER)
    assert store.prune(limit=2 * size) == []


def test_a_new_entry_makes_room_for_itself(store, builder):
    size = fill(store, builder)
    store.limit = 2 * size + size // 2
    get(store, "4" * 64, builder)
    assert {row.key for row in store.ls()} == {THIRD, "4" * 64}
    store.limit = 0
    get(store, "5" * 64, builder)
    assert {row.key for row in store.ls()} == {"5" * 64}  # the one just built stays


def test_leftovers_of_a_crash_go_after_an_hour(store, builder):
    get(store, build=builder)
    for name, age in (("old", 7200), ("new", 60)):
        stage = store.root / ".staging" / name
        stage.mkdir()
        (stage / "kernel.o").write_bytes(b"half")
        os.utime(stage, (time.time() - age,) * 2)
    store.prune()
    assert [p.name for p in (store.root / ".staging").iterdir()] == ["new"]
    assert whole(store)


def test_ls_info_remove_and_clear(store, builder):
    assert store.ls() == []
    assert store.info() == {"path": str(store.root), "entries": 0, "bytes": 0, "limit_bytes": 1 << 30, "damaged": 0}
    assert not store.root.exists()  # looking makes nothing
    assert store.clear() == 0
    size = fill(store, builder)
    (store.root / OTHER / META).write_text("{")
    rows = {row.key: row for row in store.ls()}
    assert rows[KEY].meta["registers"] == 128
    assert rows[OTHER].meta == {}
    assert rows[KEY].bytes == size == sum(len(data) for data in snapshot(store.root / KEY).values())
    assert store.info()["bytes"] == sum(row.bytes for row in rows.values())
    assert store.remove(KEY) is True
    assert store.remove(KEY) is False
    assert store.clear() == 2
    assert store.info()["entries"] == 0
    assert [p.name for p in store.root.iterdir() if any(p.iterdir())] == []
