"""Timing, checking and reporting, as far as they need no GPU: in place of a CUDA graph there is one with a script."""

import functools
import itertools
import json
import math
import operator
import re
import statistics
import subprocess
from collections import Counter
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from nvfp4dsl import cubin, emulator, reference
from nvfp4dsl.autotune import bench, measure, quantization, report
from nvfp4dsl.autotune.measure import FAILED, MISSING, OK, WRONG, MissingPeerError, Result, Timing, WrongResultError
from nvfp4dsl.autotune.peers import LINEAR, Linear, LinearPeer, Weights, select, weight_bytes
from nvfp4dsl.autotune.peers.libraries import Cublas, Humming, Quack, optional
from nvfp4dsl.autotune.peers.problem import ONE_ROUNDING
from nvfp4dsl.autotune.peers.stream import ReaderTile, Stream, as_bytes, reader, xor
from nvfp4dsl.autotune.report import Goal
from nvfp4dsl.cli import main
from nvfp4dsl.emulator.capture import capture
from nvfp4dsl.errors import OperandError, StuckDeviceError, TargetError

H200_L2 = 60 << 20


# --- rotation, turns, statistics ---


@pytest.mark.parametrize(
    ("operand", "l2", "sets"),
    [
        (weight_bytes(14336, 4096), H200_L2, 4),  # 33.0 MB: three are 99 MB, four 132
        (weight_bytes(4096, 4096), H200_L2, 14),
        (H200_L2, H200_L2, 3),  # two are exactly twice the L2, which is not more than it
        (10 * H200_L2, H200_L2, 2),  # one alone would be read again at once
        (1, 0, 2),
    ],
)
def test_the_rotated_sets_hold_more_than_twice_the_l2(operand, l2, sets):
    assert measure.rotation(operand, l2) == sets
    assert sets * operand > 2 * l2
    assert (sets - 1) * operand <= 2 * l2 or sets == measure.MIN_ROTATION


def test_nothing_is_not_rotated():
    with pytest.raises(ValueError, match="0 bytes"):
        measure.rotation(0, H200_L2)


@pytest.mark.parametrize("peers", [1, 2, 3, 7])
def test_each_peer_has_each_place_equally_often(peers):
    orders = list(measure.turns(peers, 2 * peers))
    assert all(sorted(order) == list(range(peers)) for order in orders)
    places = Counter((peer, place) for order in orders for place, peer in enumerate(order))
    assert places == dict.fromkeys(itertools.product(range(peers), repeat=2), 2)


def test_no_peer_always_follows_the_same_other():
    followed = Counter(pair for order in measure.turns(5, 10) for pair in itertools.pairwise(order))
    assert max(followed.values()) <= 5
    assert all(len({a for a, b in followed if b == peer}) == 2 for peer in range(5))


def test_median_and_quartiles():
    timing = Timing.of([9.0, 1.0, 3.0, 100.0, 5.0], calls=40)
    assert timing == Timing(us=5.0, low_us=3.0, high_us=9.0, rounds=5, calls=40)
    assert timing.spread == pytest.approx(6 / 5)
    assert Timing.of([2.0], calls=1) == Timing(2.0, 2.0, 2.0, 1, 1)
    assert Timing.of([2.0], calls=1).spread == 0


# --- the comparison ---


class Scripted:
    """A peer whose calls return ``value``; right if it is 1."""

    def __init__(self, name, value=1.0, us=1.0, raises=None):
        self.name, self.value, self.us, self.raises = name, value, us, raises

    def setup(self, problem):
        if self.raises:
            raise self.raises
        return [lambda: torch.full((problem,), self.value)] * 3

    def check(self, problem, outputs):
        assert len(outputs) == 3
        error = max((output - 1).abs().max().item() for output in outputs)
        if not error <= 0.5:
            raise WrongResultError(f"off by {error}", error)
        return error


