"""Does every kernel compute on this card what it computes in the emulator? Cases, their verdicts, and one report.

A case draws its operands from a hash, so they are the same bytes on every machine, and runs one kernel. Its output is
compared with the SHA-256 of the emulator's, stored in ``data/selftest.json``, and with float64. Where silicon is known
to compute as the emulator does, other bits are a failure; elsewhere they are reported, and float64 decides.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nvfp4dsl import dispatch, jit, ops, quantization, reference
from nvfp4dsl.autotune import measure
from nvfp4dsl.autotune.peers import Linear, Weights, select, weight_bytes
from nvfp4dsl.config import TILES, GemmSpec, TileConfig, family, k_limit, legal, legal_tiles
from nvfp4dsl.constants import BLOCK
from nvfp4dsl.dispatch import DEFAULT_OVERLAP, TORCH
from nvfp4dsl.errors import NVFP4Error
from nvfp4dsl.formats import CANONICAL, NVFP4Tensor
from nvfp4dsl.packing import BLACKWELL, FRAGMENTS, layout_for, prepare
from nvfp4dsl.targets import Target
from nvfp4dsl.testing import element_error, relative_error

FORMAT = 1
STORED = "selftest.json"
#: where the emulator and silicon were compared bit by bit (tests/gpu), so that other bits mean a fault.
PROVEN = frozenset({"sm_90a"})
#: relative errors, of the norm and of the worst element, that rounding of the output explains.
BARS = {"fp32": (1e-5, 1e-4), "bf16": (3e-3, 1e-2), "fp16": (4e-4, 2e-3)}
SAME, CLOSE, WRONG, FAILED, NEW = "same bits", "close", "wrong", "failed", "nothing stored"

#: ops whose output is NVFP4.
TO_NVFP4 = ("quantize", "silu_mul", "rms_norm", "add_rms_norm")
#: ops through a block-scaled MMA
W4A4 = ("mm", "linear_nvfp4")
EPS, GLOBAL_SCALE = 1e-6, 2.0**-6
#: by which ``linear_nvfp4`` quantizes: no block saturates
ACTIVATION_SCALE = 2.0**-3

#: extents that divide nothing, and a K that goes around every ring of stages; W4A16 takes longer steps of K.
ROWS, N, K = 70, 136, 1040
W4A16_N, W4A16_K = 40, 4368


@dataclass(frozen=True)
class Case:
    """One kernel on one problem.

    Attributes:
        op: ``"mm"`` (W4A4), ``"linear_nvfp4"`` (W4A4 of bf16, quantized by the same kernel), ``"linear"`` (W4A16), or
            one of :data:`TO_NVFP4`.
        m, n, k: extents; what quantizes has no n.
        dtype: of the output; of the input, if the output is NVFP4.
        tile: of a product, else None.
        bias: its type or None.
        layout: of an NVFP4 output.
    """

    op: str
    m: int
    n: int
    k: int
    dtype: str
    tile: TileConfig | None = None
    bias: str | None = None
    layout: str | None = None

    def __str__(self) -> str:
        parts = [self.op, self.tile, f"{self.m}x{self.n}x{self.k}" if self.n else f"{self.m}x{self.k}", self.dtype]
        return " ".join(map(str, filter(None, [*parts, self.bias and f"bias {self.bias}", self.layout])))

    @property
    def key(self) -> str:
        """What the bits depend on: a block-scaled MMA adds in the order of K, whatever the tile, unless K is split."""
        if self.op in W4A4 and self.tile is not None and self.tile.split == 1:
            return str(Case(self.op, self.m, self.n, self.k, self.dtype, None, self.bias))
        return str(self)


@dataclass(frozen=True)
class Verdict:
    """What became of a case.

    Attributes:
        case: as text.
        status: ``"same bits"``, ``"close"`` (to float64, in other bits than the emulator's), ``"wrong"``, ``"failed"``
            (raised) or ``"nothing stored"`` (close, and the emulator's result is not stored).
        passed: by the target's rule.
        rel_err, element_err: against float64.
        sha256: of the output's bytes.
        seconds: of the first call, loading included.
        message: why it failed.
    """

    case: str
    status: str
    passed: bool
    rel_err: float = math.nan
    element_err: float = math.nan
    sha256: str = ""
    seconds: float = 0.0
    message: str = ""


@dataclass
class SelfTest:
    """A whole run; :meth:`as_json` is the report."""

    target: str
    executed_by: str
    provenance: dict[str, Any]
    verdicts: list[Verdict] = field(default_factory=list)
    timings: list[dict[str, Any]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether there were cases and all passed."""
        return bool(self.verdicts) and all(v.passed for v in self.verdicts)

    def counts(self) -> dict[str, int]:
        """Cases by status."""
        statuses = [v.status for v in self.verdicts]
        return {status: statuses.count(status) for status in (SAME, CLOSE, NEW, WRONG, FAILED) if status in statuses}

    def as_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "target": self.target,
            "executed_by": self.executed_by,
            "passed": self.passed,
            "counts": self.counts(),
            "provenance": self.provenance,
            "cases": [_finite(asdict(v)) for v in self.verdicts],
            "timings": self.timings,
        }


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


# Cases --------------------------------------------------------------------------------------------------------------


def cases(target: Target, everything: bool = False) -> list[Case]:
    """Every tile that dispatch may choose on ``target``, and with K split in two; for the first of each family each
    output type, with bias and unaligned rows. With ``everything`` every legal tile."""
    found: list[Case] = []
    for mode in target.mainloops:
        found += _gemm_cases(target, mode, everything)
    layouts = [name for name in dict.fromkeys((CANONICAL, layout_for(target.name))) if name != FRAGMENTS]
    for dtype in ("bf16", "fp16", "fp32"):
        found += [Case("quantize", ROWS, 0, K, dtype, layout=name) for name in layouts]
        found += [Case(op, ROWS, 0, K, dtype, layout=layouts[-1]) for op in TO_NVFP4[1:]]
    return found


def _gemm_cases(target: Target, mode: str, everything: bool) -> Iterator[Case]:
    op = {"nvfp4": "mm", "bf16": "linear"}[mode]
    spec = GemmSpec(activation=mode, out_dtype="fp32")
    tiles = legal_tiles(spec, target) if everything else TILES[mode]
    tiles = tuple(tile for tile in tiles if not legal(spec, tile, target))
    seen = set()
    for tile in tiles:
        m, n, k = (ROWS, N, K) if op == "mm" else (max(1, tile.m - 3), W4A16_N, W4A16_K)
        limit = k_limit(tile) if op == "linear" else None
        if limit is not None and limit < k:
            k = limit - 15 * BLOCK  # whole in nothing but blocks
        yield Case(op, m, n, k, "fp32", tile)
        two = replace(tile, split=2)
        if tile.split == 1 and two not in tiles and not legal(spec, two, target):
            yield Case(op, m, n, k, "fp32", two)
        if (builder := family(spec, tile, target)) not in seen:
            seen.add(builder)
            yield Case(op, m, n, k, "bf16", tile, bias="bf16")
            yield Case(op, m, n, k, "fp16", tile, bias="fp32")
            yield Case(op, m, n - 1, k, "bf16", tile)
    if mode == "nvfp4":
        yield from _quantizing_cases(target, tiles)


def _quantizing_cases(target: Target, tiles: Sequence[TileConfig]) -> Iterator[Case]:
    """Those of ``tiles`` whose kernel can quantize its tokens; the first with each type, bias and unaligned rows."""
    spec = GemmSpec(out_dtype="fp32", quantizes="bf16")
    tiles = [tile for tile in tiles if not legal(spec, tile, target)]
    for tile in tiles:
        m = tile.m - 3
        yield Case("linear_nvfp4", m, N, K, "fp32", tile)
        two = replace(tile, split=2)
        if tile.split == 1 and two not in tiles and not legal(spec, two, target):
            yield Case("linear_nvfp4", m, N, K, "fp32", two)
        if tile == tiles[0]:
            yield Case("linear_nvfp4", m, N, K, "bf16", tile, bias="bf16")
            yield Case("linear_nvfp4", m, N, K, "fp16", tile, bias="fp32")
            yield Case("linear_nvfp4", m, N - 1, K, "bf16", tile)


def specs(case: Case) -> tuple[GemmSpec, TileConfig] | None:
    """What to compile for a case; None for what quantizes, whose kernels dispatch chooses."""
    if case.tile is None:
        return None
    bias = None if case.bias is None else TORCH[case.bias]
    if case.op == "mm":
        return dispatch.gemm_spec(case.n, TORCH[case.dtype], bias), case.tile
    if case.op == "linear_nvfp4":
        return dispatch.gemm_spec(case.n, TORCH[case.dtype], bias, DEFAULT_OVERLAP, torch.bfloat16), case.tile
    return dispatch.linear_spec(case.n, case.k, TORCH[case.dtype], bias), case.tile


# Operands: the same bytes everywhere --------------------------------------------------------------------------------


def _bytes(label: str, *shape: int) -> np.ndarray:
    """uint8 of ``shape`` out of SHAKE-256 of ``label``: no generator of any library has a say."""
    return np.frombuffer(hashlib.shake_256(label.encode()).digest(math.prod(shape)), np.uint8).reshape(shape).copy()


def _quantized(label: str, rows: int, k: int) -> NVFP4Tensor:
    """Canonical: any code, normal block scales over ten octaves, so that sums round, a global scale of 2^-6."""
    scales = 0x08 + _bytes(f"{label} scales", rows, k // 16) % 80
    return NVFP4Tensor(
        torch.from_numpy(_bytes(f"{label} codes", rows, k // 2)),
        torch.from_numpy(scales).view(torch.float8_e4m3fn),
        torch.tensor(GLOBAL_SCALE),
    )


def _floats(label: str, dtype: str, *shape: int) -> torch.Tensor:
    """8-bit integers times powers of two from 2^-6 to 2, exact in every type."""
    integers = torch.from_numpy(_bytes(label, *shape).view(np.int8).astype(np.float32))
    exponents = torch.from_numpy(_bytes(f"{label} exponents", *shape).astype(np.float32)) % 8 - 6
    return (integers * torch.exp2(exponents)).to(TORCH[dtype])


# Running ------------------------------------------------------------------------------------------------------------


def compute(case: Case, target: Target, device: str) -> tuple[torch.Tensor, ...]:
    """The kernel's outputs, on the CPU. ``device`` is ``"cpu"`` inside ``emulate``."""
    if case.op in TO_NVFP4:
        return tuple(t.cpu().contiguous() for t in _to_nvfp4(case, device))
    weight = prepare(_quantized("weight", case.n, case.k), target.name, activation=_mode(case)).to(device)
    bias = None if case.bias is None else _floats("bias", case.bias, case.n).to(device)
    out_dtype = TORCH[case.dtype]
    if case.op == "mm":
        a = prepare(_quantized("activations", case.m, case.k), target.name, activation="nvfp4").to(device)
        return (dispatch.gemm(a, weight, bias, out_dtype=out_dtype, tile=case.tile).cpu(),)
    x = _floats("x", "bf16", case.m, case.k).to(device)
    if case.op == "linear_nvfp4":
        scale = torch.tensor(ACTIVATION_SCALE, device=device)
        return (dispatch.quantizing_gemm(x, scale, weight, bias, out_dtype=out_dtype, tile=case.tile).cpu(),)
    out = torch.empty(case.m, case.n, dtype=out_dtype, device=device)
    spec, tile = specs(case)  # type: ignore[misc]
    kernel = dispatch.kernel_for(spec, tile, target.name)
    dispatch.run(kernel, (x, *dispatch.linear_operands(weight), bias, out))
    return (out.cpu(),)


def _to_nvfp4(case: Case, device: str) -> Iterator[torch.Tensor]:
    """Codes, scale bytes, and what else a quantizing kernel writes: its global scale, or the sum with the residual."""
    x, other, weight = (t.to(device) for t in _rows(case))
    layout = str(case.layout)
    if case.op in ("quantize", "silu_mul"):
        up = other if case.op == "silu_mul" else None
        codes, scales, own, _ = quantization.quantize(x, None, layout=layout, up=up)
    else:
        own = other if case.op == "add_rms_norm" else None
        scale = torch.tensor(GLOBAL_SCALE, device=device)
        codes, scales = quantization.rms_norm(x, weight, EPS, scale, own, layout=layout)
    yield codes
    yield scales.view(torch.uint8)
    if own is not None:
        yield own


def _rows(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, a second operand like it (``up`` or the residual), and the norm's weight."""
    shape = (case.m, case.k)
    return _floats("x", case.dtype, *shape), _floats("other", case.dtype, *shape), _floats("norm", case.dtype, case.k)


def _mode(case: Case) -> str:
    return "nvfp4" if case.op in W4A4 else "bf16"


def expected(case: Case) -> tuple[torch.Tensor, ...]:
    """The same by the reference: float64 for a product, the very bits for NVFP4."""
    if case.op in TO_NVFP4:
        return _expected_nvfp4(case)
    weight = _quantized("weight", case.n, case.k)
    bias = None if case.bias is None else _floats("bias", case.bias, case.n).double()
    if case.op == "mm":
        left = reference.dequantize(_quantized("activations", case.m, case.k), torch.float64)
    elif case.op == "linear_nvfp4":
        x = _floats("x", "bf16", case.m, case.k)
        left = reference.dequantize(reference.quantize(x, ACTIVATION_SCALE), torch.float64)
    else:
        left = _floats("x", "bf16", case.m, case.k).double()
    product = left @ reference.dequantize(weight, torch.float64).T
    return (product if bias is None else product + bias,)


def _expected_nvfp4(case: Case) -> tuple[torch.Tensor, ...]:
    x, other, weight = _rows(case)
    if case.op in ("quantize", "silu_mul"):
        quantized = reference.quantize(x if case.op == "quantize" else reference.silu_mul(x, other))
        more: tuple[torch.Tensor, ...] = (quantized.global_scale,)
    else:
        y, h = reference.rms_norm(x, weight, EPS, other if case.op == "add_rms_norm" else None)
        quantized = reference.quantize(y, GLOBAL_SCALE)
        more = (h,) if case.op == "add_rms_norm" else ()
    if case.layout == BLACKWELL:
        quantized = prepare(quantized, "sm_121a")
    return quantized.qdata, quantized.scale.view(torch.uint8), *more


def digest(outputs: Sequence[torch.Tensor]) -> str:
    """SHA-256 of the outputs' bytes, in order."""
    hashed = hashlib.sha256()
    for t in outputs:
        hashed.update(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def judge(case: Case, target: Target, outputs: Sequence[torch.Tensor], stored: str | None, seconds: float) -> Verdict:
    """The verdict on what a kernel returned."""
    truth, found = expected(case), digest(outputs)
    norm = max(relative_error(a, e) for a, e in zip(outputs, truth, strict=True))
    worst = max(element_error(a, e) for a, e in zip(outputs, truth, strict=True))
    bars = (0.0, 0.0) if case.op in TO_NVFP4 else BARS[case.dtype]
    right = norm <= bars[0] and worst <= bars[1]
    same = found == stored
    status = WRONG if not right else SAME if same else NEW if stored is None else CLOSE
    passed = right and (same or status == NEW or target.name not in PROVEN)
    return Verdict(str(case), status, passed, norm, worst, found, seconds)


def run(
    target: Target,
    *,
    device: str,
    everything: bool = False,
    only: Callable[[Case], bool] = lambda case: True,
    done: Callable[[Verdict], None] = lambda verdict: None,
    provenance: dict[str, Any] | None = None,
) -> SelfTest:
    """Every case of ``target`` on ``device``: ``"cuda"``, or ``"cpu"`` for the emulator. ``done`` hears of each.

    A case that raises is a verdict, not an end.
    """
    chosen = [case for case in cases(target, everything) if only(case)]
    result = SelfTest(target.name, "gpu" if device == "cuda" else "emulator", provenance or {})
    results = stored(target.name)
    _compile(chosen, target)
    with nullcontext() if device == "cuda" else dispatch.emulate(target.name):
        for case in chosen:
            start = time.perf_counter()
            try:
                outputs = compute(case, target, device)
                verdict = judge(case, target, outputs, results.get(case.key), time.perf_counter() - start)
            except (NVFP4Error, RuntimeError) as error:
                verdict = Verdict(str(case), FAILED, False, message=f"{type(error).__name__}: {error}")
            result.verdicts.append(verdict)
            done(verdict)
    return result


def _compile(chosen: Sequence[Case], target: Target) -> None:
    """All kernels at once, in parallel; what cannot be compiled fails again, by itself, when its case runs."""
    requests = dict.fromkeys((*pair, target.name) for case in chosen if (pair := specs(case)))
    try:
        jit.compile_many(requests)
    except NVFP4Error:
        return


# Timings ------------------------------------------------------------------------------------------------------------

TIMED_NK, TIMED_M = ((4096, 4096), (14336, 4096)), {"linear": (1, 16, 64, 256), "mm": (128, 1024, 4096)}


class _Gemm:
    """W4A4 on operands quantized before, as a peer of the timing module."""

    name, package = "mm", None

    def setup(self, problem: Linear) -> list[Callable[[], torch.Tensor]]:
        self.a = ops.quantize(problem.x)
        target = dispatch.site(problem.x.device)
        weights = [prepare(w, target.name) for w in problem.weights.tensors]  # type: ignore[union-attr]
        return [functools.partial(ops.mm, self.a, weight) for weight in weights]

    def check(self, problem: Linear, outputs: Sequence[torch.Tensor | None]) -> float:
        truth = reference.dequantize(self.a, torch.float64) @ problem.weights.exact.T
        error = max(relative_error(y, truth) for y in outputs if y is not None)
        if not error <= BARS["bf16"][0]:
            raise measure.WrongResultError(f"relative error {error:.2e}", error)
        return error


def timings(target: Target, done: Callable[[dict[str, Any]], None] = lambda row: None) -> list[dict[str, Any]]:
    """Microseconds of ``linear`` and, where there is FP4, of ``mm`` on the current device, as ``nvfp4dsl bench`` takes
    them; with what reading the weights alone takes. A row a shape; ``done`` hears of each."""
    rows = []
    for n, k in TIMED_NK:
        weights = Weights(n, k, measure.rotation(weight_bytes(n, k), measure.l2_bytes()))
        for op, ms in TIMED_M.items():
            if op == "mm" and "nvfp4" not in target.mainloops:
                continue
            for m in ms:
                peers = [_Gemm()] if op == "mm" else select(["stream", "nvfp4dsl"])
                results = measure.compare(peers, Linear(weights, m), rounds=5)
                rows.append({"op": op, "m": m, "n": n, "k": k, **{p: r.as_json() for p, r in results.items()}})
                done(rows[-1])
    return rows


# Stored results -----------------------------------------------------------------------------------------------------


def stored(target: str) -> dict[str, str]:
    """Case key -> SHA-256 of what the emulator computes; empty if nothing is stored for ``target``."""
    file = importlib.resources.files("nvfp4dsl.data") / STORED
    if not file.is_file():
        return {}
    content = json.loads(file.read_text())
    return content["targets"].get(target, {}) if content["format"] == FORMAT else {}


def store(runs: Sequence[SelfTest], path: Path, keys: dict[str, str], keep: bool = False) -> None:
    """Write what emulator runs computed; targets that did not run keep what they had.

    Args:
        keys: case as text -> its key.
        keep: cases that did not run keep theirs too.
    """
    targets = json.loads(path.read_text())["targets"] if path.exists() else {}
    for result in runs:
        before = targets.get(result.target, {}) if keep else {}
        targets[result.target] = before | {keys[v.case]: v.sha256 for v in result.verdicts if v.sha256}
    path.write_text(json.dumps({"format": FORMAT, "targets": targets}, indent=1, sort_keys=True) + "\n")
