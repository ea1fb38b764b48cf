"""Run by a release's own interpreter, next to a copy of ``patches/`` and to no other file of the project: what is refused
and what is admitted without the patches, with them, and after undoing them. Prints it as JSON."""

import json
import os
import sys

import patches

imported_cutlass = "cutlass" in sys.modules

import cutlass
from cutlass.cute.nvgpu import tcgen05, warp

STATES = ("not needed", "needed", "applied", "refused", "unknown")


def attempt(construct, *args):
    """``"admitted"``, or the refusal."""
    try:
        construct(*args)
    except Exception as error:
        return patches.probing.first_line(error)
    return "admitted"


def block_scaled():
    return attempt(warp.MmaMXF4NVF4Op, cutlass.Float4E2M1FN, cutlass.Float32, cutlass.Float8E4M3FN)


def without_silicon():
    """Operations on tensor memory: each MMA, load and store of it, and copy into it."""
    one, k_major = tcgen05.CtaGroup.ONE, tcgen05.OperandMajorMode.K
    repeat = tcgen05.Repetition.x1
    f16, f32, smem = cutlass.Float16, cutlass.Float32, tcgen05.OperandSource.SMEM
    fp4, e4m3 = cutlass.Float4E2M1FN, cutlass.Float8E4M3FN
    return {
        "MmaF16BF16Op": attempt(
            tcgen05.MmaF16BF16Op, f16, f32, (128, 128, 16), one, smem, k_major, k_major
        ),
        "MmaMXF4NVF4Op": attempt(tcgen05.MmaMXF4NVF4Op, e4m3, (128, 128, 64), one, smem),
        "Ld32x32bOp": attempt(tcgen05.Ld32x32bOp, repeat),
        "St32x32bOp": attempt(tcgen05.St32x32bOp, repeat),
        "Cp128x128bOp": attempt(tcgen05.Cp128x128bOp, one),
        "fp4": str(fp4.width),
    }


def attributes():
    """Every attribute of every module of cutlass that has been imported, and of the classes in them."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "cutlass" and module is not None:
            for attribute, value in vars(module).items():
                found[name, attribute] = value
                if isinstance(value, type):
                    found.update({(name, f"{attribute}.{inner}"): there for inner, there in vars(value).items()})
    return found


def changes(before):
    after = attributes()
    return sorted(
        f"{module}:{name}"
        for module, name in before.keys() | after.keys()
        if before.get((module, name), before) is not after.get((module, name), after)
        and not name.startswith("__warningregistry__")
    )


report = {"imported_cutlass": imported_cutlass, "release": cutlass.__version__, "cuda": cutlass.CUDA_VERSION.major}
block_scaled(), without_silicon()  # whatever is filled in on first use
seen = patches.observe()
before = attributes()

report |= {"without": block_scaled(), "without_silicon": without_silicon(), "status": patches.status()}
try:
    report |= {"active": patches.apply(), "refusal": None}
except patches.RefusedError as error:
    report |= {"active": patches.active(), "refusal": str(error)}
report |= {"with": block_scaled(), "changes": changes(before), "again": patches.apply(checked=True)}
report |= {"opened": block_scaled(), "opened_changes": changes(before), "applied_status": patches.status()}
report |= {"with_silicon": without_silicon()}
if "sm12x-block-scale-lowering" in seen.findings and os.environ["CUTE_DSL_ARCH"] == "sm_121a":
    try:
        report["ptx"] = patches.block_scale_lowering.compile_one_mma()
    except Exception as error:
        report["compile_error"] = str(error)[:2000]
compiled = attributes()  # compiling fills caches in
patches.revert()
report |= {"after": block_scaled(), "after_active": patches.active(), "undone": changes(compiled)}
operation = "cutlass.cute.nvgpu.warp.mma", "MmaSM120BlockScaledOp.__post_init__"
report["identical"] = attributes()[operation] is before[operation]
print("\n" + json.dumps(report))