class Chained:
    """Stands for :class:`measure.Chain`: no graph, but a record of the turns. The n-th turn of a peer takes n us more
    than its own time, so a median tells whose turns were counted, and which."""

    log: list = []  # noqa: RUF012 - emptied by the fixture

    def __init__(self, calls, graph_us):
        self.calls, self._calls, self._turns, self.graph_us = 12, calls, itertools.count(), graph_us

    def run_poisoned(self):
        return [call() for call in self._calls]

    def enqueue(self):
        self.log.append(self)
        turn = next(self._turns)
        return lambda: 10.0 * len(self._calls) + turn


@pytest.fixture
def turns(monkeypatch):
    Chained.log = []
    monkeypatch.setattr(measure, "Chain", Chained)
    monkeypatch.setattr(measure, "require_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(measure, "drain", lambda: None)
    return Chained.log


def test_a_peer_that_is_wrong_missing_or_failing_has_no_time_and_ends_nothing(turns):
    peers = [
        Scripted("right"),
        Scripted("wrong", value=2.0),
        Scripted("nan", value=float("nan")),
        Scripted("missing", raises=MissingPeerError("pip install it")),
        Scripted("failed", raises=KeyError("n")),
        Scripted("also right", value=0.75),
    ]
    results = measure.compare(peers, 4, rounds=5)
    assert {name: r.status for name, r in results.items()} == {
        "right": OK,
        "wrong": WRONG,
        "nan": WRONG,
        "missing": MISSING,
        "failed": FAILED,
        "also right": OK,
    }
    assert list(results) == [peer.name for peer in peers]
    assert {name for name, r in results.items() if r.timing} == {"right", "also right"}
    assert results["right"].error == 0
    assert results["also right"].error == 0.25
    assert results["wrong"] == Result(WRONG, 1.0, message="off by 1.0")
    assert results["missing"].message == "pip install it"
    assert re.fullmatch(r"KeyError: 'n' \(test_measure.py:\d+\)", results["failed"].message)
    assert len(set(turns)) == 2


def test_rounds_are_interleaved_and_the_first_does_not_count(turns):
    results = measure.compare([Scripted(name) for name in "abc"], 4, rounds=6)
    warm, rounds = turns[:3], [turns[i : i + 3] for i in range(3, len(turns), 3)]
    assert len(rounds) == 6
    assert all(set(order) == set(warm) for order in rounds)
    assert [[warm.index(chain) for chain in order] for order in rounds] == list(measure.turns(3, 6))
    assert {r.timing for r in results.values()} == {Timing.of([30.0 + n for n in range(1, 7)], calls=12)}


def test_checking_alone_times_nothing(turns):
    results = measure.compare([Scripted("a"), Scripted("b", value=9.0)], 4, timed=False)
    assert [(r.status, r.timing) for r in results.values()] == [(OK, None), (WRONG, None)]
    assert not turns


class Never:
    """Stands for an event of a stream whose kernel hangs."""

    def query(self):
        return False


def test_a_device_that_hangs_ends_the_comparison_and_names_the_peer(turns):
    with pytest.raises(StuckDeviceError, match=r"0\.01 s ago: a kernel hangs"):
        measure.await_event(Never(), 0.01)
    with pytest.raises(StuckDeviceError, match=r"stuck on 4: .* hangs"):
        measure.compare([Scripted("right"), Scripted("stuck", raises=StuckDeviceError("it hangs"))], 4)


def test_two_peers_of_one_name_are_refused(turns):
    with pytest.raises(ValueError, match="names of their own: a, a"):
        measure.compare([Scripted("a"), Scripted("a", value=9.0)], 4)


def test_without_a_device_nothing_is_measured():
    if torch.cuda.is_available():
        pytest.skip("there is a device here")
    with pytest.raises(TargetError, match="needs a CUDA device"):
        measure.compare([Scripted("a")], 4)


def test_host_time_is_the_median_outside_of_waiting(turns, monkeypatch):
    clock, called = itertools.count(step=3000), []
    monkeypatch.setattr(measure.time, "perf_counter_ns", lambda: next(clock))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: [next(clock) for _ in range(100)])
    assert measure.host_us(lambda: called.append(next(clock) if len(called) % 10 == 0 else 0), 200, batch=8) == 3.0
    assert len(called) == 208


# --- peers ---


