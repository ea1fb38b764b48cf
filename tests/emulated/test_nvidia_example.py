"""The emulator on a kernel that is not ours: NVIDIA's public sm_120 block-scaled GEMM.

Set ``CUTLASS_DIR`` to a CUTLASS checkout; without one these tests skip. The example does three things that the emulator
reports and real silicon forgives or hides, and they are tolerated by name here:

* ``UnorderedLanes``: one lane releases a stage for its warp with no warp-level barrier after the other lanes' loads.
* ``UnfinishedBulk``: it exits before its last TMA stores have read shared memory.
* ``UnwrittenRegister``, for fp32 output only: its epilogue copies two of each four accumulators and stores registers
  that nothing wrote. The test shows that this is reported, and then mends a copy of the source to check the arithmetic.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nvidia_example import SYMBOL

import nvfp4dsl as nv
from nvfp4dsl import emulator, reference
from nvfp4dsl.emulator.capture import capture
from nvfp4dsl.emulator.faults import UnfinishedBulk, UnorderedLanes, UnwrittenRegister
from nvfp4dsl.testing import bits_differing, relative_error

EXAMPLE = (
    "examples/python/CuTeDSL/cute/blackwell_geforce/kernel/blockscaled_gemm/"
    "dense_blockscaled_gemm_persistent_cooperative.py"
)
NAMES = ("a", "b", "sfa", "sfb", "c", "stream")
SHAPES = [(256, 384, 512), (200, 320, 1024)]


@pytest.fixture(scope="module")
def example():
    folder = os.environ.get("CUTLASS_DIR")
    if not folder:
        pytest.skip("set CUTLASS_DIR to a CUTLASS checkout to run NVIDIA's example")
    path = Path(folder) / EXAMPLE
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


def _mended(example, folder):
    """A copy whose epilogue copies every accumulator of a 32-bit output."""
    source = example.read_text()
    before = "tRS_rD_slice[elem_idx] = tRS_rAcc_slice[elem_idx]"
    loop = "cute.size(tRS_rD_slice)\n"
    assert source.count(before) == 1
    assert source.count(loop) == 1
    source = source.replace(loop, "cute.size(tRS_rAcc_slice)\n").replace(
        before,
        "tRS_rD[(elem_idx % cute.size(tRS_rD_slice), "
        "mma_m_in_epi + elem_idx // cute.size(tRS_rD_slice), mma_n_in_epi)] = tRS_rAcc_slice[elem_idx]",
    )
    for helper in example.parent.glob("*.py"):
        (folder / helper.name).write_text(helper.read_text())
    (folder / example.name).write_text(source)
    return folder / example.name


def _compile(example, folder, out_type):
    script = Path(__file__).with_name("nvidia_example.py")
    folder.mkdir()
    subprocess.run([sys.executable, str(script), str(example), str(folder), out_type], check=True, timeout=300)
    return (folder / "kernel.ptx").read_text(), folder / "kernel.o"


def _operand(rows, k, seed):
    """A prepared operand, and the same tensors as the example takes them: (rows, k/2, 1), (32, 4, rm, 4, rk, 1)."""
    quantized = nv.quantize(torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)))
    quantized = nv.NVFP4Tensor(quantized.qdata, quantized.scale, torch.tensor(1.0))  # the example knows no global scale
    prepared = nv.prepare(quantized, "sm_121a")
    tiles_m, tiles_k, _ = prepared.scale.shape
    scales = prepared.scale.view(tiles_m, tiles_k, 32, 4, 4).permute(2, 3, 0, 4, 1).unsqueeze(-1)
    return quantized, prepared.qdata.view(torch.float4_e2m1fn_x2).unsqueeze(-1), scales


def _run(ptx, object_path, shape, dtype, tolerate, seed=0):
    m, n, k = shape
    (a, a_codes, a_scales), (b, b_codes, b_scales) = _operand(m, k, 0), _operand(n, k, 1)
    c = torch.zeros(1, m, n, dtype=dtype).permute(1, 2, 0)
    arguments = (a_codes, b_codes, a_scales, b_scales, c, None)
    (launch,) = capture(object_path, SYMBOL, arguments, NAMES, outputs=("c",))
    emulator.run(ptx, launch, seed=seed, tolerate=tolerate)
    y = torch.from_numpy(launch.buffer("c").data).view(dtype).view(m, n)
    return y, a, b


def test_16_bit_output_is_right(example, tmp_path):
    ptx, object_path = _compile(example, tmp_path / "bf16", "BFloat16")
    for seed, shape in enumerate(SHAPES):
        y, a, b = _run(ptx, object_path, shape, torch.bfloat16, (UnorderedLanes, UnfinishedBulk), seed)
        assert bits_differing(y, reference.gemm_model(a, b, out_dtype=torch.bfloat16)) == 0
        assert relative_error(y.float(), reference.gemm(a, b)) < 2e-3


def test_32_bit_output_is_reported_and_right_once_mended(example, tmp_path):
    ptx, object_path = _compile(example, tmp_path / "fp32", "Float32")
    with pytest.raises(UnwrittenRegister):
        _run(ptx, object_path, SHAPES[0], torch.float32, (UnorderedLanes, UnfinishedBulk))
    ptx, object_path = _compile(_mended(example, tmp_path), tmp_path / "mended", "Float32")
    for shape in SHAPES:
        y, a, b = _run(ptx, object_path, shape, torch.float32, (UnorderedLanes, UnfinishedBulk))
        assert bits_differing(y, reference.gemm_model(a, b)) == 0
