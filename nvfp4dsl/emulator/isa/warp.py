"""Exchange within a warp: shuffles, votes, election, and the matrix loads and stores."""

from __future__ import annotations

import numpy as np

from nvfp4dsl.emulator.isa.table import Translator, instruction
from nvfp4dsl.emulator.syntax import Instruction, Pair, Sink, Vector
from nvfp4dsl.emulator.warps import LANES, Group

_LANE = np.arange(LANES)


def _pair(t: Translator, destination: object):
    first, second = (destination.first, destination.second) if isinstance(destination, Pair) else (destination, Sink())
    return t.write(first), t.write(second)


@instruction(r"shfl\.sync\.(idx|up|down|bfly)\.b32")
def shuffle(t: Translator, i: Instruction):
    """A source lane out of range, or not active, gives the lane its own value and a false predicate."""
    mode = i.parts[2]
    write, write_valid = _pair(t, i.operands[0])
    value, amount, clamp_mask = (t.read(o, "b32") for o in i.operands[1:4])

    def run(g: Group) -> None:
        b = np.broadcast_to(amount(g), g.mask.shape).astype(np.int64) & 31
        c = np.broadcast_to(clamp_mask(g), g.mask.shape).astype(np.int64)
        segment = c >> 8 & 31
        highest = (_LANE & segment) | (c & 31 & ~segment)
        lowest = _LANE & segment
        source = {
            "idx": lambda: lowest | (b & ~segment),
            "up": lambda: _LANE - b,
            "down": lambda: _LANE + b,
            "bfly": lambda: _LANE ^ b,
        }[mode]()
        valid = source >= highest if mode == "up" else source <= highest
        source = np.where(valid, source, _LANE)
        x = np.broadcast_to(value(g), g.mask.shape)
        write(g, np.take_along_axis(x, source, axis=1))
        write_valid(g, valid)

    return run


@instruction(r"vote\.sync\.(all|any|uni)\.pred|vote\.sync\.ballot\.b32")
def vote(t: Translator, i: Instruction):
    mode = i.parts[2]
    write, source = t.write(i.operands[0]), t.read(i.operands[1], "pred")

    def run(g: Group) -> None:
        x = np.broadcast_to(source(g), g.mask.shape)
        some = (x & g.mask).any(axis=1)
        every = (x | ~g.mask).all(axis=1)
        if mode == "ballot":
            result = ((x & g.mask).astype(np.uint64) << _LANE.astype(np.uint64)).sum(axis=1).astype(np.uint32)
        else:
            result = {"all": every, "any": some, "uni": every | ~some}[mode]
        write(g, np.broadcast_to(result[:, None], g.mask.shape))

    return run


@instruction(r"activemask\.b32")
def active_mask(t: Translator, i: Instruction):
    write = t.write(i.operands[0])

    def run(g: Group) -> None:
        bits = (g.mask.astype(np.uint64) << _LANE.astype(np.uint64)).sum(axis=1).astype(np.uint32)
        write(g, np.broadcast_to(bits[:, None], g.mask.shape))

    return run


@instruction(r"elect\.sync")
def elect(t: Translator, i: Instruction):
    """The same lane for the same members throughout a run, but not always the lowest: the seed decides."""
    write, write_elected = _pair(t, i.operands[0])
    order = np.roll(_LANE, -t.machine.elect_from)

    def run(g: Group) -> None:
        leader = order[g.mask[:, order].argmax(axis=1)][:, None]
        write(g, np.broadcast_to(leader, g.mask.shape).astype(np.uint32))
        write_elected(g, leader == _LANE)

    return run


_REDUCE = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@instruction(r"redux\.sync\.(add|min|max)\.(u32|s32)|redux\.sync\.(and|or|xor)\.b32")
def reduce(t: Translator, i: Instruction):
    function, kind = _REDUCE[i.parts[2]], i.parts[3]
    write, source = t.write(i.operands[0]), t.read(i.operands[1], kind)

    def run(g: Group) -> None:
        x = np.broadcast_to(source(g), g.mask.shape)
        result = np.stack([function.reduce(x[r][g.mask[r]]) for r in range(len(g.warps))]).astype(x.dtype)
        write(g, np.broadcast_to(result[:, None], g.mask.shape))

    return run


@instruction(r"match\.any\.sync\.(b32|b64)")
def match_any(t: Translator, i: Instruction):
    write, source = t.write(i.operands[0]), t.read(i.operands[1], i.parts[3])

    def run(g: Group) -> None:
        x = np.broadcast_to(source(g), g.mask.shape)
        same = (x[:, :, None] == x[:, None, :]) & g.mask[:, None, :]
        write(g, (same.astype(np.uint64) << _LANE.astype(np.uint64)).sum(axis=2).astype(np.uint32))

    return run


@instruction(r"bar\.warp\.sync")
def warp_sync(t: Translator, i: Instruction):
    """The machine has already made the lanes meet."""
    return t.machine.warps.meet


# --- 8x8 matrices of 16-bit elements; a row is 16 bytes, and lane 4r + c holds elements 2c, 2c+1 of row r

_MATRIX = r"sync\.aligned\.m8n8\.(x1|x2|x4)(\.trans)?\.(shared|shared::cta)\.b16"


@instruction(rf"ldmatrix\.{_MATRIX}")
def load_matrices(t: Translator, i: Instruction):
    count, transposed = int(i.parts[4][1]), "trans" in i.parts
    destination = i.operands[0]
    writers = [t.write(o) for o in (destination.items if isinstance(destination, Vector) else (destination,))]
    address, machine = t.address(i.operands[1]), t.machine

    def run(g: Group) -> None:
        rows = np.ascontiguousarray(address(g)[:, : 8 * count])  # lane 8m + r holds the address of row r of matrix m
        warps = np.repeat(g.warps, 8 * count)
        machine.warps.touch(g, stores=False)
        data = machine.shared.load(rows.reshape(-1), 16, warps, g.pc).view(np.uint16)
        matrices = data.reshape(len(g.warps), count, 8, 8)
        if transposed:
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
        words = matrices.view(np.uint32).reshape(len(g.warps), count, LANES)
        for m, write in enumerate(writers):
            write(g, words[:, m])

    return run


@instruction(rf"stmatrix\.{_MATRIX}")
def store_matrices(t: Translator, i: Instruction):
    count, transposed = int(i.parts[4][1]), "trans" in i.parts
    address, machine = t.address(i.operands[0]), t.machine
    source = i.operands[1]
    readers = [t.read(o, "b32") for o in (source.items if isinstance(source, Vector) else (source,))]

    def run(g: Group) -> None:
        words = np.stack([np.broadcast_to(r(g), g.mask.shape) for r in readers], axis=1)
        matrices = np.ascontiguousarray(words).view(np.uint16).reshape(len(g.warps), count, 8, 8)
        if transposed:
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
        rows = np.ascontiguousarray(address(g)[:, : 8 * count]).reshape(-1)
        warps = np.repeat(g.warps, 8 * count)
        machine.warps.touch(g, stores=True)
        machine.shared.store(rows, matrices.view(np.uint8).reshape(-1, 16), warps, g.pc)

    return run
