"""``python -m nvfp4dsl.autotune.quantization``: the quantization kernels against a plain copy of the same bytes, and
against ``torch.compile`` of the reference. Prints a Markdown table; microseconds a call, in a CUDA graph, operands from
memory.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from nvfp4dsl import quantization, reference
from nvfp4dsl.autotune.measure import (
    Call,
    Result,
    WrongResultError,
    compare,
    l2_bytes,
    provenance,
    require_device,
    rotation,
)
from nvfp4dsl.config.quantize import QuantizeTile
from nvfp4dsl.constants import BLOCK
from nvfp4dsl.errors import NVFP4Error
from nvfp4dsl.formats import CANONICAL
from nvfp4dsl.packing import BLACKWELL, prepare

SHAPES = "1x7168,16x7168,128x7168,1024x4096,4096x7168,8192x7168,16384x4096"


@dataclass(frozen=True)
class Rows:
    """bf16 [m, k] to NVFP4, by a given global scale or x's own."""

    m: int
    k: int
    dynamic: bool = False

    @property
    def bytes(self) -> int:
        """Read and written by a kernel that touches each byte once, pads left out."""
        return self.m * self.k * 2 + self.m * self.k // 2 + self.m * self.k // BLOCK

    def operands(self) -> list[torch.Tensor]:
        generator = torch.Generator("cuda").manual_seed(0)
        count = rotation(self.bytes, l2_bytes())
        shape = (self.m, self.k)
        return [torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=generator) for _ in range(count)]


class Copy:
    """A device copy that reads and writes as many bytes in all."""

    name = "copy"

    def setup(self, problem: Rows) -> Sequence[Call]:
        half = problem.bytes // 2 // 16 * 16
        sources = [torch.randint(0, 128, (half,), dtype=torch.uint8, device="cuda") for _ in problem.operands()]
        self._pairs = [(source, torch.empty_like(source)) for source in sources]  # a captured graph keeps none alive
        return [partial(self._copy, *pair) for pair in self._pairs]

    @staticmethod
    def _copy(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return target.copy_(source).view(torch.float32)

    def check(self, problem: Rows, outputs: Sequence[torch.Tensor | None]) -> float:
        return 0.0


class Quantizer:
    """One that writes codes and scales; it is right if the codes are, bit for bit.

    Attributes:
        tolerated: the share of bytes of codes that may differ nevertheless, where it works out the global scale.
    """

    tolerated = 0.0

    def __init__(self, name: str, layout: str) -> None:
        self.name, self.layout = name, layout

    def setup(self, problem: Rows) -> Sequence[Call]:
        self._x = problem.operands()
        scale = None if problem.dynamic else torch.full((), 0.002, device="cuda")
        self._scale = scale
        return [partial(self._call, x, scale) for x in self._x]

    def _call(self, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        return self.codes(x, scale).view(torch.float32)

    def codes(self, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        raise NotImplementedError

    def check(self, problem: Rows, outputs: Sequence[torch.Tensor | None]) -> float:
        for x, output in zip(self._x[:2], outputs[:2], strict=True):
            expected = reference.quantize(x, self._scale)
            if self.layout == BLACKWELL:
                expected = prepare(expected, "sm_121a")
            assert output is not None  # every call gives one
            wrong = int((output.view(torch.uint8) != expected.qdata).sum())
            if wrong > (self.tolerated * output.nbytes if problem.dynamic else 0):
                raise WrongResultError(f"{wrong} bytes of codes differ", wrong)
        return 0.0


class Ours(Quantizer):
    """The kernels of this project."""

    def __init__(self, layout: str = BLACKWELL, tile: QuantizeTile | None = None) -> None:
        super().__init__(f"ours {layout}" + (f" {tile}" if tile else ""), layout)
        self._tile = tile

    def codes(self, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        return quantization.quantize(x, scale, layout=self.layout, tile=self._tile)[0]


class Compiled(Quantizer):
    """``torch.compile`` of the reference, in canonical layout: it is spared the swizzle.

    With a given scale its codes are the reference's; where it works the scale out, up to one byte of them in two
    hundred was another (H200, torch 2.11).
    """

    tolerated = 0.01

    def __init__(self) -> None:
        super().__init__("torch.compile", CANONICAL)
        self._compiled = torch.compile(_reference, dynamic=False)

    def codes(self, x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        return self._compiled(x, scale)[0]


def _reference(x: torch.Tensor, scale: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    t = reference.quantize(x, scale)
    return t.qdata, t.scale, t.global_scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default=SHAPES, help="MxK, comma-separated")
    parser.add_argument("--tiles", default="", help="also time these tiles, BLOCKSxROWS/THREADS, comma-separated")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--commit", help="of a copy of the sources that git knows nothing of, as `git describe` has it")
    options = parser.parse_args()
    try:
        _table(options)
    except NVFP4Error as error:
        sys.exit(f"{type(error).__name__}: {error}")


def _table(options: argparse.Namespace) -> None:
    require_device()  # before the table's head
    tiles = [QuantizeTile.parse(text) for text in options.tiles.split(",") if text]

    def peers() -> list:
        others = [] if options.no_compile else [Compiled()]
        return [Copy(), Ours(), Ours(CANONICAL), *(Ours(tile=tile) for tile in tiles), *others]

    names = [peer.name for peer in peers()]
    facts = provenance(commit=options.commit)
    print(_row("M x K", "global scale", *names, "copy / ours"))
    print(_row("---", "---", *["---:"] * (len(names) + 1)))
    for text, dynamic in itertools.product(options.shapes.split(","), (False, True)):
        m, k = (int(number) for number in text.split("x"))
        results = compare(peers(), Rows(m, k, dynamic), rounds=options.rounds)
        copy, ours = (results[name].timing for name in names[:2])
        ratio = f"{copy.us / ours.us:.2f}" if copy and ours else "-"
        print(
            _row(text, "x's own" if dynamic else "given", *(_cell(results[name]) for name in names), ratio), flush=True
        )
        torch.compiler.reset()
    print(f"\n{facts['gpu']}, driver {facts['driver']}, torch {facts['torch']}; commit {facts['commit']}.")


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(result: Result) -> str:
    return f"{result.timing.us:.2f}" if result.timing else f"{result.status} {result.message}".strip()


if __name__ == "__main__":
    main()