@pytest.fixture(scope="module")
def problem():
    return Linear(Weights(96, 128, sets=3, device="cpu"), 5)


class Given(LinearPeer):
    """Computes the product with whatever ``change`` makes of the exact weight of a set."""

    def __init__(self, change=lambda w, number: w, name="given"):
        super().__init__()
        self.name, self.change, self.numbers = name, change, itertools.count()

    def prepare(self, weight):
        return self.change(reference.dequantize(weight, torch.float64), next(self.numbers))

    def call(self, x, prepared):
        return (x.double() @ prepared.T).bfloat16()


def run(peer, problem):
    return peer.check(problem, [call() for call in peer.setup(problem)])


def test_a_rounded_product_passes(problem):
    assert 1e-4 < run(Given(), problem) < ONE_ROUNDING
    weight = reference.dequantize(problem.weights.tensors[2], torch.float64)
    assert problem.expected.dtype == torch.float64
    assert torch.equal(problem.expected, problem.x.double() @ weight.T)


@pytest.mark.parametrize(
    "change",
    [
        lambda w, number: w * 1.005,  # a global scale rounded too far
        lambda w, number: torch.zeros_like(w),
        lambda w, number: w.roll(1, 0),
        lambda w, number: w.unflatten(1, (-1, 2)).flip(-1).flatten(1),  # nibbles swapped
        lambda w, number: w * (1 if number < 2 else -1),  # only the last of the rotated sets
        lambda w, number: w.masked_fill(torch.arange(len(w))[:, None] == 7, float("nan")),  # one row unwritten
    ],
)
def test_a_wrong_product_is_refused(problem, change):
    with pytest.raises(WrongResultError, match="relative error") as caught:
        run(Given(change), problem)
    assert caught.value.error > ONE_ROUNDING


def test_rotated_weights_are_equal_and_share_no_memory(problem):
    tensors = problem.weights.tensors
    assert len({t.qdata.data_ptr() for t in tensors}) == len({t.scale.data_ptr() for t in tensors}) == 3
    assert all(torch.equal(t.qdata, tensors[0].qdata) for t in tensors)


def test_weights_are_converted_once_for_all_m(problem):
    peer = Given()
    first, second = peer.setup(problem), peer.setup(Linear(problem.weights, 9))
    assert next(peer.numbers) == 3
    assert first[0]().shape == (5, 96)
    assert second[0]().shape == (9, 96)
    peer.setup(Linear(Weights(32, 64, sets=2, device="cpu"), 1))
    assert next(peer.numbers) == 6


def test_traffic_and_work(problem):
    assert weight_bytes(14336, 4096) == 33_030_144
    assert problem.bytes == 96 * 128 * 9 // 16 + 5 * (96 + 128) * 2
    assert problem.flops == 2 * 5 * 96 * 128


def test_cublas_is_within_two_roundings(problem):
    assert ONE_ROUNDING < run(Cublas(), problem) < Cublas.tolerance


@pytest.mark.parametrize(("peer", "install"), [(Quack, "quack-kernels"), (Humming, "humming-kernels")])
def test_a_missing_package_is_named(peer, install, problem, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, peer.name, None)  # what an import statement takes for missing
    with pytest.raises(MissingPeerError, match=f"pip install {install}"):
        peer().setup(problem)


def test_optional_gives_the_module():
    assert optional("json", "json") is json


def test_peers_are_selected_by_name():
    assert [peer.name for peer in select(list(LINEAR))] == list(LINEAR)
    assert {peer.package for peer in select(list(LINEAR))} >= {"nvfp4dsl", "quack-kernels", None}
    with pytest.raises(ValueError, match="unknown peers marlin; there are stream, "):
        select(["marlin"])
    with pytest.raises(ValueError, match="at most once"):
        select(["stream", "stream"])


# --- the quantization kernels ---


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_quantization_is_not_timed_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["quantization"])
    with pytest.raises(SystemExit, match=r"^TargetError: timing needs a CUDA device"):
        quantization.main()
    assert capsys.readouterr().out == ""


# --- the kernel that reads ---


