"""What happens to a launch's parameters on their way to a real GPU."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from nvfp4dsl.emulator.hopper import relocate, run
from nvfp4dsl.emulator.launch import Buffer, Launch
from nvfp4dsl.emulator.ptx import Parameter
from nvfp4dsl.errors import LaunchError, TargetError

PTX = ".version 9.4\n.target sm_121a\n.address_size 64\n.visible .entry empty(.param .u64 p)\n{\n\tret;\n}\n"


def launch(params: list[bytes], **changes) -> Launch:
    buffers = [
        Buffer("a", 0x7_0000_0100, np.zeros(512, np.uint8), "uint8", (512,), (1,)),
        Buffer("c", 0x7_0010_0100, np.zeros(64, np.uint8), "float32", (16,), (1,), writable=True),
    ]
    fields = {"kernel": "empty", "grid": (1, 1, 1), "block": (32, 1, 1), "cluster": (1, 1, 1), "smem_bytes": 0}
    return Launch(**{**fields, **changes}, params=params, buffers=buffers)


def descriptor(address: int, kind: int = 0, version: int = 2) -> bytes:
    # Dims 512 and 8, less one: as one word they read 0x7_000001ff, an address within buffer a.
    return struct.pack("<QI20xII", address, 1 << 4 | kind << 7 | 3 << 13 | version, 511, 7).ljust(128, b"\0")


ADDRESSES = {"a": 0xAAAA_0000, "c": 0xCCCC_0000}


def test_addresses_move_and_all_else_stays() -> None:
    entry = [Parameter("map", 128, 64), Parameter("pointer", 16, 8), Parameter("extents", 12, 4)]
    extents = struct.pack("<III", 0x100, 7, 1)
    moved = relocate(
        entry,
        launch([descriptor(0x7_0000_0140), struct.pack("<QII", 0x7_0010_0104, 5, 6), extents]),
        ADDRESSES,
    )
    expected = descriptor(0xAAAA_0040, version=0)
    assert moved == [expected, struct.pack("<QII", 0xCCCC_0004, 5, 6), extents]


def test_an_address_just_past_a_buffer_stays() -> None:
    value = struct.pack("<Q", 0x7_0000_0100 + 512)
    assert relocate([Parameter("p", 8, 8)], launch([value]), ADDRESSES) == [value]


def test_packed_fp4_descriptors_are_refused() -> None:
    with pytest.raises(LaunchError, match=r"parameter map .* packed FP4"):
        relocate([Parameter("map", 128, 64)], launch([descriptor(0x7_0000_0100, kind=11)]), ADDRESSES)


def test_parameters_must_fit_the_entry() -> None:
    with pytest.raises(LaunchError, match=r"\[8\] bytes, the launch has \[4\]"):
        relocate([Parameter("p", 8, 8)], launch([b"1234"]), ADDRESSES)


def test_a_launch_of_another_kernel_is_refused() -> None:
    with pytest.raises(LaunchError, match="no entry 'other'; it has empty"):
        run(PTX, launch([b"12345678"], kernel="other"))


def test_no_hopper_gpu_is_said() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        pytest.skip("there is one here")
    with pytest.raises(TargetError, match=r"no CUDA driver|no CUDA device|compute capability"):
        run(PTX, launch([b"12345678"]))
