"""The self-test itself: the same operands everywhere, verdicts that can fail, and a report one can send in."""

import json

import pytest
import torch
from click.testing import CliRunner

from nvfp4dsl import selftest
from nvfp4dsl.cli import main
from nvfp4dsl.config import TILES, GemmSpec, TileConfig, legal
from nvfp4dsl.selftest import Case
from nvfp4dsl.targets import TARGETS, get_target

MM = Case("mm", 9, 24, 48, "fp32", TileConfig(128, 128, 128))


def test_operands_do_not_depend_on_the_machine():
    weight = selftest._quantized("weight", 4, 32)
    found = [selftest.digest([t]) for t in (weight.qdata, weight.scale, selftest._floats("x", "bf16", 3, 16))]
    assert [sha[:16] for sha in found] == ["eae2866d7b9965fc", "ab5a7bbd7ad503cf", "97066f18af4c81e1"]


@pytest.mark.parametrize("target", TARGETS.values(), ids=str)
def test_every_kernel_that_dispatch_chooses_has_a_case_and_a_stored_result(target):
    cases = selftest.cases(target)
    assert len(set(map(str, cases))) == len(cases)
    for mode in target.mainloops:
        tiles = {str(t) for t in TILES[mode] if not legal(GemmSpec(activation=mode, out_dtype="fp32"), t, target)}
        op = {"nvfp4": "mm", "bf16": "linear"}[mode]
        assert {str(case.tile) for case in cases if case.op == op} >= tiles
        spec = GemmSpec(quantizes="bf16")
        few = {str(t) for t in TILES["nvfp4"] if mode == "nvfp4" and not legal(spec, t, target)}
        assert {str(case.tile) for case in cases if case.op == "linear_nvfp4"} >= few
    stored = selftest.stored(target.name)
    missing = [str(case) for case in cases if case.key not in stored]
    assert not missing, "run: nvfp4dsl selftest --regenerate"


def test_one_stored_result_serves_every_tile_unless_k_is_split():
    other = Case("mm", 9, 24, 48, "fp32", TileConfig(64, 128, 256))
    assert MM.key == other.key
    split = Case("mm", 9, 24, 48, "fp32", TileConfig(128, 128, 128, split=2))
    assert split.key != MM.key
    assert Case("linear", 9, 24, 48, "fp32", TileConfig(8, 16, 2048)).key.startswith("linear 8x16x2048")


def judged(outputs, stored, target="sm_121a", case=MM):
    return selftest.judge(case, get_target(target), outputs, stored, 0.0)


def test_verdicts():
    (truth,) = selftest.expected(MM)
    right = truth.float()
    sha = selftest.digest([right])
    assert (judged([right], sha).status, judged([right], sha).passed) == (selftest.SAME, True)
    assert (judged([right], None).status, judged([right], None).passed) == (selftest.NEW, True)
    nearly = right.clone()
    nearly[0, 0] = torch.nextafter(right[0, 0], torch.tensor(9e9))
    close = judged([nearly], sha)
    assert (close.status, close.passed) == (selftest.CLOSE, True)
    assert not judged([nearly], sha, target="sm_90a").passed
    one_off = right.clone()
    one_off[3, 3] += 1e-2 * right.abs().max()
    for bad in (one_off, right * 1.001, torch.zeros_like(right), right * torch.nan):
        verdict = judged([bad], selftest.digest([bad]))
        assert (verdict.status, verdict.passed) == (selftest.WRONG, False)


def test_quantize_must_be_right_to_the_bit():
    case = Case("quantize", 5, 0, 32, "bf16", layout="blackwell")
    truth = [t.clone() for t in selftest.expected(case)]
    assert judged(truth, None, case=case).passed
    truth[0][0, 0] ^= 1
    assert judged(truth, None, case=case).status == selftest.WRONG


def test_an_exception_is_a_verdict(monkeypatch):
    monkeypatch.setattr(selftest, "compute", lambda *_: (_ for _ in ()).throw(RuntimeError("no such card")))
    monkeypatch.setattr(selftest, "_compile", lambda *_: None)
    result = selftest.run(get_target("sm_121a"), device="cpu", only=lambda case: str(case).startswith("mm 128"))
    assert not result.passed
    assert {v.status for v in result.verdicts} == {selftest.FAILED}
    assert "no such card" in result.verdicts[0].message
    assert not selftest.SelfTest("sm_121a", "gpu", {}).passed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_refuses_without_a_gpu():
    result = CliRunner().invoke(main, ["selftest", "--json"])
    assert result.exit_code == 1
    assert "--emulate" in json.loads(result.output)["message"]


def test_a_report_that_cannot_be_written_is_refused_before_the_run(monkeypatch):
    monkeypatch.setattr(selftest, "run", lambda *_, **__: pytest.fail("it ran"))
    result = CliRunner().invoke(main, ["selftest", "--emulate", "sm_121a", "--out", "/nonexistent/x.json"])
    assert result.exit_code == 1
    assert result.output.startswith("FileNotFoundError: ")
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_report_that_could_not_be_written_is_printed(monkeypatch, options):
    found = selftest.SelfTest("sm_121a", "emulator", {})
    monkeypatch.setattr(selftest, "run", lambda *_, **__: found)
    result = CliRunner().invoke(main, ["selftest", "--emulate", "sm_121a", "--out", "/dev/full", *options])
    assert result.exit_code == 1
    assert json.loads(result.stdout) == found.as_json() | {"report": None}
    assert "No space left" in result.stderr


@pytest.mark.parametrize(("target", "only"), [("sm_121a", "mm 128x128x128 70x136x1040 fp32"), ("sm_90a", "bias bf16")])
def test_the_emulator_reproduces_what_is_stored(target, only, tmp_path):
    report = tmp_path / "report.json"
    arguments = ["selftest", "--emulate", target, "--only", only, "--out", str(report), "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    content = json.loads(report.read_text())
    assert content["passed"]
    assert content["counts"] == {selftest.SAME: len(content["cases"])}
    assert content["target"] == target
    assert report.stat().st_size < 100_000
    assert json.loads(result.output)["report"] == str(report)
    assert "nvfp4dsl" in content["provenance"]["packages"]