@pytest.mark.parametrize("count", [0, 1, 2, 7, 64, 1001])
def test_xor_of_all(count):
    words = torch.randint(-(1 << 31), 1 << 31, (count,)).int()
    assert xor(words) == functools.reduce(operator.xor, words.tolist(), 0)


def test_all_bytes_of_a_weight_are_there_to_be_read(problem):
    data, weight = as_bytes(problem.weights.tensors[0]), problem.weights.tensors[0]
    assert data.numel() == weight_bytes(96, 128)
    assert torch.equal(data[: weight.qdata.numel()], weight.qdata.flatten())
    assert torch.equal(data[weight.qdata.numel() :], weight.scale.view(torch.uint8).flatten())


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("tile", [ReaderTile(), ReaderTile(256, 8)])
def test_the_reader_has_its_loads_in_flight_at_once(pdl, tile):
    kernel = reader(pdl, tile, "sm_90a")
    code = cubin.disassemble(kernel.cubin)
    loads = [match.start() for match in re.finditer(r"LDG\.E\.\S*128", code)]
    assert len(loads) == len(re.findall(r"\bLDG", code)) == tile.unroll
    assert kernel.meta["spills"] == 0
    assert kernel.meta["registers"] <= 65536 // 2048  # blocks fill the device
    starts, waits = code.find("PREEXIT"), code.find("ACQBULK")
    if pdl:
        assert 0 < starts < min(loads)
        assert max(loads) < waits < code.find("STG")
    else:
        assert starts == waits == -1


@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("chunks", [1, 191, 768, 3001])
def test_the_reader_reads_every_byte(pdl, chunks):
    blocks, tile = 3, ReaderTile(64, 4)
    kernel = reader(pdl, tile, "sm_90a")
    data = torch.randint(0, 256, (16 * chunks,), dtype=torch.uint8)
    sums = torch.zeros(blocks * tile.threads, dtype=torch.int32)
    names = ("data", "sums", "blocks", "store")
    (launch,) = capture(kernel.object_path, kernel.symbol, (data, sums, blocks, 1), names, outputs=("sums",))
    assert bool(launch.attributes.get("programmatic_stream_serialization")) == pdl
    emulator.run(kernel.ptx, launch)  # strict: out of bounds is a fault
    assert xor(torch.from_numpy(launch.buffer("sums").data.copy()).view(torch.int32)) == xor(data.view(torch.int32))


def test_bytes_that_are_left_out_are_noticed(problem, monkeypatch):
    peer = Stream()
    monkeypatch.setattr(peer, "_launch", lambda data, store: data.view(torch.int32))
    assert run(peer, problem) == 0
    monkeypatch.setattr(peer, "_launch", lambda data, store: data.view(torch.int32)[:-1])
    with pytest.raises(WrongResultError, match="bytes were left out"):
        run(peer, problem)


# --- provenance ---


