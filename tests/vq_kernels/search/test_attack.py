"""Attacks on the exactness of the search: values for which a plausible implementation fails."""

import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor

from benchmarks.data import DATA_NAMES, make_search_data
from tests.vq_kernels.search.exactness import DTYPES, INTERPRETED, check_exact
from tests.vq_kernels.search.steps import STEPS
from vq_kernels.search.reference import brute_force_nearest

N, K, D = 12 if INTERPRETED else 100, 130, 16
# The steps that a float32 data set is meant for: one of them has to decide a row. Default: certified.
MEANT_FOR = {
    "near-duplicates": {"reranked", "exhaustive"},
    "duplicates": {"reranked"},
    "outliers": {"reranked"},
    "shell": {"exhaustive"},
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = seeded(seed)
    return torch.randn(N, D, generator=generator).to(dtype), torch.randn(K, D, generator=generator).to(dtype)


def shell(spread: float) -> tuple[Tensor, Tensor]:
    """Vectors near one point, and codes around it at distances 1 to 1 + spread, all nearly tied."""
    generator = seeded(1)
    centre = torch.randn(D, generator=generator)
    directions = torch.nn.functional.normalize(torch.randn(K, D, generator=generator), dim=1)
    radii = 1 + spread * torch.rand(K, 1, generator=generator)
    x = centre + spread * torch.randn(N, D, generator=generator) / D
    return x, centre + radii * directions


@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-5, 1e-6])
def test_codes_that_16_bit_scores_order_wrongly(backend: str, steps: Counter[str], spread: float) -> None:
    x, codebook = shell(spread)
    nearest = brute_force_nearest(x, codebook)
    for dtype in (torch.float16, torch.bfloat16):
        rounded_x, rounded_codes = x.to(dtype).double(), codebook.to(dtype).double()
        rounded_scores = rounded_x @ rounded_codes.t() - rounded_codes.square().sum(dim=1) / 2
        misled = rounded_scores.argmax(dim=1) != nearest
        assert misled.sum() > N // 10, f"the attack must mislead a search by {dtype} scores"

    check_exact(backend, x, codebook)
    if backend == "triton":  # PyTorch's scores are float32
        assert steps["certified"] < N, "the attack must leave a row uncertified"


def test_every_step_of_the_search_is_attacked(backend: str, steps: Counter[str]) -> None:
    attacks = (gaussian(), shell(1e-3), shell(1e-6), (gaussian()[0], gaussian()[1][:1].expand(K, D)))
    for x, codebook in attacks:
        check_exact(backend, x, codebook)
    assert steps.total() == len(attacks) * N
    assert all(steps[step] for step in STEPS), f"a step decided no row: {steps}"


@pytest.mark.parametrize("name", DATA_NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_data_set_in_every_dtype(backend: str, steps: Counter[str], name: str, dtype: torch.dtype) -> None:
    x, codebook = make_search_data(name, N, K, D, dtype=dtype, seed=3)
    check_exact(backend, x, codebook)
    assert steps.total() == N
    if dtype == torch.float32:
        meant_for = MEANT_FOR.get(name, {"certified"})
        assert any(steps[step] for step in meant_for), f"{name} is meant to be {meant_for}: {steps}"


@pytest.mark.parametrize("offset", [1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("spread", [1.0, 1e-2])
def test_offsets_far_beyond_the_spread(backend: str, offset: float, spread: float) -> None:
    x, codebook = gaussian()
    check_exact(backend, spread * x + offset, spread * codebook + offset)


@pytest.mark.parametrize("offset", [1e2, 1e6])
def test_codes_offset_from_the_vectors(backend: str, offset: float) -> None:
    x, codebook = gaussian()
    check_exact(backend, x, codebook + offset)
    check_exact(backend, x + offset, codebook)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 2.0**-126),
        (torch.float32, 1e-40),
        (torch.float32, 1e-44),
        (torch.float16, 2.0**-14),
        (torch.float16, 1e-6),
        (torch.bfloat16, 1e-39),
    ],
)
def test_subnormals(backend: str, dtype: torch.dtype, scale: float) -> None:
    if backend == "triton" and INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter converts bfloat16 subnormals to other numbers")
    x, codebook = gaussian(dtype=torch.float64)
    check_exact(backend, (scale * x).to(dtype), (scale * codebook).to(dtype))


def test_subnormal_vectors_among_normal_codes(backend: str) -> None:
    x, codebook = gaussian()
    check_exact(backend, 1e-40 * x, codebook)
    check_exact(backend, x, 1e-40 * codebook)


@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1e-15, 1e-10, 1e10, 1e15, 1e19, 1e30, 1e37])
def test_scales_across_the_range_of_float32(backend: str, scale: float) -> None:
    x, codebook = gaussian()
    check_exact(backend, scale * x, scale * codebook)


@pytest.mark.parametrize("huge", [1e4, 1e20, 3e38, *([] if INTERPRETED else [1e10])])
def test_one_huge_entry(backend: str, huge: float) -> None:
    x, codebook = gaussian()
    x[:, 3] = torch.where(torch.arange(N) % 2 == 0, huge, -huge)
    check_exact(backend, x, codebook)
    x, codebook = gaussian()
    codebook[5, 2] = huge
    check_exact(backend, x, codebook)
    x[7] = codebook[5]
    check_exact(backend, x, codebook)


