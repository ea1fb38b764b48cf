"""What this project tests itself with, for users' tests too: strategies make inputs, checks judge outputs.

Strategies are `hypothesis <https://hypothesis.readthedocs.io>`_ strategies, and need it installed; checks do not::

    from hypothesis import given
    from nvfp4dsl import quantize, dequantize, testing

    @given(testing.tensors())
    def test_my_quantizer(x):
        testing.assert_close(my_dequantize(x), dequantize(quantize(x)), norm=1e-6, element=1e-6)

    def test_my_layout():
        testing.assert_bijective(my_layout)                          # an nvfp4dsl.layouts.IntLayout
        testing.assert_matches_cute(my_layout, lambda: cute.make_layout(...))

Strategies: :func:`ks`, :func:`shapes`, :func:`tiles`, :func:`tensors`, :func:`nvfp4_tensors`,
:func:`representable_tensors`, :func:`tie_tensors`, :func:`scale_layouts`.
:func:`near_ties` makes such without hypothesis.
Checks: :func:`relative_error`, :func:`element_error`, :func:`assert_close`, :func:`bits_differing`,
:func:`assert_identical`, :func:`assert_bijective`, :func:`assert_matches_cute`.

A tensor strategy draws shapes and magnitudes, which hypothesis shrinks, and a seed, from which torch fills in the
values: fast at any size, and repeatable.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from nvfp4dsl.config import GemmSpec, TileConfig, legal_tiles
from nvfp4dsl.constants import BLOCK, E4M3_MIN_NORMAL
from nvfp4dsl.formats import NVFP4Tensor, pack_codes
from nvfp4dsl.layouts import IntLayout, scale_layout

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

_NAN_SCALE = 0x7F
_FIRST_NORMAL_SCALE = 0x08
_CODE_SIX = 7


def _strategies() -> Any:
    try:
        from hypothesis import strategies
    except ImportError as e:
        raise ImportError("the strategies of nvfp4dsl.testing need hypothesis: pip install hypothesis") from e
    return strategies


# Strategies ---------------------------------------------------------------------------------------------------------


def ks(max_k: int = 512) -> SearchStrategy[int]:
    """Legal K: multiples of 16, from 16 to ``max_k``; often not a multiple of 32, 64 or 128, where padding begins."""
    return _strategies().integers(1, max_k // BLOCK).map(lambda blocks: blocks * BLOCK)


def shapes(max_m: int = 300, max_n: int = 300, max_k: int = 512) -> SearchStrategy[tuple[int, int, int]]:
    """(M, N, K) of a GEMM: M and N anything from 1, K as in :func:`ks`."""
    st = _strategies()
    return st.tuples(st.integers(1, max_m), st.integers(1, max_n), ks(max_k))


def tiles(spec: GemmSpec | None = None, target: str = "sm_121a") -> SearchStrategy[TileConfig]:
    """Legal tiles for ``spec`` (by default W4A4, bf16 output) on ``target``."""
    admitted = legal_tiles(spec or GemmSpec(), target)
    if not admitted:
        raise ValueError(f"{target} has no legal tile for {spec or GemmSpec()}")
    return _strategies().sampled_from(admitted)


def _matrix_shapes(max_rows: int, max_k: int) -> Any:
    st = _strategies()
    batch = st.sampled_from([(), (), (), (1,), (3,), (2, 2)])
    return st.tuples(batch, st.integers(1, max_rows), ks(max_k)).map(lambda s: (*s[0], s[1], s[2]))


def _seeds() -> Any:
    return _strategies().integers(0, 2**32 - 1).map(lambda seed: torch.Generator().manual_seed(seed))


def tensors(
    shape: Sequence[int] | None = None,
    dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16),
    max_rows: int = 40,
    max_k: int = 256,
) -> SearchStrategy[torch.Tensor]:
    """Finite tensors [..., N, K] to quantize, K a multiple of 16, some batched.

    Blocks of 16 differ in magnitude by up to 2^250; some are zero, some hold one outlier, and the whole may lie
    anywhere between the dtype's subnormals and its largest value.
    """
    st = _strategies()

    @st.composite
    def build(draw: Any) -> torch.Tensor:
        size = tuple(shape) if shape is not None else draw(_matrix_shapes(max_rows, max_k))
        dtype = draw(st.sampled_from(list(dtypes)))
        spread = draw(st.sampled_from([0, 3, 20, 125]))
        centre = draw(st.sampled_from([0, 0, 0, -140, -30, 30, 126]))
        zeros = draw(st.sampled_from([0.0, 0.3, 1.0]))
        g = draw(_seeds())
        blocks = (*size[:-1], size[-1] // BLOCK, 1)
        exponent = torch.randint(-spread, spread + 1, blocks, generator=g).double() + centre
        x = torch.randn(*blocks[:-1], BLOCK, generator=g, dtype=torch.float64) * torch.exp2(exponent)
        x = x * (torch.rand(blocks, generator=g) >= zeros)
        x[..., 0] *= torch.where(torch.rand(blocks[:-1], generator=g) < 0.1, 1000.0, 1.0)
        largest = torch.finfo(dtype).max
        return x.clamp(-largest, largest).to(dtype).reshape(size)

    return build()


def near_ties(
    dtype: torch.dtype, exponent: int, matrices: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x [L, 3, 32], global scales fp32 [L]) whose quotients lie at, or next to, where rounding changes its mind.

    For each matrix a global scale of 24 bits is sought with which some value of ``dtype``, about 2^exponent, is to the
    last bit at a midpoint of e2m1 times a block's step, or a block's largest at a midpoint of e4m3.
    """

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    scales = torch.arange(1, _NAN_SCALE, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]).double()
    value = (2.0**exponent * (1 + uniform(matrices))).to(dtype).double()
    index = integers(0, len(scales) - 1, matrices)
    scale, middle = scales[index], (scales[index] + scales[index + 1]) / 2
    of_code, of_scale = value / (ties[integers(0, len(ties), matrices)] * scale), value / (6 * middle)
    global_scale = torch.where(uniform(matrices) < 0.7, of_code, of_scale).float()

    x = value[:, None, None] * torch.exp2(integers(-3, 2, matrices, 3, 32).double())
    at_ties = (scale.float() * global_scale).double()[:, None] * ties
    x[:, 1, :7], x[:, 1, 16:23] = at_ties, -at_ties
    x[:, :, 0], x[:, :, 16] = (6 * scale * global_scale.double())[:, None], value[:, None]
    x[:, 2, 1] = -0.0
    near = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    bits = near.view(torch.int16)
    inner = ((bits & 0x7FFF) > 1) & (near.abs() < torch.finfo(dtype).max) & (uniform(*near.shape) < 0.5)
    ulps = integers(-1, 2, *near.shape).to(torch.int16)
    return torch.where(inner, bits + ulps, bits).view(dtype), global_scale


