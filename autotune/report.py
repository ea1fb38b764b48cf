"""Results as people read them: a table for a document, the bars they are held against, a roofline picture."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from nvfp4dsl.autotune.bench import Point, Run
from nvfp4dsl.autotune.measure import MISSING
from nvfp4dsl.autotune.peers import weight_bytes
from nvfp4dsl.errors import OperandError

OURS, BASE, FLOOR, LIBRARY = "nvfp4dsl", "stream", "stream_pdl", "cublas"
RIVALS, READERS = ("quack", "humming"), (BASE, FLOOR)
MS = (1, 4, 8, 16, 64, 256, 1024, 4096)
BANDS = ((1, 16), (17, 64), (65, 512), (513, 1 << 30))

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
    lines = [header, ["---"] * 2 + ["---:"] * (len(header) - 2), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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


def bars(run: Run) -> list[dict[str, Any]]:
    """For each band of M, each of :data:`RATIOS`: geometric mean, least and greatest, with where they are."""
    rows = []
    for low, high in BANDS:
        for name, ratio in RATIOS.items():
            found = [(value, p) for p in run.points if low <= p.m <= high and (value := ratio(p))]
            if not found:
                continue
            least, greatest = (pick(found, key=lambda pair: pair[0]) for pick in (min, max))
            rows.append(
                {
                    "M": f"{low}-{max(p.m for _, p in found)}",
                    "ratio": name,
                    "geometric mean": statistics.geometric_mean(value for value, _ in found),
                    "least": least[0],
                    "at": _where(least[1]),
                    "greatest": greatest[0],
                    "at ": _where(greatest[1]),
                }
            )
    return rows


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


MARKED = re.compile(r"(<!-- bench:(?P<op>\w+)(?: m=(?P<ms>[\d,]+))? -->\n).*?(<!-- /bench -->)", re.DOTALL)


def insert(run: Run, document: str) -> str:
    """``document`` with its table regenerated, between ``<!-- bench:linear m=1,16,256 -->`` (``m=`` may be left out)
    and ``<!-- /bench -->``. The rest is untouched.

    Raises:
        OperandError: there are no such marks.
    """

    def fresh(match: re.Match[str]) -> str:
        if match["op"] != run.op:
            return match[0]
        ms = [int(m) for m in match["ms"].split(",")] if match["ms"] else MS
        return f"{match[1]}\n{table(run, ms)}\n\n{caption(run)}\n{match[4]}"

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
    names = [name for name in _peers(run.points) if name not in READERS]
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
