"""A kernel launch as data: what the device would have been handed, with the memory it may touch.

A :class:`Launch` and the PTX it names are all that :func:`nvfp4dsl.emulator.run` needs. numpy only, so that a
dumped pair runs anywhere.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike

import numpy as np

from nvfp4dsl.errors import LaunchError

FORMAT = 1
"""Version of the ``.npz`` layout written by :meth:`Launch.save`."""

Dim3 = tuple[int, int, int]


@dataclass
class Buffer:
    """One tensor in device memory.

    Attributes:
        name: the caller's name for it.
        address: device address of element 0, in bytes.
        data: uint8, 1-D: the bytes from element 0 to the last element that the strides reach. The emulator writes here.
        dtype: element type as torch names it (``"uint8"``, ``"bfloat16"``, ``"float8_e4m3fn"``).
        shape: in elements.
        strides: in elements, as long as ``shape``; 0 where a dimension is broadcast.
        writable: whether the kernel may store to it.
        init: whether ``data`` counts as written before the launch; reading a buffer that nothing wrote is a fault.
    """

    name: str
    address: int
    data: np.ndarray
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    writable: bool = False
    init: bool = True

    @property
    def end(self) -> int:
        """The first device address after the buffer."""
        return self.address + self.data.size


@dataclass
class Launch:
    """One launch of one kernel.

    Attributes:
        kernel: the name of the PTX entry.
        grid: CTAs in x, y, z.
        block: threads in x, y, z.
        cluster: CTAs of a cluster in x, y, z; (1, 1, 1) without clusters.
        smem_bytes: dynamic shared memory of a CTA.
        params: the value of each entry parameter, in the PTX entry's order and sizes.
        buffers: the memory behind the pointers and TMA descriptors among ``params``. Launches that were captured
            together share these objects, so one sees what an earlier one wrote.
        expected: the bytes that buffers must hold after the launch, by name, where they are known.
        attributes: what else the host half asked for: ``programmatic_stream_serialization`` (PDL) and other launch
            attributes by name, ``max_dynamic_smem`` (the most dynamic shared memory the kernel was opened to, bytes)
            and ``smem_carveout`` (the preferred carve-out as the runtime's integer).
    """

    kernel: str
    grid: Dim3
    block: Dim3
    cluster: Dim3
    smem_bytes: int
    params: list[bytes]
    buffers: list[Buffer]
    attributes: dict[str, int] = field(default_factory=dict)
    expected: dict[str, np.ndarray] = field(default_factory=dict)

    def buffer(self, name: str) -> Buffer:
        """The buffer of that name; :class:`LaunchError` if there is none."""
        for buffer in self.buffers:
            if buffer.name == name:
                return buffer
        raise LaunchError(f"the launch has no buffer {name!r}; it has {', '.join(b.name for b in self.buffers)}")

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the launch to ``path`` (an ``.npz`` archive: a JSON header, one array a parameter and a buffer)."""
        header = {
            "format": FORMAT,
            "kernel": self.kernel,
            "grid": self.grid,
            "block": self.block,
            "cluster": self.cluster,
            "smem_bytes": self.smem_bytes,
            "params": len(self.params),
            "attributes": self.attributes,
            "expected": list(self.expected),
            "buffers": [{k: v for k, v in vars(b).items() if k != "data"} for b in self.buffers],
        }
        arrays = {f"param_{i}": np.frombuffer(p, np.uint8) for i, p in enumerate(self.params)}
        arrays |= {f"buffer_{i}": b.data for i, b in enumerate(self.buffers)}
        arrays |= {f"expected_{i}": data for i, data in enumerate(self.expected.values())}
        with open(path, "wb") as file:  # a file object: np.savez would append ".npz" to another name
            np.savez(file, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Launch:
        """Reads what :meth:`save` wrote. :class:`LaunchError` if the file is not such a launch."""
        try:
            with np.load(path, allow_pickle=False) as archive:
                return cls._from_arrays(archive)
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise LaunchError(f"{path} is not a launch written by Launch.save (format {FORMAT}): {error}") from error

    @classmethod
    def _from_arrays(cls, archive: Mapping[str, np.ndarray]) -> Launch:
        header = json.loads(archive["header"].tobytes())
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']}")
        buffers = [
            Buffer(
                data=archive[f"buffer_{i}"].copy(),
                shape=tuple(row.pop("shape")),
                strides=tuple(row.pop("strides")),
                **row,
            )
            for i, row in enumerate(header["buffers"])
        ]
        return cls(
            kernel=header["kernel"],
            grid=tuple(header["grid"]),
            block=tuple(header["block"]),
            cluster=tuple(header["cluster"]),
            smem_bytes=header["smem_bytes"],
            params=[archive[f"param_{i}"].tobytes() for i in range(header["params"])],
            buffers=buffers,
            attributes=header["attributes"],
            expected={name: archive[f"expected_{i}"] for i, name in enumerate(header["expected"])},
        )
