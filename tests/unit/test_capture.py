"""Capturing a launch from compiled host code, and keeping it in a file."""

import ctypes
import re
import struct
from itertools import pairwise

import numpy as np
import pytest
import torch

from nvfp4dsl.config import GemmSpec, TileConfig
from nvfp4dsl.emulator.capture import ALIGNMENT, GUARD, _buffer, capture
from nvfp4dsl.emulator.launch import Buffer, Launch
from nvfp4dsl.errors import LaunchError
from nvfp4dsl.jit import compile

NAMES = ("x", "y", "bias", "factor")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """One cache for this file's tests, which compile half a dozen kernels between them."""
    monkeypatch.setenv("NVFP4DSL_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "capture-cache"))


def tiny(builder="scale", number=128, target="sm_121a", bias=None):
    return compile(GemmSpec(bias=bias), TileConfig(m=number), target, builder=f"tiny_kernel:{builder}")


def call(kernel, *args, names=NAMES, outputs=("y",)):
    return capture(kernel.object_path, kernel.symbol, args, names, outputs=outputs)


X, Y = torch.arange(7, dtype=torch.float32), torch.empty(7)


def values(param):
    """Address, extent and stride of a vector that is passed by value; the gap between them is not initialised."""
    return struct.unpack("<Qi4xq", param)


# --- what is recorded ---


def test_a_launch_with_its_parameters_and_buffers():
    kernel = tiny()
    (launch,) = call(kernel, X, Y, None, 3)
    assert re.findall(r"\.entry (\w+)", kernel.ptx) == [launch.kernel]
    assert (launch.grid, launch.block, launch.cluster, launch.smem_bytes) == ((7, 1, 1), (32, 1, 1), (1, 1, 1), 0)
    x, y = launch.buffers
    assert [b.name for b in launch.buffers] == ["x", "y"]
    assert (x.data.tobytes(), x.dtype, x.shape, x.strides) == (X.numpy().tobytes(), "float32", (7,), (1,))
    assert (x.writable, x.init, y.writable, y.init) == (False, True, True, False)
    assert [values(p) for p in launch.params[:2]] == [(x.address, 7, 1), (y.address, 7, 1)]
    assert launch.params[2] == struct.pack("<i", 3)


def test_parameters_have_the_sizes_that_the_ptx_declares():
    kernel = tiny(bias="fp32")
    (launch,) = call(kernel, X, Y, X, 3)
    declared = re.findall(
        r"\.param (?:\.align \d+ )?\.(b8|u32|f32|u64|b32|b64) \w+_param_\d+(?:\[(\d+)\])?", kernel.ptx
    )
    sizes = [int(count) if count else int(kind[1:]) // 8 for kind, count in declared]
    assert [len(p) for p in launch.params] == sizes
    assert len(sizes) == 4


def test_buffers_lie_apart_and_are_no_better_aligned_than_promised():
    (launch,) = call(tiny(bias="fp32"), X, Y, X, 1)
    assert len(launch.buffers) == 3
    assert all(b.address % ALIGNMENT == 0 and b.address % (2 * ALIGNMENT) for b in launch.buffers)
    assert all(b.address - a.end >= GUARD for a, b in pairwise(launch.buffers))


def test_a_buffer_is_as_misaligned_as_its_tensor():
    (launch,) = call(tiny(), torch.arange(8.0)[1:], Y, None, 1)
    assert (launch.buffer("x").address % ALIGNMENT, launch.buffer("y").address % ALIGNMENT) == (4, 0)


def test_the_buffers_are_copies():
    x = X.clone()
    (launch,) = call(tiny(), x, Y, None, 1)
    launch.buffer("x").data[:] = 0
    assert torch.equal(x, X)


def test_strides_and_broadcasts_reach_the_kernel():
    base = torch.arange(30, dtype=torch.float32)
    x, one = base[2::4], torch.ones(1).expand(7)
    (launch,) = call(tiny(bias="fp32"), x, Y, one, 1)
    strided, broadcast = launch.buffer("x"), launch.buffer("bias")
    assert (strided.strides, strided.data.size) == ((4,), 25 * 4)
    assert np.array_equal(strided.data.view(np.float32)[::4], x.numpy())
    assert values(launch.params[0])[2] == 4
    assert (broadcast.shape, broadcast.strides, broadcast.data.size) == ((7,), (0,), 4)
    assert values(launch.params[2])[2] == 0


def test_numpy_and_torch_give_the_same_launch():
    kernel = tiny()
    (a,), (b,) = call(kernel, X, Y, None, 3), call(kernel, X.numpy(), Y.numpy(), None, np.int64(3))
    assert same_buffers(a, b)
    assert [values(p) for p in a.params[:2]] == [values(p) for p in b.params[:2]]
    assert (a.grid, a.params[2]) == (b.grid, b.params[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float4_e2m1fn_x2, torch.int32])
def test_element_types_keep_their_bytes_and_their_names(dtype):
    data = torch.arange(28, dtype=torch.uint8)
    buffer = _buffer(data.view(dtype), "x", False, 256)
    assert (buffer.data.tobytes(), buffer.dtype) == (data.numpy().tobytes(), str(dtype).removeprefix("torch."))
    with pytest.raises(LaunchError, match=r"argument #0 .*expected dtype=float32"):
        call(tiny(), data.view(dtype), Y, None, 1)


# --- the launch as the driver would see it ---


def test_launches_of_one_call_share_their_buffers():
    first, second = call(tiny("twice_dependent"), X, Y, None, 2)
    assert first.kernel != second.kernel
    assert first.buffers is second.buffers or all(a is b for a, b in zip(first.buffers, second.buffers, strict=True))
    assert first.attributes["programmatic_stream_serialization"] == 1


def test_without_pdl_the_attribute_is_off():
    (launch,) = call(tiny(), X, Y, None, 1)
    assert not launch.attributes.get("programmatic_stream_serialization")


def test_a_cluster_is_recorded_and_must_divide_the_grid():
    kernel = tiny("clustered", 2, "sm_90a")
    (launch,) = call(kernel, X[:6], Y[:6], None, 1)
    assert (launch.grid, launch.cluster) == ((6, 1, 1), (2, 1, 1))
    with pytest.raises(LaunchError, match=r"grid \(7, 1, 1\) is not a multiple of the cluster \(2, 1, 1\)"):
        call(kernel, X, Y, None, 1)


def test_shared_memory_up_to_what_a_block_may_have():
    most = 99 * 1024
    (launch,) = call(tiny("with_smem", most), X, Y, None, 1)
    assert launch.smem_bytes == launch.attributes["max_dynamic_smem"] == most
    with pytest.raises(LaunchError, match=r"101392 bytes of dynamic shared memory; a block may have 101376"):
        call(tiny("with_smem", most + 16), X, Y, None, 1)
    (launch,) = call(tiny("with_smem", most + 16, "sm_90a"), X, Y, None, 1)  # a Hopper block may have 227 KiB
    assert launch.attributes["max_dynamic_smem"] == 227 * 1024


def test_an_empty_grid_is_refused():
    with pytest.raises(LaunchError, match=r"grid \(0, 1, 1\)"):
        call(tiny(), X[:0], Y[:0], None, 1)


def test_two_objects_live_in_one_process_and_nothing_leaks_out():
    plain, biased = tiny(), tiny(bias="fp32")
    names = ("_cudaLaunchKernelEx", "TVMFFIEnvGetStream", "recorder_install", f"__tvm_ffi_{plain.symbol}")
    # a test before this one may have loaded the DSL's own runtime, which exports some of these
    before = [hasattr(ctypes.CDLL(None), name) for name in names]
    for _ in range(2):
        assert len(call(plain, X, Y, None, 3)[0].params) == 3
        assert len(call(biased, X, Y, X, 3)[0].params) == 4
    assert [hasattr(ctypes.CDLL(None), name) for name in names] == before
    assert before[2:] == [False, False]


# --- TMA descriptors of the project's own kernel ---


def descriptor(param):
    """The fields of a tensor map that host code encodes: address, version, element type, swizzle, strides in bytes,
    extents, box."""
    words = struct.unpack("<32I", param)
    rank = (words[2] >> 4 & 7) + 1
    return {
        "address": words[0] | words[1] << 32,
        "version": words[2] & 15,
        "type": words[2] >> 7 & 15,
        "strides": [16 * w for w in words[3 : 3 + rank - 1]],
        "extents": [w + 1 for w in words[8 : 8 + rank]],
        "box": [b + 1 for b in param[55 : 55 + rank]],
    }


def test_descriptors_of_the_dense_kernel_describe_the_operands():
    m, n, k, batch = 200, 320, 1024, 2
    atoms = [torch.zeros(batch, -(-rows // 128), k // 64, 512, dtype=torch.uint8) for rows in (m, n)]
    args = {
        "a": torch.zeros(batch, m, k // 2, dtype=torch.uint8),
        "sfa": atoms[0],
        "b": torch.zeros(batch, n, k // 2, dtype=torch.uint8),
        "sfb": atoms[1],
        "alpha_a": torch.ones(()).expand(batch),
        "alpha_b": torch.ones(()).expand(batch, n),
        "bias": None,
        "partials": None,
        "arrivals": None,
        "c": torch.empty(batch, m, n, dtype=torch.bfloat16),
        "max_ctas": 4,
    }
    kernel = compile(GemmSpec(), TileConfig(), "sm_121a")
    (launch,) = call(kernel, *args.values(), names=list(args), outputs=("c",))
    assert launch.grid == (4, 1, 1)
    assert launch.smem_bytes == kernel.meta["smem_bytes"]
    maps = {d["address"]: d for d in (descriptor(p) for p in launch.params if len(p) == 128)}
    u8, bf16 = 0, 10
    a, c = maps[launch.buffer("a").address], maps[launch.buffer("c").address]
    assert (a["version"], a["type"]) == (2, u8)
    assert (a["extents"], a["strides"], a["box"]) == ([k // 2, m, batch], [k // 2, m * k // 2], [64, 128, 1])
    assert (c["type"], c["extents"], c["strides"]) == (bf16, [n, m, batch], [2 * n, 2 * m * n])
    assert {launch.buffer(name).address for name in ("sfa", "sfb", "b")} <= maps.keys()


# --- refusals ---


def test_the_host_halfs_own_checks_come_through():
    kernel = tiny()
    with pytest.raises(LaunchError, match=r"ValueError: Mismatched .*argument #1 .*expected to match x\.shape\[0\]"):
        call(kernel, X, torch.empty(8), None, 1)
    with pytest.raises(LaunchError, match=r"TypeError: Mismatched type on argument #0"):
        call(kernel, 5, Y, None, 1)
    with pytest.raises(LaunchError, match=r"TypeError: Expects \d parameters"):
        call(kernel, X, Y, names=("x", "y"))
    (launch,) = call(kernel, X, Y, None, 1)  # and an error leaves nothing behind
    assert launch.grid == (7, 1, 1)


@pytest.mark.parametrize(
    ("args", "names", "outputs", "text"),
    [
        ((X, Y), ("x",), (), "2 arguments need as many different names"),
        ((X, Y), ("x", "x"), (), "2 arguments need as many different names"),
        ((X, Y), ("x", "y"), ("z",), r"outputs \['z'\] are not among the arguments"),
        ((X, 1), ("x", "y"), ("y",), "output 'y' is a int, not a tensor"),
        ((X, "text"), ("x", "y"), (), "argument 'y' is a str; a kernel takes"),
        ((X, X.to(torch.complex64)), ("x", "y"), (), "argument 'y' has dtype complex64; allowed are"),
        ((X, X.numpy()[::-1]), ("x", "y"), (), "argument 'y' has a negative stride"),
        ((X, X.to("meta")), ("x", "y"), (), "argument 'y' is on meta"),
    ],
)
def test_unfit_arguments_are_named(args, names, outputs, text):
    with pytest.raises(LaunchError, match=text):
        capture("never opened", "k", args, names, outputs=outputs)


def test_objects_that_are_none(tmp_path):
    kernel = tiny()
    with pytest.raises(LaunchError, match="no entry 'other', the name it was exported under"):
        capture(kernel.object_path, "other", (X, Y, None, 1))
    path = tmp_path / "kernel.o"
    path.write_bytes(b"no object")
    with pytest.raises(LaunchError, match="no machine code that can be read"):
        capture(path, "k", (X,))
    path.write_bytes(kernel.object_path.read_bytes()[64:])
    with pytest.raises(LaunchError, match="does not link with the recorder"):
        capture(path, kernel.symbol, (X,))


def test_without_a_c_compiler_it_is_asked_for(monkeypatch, tmp_path):
    path = tmp_path / "kernel.o"
    path.write_bytes(tiny().object_path.read_bytes() + b"\0")  # linked by no other test
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match="install gcc"):
        capture(path, "k", (X,))


# --- files ---


def facts(x):
    return {name: value for name, value in vars(x).items() if name not in ("buffers", "data")}


def same_buffers(a, b):
    return [(facts(x), x.data.tobytes()) for x in a.buffers] == [(facts(x), x.data.tobytes()) for x in b.buffers]


def same(a, b):
    """Every field equal, the bytes of the buffers included."""
    return facts(a) == facts(b) and same_buffers(a, b)


def test_a_launch_survives_its_file(tmp_path):
    (launch,) = call(tiny(bias="fp32"), X, Y, torch.ones(1).expand(7), 3)
    launch.save(tmp_path / "dumped.launch")
    loaded = Launch.load(tmp_path / "dumped.launch")
    assert same(loaded, launch)
    assert all(b.data.flags.writeable for b in loaded.buffers)
    loaded.params[0] = b"\0" * 24
    assert not same(loaded, launch)


def test_a_launch_without_memory_survives_too(tmp_path):
    launch = Launch(
        "k", (1, 2, 3), (32, 1, 1), (1, 1, 1), 0, [], [Buffer("e", 256, np.zeros(0, np.uint8), "uint8", (0,), (1,))]
    )
    launch.save(tmp_path / "l")
    assert same(Launch.load(tmp_path / "l"), launch)


def test_what_is_no_launch_is_said_to_be_none(tmp_path):
    path = tmp_path / "file"
    for write in (
        lambda: path.write_bytes(b""),
        lambda: path.write_text("text"),
        lambda: np.savez(path.open("wb"), other=np.zeros(3)),
        lambda: np.save(path.open("wb"), np.zeros(3)),
        lambda: np.savez(path.open("wb"), header=np.frombuffer(b'{"format": 0}', np.uint8)),
    ):
        write()
        with pytest.raises(LaunchError, match=r"is not a launch written by Launch\.save"):
            Launch.load(path)
    with pytest.raises(FileNotFoundError):
        Launch.load(tmp_path / "absent")


def test_a_buffer_that_is_not_there_is_named():
    (launch,) = call(tiny(), X, Y, None, 1)
    assert launch.buffer("y") is launch.buffers[1]
    with pytest.raises(LaunchError, match=r"no buffer 'c'; it has x, y"):
        launch.buffer("c")
