"""Packing and the container: what it holds, what it refuses, and how it says so."""

import copy
import io
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from nvfp4dsl.errors import LayoutError, NVFP4Error, OperandError
from nvfp4dsl.formats import E2M1_VALUES, NVFP4Tensor, decode_codes, pack_codes, unpack_codes
from nvfp4dsl.packing import prepare
from nvfp4dsl.testing import assert_identical

N, K = 6, 48


def parts(*batch: int, n: int = N, k: int = K) -> dict:
    g = torch.Generator().manual_seed(0)
    return {
        "qdata": torch.randint(0, 256, (*batch, n, k // 2), generator=g, dtype=torch.uint8),
        "scale": torch.randint(0, 0x7F, (*batch, n, k // 16), generator=g, dtype=torch.uint8).view(torch.float8_e4m3fn),
        "global_scale": torch.tensor(0.25),
    }


def test_the_even_k_is_in_the_low_nibble():
    assert pack_codes(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)).tolist() == [[0x21, 0x0F]]
    assert unpack_codes(torch.tensor([[0x21, 0x0F]], dtype=torch.uint8)).tolist() == [[1, 2, 15, 0]]


def test_every_byte_survives_unpacking_and_packing():
    every = torch.arange(256, dtype=torch.uint8).view(4, 64)
    assert torch.equal(pack_codes(unpack_codes(every)), every)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_code_values_are_sign_exponent_mantissa(dtype):
    for code, value in enumerate(E2M1_VALUES):
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        magnitude = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
        assert abs(value) == magnitude
        decoded = decode_codes(torch.tensor([code], dtype=torch.uint8), dtype)
        assert decoded.dtype == dtype
        assert decoded.item() == value
        assert bool(torch.signbit(decoded)) == bool(sign)


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, 4, dtype=torch.int8)], ids=["odd", "dtype"]
)
def test_packing_refuses(bad):
    with pytest.raises(OperandError, match="uint8 of even last dimension"):
        pack_codes(bad)


