"""What a kernel finds under names: special registers, and the addresses of variables and parameters."""

from __future__ import annotations

import numpy as np

from nvfp4dsl.emulator.launch import Launch
from nvfp4dsl.emulator.memory import PARAM_WINDOW, RANK_SHIFT, SHARED_BASE, ParamMemory
from nvfp4dsl.emulator.syntax import Kernel
from nvfp4dsl.emulator.warps import LANES


def symbols_of(kernel: Kernel, params: ParamMemory) -> tuple[dict[str, int], int]:
    """Addresses of shared variables and parameters, and the bytes of static shared memory before the dynamic part."""
    symbols = {name: PARAM_WINDOW + offset for name, offset in params.offsets.items()}
    at = SHARED_BASE
    for variable in sorted(kernel.shared, key=lambda v: v.bytes is None):
        at = -(-at // variable.align) * variable.align
        symbols[variable.name] = at
        at += variable.bytes or 0
    return symbols, at - SHARED_BASE


def special_registers(
    kernel: Kernel,
    launch: Launch,
    ctas: list[tuple[int, int, int]],
    first_cta: int,
    symbols: dict[str, int],
) -> dict[str, np.ndarray]:
    """The value of each special register in every lane of the resident warps, [warps, 32].

    In a cluster the addresses of shared variables are among them, as they hold the CTA's rank.
    """
    block, grid, cluster = launch.block, launch.grid, launch.cluster
    warps_per_cta = -(-int(np.prod(block)) // LANES)
    shape = (len(ctas) * warps_per_cta, LANES)
    lane = np.broadcast_to(np.arange(LANES), shape)
    warp = np.broadcast_to((np.arange(shape[0]) % warps_per_cta)[:, None], shape)
    thread = warp * LANES + lane

    def constant(value: int) -> np.ndarray:
        return np.full(shape, value)

    def per_cta(values: np.ndarray) -> np.ndarray:
        return np.broadcast_to(np.repeat(values, warps_per_cta)[:, None], shape)

    size = int(np.prod(cluster))
    ranks = np.arange(len(ctas)) % size
    registers = {
        "%laneid": lane,
        "%warpid": warp,
        "%nwarpid": constant(warps_per_cta),
        "%smid": per_cta(np.arange(len(ctas)) + first_cta),
        "%nsmid": constant(int(np.prod(grid))),
        "%gridid": constant(1),
        "%cluster_ctarank": per_cta(ranks),
        "%cluster_nctarank": constant(size),
        "%is_explicit_cluster": constant(int(size > 1)),
        "%dynamic_smem_size": constant(launch.smem_bytes),
        "%lanemask_eq": 1 << lane,
        "%lanemask_lt": (1 << lane) - 1,
        "%lanemask_le": (2 << lane) - 1,
        "%clock": constant(0),
        "%clock64": constant(0),
        "%globaltimer": constant(0),
    }
    threads = (thread % block[0], thread // block[0] % block[1], thread // (block[0] * block[1]))
    for axis, letter in enumerate("xyz"):
        cta = per_cta(np.array([c[axis] for c in ctas]))
        width = cluster[axis]
        registers |= {
            f"%tid.{letter}": threads[axis],
            f"%ntid.{letter}": constant(block[axis]),
            f"%ctaid.{letter}": cta,
            f"%nctaid.{letter}": constant(grid[axis]),
            f"%clusterid.{letter}": cta // width,
            f"%nclusterid.{letter}": constant(grid[axis] // width),
            f"%cluster_ctaid.{letter}": cta % width,
            f"%cluster_nctaid.{letter}": constant(width),
        }
    if size > 1:
        registers |= {v.name: per_cta(symbols[v.name] + (ranks << RANK_SHIFT)) for v in kernel.shared}
    return registers
