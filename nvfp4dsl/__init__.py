"""Block-scaled NVFP4 GEMM kernels in CuTe DSL: compiled for the GPU at hand, executed anywhere.

>>> import nvfp4dsl as nv
>>> with nv.emulate("sm_121a"):                                   # or CUDA tensors, and no block
...     w = nv.quantize(weight)                                   # once, at load
...     y = nv.linear(x, w, bias, activation="nvfp4")             # the real kernel, executed by the emulator

Importing this package compiles nothing, patches nothing, and does not import cutlass.
"""

from nvfp4dsl.calibration import Calibration, Saturation
from nvfp4dsl.config import GemmSpec, TileConfig, legal
from nvfp4dsl.dispatch import emulate
from nvfp4dsl.errors import (
    CacheError,
    CalibrationError,
    CompileError,
    EmulationError,
    LaunchError,
    LayoutError,
    ModeError,
    NVFP4Error,
    OperandError,
    SaturationWarning,
    SettingError,
    SpecError,
    TargetError,
    TileError,
)
from nvfp4dsl.formats import NVFP4Tensor
from nvfp4dsl.jit import CompiledKernel, compile
from nvfp4dsl.ops import dequantize, linear, mm, quantize, quantize_rms_norm, quantize_silu_mul, warmup
from nvfp4dsl.packing import prepare
from nvfp4dsl.targets import DEVICES, TARGETS, Device, Target

__all__ = [
    "DEVICES",
    "TARGETS",
    "CacheError",
    "Calibration",
    "CalibrationError",
    "CompileError",
    "CompiledKernel",
    "Device",
    "EmulationError",
    "GemmSpec",
    "LaunchError",
    "LayoutError",
    "ModeError",
    "NVFP4Error",
    "NVFP4Tensor",
    "OperandError",
    "Saturation",
    "SaturationWarning",
    "SettingError",
    "SpecError",
    "Target",
    "TargetError",
    "TileConfig",
    "TileError",
    "compile",
    "dequantize",
    "emulate",
    "legal",
    "linear",
    "mm",
    "prepare",
    "quantize",
    "quantize_rms_norm",
    "quantize_silu_mul",
    "warmup",
]
