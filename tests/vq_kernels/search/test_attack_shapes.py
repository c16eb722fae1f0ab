"""Attacks on the exactness of the search: shapes, strides, mixed dtypes and process-wide settings."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.vq_kernels.search.exactness import DTYPES, INTERPRETED, check_exact, check_outputs, device_of
from vq_kernels import NearestCode, PreparedCodebook, nearest_code, nearest_code_topk
from vq_kernels.search.backend import Backend
from vq_kernels.search.reference import brute_force_nearest
from vq_kernels.search.torch_bounds import float32_is_sufficient

T = TypeVar("T")
WIDE_DTYPES = tuple(dtype for dtype in DTYPES if dtype.itemsize >= 4)


def gaussian(num_vectors: int, num_codes: int, code_dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_vectors, code_dim, generator=generator), torch.randn(
        num_codes, code_dim, generator=generator
    )


@pytest.mark.parametrize("num_vectors", [1, 63] if INTERPRETED else [1, 63, 1000])
@pytest.mark.parametrize("num_codes", [7, 257] if INTERPRETED else [1, 7, 513])
@pytest.mark.parametrize("code_dim", [3, 64, 100])
def test_odd_sizes(backend: str, num_vectors: int, num_codes: int, code_dim: int) -> None:
    check_exact(backend, *gaussian(num_vectors, num_codes, code_dim))


@pytest.mark.parametrize(
    ("num_vectors", "num_codes", "code_dim"),
    [(0, 5, 4), (0, 1, 1), (1, 1, 1), (50, 1, 1), (50, 300, 1), (3, 20, 512 if INTERPRETED else 4096)],
)
def test_smallest_and_longest_sizes(backend: str, num_vectors: int, num_codes: int, code_dim: int) -> None:
    check_exact(backend, *gaussian(num_vectors, num_codes, code_dim))


@pytest.mark.parametrize(
    "num_codes",
    [33, 64, 65, 128, 129, 257, 513] if INTERPRETED else [*(2**p + i for p in (5, 6, 7, 8) for i in (-1, 0, 1)), 2049],
)
def test_the_nearest_code_is_the_first_or_the_last(backend: str, num_codes: int) -> None:
    x, codebook = gaussian(20, num_codes, 8)
    x[:10], x[10:] = codebook[0], codebook[-1]
    x += 1e-4
    found = check_exact(backend, x, codebook)
    assert found.indices.tolist() == [0] * 10 + [num_codes - 1] * 10


def test_identical_codes_in_different_blocks_give_the_lowest_index(backend: str) -> None:
    """PyTorch processes 4,096 codes at a time; the interpreted kernels split 700 codes into 384 and 316."""
    num_rows, num_codes, copies, shifts = 200, 20_011, 1000, (8192, 10_000, 16_384)
    if INTERPRETED:
        num_rows, num_codes, copies, shifts = 12, 700, 60, (128, 384, 600)
    x, codebook = gaussian(num_rows, num_codes, 4)
    for shift in shifts:
        codebook[shift : shift + copies] = codebook[:copies]
    near_copies = slice(0, num_rows // 2)
    x[near_copies] = codebook[torch.arange(num_rows // 2) + shifts[0]] + 1e-3
    found = check_exact(backend, x, codebook)
    assert (found.indices[near_copies] < shifts[0]).any()


@pytest.mark.parametrize("dtype", WIDE_DTYPES)
@pytest.mark.parametrize(
    ("num_codes", "code_dim"),
    [(64, 8), (257, 8), (200, 64)] if INTERPRETED else [(64, 8), (513, 8), (1000, 3), (200, 64)],
)
def test_the_bound_in_a_tie_holds_for_the_tied_codes(
    backend: str, num_codes: int, code_dim: int, dtype: torch.dtype
) -> None:
    """Long codes that are equal or nearly so; their positions in the tile point to a short code."""
    num_rows = 6 if INTERPRETED else (1 << 20) // num_codes + 100  # more than one tile
    for first, second, between in ((1, 2, 3), (33, 2, 1), (2, 33, 1), (34, 3, 37)):
        x, codebook = gaussian(num_rows, num_codes, code_dim, seed=first)
        x, codebook = 0.1 * x.to(dtype), 0.1 * codebook.to(dtype)
        long = 3 * torch.nn.functional.normalize(codebook[:1])
        codebook[[first, second]] = long
        codebook[60] = long * (1 + 2e-7 * torch.linspace(-1, 1, code_dim, dtype=dtype))
        codebook[between] = codebook.mean(dim=0)
        x[::3] += long
        check_exact(backend, x, codebook)


@pytest.mark.parametrize("num_codes", [33, 40, 300] if INTERPRETED else [33, 40, 500, 625])
def test_ties_in_a_padded_codebook(backend: str, num_codes: int) -> None:
    x = gaussian(5 if INTERPRETED else 2000 + (1 << 20) // num_codes, num_codes, 4)[0]
    lattice = torch.cartesian_prod(*[torch.linspace(-1, 1, 5)] * 4)[:num_codes]
    for codebook in (torch.zeros(num_codes, 4), lattice, torch.full((num_codes, 4), torch.nan)):
        check_exact(backend, (4 * x).round() / 4, codebook)


@pytest.mark.parametrize("dtype", WIDE_DTYPES)
def test_a_row_out_of_range_does_not_choose_padding(backend: str, dtype: torch.dtype) -> None:
    x = torch.full((40 if INTERPRETED else 40_000, 1), -3.6547157337824e31, dtype=dtype)
    codebook = torch.tensor([[-33863350.36881905]], dtype=dtype)  # in float64, the scaled code differs from the mean
    check_exact(backend, x, codebook)


@pytest.mark.parametrize("log_size", [139, 145, 150, 155, 163, 170, 300, 500])
@pytest.mark.parametrize("num_rows", [1, 40_000])
@pytest.mark.parametrize("last", [torch.nan, -4.0])
def test_float64_codes_beyond_the_range_of_any_scale(log_size: int, num_rows: int, last: float) -> None:
    codebook = 2.0**log_size * torch.tensor([[3.0], [1.0], [last]], dtype=torch.float64)
    for x in (0.0, 2.0**100, 2.0 ** (log_size + 1)):  # the mean of the codes is 0 or the last code
        check_exact("torch", torch.full((num_rows, 1), x, dtype=torch.float64), codebook)


def test_a_finite_code_is_not_mistaken_for_an_unusable_one() -> None:
    largest = 1592264501493760.0 * 2.0**100  # scaled by 2^-100 in float32, half its square is 2^100
    codebook = torch.tensor([[largest], [-largest], [0.0], [torch.nan]], dtype=torch.float64)
    assert check_exact("torch", codebook[:3], codebook).indices.tolist() == [0, 1, 2]
    assert nearest_code_topk(codebook[:3], codebook, 1).indices[:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("size", [1e37, -3e38])
def test_codes_whose_sum_overflows(backend: str, steps: Counter[str], size: float) -> None:
    num_rows = 100 if INTERPRETED else 1000
    x, codebook = (size * (0.5 + 0.5 * t.sigmoid()) for t in gaussian(num_rows, 64, 4))
    check_exact(backend, x, codebook)
    assert steps["certified"] > (num_rows // 2 if backend == "triton" else 990)


def test_rows_count_as_certified_if_no_code_is_finite(backend: str, steps: Counter[str]) -> None:
    x, codebook = gaussian(50, 30, 4)
    codebook[:, 0] = torch.nan
    check_exact(backend, x, codebook)
    assert steps == Counter(certified=50)


@pytest.mark.parametrize("radius", [3e-4, 1.0, 3000.0])
def test_rows_far_from_all_codes_are_certified(backend: str, steps: Counter[str], radius: float) -> None:
    _, codebook = gaussian(1, 60, 1)
    x = torch.linspace(0.5, 2, 100)[:, None] * 2.0**29 * radius
    check_exact(backend, x, radius * codebook)
    assert steps == Counter(certified=100)


def test_more_dimensions_than_the_float32_bounds_cover() -> None:
    most = 1 << 15
    assert float32_is_sufficient(torch.zeros(1, most))
    assert not float32_is_sufficient(torch.zeros(1, most + 1))
    check_exact("torch", *gaussian(20, 30, most + 1))


def test_more_dimensions_than_a_tile_has_numbers() -> None:
    x, codebook = gaussian(2, 3, (1 << 20) + 1)
    found = nearest_code(x, codebook, backend="torch")
    # Not by check_exact: its reference loops over the dimensions.
    sq_distances, expected = (x.double()[:, None] - codebook.double()).square().sum(dim=2).min(dim=1)
    assert torch.equal(found.indices, expected)
    assert torch.equal(found.codes, codebook[expected])
    torch.testing.assert_close(found.sq_distances, sq_distances.float(), rtol=1e-5, atol=0)


def test_more_dimensions_than_the_kernels_support() -> None:
    x = torch.zeros(1, (1 << 15) + 1)
    with pytest.raises(RuntimeError, match="D is 32,769, and the kernels take 32,768 at most"):
        nearest_code(x, x, backend="triton")


def test_more_rows_than_a_tile_holds(backend: str) -> None:
    x, codebook = gaussian(300 if INTERPRETED else 40_000, 50, 3)
    check_exact(backend, x, codebook)


@pytest.mark.parametrize(("x_dtype", "codebook_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_mixed_dtypes(backend: str, x_dtype: torch.dtype, codebook_dtype: torch.dtype) -> None:
    x, codebook = gaussian(40 if INTERPRETED else 200, 90, 12)
    codebook[45:] = codebook[:45] * (1 + 1e-3)
    check_exact(backend, x.to(x_dtype), codebook.to(codebook_dtype))
    check_exact(backend, x.to(x_dtype) + 100, codebook.to(codebook_dtype) + 100)


def test_float64_inputs_beyond_the_range_and_precision_of_float32() -> None:
    x, codebook = (t.double() for t in gaussian(200, 90, 12))
    for scale in (1e-100, 1e-60, 1e60, 1e100):
        check_exact("torch", scale * x, scale * codebook)
    codebook[45:] = codebook[:45] * (1 + 1e-12)
    check_exact("torch", x, codebook)
    check_exact("torch", x + 1e5, codebook + 1e5)


@pytest.mark.parametrize("backend_argument", ["given", "prepared"])
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
        lambda x: x.repeat_interleave(3, dim=0)[::3],
        lambda x: x[:1].expand(x.shape[0], -1),
        lambda x: x.flip(0),
        lambda x: torch.cat([x, x], dim=1)[:, x.shape[1] :],
        lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    ],
    ids=["transposed", "columns-strided", "rows-strided", "expanded", "flipped", "offset-columns", "misaligned"],
)
def test_any_strides(backend: str, layout: Callable[[Tensor], Tensor], backend_argument: str) -> None:
    x, codebook = (layout(t) for t in gaussian(70, 40, 10))
    device = device_of(backend)
    x, codebook = x.to(device), codebook.to(device)
    if backend_argument == "given":
        found = nearest_code(x, codebook, backend=backend)
    else:
        found = nearest_code(x, PreparedCodebook.from_codebook(codebook, backend=backend))
    check_outputs(NearestCode(*(t.cpu() for t in found)), x.cpu(), codebook.cpu())


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (2, 0, 5), (1, 2, 3, 4, 5)])
def test_leading_dimensions(backend: str, shape: tuple[int, ...]) -> None:
    device = device_of(backend)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = x.movedim(0, -1).contiguous().movedim(-1, 0)
    codebook = gaussian(1, 30, 5)[1]
    found = NearestCode(*(t.cpu() for t in nearest_code(x.to(device), codebook.to(device), backend=backend)))
    assert found.indices.shape == found.sq_distances.shape == shape[:-1]
    assert found.codes.shape == shape
    flat = NearestCode(found.indices.reshape(-1), found.codes.reshape(-1, 5), found.sq_distances.reshape(-1))
    check_outputs(flat, x.reshape(-1, 5), codebook)


@settings(
    max_examples=6 if INTERPRETED else 60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_random_shapes_values_and_dtypes(backend: str, data: st.DataObject) -> None:
    num_vectors, num_codes = data.draw(st.integers(0, 80)), data.draw(st.integers(1, 150))
    compiled = backend == "triton" and not INTERPRETED  # each D and dtype compiles kernels
    code_dim = data.draw(st.sampled_from([5, 16, 40]) if compiled else st.integers(1, 40))
    seed = data.draw(st.integers(0, 2**31))
    dtypes = st.sampled_from(DTYPES if backend == "torch" else DTYPES[:3])
    if compiled:
        dtypes = st.just(data.draw(dtypes))
    x, codebook = gaussian(num_vectors, num_codes, code_dim, seed)
    offset = data.draw(st.sampled_from([0.0, 0.5, 30.0, 2000.0]))
    scale = data.draw(st.sampled_from([1.0, 1e-3, 1e-6, 1e-20, 1e3, 1e15]))
    levels = data.draw(st.sampled_from([None, 1, 2, 16]))  # coarse values tie
    x, codebook = (scale * ((t * levels).round() / levels if levels else t) + offset for t in (x, codebook))
    if data.draw(st.booleans()) and num_vectors:
        x = codebook[torch.arange(num_vectors) % num_codes] + scale * 1e-3 * x
    check_exact(backend, x.to(data.draw(dtypes)), codebook.to(data.draw(dtypes)))


@contextmanager
def changed(read: Callable[[], T], write: Callable[[T], object], value: T) -> Iterator[None]:
    """Set a process-wide setting, and restore it."""
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def float32_products(precision: str) -> AbstractContextManager[object]:
    return changed(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, precision)


def every_float32_product_in(precision: str) -> AbstractContextManager[object]:
    def write(precisions: tuple[str, str]) -> None:
        torch.backends.fp32_precision, torch.backends.mkldnn.fp32_precision = precisions

    return changed(
        lambda: (torch.backends.fp32_precision, torch.backends.mkldnn.fp32_precision), write, (precision, precision)
    )


SURROUNDINGS: dict[str, Callable[[str], AbstractContextManager[object]]] = {
    "autocast-bf16": lambda device: torch.autocast(device, dtype=torch.bfloat16),
    "autocast-fp16": lambda device: torch.autocast(device, dtype=torch.float16),
    "products-medium": lambda device: float32_products("medium"),
    "products-high": lambda device: float32_products("high"),
    "all-products-bf16": lambda device: every_float32_product_in("bf16"),
    "all-products-tf32": lambda device: every_float32_product_in("tf32"),
    "default-float64": lambda device: changed(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default-float16": lambda device: changed(torch.get_default_dtype, torch.set_default_dtype, torch.float16),
    "deterministic": lambda device: changed(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "one-thread": lambda device: changed(torch.get_num_threads, torch.set_num_threads, 1),
    "inference": lambda device: torch.inference_mode(),
    "no-grad": lambda device: torch.no_grad(),
}


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_process_wide_settings_do_not_change_a_result(backend: str, surroundings: str, offset: float) -> None:
    device = device_of(backend)
    x, codebook = (t.to(device) + offset for t in gaussian(12 if INTERPRETED else 300, 100, 24))
    expected = nearest_code(x, codebook, backend=backend)
    with SURROUNDINGS[surroundings](device):
        found = nearest_code(x, codebook, backend=backend)
        ranked = nearest_code_topk(x, codebook, 1)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(ranked.indices[:, 0], expected.indices)
    assert torch.equal(found.codes, expected.codes)
    check_outputs(NearestCode(*(t.cpu() for t in found)), x.cpu(), codebook.cpu())


@pytest.mark.parametrize("backend", ["llvm", "torch"])
def test_flushing_subnormals_does_not_change_results_of_normal_values(backend: Backend) -> None:
    generator = torch.Generator().manual_seed(0)
    codebook, x = (1 + torch.rand(size, generator=generator) for size in ((100, 8), (200, 8)))
    far_codes = torch.zeros(2, 8)
    far_codes[:, 0] = torch.tensor([1.0, -1.0])  # these determine the scale
    x, codebook = 2.0**-124 * x, torch.cat([2.0**-124 * codebook, 2.0**-100 * far_codes])
    assert min(t[t != 0].abs().min() for t in (x, codebook)) >= torch.finfo(torch.float32).tiny
    expected = brute_force_nearest(x, codebook)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals to zero")
    try:
        found = nearest_code(x, codebook, backend=backend)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found.indices, expected)


def test_inputs_are_not_written(backend: str) -> None:
    device = device_of(backend)
    x, codebook = (t.to(device) for t in gaussian(30 if INTERPRETED else 300, 100, 24))
    x[5], codebook[3] = torch.nan, torch.inf
    versions = x._version, codebook._version
    copies = x.clone(), codebook.clone()
    nearest_code(x, codebook, backend=backend)
    assert (x._version, codebook._version) == versions
    torch.testing.assert_close((x, codebook), copies, rtol=0, atol=0, equal_nan=True)
