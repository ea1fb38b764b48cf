"""Peers ``stream`` and ``stream_pdl``: a kernel that reads the weight's bytes and computes nothing."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nvfp4dsl import jit
from nvfp4dsl.autotune.measure import WrongResultError
from nvfp4dsl.autotune.peers.problem import Linear, LinearPeer
from nvfp4dsl.dispatch import site
from nvfp4dsl.errors import OperandError
from nvfp4dsl.formats import NVFP4Tensor

BUILDER = "nvfp4dsl.autotune.peers.stream_kernel:build"
THREADS_PER_SM = 2048
CHUNK = 16


@dataclass(frozen=True)
class ReaderSpec:
    """``source`` is the digest of the kernel's file, which is not among the sources that the cache key hashes."""

    pdl: bool
    source: str


@dataclass(frozen=True)
class ReaderTile:
    """Threads of a block, and 16-byte loads that a thread has in flight. Blocks fill the device exactly once.

    The default was the best on an H200: 8.9 us for 33.0 MB, 2.0 us for 1.8 MB; with PDL 7.3 and 1.1, where blocks of
    256 take 1.6 for the small one, and a single load in flight takes 9.5 for the large one without PDL.
    """

    threads: int = 512
    unroll: int = 4


@functools.cache
def reader(pdl: bool, tile: ReaderTile, target: str) -> jit.CompiledKernel:
    """The compiled reader; see :mod:`nvfp4dsl.autotune.peers.stream_kernel` for its arguments."""
    source = hashlib.sha256(Path(__file__).with_name("stream_kernel.py").read_bytes()).hexdigest()
    return jit.compile(ReaderSpec(pdl, source), tile, target, builder=BUILDER)


def as_bytes(weight: NVFP4Tensor) -> torch.Tensor:
    """All that a kernel must read of a weight: codes and block scales, uint8 [bytes], of memory of its own."""
    data = torch.cat([weight.qdata.flatten(), weight.scale.view(torch.uint8).flatten()])
    if data.numel() % CHUNK:
        raise OperandError(f"the weight has {data.numel()} bytes; the reading kernel takes a multiple of {CHUNK}")
    return data


class Stream(LinearPeer):
    """Reads the weight; ``pdl`` by programmatic dependent launch."""

    def __init__(self, pdl: bool = False, tile: ReaderTile | None = None) -> None:
        super().__init__()
        self.name = "stream_pdl" if pdl else "stream"
        self._pdl, self._tile = pdl, tile or ReaderTile()

    def prepare(self, weight: NVFP4Tensor) -> torch.Tensor:
        return as_bytes(weight)

    def call(self, x: torch.Tensor, prepared: torch.Tensor) -> None:
        self._launch(prepared, store=0)

    def check(self, problem: Linear, outputs: Sequence[Any]) -> float:
        """The xor of all that the threads read, in a launch that stores it, is the xor of the weight's words."""
        for data in self._prepared:
            words = data.view(torch.int32)
            if xor(self._launch(data, store=1)) != xor(words):
                raise WrongResultError(f"{self.name} on {problem}: the checksum differs; bytes were left out")
        return 0.0

    def _launch(self, data: torch.Tensor, store: int) -> torch.Tensor:
        blocks = torch.cuda.get_device_properties(data.device).multi_processor_count * (
            THREADS_PER_SM // self._tile.threads
        )
        target = site(data.device)
        assert target is not None  # the data are on a CUDA device
        sums = _sums(data.device, blocks * self._tile.threads)
        if store:
            sums.zero_()
        reader(self._pdl, self._tile, target.name)(data, sums, blocks, store)
        return sums


@functools.cache
def _sums(device: torch.device, threads: int) -> torch.Tensor:
    """Where checksums go; nothing is allocated in a call."""
    return torch.zeros(threads, dtype=torch.int32, device=device)


def xor(words: torch.Tensor) -> int:
    """Of all elements of an int32 tensor."""
    while words.numel() > 1:
        half = words.numel() // 2
        rest = words[2 * half :]
        words = torch.cat([words[:half] ^ words[half : 2 * half], rest])
    return int(words.item()) if words.numel() else 0