def git(folder, *args):
    who = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *who, *args], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_provenance_knows_the_commit_and_whether_it_is_clean(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert measure.describe(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert measure.describe(tmp_path) is None
    (tmp_path / "kernel.py").write_text("1")
    git(tmp_path, "add", "kernel.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    git(tmp_path, "tag", "-a", "v1", "-m", "a tag is not what names a commit here")
    head = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "notes").write_text("untracked")
    assert measure.describe(tmp_path) == head
    (tmp_path / "kernel.py").write_text("2")
    assert measure.describe(tmp_path) == f"{head}-dirty"


def test_provenance():
    found = measure.provenance(["torch", "no-such-package"], commit="0123abc-dirty")
    assert (found["commit"], found["dirty"]) == ("0123abc", True)
    assert measure.provenance(commit="0123abc")["dirty"] is False
    assert found["packages"]["no-such-package"] is None
    assert found["torch"].startswith(found["packages"]["torch"].partition("+")[0])
    assert found["toolchain"]["nvidia-cutlass-dsl"].startswith("4.")
    assert json.loads(json.dumps(found)) == found
    if not torch.cuda.is_available():
        assert found["gpu"] is found["driver"] is None


# --- results and reports ---


def point(n, k, m, **us):
    """A point where each peer takes ``us``; a text is a status."""
    results = {
        name: Result(value, message="why") if isinstance(value, str) else Result(OK, 1e-3, Timing.of([value] * 3, 10))
        for name, value in us.items()
    }
    return bench.Point(n, k, m, 4, weight_bytes(n, k) + 2 * m * (n + k), 2 * m * n * k, results)


@pytest.fixture
def results():
    provenance = {
        "gpu": "NVIDIA H200",
        "driver": "580",
        "torch": "2.11",
        "toolchain": {"nvidia-cutlass-dsl": "4.8.1"},
        "packages": {"quack-kernels": "0.6.5", "humming-kernels": None},
        "commit": "a" * 40,
        "dirty": True,
        "time": "2026-01-01T00:00:00+00:00",
    }
    points = [
        point(14336, 4096, 1, stream=8.9, stream_pdl=7.3, cublas=30.0, quack=18.0, humming="missing", nvfp4dsl=10.0),
        point(14336, 4096, 16, stream=8.9, stream_pdl=7.3, cublas=32.0, quack=20.0, humming=19.0, nvfp4dsl=12.5),
        point(
            4096, 4096, 256, stream=4.0, stream_pdl=2.3, cublas=123.4, quack="wrong", humming=24.0, nvfp4dsl="failed"
        ),
    ]
    return bench.Run(provenance, points)


def test_results_survive_the_file(results, tmp_path):
    file = tmp_path / "new" / "h200.json"
    results.save(file)
    assert bench.Run.load(file) == results
    assert [entry.name for entry in file.parent.iterdir()] == ["h200.json"]
    assert len([line for line in file.read_text().splitlines() if line.startswith('{"n"')]) == 3
    assert json.loads(file.read_text()) == results.as_json()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 2}', '{"format": 1, "points": [{}]}'])
def test_a_file_of_something_else_is_refused(text, tmp_path):
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(OperandError, match="does not hold the results"):
        bench.Run.load(tmp_path / "f.json")


def test_table(results):
    header, _, first, _, third = report.table(results, [1, 16, 256]).splitlines()
    assert header == (
        "| N x K | M | stream | stream_pdl | cublas | quack | humming | nvfp4dsl | ours / stream | ours / stream_pdl "
        "| best rival / ours | cublas / ours |"
    )
    assert first == "| 14336 x 4096 | 1 | 8.90 | 7.30 | 30.0 | 18.0 | - | 10.0 | 1.12 | 1.37 | 1.80 | 3.00 |"
    assert third == "| 4096 x 4096 | 256 | 4.00 | 2.30 | 123 | wrong | 24.0 | failed | - | - | - | - |"
    assert len(report.table(results, [16]).splitlines()) == 3


@pytest.mark.parametrize(
    ("goal", "met", "value", "worst"),
    [
        (Goal("best rival / ours", 0.97), True, 19 / 12.5, "1.52 at 14336x4096 M=16"),
        (Goal("best rival / ours", 1.6, mean=True), True, math.sqrt(1.8 * 19 / 12.5), "1.52 at 14336x4096 M=16"),
        (Goal("best rival / ours", 1.7, mean=True), False, math.sqrt(1.8 * 19 / 12.5), "1.52 at 14336x4096 M=16"),
        (Goal("ours / stream", 1.3, at_most=True), False, 12.5 / 8.9, "1.4 at 14336x4096 M=16"),
        (Goal("ours / stream", 1.3, m=(1, 4), at_most=True), True, 10 / 8.9, "1.12 at 14336x4096 M=1"),
        (Goal("cublas / ours", 2.7, m=(1, 16), wide=True), False, 2.56, "2.56 at 14336x4096 M=16"),
    ],
)
def test_goals(results, goal, met, value, worst):
    verdict = goal.verdict(results.points)
    assert (verdict["met"], verdict["worst"], verdict["goal"]) == (met, worst, str(goal))
    assert verdict["value"] == pytest.approx(value)


def test_goals_without_points(results):
    assert Goal("ours / stream", 1.0, wide=False).verdict(results.points) is None  # ours failed at the small weight
    assert Goal("cublas / ours", 1.0, m=(2, 15)).verdict(results.points) is None
    assert {row["goal"].partition(" at ")[0] for row in report.verdicts(results)} == set(report.RATIOS)


def test_goals_say_what_they_are_about():
    texts = [str(goal) for goal in report.GOALS]
    assert len(set(texts)) == len(texts)
    assert "best rival / ours at least 1.3 in geometric mean at M = 32..64" in texts
    assert "ours / stream at most 1.15 at M = 8 where N*K >= 30 M" in texts
    assert "cublas / ours at least 0.97" in texts


def test_where_bf16_is_faster(results):
    assert report.overtaken(results) == {}
    results.points += [
        point(4096, 4096, m, cublas=cublas, nvfp4dsl=40.0) for m, cublas in ((128, 39.0), (1, 41.0), (64, 38.0))
    ]
    assert report.overtaken(results) == {"4096x4096": 64}


DOCUMENT = """# Title
<!-- bench:linear m=1,256 -->
old
<!-- /bench -->
between
<!-- bench:grouped -->
another operation's
<!-- /bench -->
<!-- bench:linear -->
<!-- /bench -->
end
"""


def test_the_table_of_a_document_is_regenerated(results):
    text = report.insert(results, DOCUMENT)
    assert "old" not in text
    assert text.count(report.caption(results)) == 2
    assert report.table(results, [1, 256]) in text
    assert report.table(results, report.MS) in text
    assert "| 14336 x 4096 | 16 |" not in text.partition("between")[0]
    assert report.insert(results, text) == text
    assert re.sub(r"(m=1,256 -->|linear -->)\n.*?<!-- /b", r"\1\n<!-- /b", text, flags=re.DOTALL) == DOCUMENT.replace(
        "old\n", ""
    )
    results.points[0] = replace(results.points[0], results={})
    assert report.insert(results, text) != text


def test_tables_that_sum_up(results):
    results.points += [point(4096, 4096, 16, stream=4.0, cublas=9.0, nvfp4dsl=10.0, nvfp4dsl_no_pdl=11.0)]
    header, _, *rows = report.by_m(results).splitlines()
    assert (
        header == "| M | ours / stream | ours / stream_pdl | best rival / ours | cublas / ours | without PDL / ours |"
    )
    assert rows[0] == "| 1 | 1.12 (1.12) | 1.37 (1.37) | 1.80 (1.80) | 3.00 (3.00) | - |"
    assert rows[1] == "| 16 | 1.87 (2.50) | 1.71 (1.71) | 1.52 (1.52) | 1.52 (0.90) | 1.10 (1.10) |"
    assert rows[2] == "| 256 | - | - | - | - | - |"
    assert report.crossings(results).splitlines()[2:] == ["| 14336 x 4096 | nowhere |", "| 4096 x 4096 | 16 |"]
    assert "| cublas / ours at least 0.97 | 0.90 | no | 0.9 at 4096x4096 M=16 |" in report.goals(results)
    for what in ("by-m", "goals", "crossings"):
        assert report.TABLES[what](results) in report.insert(results, f"<!-- bench:linear {what} -->\n<!-- /bench -->")
    with pytest.raises(OperandError, match="'by-n'; there are by-m"):
        report.insert(results, "<!-- bench:linear by-n -->\n<!-- /bench -->")


def test_a_document_without_marks_is_refused(results):
    with pytest.raises(OperandError, match="bench:linear"):
        report.insert(results, "<!-- bench:grouped -->\n<!-- /bench -->")


def test_caption(results):
    assert report.caption(results) == (
        "NVIDIA H200, driver 580, torch 2.11, nvidia-cutlass-dsl 4.8.1, quack-kernels 0.6.5; commit aaaaaaaaaaaa with "
        "changes; 2026-01-01T00:00:00+00:00. Microseconds a call, medians."
    )


def test_picture(results, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    report.picture(results, tmp_path / "r.png")
    pixels = image.imread(tmp_path / "r.png")
    assert pixels.shape[0] > 300
    assert len({tuple(pixel) for pixel in pixels.reshape(-1, pixels.shape[-1])[::7]}) > 5  # something is drawn
    with pytest.raises(OperandError, match="nothing to draw"):
        report.picture(replace(results, points=[]), tmp_path / "r.png")


# --- the command ---


def invoke(*args, status=0):
    result = CliRunner().invoke(main, ["bench", *map(str, args)])
    assert result.exit_code == status, result.output
    return result


def test_the_command_reports_on_an_earlier_run(results, tmp_path):
    results.save(tmp_path / "r.json")
    (tmp_path / "README.md").write_text(DOCUMENT)
    output = invoke("--from", tmp_path / "r.json", "--into", tmp_path / "README.md").stdout
    assert (tmp_path / "README.md").read_text() == report.insert(results, DOCUMENT)
    assert report.table(results, [1, 16, 256]) in output
    assert json.loads(invoke("--from", tmp_path / "r.json", "--json").stdout) == results.as_json()


def test_a_grid_is_shared_out_by_weight():
    nks, ms = [(64, 128), (96, 64)], [1, 2, 4, 8, 16]
    for processes, parts in ((1, 1), (2, 1), (3, 2), (16, 5)):
        shares = bench.shares(nks, ms, processes)
        assert len(shares) == parts * len(nks)
        assert sorted((nk, m) for nk, part in shares for m in part) == sorted((nk, m) for nk in nks for m in ms)


def test_caches_are_warmed_by_checking_in_other_processes(turns, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "l2_bytes", lambda: 1 << 14)
    monkeypatch.setattr(bench, "Weights", functools.partial(Weights, device="cpu"))
    monkeypatch.setitem(LINEAR, "given", Given)
    asked = []

    def run(command, **options):
        asked.append(command[4:])
        return subprocess.CompletedProcess(command, len(asked) == 2)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(measure, "_line", lambda *command: None)
    stderr = invoke("--nk", "64x128", "--m", "1,3,5", "--peers", "given", "--warm", 2).stderr
    assert sorted(asked) == [["--check", "--nk", "64x128", "--m", ms, "--peers", "given"] for ms in ("1,5", "3")]
    assert "checked in 2 processes, 1 of them failing" in stderr


def test_the_command_measures(turns, monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "l2_bytes", lambda: 1 << 14)
    monkeypatch.setattr(bench, "Weights", functools.partial(Weights, device="cpu"))
    monkeypatch.setitem(LINEAR, "given", Given)
    monkeypatch.setitem(LINEAR, "wrong", lambda: Given(lambda w, number: -w, "wrong"))
    invoke("--nk", "64x128,96x64", "--m", "1,3", "--peers", "given,cublas", "--json", tmp_path / "r.json")
    measured = bench.Run.load(tmp_path / "r.json")
    assert [(p.n, p.k, p.m) for p in measured.points] == [(64, 128, 1), (64, 128, 3), (96, 64, 1), (96, 64, 3)]
    assert [p.sets for p in measured.points] == [7, 7, 9, 9]
    assert measured.points[0].us("given") == 70 + statistics.median(range(1, measure.ROUNDS + 1))
    assert measured.provenance["packages"].keys() == {"nvidia-cublas"}
    wrong = invoke("--nk", "64x128", "--m", 1, "--peers", "given,wrong", "--commit", "12-dirty", "--json", status=1)
    answer = json.loads(wrong.stdout)
    assert [r["status"] for r in answer["points"][0]["results"].values()] == [OK, WRONG]
    assert (answer["provenance"]["commit"], answer["provenance"]["dirty"]) == ("12", True)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--nk", "4096"), "an example is 14336x4096,4096x4096"),
        (("--nk", "0x16"), "0 is not positive"),
        (("--m", "1,b"), "an example is 1,16,256"),
        (("--peers", "marlin"), "there is no peer 'marlin'"),
    ],
)
def test_arguments_are_explained(args, message):
    assert message in re.sub(r"\s+", " ", invoke(*args, status=2).stderr)


def test_errors_are_json_where_results_would_be():
    if torch.cuda.is_available():
        pytest.skip("there is a device here")
    assert json.loads(invoke("--json", status=1).stdout)["error"] == "TargetError"
    assert "TargetError" in invoke("--json", "somewhere.json", status=1).stderr
