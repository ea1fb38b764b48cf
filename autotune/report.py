"""Results as people read them: a table for a document, the goals they are held against, a roofline picture."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvfp4dsl.autotune.bench import Point, Run
from nvfp4dsl.autotune.measure import MISSING
from nvfp4dsl.autotune.peers import weight_bytes
from nvfp4dsl.errors import OperandError

OURS, BASE, FLOOR, LIBRARY, WITHOUT_PDL = "nvfp4dsl", "stream", "stream_pdl", "cublas", "nvfp4dsl_no_pdl"
RIVALS, READERS = ("quack", "humming"), (BASE, FLOOR)
MS = (1, 4, 8, 16, 64, 256, 1024, 4096)

Ratio = Callable[[Point], "float | None"]


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator and denominator else None


def best_rival(point: Point) -> float | None:
    """Microseconds of the faster rival."""
    return min((us for name in RIVALS if (us := point.us(name))), default=None)


RATIOS: dict[str, Ratio] = {
    "ours / stream": lambda p: _ratio(p.us(OURS), p.us(BASE)),
    "ours / stream_pdl": lambda p: _ratio(p.us(OURS), p.us(FLOOR)),
    "best rival / ours": lambda p: _ratio(best_rival(p), p.us(OURS)),
    "cublas / ours": lambda p: _ratio(p.us(LIBRARY), p.us(OURS)),
}
"""The first two are better when small, the others when large."""


def table(run: Run, ms: Sequence[int] = MS) -> str:
    """Markdown: microseconds a call, a row for each N x K and M in ``ms``, and how ours compares."""
    points = [point for point in run.points if point.m in ms]
    names = _peers(points)
    ratios = {name: ratio for name, ratio in RATIOS.items() if any(ratio(point) for point in points)}
    header = ["N x K", "M", *names, *ratios]
    rows = [
        [f"{p.n} x {p.k}", str(p.m), *(_cell(p, name) for name in names), *(_number(r(p)) for r in ratios.values())]
        for p in points
    ]
    return _markdown([header, ["---"] * 2 + ["---:"] * (len(header) - 2), *rows])


SUMMARY: dict[str, tuple[Ratio, Callable[[Iterable[float]], float]]] = {
    "ours / stream": (RATIOS["ours / stream"], max),
    "ours / stream_pdl": (RATIOS["ours / stream_pdl"], max),
    "best rival / ours": (RATIOS["best rival / ours"], min),
    "cublas / ours": (RATIOS["cublas / ours"], min),
    "without PDL / ours": (lambda p: _ratio(p.us(WITHOUT_PDL), p.us(OURS)), min),
}
"""Columns of :func:`by_m`: a ratio, and which of its values is the worst."""


def by_m(run: Run) -> str:
    """Markdown: a row for each M, with the geometric mean of each ratio over all N x K, and the worst."""
    ms = sorted({point.m for point in run.points})
    columns = {name: column for name, column in SUMMARY.items() if any(column[0](point) for point in run.points)}

    def cell(m: int, ratio: Ratio, worst: Callable[[Iterable[float]], float]) -> str:
        values = [value for point in run.points if point.m == m and (value := ratio(point))]
        return f"{statistics.geometric_mean(values):.2f} ({worst(values):.2f})" if values else "-"

    header = ["M", *columns]
    rows = [[str(m), *(cell(m, *column) for column in columns.values())] for m in ms]
    return _markdown([header, ["---:"] * len(header), *rows])


def goals(run: Run) -> str:
    """Markdown: a row for each goal that the run has points for."""
    rows = [[r["goal"], _number(r["value"]), "yes" if r["met"] else "no", r["worst"]] for r in verdicts(run)]
    return _markdown([["goal", "figure", "met", "worst"], ["---", "---:", "---", "---"], *rows])


def crossings(run: Run) -> str:
    """Markdown: for each N x K, the least M measured at which bf16 is faster."""
    least = overtaken(run)
    shapes = dict.fromkeys((p.n, p.k) for p in run.points if RATIOS["cublas / ours"](p))
    rows = [[f"{n} x {k}", str(least.get(f"{n}x{k}", "nowhere"))] for n, k in shapes]
    return _markdown([["N x K", "cublas is faster from M ="], ["---", "---:"], *rows])


def _markdown(rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _peers(points: Iterable[Point]) -> list[str]:
    """Names in the order in which they first appear."""
    return list(dict.fromkeys(name for point in points for name in point.results))


def _cell(point: Point, name: str) -> str:
    us, result = point.us(name), point.results.get(name)
    return _number(us) if us or result is None or result.status == MISSING else result.status


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


@dataclass(frozen=True)
class Goal:
    """A bound on one of :data:`RATIOS`.

    Attributes:
        ratio: its name.
        bound: what it must reach, or stay within if ``at_most``.
        m: least and greatest M it is about.
        wide: about weights of at least :data:`WIDE` elements (True), of fewer (False), or all (None).
        at_most: whether small is good.
        mean: about the geometric mean over the points, else about each of them.
    """

    ratio: str
    bound: float
    m: tuple[int, int] = (1, 1 << 30)
    wide: bool | None = None
    at_most: bool = False
    mean: bool = False

    def __str__(self) -> str:
        words = [self.ratio, "at most" if self.at_most else "at least", f"{self.bound:g}"]
        words += ["in geometric mean"] if self.mean else []
        low, high = self.m
        if high < 1 << 30:
            words.append(f"at M = {low}" if low == high else f"at M <= {high}" if low == 1 else f"at M = {low}..{high}")
        if self.wide is not None:
            words.append(f"where N*K {'>=' if self.wide else '<'} {WIDE // 10**6} M")
        return " ".join(words)

    def concerns(self, point: Point) -> bool:
        return self.m[0] <= point.m <= self.m[1] and self.wide in (None, point.n * point.k >= WIDE)

    def verdict(self, points: Iterable[Point]) -> dict[str, Any] | None:
        """Whether it is met, by what, and where it is worst; None if no point has the ratio."""
        found = [(v, p) for p in points if self.concerns(p) and (v := RATIOS[self.ratio](p))]
        if not found:
            return None
        worst, where = (max if self.at_most else min)(found, key=lambda pair: pair[0])
        value = statistics.geometric_mean(v for v, _ in found) if self.mean else worst
        met = value <= self.bound if self.at_most else value >= self.bound
        return {"goal": str(self), "met": met, "value": value, "worst": f"{worst:.3g} at {_where(where)}"}


WIDE = 30_000_000
GOALS = (
    Goal("best rival / ours", 0.97),
    Goal("best rival / ours", 1.6, m=(1, 16), mean=True),
    Goal("best rival / ours", 1.3, m=(32, 64), mean=True),
    Goal("best rival / ours", 1.1, m=(128, 512), mean=True),
    Goal("ours / stream", 1.1, m=(1, 4), wide=True, at_most=True),
    Goal("ours / stream", 1.15, m=(8, 8), wide=True, at_most=True),
    Goal("ours / stream", 1.3, m=(16, 16), wide=True, at_most=True),
    Goal("ours / stream", 1.0, m=(1, 4), wide=False, at_most=True),
    Goal("ours / stream", 1.2, m=(8, 8), wide=False, at_most=True),
    Goal("ours / stream", 1.4, m=(16, 16), wide=False, at_most=True),
    Goal("ours / stream_pdl", 1.3, m=(1, 4), at_most=True),
    Goal("cublas / ours", 2.7, m=(1, 16), wide=True),
    Goal("cublas / ours", 0.97),
)
"""What ``linear`` is held against on a Hopper card."""


def verdicts(run: Run) -> list[dict[str, Any]]:
    """Of each goal that the run has points for."""
    return [row for goal in GOALS if (row := goal.verdict(run.points))]


def overtaken(run: Run) -> dict[str, int]:
    """For each N x K, the least M measured at which cuBLAS with the bf16 weight is faster; without those where none."""
    faster = [(p.m, f"{p.n}x{p.k}") for p in run.points if (ratio := RATIOS["cublas / ours"](p)) and ratio < 1]
    return {shape: m for m, shape in sorted(faster, reverse=True)}


def _where(point: Point) -> str:
    return f"{point.n}x{point.k} M={point.m}"


def caption(run: Run) -> str:
    """One line: the device, the versions that matter, the commit."""
    p = run.provenance
    versions = {
        "torch": p.get("torch"),
        "nvidia-cutlass-dsl": p["toolchain"].get("nvidia-cutlass-dsl"),
        **p.get("packages", {}),
    }
    names = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    commit = f"commit {p['commit'][:12]}{' with changes' if p['dirty'] else ''}" if p.get("commit") else "no commit"
    return (
        f"{p.get('gpu')}, driver {p.get('driver')}, {names}; {commit}; {p.get('time')}. Microseconds a call, medians."
    )


MARKED = re.compile(r"(<!-- bench:(?P<op>\w+)(?: (?P<what>[\w=,-]+))? -->\n).*?(<!-- /bench -->)", re.DOTALL)
TABLES: dict[str, Callable[[Run], str]] = {"by-m": by_m, "goals": goals, "crossings": crossings, "all": table}


def insert(run: Run, document: str) -> str:
    """``document`` with its tables regenerated, each between ``<!-- bench:linear WHAT -->`` and ``<!-- /bench -->``.
    WHAT is ``by-m``, ``goals``, ``crossings``, ``m=1,16,256`` (:func:`table` of these), or left out (:data:`MS`). The
    rest is untouched.

    Raises:
        OperandError: there are no such marks, or one asks for a table there is not.
    """

    def fresh(match: re.Match[str]) -> str:
        if match["op"] != run.op:
            return match[0]
        what = match["what"] or "all"
        if what.startswith("m="):
            made = table(run, [int(m) for m in what[2:].split(",")])
        elif what in TABLES:
            made = TABLES[what](run)
        else:
            raise OperandError(f"{match[1].strip()} asks for {what!r}; there are {', '.join(TABLES)}, and m=1,16")
        return f"{match[1]}\n{made}\n\n{caption(run)}\n{match[4]}"

    if not any(match["op"] == run.op for match in MARKED.finditer(document)):
        raise OperandError(f"no table to regenerate: put <!-- bench:{run.op} --> and <!-- /bench --> where it belongs")
    return MARKED.sub(fresh, document)


def picture(run: Run, path: Path) -> None:
    """Rooflines as PNG, a panel for each N x K: rate over arithmetic intensity, a line a peer. The roofs are what was
    reached in this run: the best bandwidth of a peer that only reads, the best rate of any peer.

    Raises:
        OperandError: matplotlib is missing, or nothing was timed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OperandError("the picture needs matplotlib: pip install matplotlib") from error
    panels = list(dict.fromkeys((p.n, p.k) for p in run.points))
    names = [name for name in _peers(run.points) if name not in (*READERS, WITHOUT_PDL)]
    rates = [p.flops / us for p in run.points for name in names if (us := p.us(name))]
    if not rates:
        raise OperandError("nothing that computes was timed, so there is nothing to draw")
    reading = [weight_bytes(p.n, p.k) / us for p in run.points for name in READERS if (us := p.us(name))]
    bandwidth, peak = max(reading, default=math.inf), max(rates)  # bytes and FLOP a microsecond

    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * lines + 0.6), layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    for axis, (n, k) in zip(axes, panels, strict=False):
        points = sorted((p for p in run.points if (p.n, p.k) == (n, k)), key=lambda p: p.m)
        intensity = [p.flops / p.bytes for p in points]
        corners = sorted({*intensity, min(max(peak / bandwidth, intensity[0]), intensity[-1])})
        axis.plot(corners, [min(bandwidth * i, peak) / 1e6 for i in corners], "k--", label="roof")
        for name in names:
            if drawn := [(i, p.flops / us / 1e6) for i, p in zip(intensity, points, strict=True) if (us := p.us(name))]:
                axis.plot(*zip(*drawn, strict=True), marker=".", label=name)
        axis.set(title=f"{n} x {k}", xscale="log", yscale="log")
        axis.grid(alpha=0.3)
        axis.set_xlabel("FLOP / byte")
    figure.supylabel("TFLOP/s")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle(caption(run), fontsize="small", wrap=True)
    FigureCanvasAgg(figure).print_png(str(path))
