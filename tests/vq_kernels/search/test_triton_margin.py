"""The margin of the Triton kernels against a model of the tensor cores' truncating accumulator.

The interpreter adds in float32 without truncation, so it cannot detect a bound that is too small. Here x', c', h and E
come from the kernels, and the scores from the model.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from tests.vq_kernels.search.accumulator_model import ACCUMULATORS, Array, pack, truncating_product
from tests.vq_kernels.search.exactness import device_of, require_backend
from tests.vq_kernels.search.test_accumulator_model import CASES, vectors

N, K = 24, 96


@pytest.fixture
def device() -> str:
    """The device of the Triton kernels."""
    require_backend("triton")
    return device_of("triton")


# A float16 codebook is not shifted if that gives the smaller E.
SIXTEEN_BIT_CASES = (("gaussian", 8), ("gaussian", 512), ("offset-3", 100), ("offset-1000", 8), ("near the mean", 64))
OWN_CASES = ("rows far smaller than the codes", "codes far smaller than the rows", "subnormal codes", "equal products")


def attack(name: str, code_dim: int) -> tuple[Array, Array]:
    """Vectors of test_accumulator_model.py, and some that attack the preparation of rows."""
    if name == "equal products":  # each slightly less than the accumulator keeps next to h
        signs = np.resize([1.0, -1.0], (K, 1))
        return np.full((N, code_dim), 2.0**-18 * (2 - 2.0**-9)), signs * np.ones(code_dim)
    x, codebook = vectors("gaussian" if name in OWN_CASES else name, code_dim)
    if name == "rows far smaller than the codes":
        return codebook.mean(axis=0) + 1e-9 * x, codebook
    if name == "codes far smaller than the rows":
        return 1e15 * x, 1e-5 * codebook
    if name == "subnormal codes":
        return 1e-38 * x, 1e-39 * codebook
    return x, codebook


class Checked(NamedTuple):
    """Per row [N]: the largest error with any accumulator, E, and the accumulation term of H in E."""

    error: Array
    bound: Array
    half_norm_term: Array


def check(x: torch.Tensor, codebook: torch.Tensor) -> Checked:
    """The errors of x [N, D] and codebook [K, D], prepared by the kernels and summed by the model."""
    from tests.vq_kernels.search.triton_rows import FEW_ROWS, rounded_rows, row_ratios, scan_in_two, unrounded_scores
    from vq_kernels.search.triton.launch import prepare
    from vq_kernels.search.triton.prepare import TritonCodebook

    code_dim = x.shape[1]
    with np.errstate(all="ignore"):  # the interpreter computes in numpy
        prepared = TritonCodebook(*prepare(codebook))
        plan, _, margins, memory = scan_in_two(x, codebook, prepared, FEW_ROWS)

    rows, codes = as_array(rounded_rows(memory)), as_array(prepared.codes16)[:K, :code_dim]
    ratios = as_array(row_ratios(x, prepared))
    half_norms = as_array(prepared.half_norms)[None, :K] * ratios
    true_scores = as_array(unrounded_scores(x, codebook, prepared))
    errors = []
    for group, fraction_bits in ACCUMULATORS:
        scores = truncating_product(rows, codes, -half_norms, group=group, fraction_bits=fraction_bits)
        for position in (0, plan.tile_mask):
            packed = pack(scores, plan.tile_mask.bit_length(), position)
            errors.append(np.abs(packed - true_scores).max(axis=1))
    half_norm_term = (code_dim + 16) * 2.0**-23 * float(prepared.bounds[3]) * ratios[:, 0]
    return Checked(np.max(errors, axis=0), as_array(margins) / 2, half_norm_term)


def as_array(tensor: torch.Tensor) -> Array:
    return tensor.cpu().double().numpy()


@pytest.mark.parametrize(
    ("name", "code_dim", "codebook_dtype"),
    [
        *((*case, torch.float32) for case in CASES),
        *((*case, torch.float16) for case in SIXTEEN_BIT_CASES),
        *((name, 64, dtype) for name in OWN_CASES for dtype in (torch.float32, torch.float16)),
    ],
)
def test_score_errors_are_within_the_margin(device: str, name: str, code_dim: int, codebook_dtype: torch.dtype) -> None:
    x, codebook = (torch.from_numpy(values).float().to(device) for values in attack(name, code_dim))
    checked = check(x, codebook.to(codebook_dtype))
    assert (checked.error <= checked.bound).all(), f"{(checked.error / checked.bound).max():.2f} of the bound"


@pytest.mark.parametrize("name", ["near the mean", "equal products"])
def test_attacks_detect_a_margin_without_the_half_norm_in_the_accumulator(device: str, name: str) -> None:
    x, codebook = (torch.from_numpy(values).float().to(device) for values in attack(name, 64))
    checked = check(x, codebook)
    assert (checked.error > checked.bound - checked.half_norm_term).any()
