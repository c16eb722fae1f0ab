"""A numpy model of the scan on tensor cores: fp16 products, a truncating accumulator, packed positions.

The accumulator takes `group` products at a time. These and the running sum are aligned to the largest exponent among
them, each is truncated `fraction_bits` bits below that exponent, the truncated values are added without error, and the
sum is truncated to float32's 24 bits. Ampere has groups of 8 with 24 fraction bits; Hopper and Blackwell have groups of
16 with 25. Sources: MMA-Sim (Xie et al. 2025, arXiv:2511.10909), a bit-exact model; Fasi, Higham, Mikaitis, Pranesh,
"Numerical behavior of NVIDIA tensor cores", PeerJ Computer Science 7 (2021).

Where the sources differ, the model takes the larger error: the exponent of a product is the larger of its own and the
sum of its factors' (a subnormal factor counts as 2^-14).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ACCUMULATORS = [(8, 24), (8, 25), (16, 24), (16, 25)]
"""(group, fraction_bits) of the accumulators that a bound has to cover."""

_NO_EXPONENT = -(10**6)
_LARGEST_EXPONENT = 14  # rows and codebook are scaled to magnitudes below 2^14


def truncating_product(left: Array, right: Array, start: Array, *, group: int, fraction_bits: int) -> Array:
    """Compute start + left @ right.T as a tensor core does.

    Args:
        left: [N, D], values of float16.
        right: [K, D], values of float16.
        start: [N, K], values of float32, the initial accumulator.
        group: products added at once.
        fraction_bits: bits kept below the largest exponent.

    Returns:
        [N, K], values of float32.
    """
    total = start.copy()
    for first in range(0, left.shape[1], group):
        part = slice(first, first + group)
        products = left[:, None, part] * right[None, :, part]  # [N, K, group], exact
        factor_exponents = _exponents(left[:, None, part], least=-14) + _exponents(right[None, :, part], least=-14)
        product_exponents = np.where(products == 0, _NO_EXPONENT, np.maximum(factor_exponents, _exponents(products)))
        largest = np.maximum(product_exponents.max(axis=2), _exponents(total))
        quantum = np.ldexp(1.0, np.maximum(largest, -900) - fraction_bits)
        cut_products = np.trunc(products / quantum[:, :, None]).sum(axis=2)
        total = _cut_to_float32((cut_products + np.trunc(total / quantum)) * quantum)
    return total


def _exponents(values: Array, least: int = _NO_EXPONENT) -> NDArray[np.int64]:
    """floor(log2(|v|)), at least `least`; _NO_EXPONENT for 0."""
    exponents = np.frexp(values)[1].astype(np.int64) - 1
    return np.where(values == 0, _NO_EXPONENT, np.maximum(exponents, least))


def _cut_to_float32(values: Array) -> Array:
    """Round towards zero to 24 significant bits."""
    mantissas, exponents = np.frexp(values)
    return np.ldexp(np.trunc(np.ldexp(mantissas, 24)), exponents - 24)


def pack(scores: Array, bits: int, position: int) -> Array:
    """Write `position` into the lowest `bits` bits of float32 scores."""
    mask = np.int32((1 << bits) - 1)
    raw = scores.astype(np.float32).view(np.int32)
    return ((raw & ~mask) | (np.int32(position) & mask)).view(np.float32).astype(np.float64)


@dataclass(frozen=True)
class Prepared:
    """Prepared rows and codes in scaled units, and their rounding errors.

    Attributes:
        rows: [N, D] float16 values x', each row with its own power of two.
        codes: [K, D] float16 values c', with one power of two.
        half_norms: [N, K] float32 values of h, scaled as the row's scores are.
        true_scores: [N, K], X·C - h without rounding.
        row_residuals: [N], r_x, the norm of a row's rounding error.
        code_norm, code_residual, rounded_code_norm: C, R, C', maxima over the codes.
        half_norm: [N], H, scaled as the row's scores are.
    """

    rows: Array
    codes: Array
    half_norms: Array
    true_scores: Array
    row_residuals: Array
    code_norm: float
    code_residual: float
    rounded_code_norm: float
    half_norm: Array

    def error_bound(self, *, packed_bits: int, half_norm_in_accumulation: bool = True) -> Array:
        """E of each row [N]; see vq_kernels/search/triton/common.py.

        Args:
            packed_bits: b, the mantissa bits that hold the position.
            half_norm_in_accumulation: False leaves H out of the accumulator's term, which makes the bound too small.
        """
        code_dim = self.rows.shape[1]
        products = np.linalg.norm(self.rows, axis=1) * self.rounded_code_norm
        accumulated = products + self.half_norm if half_norm_in_accumulation else products
        return (
            self.row_residuals * self.code_norm
            + np.linalg.norm(self.rows, axis=1) * self.code_residual
            + (code_dim + 16) * 2.0**-23 * accumulated
            + (2.0**packed_bits if packed_bits else 0.0) * 2.0**-23 * (products + self.half_norm)
            + 2.0**-23 * self.half_norm
            + 2.0**-60
        )


def prepare(x: Array, codebook: Array) -> Prepared:
    """Shift by the codebook's mean, scale below 2^14 and round to fp16.

    Args:
        x: [N, D], values of float32.
        codebook: [K, D], values of float32.
    """
    mean = codebook.mean(axis=0).astype(np.float32).astype(np.float64)
    shifted_codes = codebook - mean
    code_exponent = _LARGEST_EXPONENT - 1 - _largest_exponent(np.abs(shifted_codes).max())
    scaled_codes = np.ldexp(shifted_codes, code_exponent)
    codes = scaled_codes.astype(np.float16).astype(np.float64)
    half_norms = 0.5 * np.square(scaled_codes).sum(axis=1)

    shifted_rows = x - mean
    largest = np.array([_largest_exponent(value) for value in np.abs(shifted_rows).max(axis=1)])
    row_exponents = np.minimum(_LARGEST_EXPONENT - 1 - largest, code_exponent + 20)[:, None]
    scaled_rows = np.ldexp(shifted_rows, row_exponents)
    rows = scaled_rows.astype(np.float32).astype(np.float16).astype(np.float64)
    true_half_norms = np.ldexp(half_norms[None, :], row_exponents - code_exponent)  # [N, K]
    return Prepared(
        rows=rows,
        codes=codes,
        half_norms=true_half_norms.astype(np.float32).astype(np.float64),
        true_scores=scaled_rows @ scaled_codes.T - true_half_norms,
        row_residuals=np.linalg.norm(scaled_rows - rows, axis=1),
        code_norm=float(np.linalg.norm(scaled_codes, axis=1).max()),
        code_residual=float(np.linalg.norm(scaled_codes - codes, axis=1).max()),
        rounded_code_norm=float(np.linalg.norm(codes, axis=1).max()),
        half_norm=true_half_norms.max(axis=1),
    )


def _largest_exponent(value: float) -> int:
    """floor(log2(value)), 0 for 0."""
    return int(np.frexp(value)[1]) - 1 if value else 0