def test_rows_of_very_different_sizes(backend: str) -> None:
    x, codebook = gaussian()
    sizes = torch.logspace(-38, 37, N)[:, None]
    check_exact(backend, sizes * x, codebook)
    check_exact(backend, x, torch.logspace(-38, 37, K)[:, None] * codebook)


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float16, 65504.0), (torch.bfloat16, 3.3895e38), (torch.float32, 3.4028e38)]
)
def test_values_at_the_edge_of_the_format(backend: str, dtype: torch.dtype, limit: float) -> None:
    signs = torch.randint(0, 2, (N + K, D), generator=seeded(), dtype=torch.float64) * 2 - 1
    values = (limit * signs * (1 - torch.rand(N + K, D, generator=seeded(1), dtype=torch.float64) / 8)).to(dtype)
    check_exact(backend, values[:N], values[N:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_codes_that_differ_in_the_last_bit(backend: str, dtype: torch.dtype, offset: float) -> None:
    x, codebook = make_search_data("near-duplicates", N, K, D, dtype=dtype, seed=1)
    check_exact(backend, x + offset, codebook + offset)
    check_exact(backend, codebook[:N], codebook)


def test_many_codes_within_one_ulp(backend: str) -> None:
    generator = seeded()
    bits = torch.ones(256, D).view(torch.int32) + torch.randint(0, 2, (256, D), generator=generator, dtype=torch.int32)
    codebook = bits.view(torch.float32)
    check_exact(backend, 1 + 2.0**-20 * torch.randn(N, D, generator=generator), codebook)


@pytest.mark.parametrize("dtype", DTYPES)
def test_identical_codes_give_the_lowest_index(backend: str, steps: Counter[str], dtype: torch.dtype) -> None:
    x, codebook = gaussian(dtype=dtype)
    codebook[64:128] = codebook[:64].flip(0)
    found = check_exact(backend, x, codebook)
    assert torch.equal(found.indices, brute_force_nearest(x, codebook))
    assert not ((found.indices >= 64) & (found.indices < 128)).any()
    has_twin = found.indices < 64
    assert has_twin.any()
    assert steps["certified"] <= (~has_twin).sum(), "a tie was certified"


def test_zero_and_minus_zero_are_identical(backend: str) -> None:
    codebook = torch.zeros(20, D)
    codebook[:10] = -0.0
    assert (check_exact(backend, gaussian()[0], codebook).indices == 0).all()


@pytest.mark.parametrize("value", [0.0, 1e-42, -3.3e38, *([] if INTERPRETED else [1.0, 1e-30, 1e30, -65504.0])])
def test_all_codes_equal(backend: str, steps: Counter[str], value: float) -> None:
    codebook = torch.full((K, D), value)
    assert (check_exact(backend, gaussian()[0], codebook).indices == 0).all()
    assert (check_exact(backend, codebook[:3], codebook).indices == 0).all()
    assert steps["certified"] == 0, "a tie was certified"


def test_small_integers_tie_and_the_lowest_index_wins(backend: str) -> None:
    generator = seeded()
    x = torch.randint(-2, 3, (5 * N, 4), generator=generator).float()
    codebook = torch.randint(-2, 3, (K, 4), generator=generator).float()
    distances = (x[:, None] - codebook).square().sum(dim=2)
    ties = (distances == distances.amin(dim=1, keepdim=True)).sum(dim=1)
    assert (ties > 1).sum() > N, "the attack must tie"

    found = check_exact(backend, x, codebook)
    assert torch.equal(found.indices, distances.argmin(dim=1))  # exact on integers, and the first of equals
    assert torch.equal(found.sq_distances, distances.amin(dim=1))


def test_midpoints_moved_by_one_ulp(backend: str) -> None:
    codebook = gaussian()[1]
    pairs = torch.randint(0, K, (N, 2), generator=seeded(5))
    middle = (codebook[pairs[:, 0]] + codebook[pairs[:, 1]]) / 2
    for x in (middle, torch.nextafter(middle, codebook[pairs[:, 0]]), torch.nextafter(middle, codebook[pairs[:, 1]])):
        check_exact(backend, x, codebook)
        check_exact(backend, x, codebook[:2])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("num_codes", [3, K] if INTERPRETED else [2, 3, 5, K])
def test_nan_and_inf(backend: str, poison: float, num_codes: int) -> None:
    x, codebook = gaussian()
    codebook = codebook[:num_codes]
    bad_x, bad_codebook = x.clone(), codebook.clone()
    bad_x[::3, 2] = poison
    bad_codebook[::2, 1] = poison
    for vectors, codes in itertools.product((x, bad_x), (codebook, bad_codebook)):
        check_exact(backend, vectors, codes)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("num_codes", [1, 2, K])
def test_no_finite_code(backend: str, poison: float, num_codes: int) -> None:
    codebook = torch.full((num_codes, D), poison)
    assert (check_exact(backend, gaussian()[0], codebook).indices == 0).all()


def test_the_only_finite_code_is_chosen(backend: str) -> None:
    codebook = torch.full((K, D), torch.nan)
    codebook[77] = 1.0
    assert (check_exact(backend, gaussian()[0], codebook).indices == 77).all()


def test_the_only_finite_code_is_chosen_however_far(backend: str) -> None:
    codebook = torch.full((K, D), torch.inf)
    codebook[77] = 3e38
    assert (check_exact(backend, -3e38 * gaussian()[0].sign(), codebook).indices == 77).all()
