"""Comparisons over a grid of shapes, and the file that keeps what came out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvfp4dsl.autotune import measure
from nvfp4dsl.autotune.measure import Result
from nvfp4dsl.autotune.peers import Linear, LinearPeer, Weights, output_bytes, weight_bytes
from nvfp4dsl.errors import OperandError

FORMAT = 1


@dataclass(frozen=True)
class Point:
    """One shape: what it takes and what each peer took.

    Attributes:
        n, k, m: the product's extents.
        sets: weights that the calls rotated through.
        bytes: least traffic, each operand and the output once.
        flops: two a multiply-add.
        results: by the peer's name.
    """

    n: int
    k: int
    m: int
    sets: int
    bytes: int
    flops: int
    results: dict[str, Result]

    def us(self, peer: str) -> float | None:
        """The peer's median, None if it has none."""
        result = self.results.get(peer)
        return result.timing.us if result and result.timing else None

    def as_json(self) -> dict[str, Any]:
        return vars(self) | {"results": {name: result.as_json() for name, result in self.results.items()}}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Point:
        return cls(**row | {"results": {name: Result.from_json(r) for name, r in row["results"].items()}})


@dataclass
class Run:
    """Points measured together, on one device by one version."""

    provenance: dict[str, Any]
    points: list[Point] = field(default_factory=list)
    op: str = "linear"

    def as_json(self) -> dict[str, Any]:
        points = [point.as_json() for point in self.points]
        return {"format": FORMAT, "op": self.op, "provenance": self.provenance, "points": points}

    def save(self, path: Path) -> None:
        """Whole or not at all, so that an interrupted run leaves what it had. A line a point keeps diffs small."""
        content = self.as_json()
        rows = ",\n".join(json.dumps(row) for row in content.pop("points"))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(f'{json.dumps(content, indent=1)[:-2]},\n "points": [\n{rows}\n]}}\n')
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> Run:
        """Raises :class:`OperandError` if the file is not such a run."""
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}, not {FORMAT}")
            points = [Point.from_json(row) for row in content["points"]]
            return cls(content["provenance"], points, content["op"])
        except (KeyError, TypeError, ValueError) as error:
            raise OperandError(
                f"{path} does not hold the results of nvfp4dsl bench ({type(error).__name__}: {error})"
            ) from error


def linear(
    nks: Iterable[tuple[int, int]],
    ms: Sequence[int],
    peers: Sequence[LinearPeer],
    *,
    rounds: int = measure.ROUNDS,
    timed: bool = True,
    commit: str | None = None,
    done: Callable[[Run], None] = lambda run: None,
) -> Run:
    """Compares ``peers`` on each N x K with each M. ``done`` is called with what there is after each point;
    ``rounds``, ``timed`` and ``commit`` are :func:`measure.compare`'s and :func:`measure.provenance`'s.

    Raises:
        TargetError: there is no CUDA device.
        OperandError: K is not a multiple of 16.
    """
    measure.require_device()
    run = Run(measure.provenance((peer.package for peer in peers if peer.package), commit))
    for n, k in nks:
        needed = {m: sets(n, k, m) if timed else measure.MIN_ROTATION for m in ms}
        weights = Weights(n, k, max(needed.values()))
        for m in ms:
            problem = Linear(weights, m, needed[m])
            results = measure.compare(peers, problem, rounds=rounds, timed=timed)
            run.points.append(Point(n, k, m, problem.sets, problem.bytes, problem.flops, results))
            done(run)
    return run


def sets(n: int, k: int, m: int) -> int:
    """Weights to rotate through at M rows: each call also writes an output of its own, which passes through the L2."""
    return measure.rotation(weight_bytes(n, k) + output_bytes(n, m), measure.l2_bytes())


def shares(
    nks: Sequence[tuple[int, int]], ms: Sequence[int], processes: int
) -> list[tuple[tuple[int, int], tuple[int, ...]]]:
    """The grid in about ``processes`` parts, each of one N x K, since converting a weight is shared by all M."""
    parts = min(len(ms), -(-processes // len(nks)))
    return [(nk, tuple(ms[i::parts])) for i in range(parts) for nk in nks]
