"""Run by a release's own interpreter, beside a copy of ``patches/`` and no other file of the project: what is refused
and what is admitted without the patches, with them, and after undoing them. Prints it as JSON."""

import json
import sys

import patches

report = {"imports_cutlass": "cutlass" in sys.modules}

import cutlass  # noqa: E402
from cutlass.cute.nvgpu import tcgen05, warp  # noqa: E402


def attempt(construct, *args):
    """``"admitted"``, or the refusal."""
    try:
        construct(*args)
    except Exception as error:
        return patches.probing.first_line(error)
    return "admitted"


def block_scaled():
    return attempt(warp.MmaMXF4NVF4Op, cutlass.Float4E2M1FN, cutlass.Float32, cutlass.Float8E4M3FN)


def tensor_memory():
    """Operations whose silicon no sm_12x has: MMA, load, store, and copy."""
    one, smem, k_major = tcgen05.CtaGroup.ONE, tcgen05.OperandSource.SMEM, tcgen05.OperandMajorMode.K
    half, single = cutlass.Float16, cutlass.Float32
    return {
        "mma": attempt(tcgen05.MmaF16BF16Op, half, single, (128, 128, 16), one, smem, k_major, k_major),
        "block-scaled mma": attempt(tcgen05.MmaMXF4NVF4Op, cutlass.Float8E4M3FN, (128, 128, 64), one, smem),
        "load": attempt(tcgen05.Ld32x32bOp, tcgen05.Repetition.x1),
        "store": attempt(tcgen05.St32x32bOp, tcgen05.Repetition.x1),
        "copy": attempt(tcgen05.Cp128x128bOp, one),
    }


def attributes():
    """Every attribute of every imported module of cutlass, and of the classes in them."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "cutlass" and module is not None:
            for attribute, value in vars(module).items():
                found[f"{name}:{attribute}"] = value
                if isinstance(value, type):
                    found.update({f"{name}:{attribute}.{inner}": there for inner, there in vars(value).items()})
    return found


def changes(before):
    after, absent = attributes(), object()
    return sorted(n for n in before.keys() | after.keys() if before.get(n, absent) is not after.get(n, absent))


block_scaled(), tensor_memory()  # whatever is filled in at first use
before = attributes()

report |= {"without": block_scaled(), "status": patches.status()}
try:
    patches.apply()
    report["refusal"] = None
except patches.RefusedError as error:
    report |= {"refusal": str(error), "changed_by_refusing": changes(before)}
report["active"] = patches.apply(checked=True)
report |= {"with": block_scaled(), "tensor_memory": tensor_memory(), "changed": changes(before)}
report |= {"again": patches.apply(checked=True), "changed_again": changes(before), "applied": patches.status()}
patches.revert()
report |= {"after": block_scaled(), "changed_after": changes(before), "active_after": patches.active()}

patches.apply(checked=True)
try:
    report["ptx"] = patches.block_scale_lowering.compile_one_mma().rstrip("\0")
except Exception as error:
    report["compile_error"] = str(error)
patches.revert()
print("\n" + json.dumps(report))
