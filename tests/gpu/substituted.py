"""The kernels that the H200 executes with only their OMMA substituted: shapes, operands, PTX and launch.

Where CuTe DSL is missing on the GPU machine, prepare PTX and launches elsewhere and carry the folder there:

    python tests/gpu/substituted.py FOLDER            # where CuTe DSL is; needs no GPU
    pytest tests/gpu --prepared FOLDER                # on the GPU machine
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

import nvfp4dsl as nv
from nvfp4dsl import dispatch, emulator
from nvfp4dsl.config import GemmSpec, TileConfig, legal_tiles
from nvfp4dsl.emulator.launch import Launch
from nvfp4dsl.formats import NVFP4Tensor

#: of bf16 that a kernel quantizes: some blocks saturate
ACTIVATION_SCALE = 2.0**-10


@dataclass(frozen=True)
class Case:
    """One GEMM, M x N x K, for sm_121a. Plain: no bias, one global scale a tensor. Without a tile, dispatch chooses.
    Quantizes: the kernel takes bf16."""

    m: int
    n: int
    k: int
    out_dtype: torch.dtype = torch.bfloat16
    plain: bool = True
    batch: tuple[int, ...] = ()
    tile: str | None = None
    quantizes: bool = False

    def __str__(self) -> str:
        parts = [f"{self.m}x{self.n}x{self.k}", str(self.out_dtype).removeprefix("torch.")]
        parts += [f"batch{n}" for n in self.batch]
        parts += ["bias-ranges"] if not self.plain else []
        parts += ["quantizes"] if self.quantizes else []
        parts += ["tile" + self.tile.replace("/", "-split")] if self.tile else []
        return "-".join(parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result."""
        return (*self.batch, self.m, self.n)

    @property
    def tolerance(self) -> float:
        """Relative error in norm: the rounding of the output."""
        return {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 1e-5}[self.out_dtype]

    def operands(self) -> tuple[NVFP4Tensor, NVFP4Tensor, torch.Tensor | None]:
        """Canonical a and b, and the bias. numpy draws them, whose streams are the same in every version."""
        rng = np.random.default_rng([self.m, self.n, self.k])
        shapes = ((*self.batch, self.m, self.k), (*self.batch, self.n, self.k), self.n)
        a, b, bias = (torch.from_numpy(rng.standard_normal(shape)) for shape in shapes)
        row_ends = None if self.plain else (self.n // 3, self.n)
        weight = nv.quantize(b.float(), row_ends=row_ends)
        a = nv.quantize(a.bfloat16(), ACTIVATION_SCALE) if self.quantizes else nv.quantize(a.float())
        return a, weight, None if self.plain else bias.float()

    def x(self) -> torch.Tensor:
        """What the kernel itself quantizes, before it does."""
        rng = np.random.default_rng([self.m, self.n, self.k])
        return torch.from_numpy(rng.standard_normal((*self.batch, self.m, self.k))).bfloat16()


CASES = [
    Case(256, 384, 512),
    Case(200, 320, 1024),
    Case(1000, 2048, 2048),
    Case(257, 129, 272),
    Case(256, 384, 512, torch.float32),
    Case(257, 129, 272, torch.float32, plain=False),
    Case(33, 136, 1040, torch.float16, plain=False),
    Case(70, 136, 208, torch.float32, batch=(3,)),
    Case(200, 320, 1024, torch.float32, tile="128x128x256"),
    Case(200, 320, 1024, torch.float32, tile="64x128x128"),
    Case(13, 2880, 1040, torch.float32, tile="8x128x256"),
    Case(200, 2880, 272, torch.float32, tile="64x128x128-pingpong"),
    Case(37, 200, 7680, torch.float32, tile="16x64x128/4"),
    Case(7, 2880, 1040, torch.float32, tile="8x128x256", quantizes=True),
    Case(16, 200, 7680, tile="16x64x128/4", quantizes=True),
    Case(13, 133, 2880, torch.float16, plain=False, tile="16x128x256", quantizes=True),
    Case(1, 1448, 2880, quantizes=True),
]
#: extents that no tile divides
SHAPES = [(197, 2880, 336), (67, 200, 7680), (35, 7680, 208), (45, 1448, 2880)]


def drawn(count: int = 12, seed: int = 6) -> list[Case]:
    """Tiles at random out of all that are legal."""
    tiles = random.Random(seed).sample(legal_tiles(GemmSpec(), "sm_121a"), count)
    return [Case(*SHAPES[i % len(SHAPES)], tile=str(tile)) for i, tile in enumerate(tiles)]


CASES += drawn()


def files(folder: Path, case: Case) -> tuple[Path, Path]:
    """PTX and launch of a case in a folder."""
    return folder / f"{case}.ptx", folder / f"{case}.launch.npz"


def write(folder: Path, case: Case) -> None:
    """Compiles the real kernel and writes its PTX and launch; nothing is executed."""
    ptx_file, launch_file = files(folder, case)

    def save(ptx: str, launch: Launch, **_: object) -> None:
        ptx_file.write_text(ptx)
        launch.save(launch_file)

    a, b, bias = case.operands()
    with nv.emulate("sm_121a"), patch.object(emulator, "run", save):
        weight = nv.prepare(b, "sm_121a")
        if case.quantizes:
            tile = TileConfig.parse(case.tile) if case.tile else None
            scale = torch.tensor(ACTIVATION_SCALE)
            dispatch.quantizing_gemm(case.x(), scale, weight, bias, out_dtype=case.out_dtype, tile=tile)
        else:
            nv.mm(nv.prepare(a, "sm_121a"), weight, bias, out_dtype=case.out_dtype, tile=case.tile)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    for each in CASES:
        write(target, each)
