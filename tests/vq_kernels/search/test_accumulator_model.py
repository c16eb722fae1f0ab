"""The bound E of the 16-bit scan against a model of the tensor cores' truncating accumulator."""

import numpy as np
import pytest
import torch

from benchmarks.data import make_search_data
from tests.vq_kernels.search.accumulator_model import ACCUMULATORS, Array, Prepared, pack, prepare, truncating_product

N, K = 24, 96

CASES = [
    *(
        (name, code_dim)
        for name in ("gaussian", "clustered", "offset-3", "offset-1000", "uniform")
        for code_dim in (8, 100)
    ),
    *((name, 512) for name in ("gaussian", "clustered")),
    *(
        (name, 64)
        for name in ("near the mean", "far from the mean", "one huge entry", "one huge code", "all the same sign")
    ),
]


def vectors(name: str, code_dim: int) -> tuple[Array, Array]:
    """x [N, D] and a codebook [K, D] of float32 values, as float64."""
    drawn = name if " " not in name else "gaussian"
    x, codebook = make_search_data(drawn, N, K, code_dim, seed=2)
    if name == "near the mean":
        x = codebook.mean(dim=0) + 1e-5 * x  # products far below h, truncated relative to h's exponent
    elif name == "far from the mean":
        x = 1e4 * x
    elif name == "one huge entry":
        x[:, 0] = 1e4
    elif name == "one huge code":
        codebook[3] *= 1e4
    elif name == "all the same sign":
        x, codebook = x.abs(), codebook.abs()
    return x.double().numpy(), codebook.double().numpy()


def largest_error(prepared: Prepared, group: int, fraction_bits: int, packed_bits: int) -> Array:
    """The largest |packed score - true score| of each row [N], over the codes and the extreme positions."""
    scores = truncating_product(
        prepared.rows, prepared.codes, -prepared.half_norms, group=group, fraction_bits=fraction_bits
    )
    positions = {0, (1 << packed_bits) - 1} if packed_bits else {0}
    errors = [np.abs(pack(scores, packed_bits, position) - prepared.true_scores).max(axis=1) for position in positions]
    return np.max(errors, axis=0)


def test_accumulator_truncates_below_its_fraction_bits() -> None:
    ones, start = np.ones((1, 8)), np.array([[1.0]])

    def add(products: list[float], bits: int) -> float:
        return float(truncating_product(ones, np.array([products]), start, group=8, fraction_bits=bits)[0, 0])

    tiny = 2.0**-24
    assert add([1.0, 2.0, 3.0, -4.0, 0.0, 0.0, 0.0, 0.0], 24) == 3.0
    assert add([tiny] * 8, 24) == 1 + 2.0**-21  # eight halves of an ulp, each kept
    assert add([tiny] + [0.0] * 7, 24) == 1.0  # kept by the alignment, truncated by float32
    assert add([-tiny] + [0.0] * 7, 24) == 1 - tiny  # below 1, float32 has the bit
    assert (
        truncating_product(ones * 2.0**-12, ones * 1.5 * 2.0**-13, start, group=8, fraction_bits=24) == 1.0
    )  # eight times 0.75 quanta, each truncated to 0, though their sum is six


def test_accumulator_is_exact_on_small_integers() -> None:
    generator = np.random.default_rng(0)
    left, right = generator.integers(-9, 10, (5, 40)).astype(float), generator.integers(-9, 10, (7, 40)).astype(float)
    for group, fraction_bits in ACCUMULATORS:
        scores = truncating_product(left, right, np.zeros((5, 7)), group=group, fraction_bits=fraction_bits)
        assert np.array_equal(scores, left @ right.T)


@pytest.mark.parametrize(("name", "code_dim"), CASES)
@pytest.mark.parametrize("packed_bits", [0, 3, 8])
def test_score_errors_are_within_the_bound(name: str, code_dim: int, packed_bits: int) -> None:
    prepared = prepare(*vectors(name, code_dim))
    bound = prepared.error_bound(packed_bits=packed_bits)
    for group, fraction_bits in ACCUMULATORS:
        error = largest_error(prepared, group, fraction_bits, packed_bits)
        assert (error <= bound).all(), f"{(error / bound).max():.2f} of the bound with {group=}, {fraction_bits=}"


def heavy_half_norms(code_dim: int) -> Prepared:
    """Rows and codes exact in fp16, with every product slightly below the quantum that h imposes."""
    codes = np.ones((4, code_dim))
    products = 2.0**-24 * (1 - 2.0**-8)  # times the exponent of h
    half_norm = 2.0**10
    rows = np.full((3, code_dim), half_norm * products)
    half_norms = np.full((3, 4), half_norm)
    return Prepared(
        rows=rows,
        codes=codes,
        half_norms=half_norms,
        true_scores=rows @ codes.T - half_norms,
        row_residuals=np.zeros(3),
        code_norm=code_dim**0.5,
        code_residual=0.0,
        rounded_code_norm=code_dim**0.5,
        half_norm=half_norms.max(axis=1),
    )


@pytest.mark.parametrize("code_dim", [64, 512, 4096])
def test_a_bound_without_the_half_norm_in_the_accumulation_is_too_small(code_dim: int) -> None:
    prepared = heavy_half_norms(code_dim)
    assert np.array_equal(prepared.rows, prepared.rows.astype(np.float16))
    error = largest_error(prepared, group=8, fraction_bits=24, packed_bits=0)
    assert (error > 3 * prepared.error_bound(packed_bits=0, half_norm_in_accumulation=False)).all()
    assert (error <= prepared.error_bound(packed_bits=0)).all()


@pytest.mark.parametrize(("twins_apart", "least_certified", "misled"), [(None, 0.9, False), (1e-3, 0.4, True)])
def test_certified_rows_of_the_model_are_right(twins_apart: float | None, least_certified: float, misled: bool) -> None:
    x, codebook = make_search_data("clustered", 500, 256, 16, seed=4)
    if twins_apart is not None:
        codebook[:64] = codebook[64:128] + twins_apart * codebook[:64]
    prepared = prepare(x.double().numpy(), codebook.double().numpy())
    scores = truncating_product(prepared.rows, prepared.codes, -prepared.half_norms, group=8, fraction_bits=24)
    winners = torch.from_numpy(scores).topk(2, dim=1)
    certified = (winners.values[:, 0] - winners.values[:, 1]).numpy() > 2 * prepared.error_bound(packed_bits=0)
    right = winners.indices[:, 0].numpy() == prepared.true_scores.argmax(axis=1)
    assert right[certified].all()
    assert certified.mean() > least_certified
    assert right.all() != misled