def tie_tensors(
    dtypes: Iterable[torch.dtype] = (torch.bfloat16, torch.float16), matrices: int = 24
) -> SearchStrategy[tuple[torch.Tensor, torch.Tensor]]:
    """What :func:`near_ties` makes."""
    st = _strategies()
    return st.builds(near_ties, st.sampled_from(list(dtypes)), st.integers(-6, 8), st.just(matrices), _seeds())


def _global_scales() -> Any:
    """fp32 multipliers with all significant bits in use, or powers of two."""
    st = _strategies()
    return st.builds(
        lambda exponent, fraction: torch.tensor(2.0**exponent * (1 + fraction * 2.0**-23)),
        st.integers(-20, 20),
        st.one_of(st.just(0), st.integers(0, 2**23 - 1)),
    )


def nvfp4_tensors(
    shape: Sequence[int] | None = None, max_rows: int = 300, max_k: int = 512
) -> SearchStrategy[NVFP4Tensor]:
    """Any valid canonical tensor: every code, every finite block scale (zero and subnormals too), any global scale.

    The global scale may be one for the tensor, one for each matrix, or one for each of two row ranges.
    """
    st = _strategies()

    @st.composite
    def build(draw: Any) -> NVFP4Tensor:
        *batch, n, k = tuple(shape) if shape is not None else draw(_matrix_shapes(max_rows, max_k))
        g = draw(_seeds())
        codes = torch.randint(0, 16, (*batch, n, k), generator=g, dtype=torch.uint8)
        scale = torch.randint(0, _NAN_SCALE, (*batch, n, k // BLOCK), generator=g, dtype=torch.uint8)
        row_ends = (draw(st.integers(1, n - 1)), n) if n > 1 and draw(st.booleans()) else None
        scale_shape = (*(batch if draw(st.booleans()) else ()), *((2,) if row_ends else ()))
        spread = torch.exp2(torch.randint(-3, 4, scale_shape, generator=g).float())
        return NVFP4Tensor(
            pack_codes(codes), scale.view(torch.float8_e4m3fn), draw(_global_scales()) * spread, row_ends=row_ends
        )

    return build()


def representable_tensors(max_rows: int = 40, max_k: int = 256) -> SearchStrategy[NVFP4Tensor]:
    """Canonical tensors that quantization must return: every block has a +-6, every block scale is normal.

    ``quantize(dequantize(t), t.global_scale)`` is ``t``, bit for bit.
    """
    st = _strategies()

    @st.composite
    def build(draw: Any) -> NVFP4Tensor:
        *batch, n, k = draw(_matrix_shapes(max_rows, max_k))
        g = draw(_seeds())
        blocks = (*batch, n, k // BLOCK)
        codes = torch.randint(0, 16, (*blocks, BLOCK), generator=g, dtype=torch.uint8)
        six = _CODE_SIX + 8 * torch.randint(0, 2, (*blocks, 1), generator=g, dtype=torch.uint8)
        codes.scatter_(-1, torch.randint(0, BLOCK, (*blocks, 1), generator=g), six)
        scale = torch.randint(_FIRST_NORMAL_SCALE, _NAN_SCALE, blocks, generator=g, dtype=torch.uint8)
        assert scale.view(torch.float8_e4m3fn).float().min() >= E4M3_MIN_NORMAL
        return NVFP4Tensor(pack_codes(codes.flatten(-2)), scale.view(torch.float8_e4m3fn), draw(_global_scales()))

    return build()


def scale_layouts(max_rows: int = 600, max_k: int = 1024) -> SearchStrategy[IntLayout]:
    """Swizzled scale-factor layouts of operands of any size, as :func:`nvfp4dsl.layouts.scale_layout` gives them."""
    return _strategies().builds(scale_layout, _strategies().integers(1, max_rows), ks(max_k))


# Checks of numbers --------------------------------------------------------------------------------------------------


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """``|actual - expected| / |expected|`` in the Frobenius norm, in float64; inf if either has a value not finite.

    Unlike a cosine it sees magnitudes: a result scaled wrongly, or all zero, has a large error.
    """
    a, e = _pair(actual, expected)
    if not (a.isfinite().all() and e.isfinite().all()):
        return math.inf
    error, size = torch.linalg.vector_norm(a - e).item(), torch.linalg.vector_norm(e).item()
    return error / size if size else (math.inf if error else 0.0)


def element_error(actual: torch.Tensor, expected: torch.Tensor, magnitude: torch.Tensor | None = None) -> float:
    """The worst element: ``max |actual - expected| / magnitude``; inf if either has a value not finite.

    Args:
        magnitude: the size an element's error is measured by, broadcastable; for a GEMM ``|A| @ |B|^T`` is sharpest.
            By default the element's own size plus the root mean square of all, which forgives cancellation.
    """
    a, e = _pair(actual, expected)
    if not (a.isfinite().all() and e.isfinite().all()):
        return math.inf
    if a.numel() == 0:
        return 0.0
    size = e.abs() + e.square().mean().sqrt() if magnitude is None else magnitude.double()
    error = (a - e).abs()
    return torch.where(error == 0, 0.0, error / size).max().item()


def assert_close(
    actual: torch.Tensor,
    expected: torch.Tensor,
    norm: float,
    element: float,
    magnitude: torch.Tensor | None = None,
) -> None:
    """Fail unless :func:`relative_error` is at most ``norm`` and :func:`element_error` at most ``element``."""
    in_norm, worst = relative_error(actual, expected), element_error(actual, expected, magnitude)
    if not (in_norm <= norm and worst <= element):
        raise AssertionError(
            f"error in norm {in_norm:.3e} (allowed {norm:.1e}), worst element {worst:.3e} ({element:.1e})"
        )


def bits_differing(actual: torch.Tensor, expected: torch.Tensor) -> int:
    """How many elements differ in any bit; +0 and -0 differ, and NaNs are compared by their bits too."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        raise AssertionError(
            f"got {actual.dtype} {list(actual.shape)}, expected {expected.dtype} {list(expected.shape)}"
        )
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    a, e = (t.detach().cpu().contiguous().view(word) for t in (actual, expected))
    return int((a != e).sum())


def assert_identical(actual: NVFP4Tensor, expected: NVFP4Tensor) -> None:
    """Fail unless two NVFP4 tensors have the same layout, K and row ranges, and the same bits."""
    for name in ("layout", "k", "row_ends"):
        got, want = getattr(actual, name), getattr(expected, name)
        if got != want:
            raise AssertionError(f"{name} is {got!r}, expected {want!r}")
    for name in ("qdata", "scale", "global_scale"):
        count = bits_differing(getattr(actual, name), getattr(expected, name))
        if count:
            raise AssertionError(f"{count} of {getattr(expected, name).numel()} elements of {name} differ")


def _pair(actual: torch.Tensor, expected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {list(actual.shape)}, expected {list(expected.shape)}")
    return actual.detach().to(expected.device).double(), expected.detach().double()


# Checks of layouts --------------------------------------------------------------------------------------------------


def assert_bijective(layout: IntLayout) -> None:
    """Fail unless the layout fills ``range(cosize)``, each offset once, and ``layout.inverse`` leads back.

    Coordinates along a broadcast (a leaf of stride 0) count as one.
    """
    axes = torch.meshgrid(*(torch.arange(extent) for extent in layout.extents), indexing="ij")
    hits = torch.bincount(layout(*axes).flatten(), minlength=layout.cosize)
    shared = math.prod(size for size, stride in layout.leaves() if stride == 0)
    wrong = (hits != shared).nonzero().flatten()
    if len(wrong):
        first = int(wrong[0])
        times = int(hits[first]) / shared
        raise AssertionError(f"{len(wrong)} of {layout.cosize} offsets not hit once: {first} is hit {times:g} times")
    every = torch.arange(layout.cosize)
    if not torch.equal(layout(*layout.inverse(every)), every):
        raise AssertionError("layout(*layout.inverse(offset)) is not offset everywhere")


def assert_matches_cute(
    layout: IntLayout,
    make_cute_layout: Callable[[], Any],
    coordinates: Iterable[tuple[int, ...]] | None = None,
    limit: int = 4096,
) -> None:
    """Fail unless a CuTe layout, asked of CuTe itself, has the same image as the integer map.

    Args:
        layout: the integer map.
        make_cute_layout: builds the CuTe layout; called while CuTe DSL traces, so anything of ``cutlass.cute`` may be
            used. Its top-level modes are the axes of ``layout``.
        coordinates: where to compare; all coordinates by default, or an even sample of ``limit`` if there are more.
            CuTe takes about 0.2 ms for each.

    Needs nvidia-cutlass-dsl, but no GPU.
    """
    if coordinates is None:
        total = math.prod(layout.extents)
        step = max(1, -(-total // limit)) | 1  # odd: a step of a power of two would see one corner of each tile
        every = itertools.product(*(range(extent) for extent in layout.extents))
        coordinates = itertools.islice(every, 0, total, step)
    points = [tuple(c) for c in coordinates]
    for point, found in zip(points, _cute_image(make_cute_layout, points), strict=True):
        if layout(*point) != found:
            raise AssertionError(f"at {point} the integer map gives {layout(*point)}, CuTe gives {found}")


def _cute_image(make_cute_layout: Callable[[], Any], points: list[tuple[int, ...]]) -> list[int]:
    from cutlass import cute

    image: list[int] = []

    def evaluate() -> None:
        cute_layout = make_cute_layout()
        image.extend(int(cute.crd2idx(point, cute_layout)) for point in points)

    @cute.jit
    def trace() -> None:
        evaluate()

    cute.compile(trace)
    return image