def test_logical_shape_and_properties():
    t = NVFP4Tensor(**parts(3))
    assert t.shape == (3, N, K)
    assert (t.batch_shape, t.ndim, t.k, t.layout) == ((3,), 3, K, "canonical")
    assert t.device == torch.device("cpu")
    assert t.nbytes == 3 * N * (K // 2 + K // 16) + 4
    assert t.canonical() is t
    assert repr(t) == "NVFP4Tensor(shape=(3, 6, 48), layout='canonical', device='cpu')"


def test_it_is_frozen():
    with pytest.raises(AttributeError):
        NVFP4Tensor(**parts()).k = 3


def test_row_scale_of_every_form_of_global_scale():
    assert NVFP4Tensor(**parts(2)).row_scale().tolist() == [[0.25] * N] * 2
    by_matrix = NVFP4Tensor(**parts(2) | {"global_scale": torch.tensor([1.0, 2.0])})
    assert by_matrix.row_scale().tolist() == [[1.0] * N, [2.0] * N]
    by_range = NVFP4Tensor(**parts() | {"global_scale": torch.tensor([1.0, 2.0, 4.0])}, row_ends=[1, 3, N])
    assert by_range.row_scale().tolist() == [1, 2, 2, 4, 4, 4]
    assert by_range.row_ends == (1, 3, N)
    both = NVFP4Tensor(**parts(2) | {"global_scale": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, row_ends=(2, N))
    assert both.row_scale().tolist() == [[1, 1, 2, 2, 2, 2], [3, 3, 4, 4, 4, 4]]


def test_pytree_round_trip_keeps_the_static_fields():
    t = prepare(NVFP4Tensor(**parts() | {"global_scale": torch.tensor([1.0, 2.0])}, row_ends=(2, N)), "sm_121a")
    leaves, spec = pytree.tree_flatten(t)
    assert [x.dtype for x in leaves] == [torch.uint8, torch.float8_e4m3fn, torch.float32]
    assert_identical(pytree.tree_unflatten(leaves, spec), t)
    assert pytree.tree_map(lambda x: tuple(x.shape), t).qdata == (N, 32)  # K 48 is stored as 64
    assert [str(p) for p, _ in pytree.tree_flatten_with_path(t)[0]] == [
        "(GetAttrKey(name='qdata'),)",
        "(GetAttrKey(name='scale'),)",
        "(GetAttrKey(name='global_scale'),)",
    ]


def test_copies_keep_everything():
    t = prepare(NVFP4Tensor(**parts(2)), "sm_100a")
    assert_identical(copy.deepcopy(t), t)
    file = io.BytesIO()
    torch.save(t, file)
    file.seek(0)
    assert_identical(torch.load(file, weights_only=False), t)
    assert_identical(t.to("cpu"), t)
    assert t.to("meta").device.type == "meta"
    assert t.to("meta").shape == t.shape


def test_rows_of_a_checkpoint_may_be_a_view():
    wide = parts(n=20)
    t = NVFP4Tensor(wide["qdata"][4::3], wide["scale"][4::3], wide["global_scale"])
    assert t.shape == (6, K)
    assert_identical(prepare(t, "sm_120a").canonical(), NVFP4Tensor(t.qdata.contiguous(), t.scale, t.global_scale))


E4M3, U8 = torch.float8_e4m3fn, torch.uint8
REFUSED = {
    "codes of a wrong dtype": (
        {"qdata": torch.zeros(N, K // 2, dtype=torch.int8)},
        r"qdata is torch.int8.*must be.*uint8.*view",
    ),
    "scales as bytes": (
        {"scale": torch.zeros(N, K // 16, dtype=U8)},
        r"scale is torch.uint8.*\.view\(torch.float8_e4m3fn\)",
    ),
    "scales in bf16": (
        {"scale": torch.zeros(N, K // 16, dtype=torch.bfloat16)},
        r"scale is torch.bfloat16; it must be",
    ),
    "global scale in fp64": (
        {"global_scale": torch.tensor(1.0, dtype=torch.float64)},
        r"global_scale is torch.float64.*float\(\)",
    ),
    "global scale a number": ({"global_scale": 0.25}, r"global_scale is a float; it must be a torch.Tensor"),
    "a vector": ({"qdata": torch.zeros(8, dtype=U8)}, r"qdata has shape \[8\]; it must be \[..., N, bytes\]"),
    "K not in 16s": (
        {"qdata": torch.zeros(N, 20, dtype=U8)},
        r"K .* is 40.*positive multiple of 16.*pad K with zeros up to 48",
    ),
    "no K": ({"qdata": torch.zeros(N, 0, dtype=U8)}, r"K .* is 0.*up to 16"),
    "too few scales": (
        {"scale": torch.zeros(N, 2, dtype=E4M3)},
        r"scale has shape \[6, 2\].*\[6, 48\] tensor as \[6, 3\]",
    ),
    "scales transposed": ({"scale": torch.zeros(3, N, dtype=E4M3)}, r"scale has shape \[3, 6\]"),
    "two devices": (
        {"scale": torch.zeros(N, 3, dtype=E4M3, device="meta")},
        r"qdata is on cpu, scale on meta.*\.to\(device\)",
    ),
    "K not contiguous": (
        {"qdata": torch.zeros(K // 2, N, dtype=U8).T},
        r"qdata is not contiguous along K.*\.contiguous",
    ),
    "scales not contiguous": ({"scale": torch.zeros(3, N).to(E4M3).T}, r"scale is not contiguous along K"),
    "global of shape [1]": ({"global_scale": torch.ones(1)}, r"global_scale has shape \[1\]; allowed: \[\] "),
    "global per row": ({"global_scale": torch.ones(N)}, r"allowed: \[\].*row_ends"),
    "row_ends without them": ({"row_ends": (2, N)}, r"global_scale has shape \[\]; allowed: \[2\]"),
    "row_ends short of N": ({"row_ends": (2, 5), "global_scale": torch.ones(2)}, r"row_ends is \(2, 5\).*N = 6"),
    "row_ends descending": ({"row_ends": (4, 2, N), "global_scale": torch.ones(3)}, r"row_ends is \(4, 2, 6\)"),
    "an empty row range": ({"row_ends": (0, N), "global_scale": torch.ones(2)}, r"row_ends is \(0, 6\)"),
    "global of zero": ({"global_scale": torch.tensor(0.0)}, r"global_scale is 0.0; .*positive"),
    "global negative": ({"global_scale": torch.tensor(-1.0)}, r"global_scale is -1.0"),
    "global infinite": ({"global_scale": torch.tensor(torch.inf)}, r"global_scale is inf; .*finite"),
    "global NaN": ({"global_scale": torch.tensor(torch.nan)}, r"global_scale is nan"),
    "global subnormal": ({"global_scale": torch.tensor(1e-39)}, r"not subnormal"),
    "K contradicts": ({"k": 64}, r"qdata has shape \[6, 24\].*\[6, 64\] tensor as \[6, 32\]"),
    "unknown layout": ({"layout": "volta"}, r"layout 'volta' is unknown; known layouts: blackwell, canonical"),
    "prepared without K": ({"layout": "blackwell"}, r"K is 0"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_it_refuses(change, message):
    NVFP4Tensor(**parts())
    with pytest.raises(OperandError, match=message) as caught:
        NVFP4Tensor(**parts() | change)
    assert isinstance(caught.value, NVFP4Error)
    assert isinstance(caught.value, ValueError)


def test_an_unknown_layout_is_a_layout_error():
    with pytest.raises(LayoutError):
        NVFP4Tensor(**parts(), layout="volta")


@pytest.mark.parametrize(("byte", "shown"), [(0x7F, "nan"), (0xFF, "nan"), (0x81, "-0.00195"), (0xFE, "-448")])
def test_it_refuses_a_scale_and_says_where(byte, shown):
    p = parts(2)
    p["scale"].view(torch.uint8)[1, 4, 2] = byte
    with pytest.raises(OperandError, match=rf"scale\[1, 4, 2\] is {re.escape(shown)}"):
        NVFP4Tensor(**p)


def test_it_names_the_expert_with_a_dead_global_scale():
    with pytest.raises(OperandError, match=r"global_scale\[2\] is 0.0"):
        NVFP4Tensor(**parts(4) | {"global_scale": torch.tensor([1.0, 2.0, 0.0, 1.0])})


@pytest.mark.parametrize("byte", [0x00, 0x01, 0x7E, 0x80])
def test_it_takes_every_finite_nonnegative_scale(byte):
    p = parts()
    p["scale"].view(torch.uint8)[0, 0] = byte
    assert NVFP4Tensor(**p).scale.view(torch.uint8)[0, 0] == byte


def test_a_prepared_tensor_must_be_contiguous_and_of_the_padded_shape():
    t = prepare(NVFP4Tensor(**parts()), "sm_120a")
    fields = {"global_scale": t.global_scale, "layout": "blackwell", "k": K}
    NVFP4Tensor(t.qdata, t.scale, **fields)
    with pytest.raises(OperandError, match=r"qdata has shape \[6, 24\].*as \[6, 32\]"):
        NVFP4Tensor(t.qdata[:, :24].contiguous(), t.scale, **fields)
    with pytest.raises(OperandError, match=r"scale has shape \[1, 2, 512\].*as \[1, 1, 512\]"):
        NVFP4Tensor(t.qdata, t.scale.repeat(1, 2, 1), **fields)
    with pytest.raises(OperandError, match=r"qdata is not contiguous"):
        NVFP4Tensor(t.qdata.repeat(1, 2)[:, :32], t.scale, **fields)


def test_fake_tensors_are_checked_by_shape_alone():
    with FakeTensorMode():
        p = {
            "qdata": torch.empty(N, K // 2, dtype=U8),
            "scale": torch.empty(N, K // 16, dtype=E4M3),
            "global_scale": torch.empty(()),
        }
        t = prepare(NVFP4Tensor(**p), "sm_121a")
        assert t.scale.shape == (1, 1, 512)
        assert t.canonical().scale.shape == (N, K // 16)
        with pytest.raises(OperandError, match="scale has shape"):
            NVFP4Tensor(**p | {"scale": torch.empty(N, 2, dtype=E4M3)})
