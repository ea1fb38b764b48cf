"""The issue model against measured times: W4A16 on the H200 at M >= 64, out of the stored benchmark."""

import json
from pathlib import Path

import pytest
import torch

from nvfp4dsl import dispatch, jit
from nvfp4dsl.config import mixed_input, plan
from nvfp4dsl.inspect import inspect, predict
from nvfp4dsl.targets import get_device, get_target

BENCH = Path(__file__).parents[2] / "docs" / "bench"
#: stored benchmark and the peer in it, by inner loop
STORED = {"wgmma": (BENCH / "h200_linear.json", "nvfp4dsl"), "hmma": (BENCH / "h200_hmma.json", "nvfp4dsl_hmma")}
TARGET, LEAST_M, BAR = "sm_90a", 64, 0.15


def measured(loop):
    """(m, n, k, microseconds) of every such point that was measured."""
    file, peer = STORED[loop]
    points = json.loads(file.read_text())["points"] if file.exists() else []
    rows = [(p["m"], p["n"], p["k"], p["results"].get(peer, {}).get("us")) for p in points]
    return [row for row in rows if row[0] >= LEAST_M and row[3]]


def ratio(loop, m, n, k, us):
    """Predicted over measured."""
    card = get_device("H200")
    spec = dispatch.linear_spec(n, k, torch.bfloat16, None)
    forced = None if loop == "wgmma" else loop
    tile = mixed_input.choose(spec, m, n, k, get_target(TARGET), card.sms, mainloop=forced)
    planned = plan(spec, tile, TARGET)
    found = inspect(jit.compile(spec, tile, TARGET).cubin, planned)
    assert found.mma.startswith({"wgmma": "HGMMA", "hmma": "HMMA"}[loop])
    return predict(found, planned, card, m, n, k).predicted_us / us


def check(loop, rows):
    if not rows:
        pytest.skip(f"{STORED[loop][0].name} has no point at M >= {LEAST_M}")
    off = {row: ratio(loop, *row) for row in rows}
    assert not {row: r for row, r in off.items() if abs(r - 1) > BAR}


@pytest.mark.parametrize("loop", STORED)
def test_some_predictions_are_within_the_bar(loop):
    rows = measured(loop)
    check(loop, rows[:: max(1, len(rows) // 3)])


@pytest.mark.slow
@pytest.mark.parametrize("loop", STORED)
def test_all_predictions_are_within_the_bar(loop):
    check(loop, measured(loop))
