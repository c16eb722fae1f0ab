"""Both sides of the scan on the CPU: codebook and rows, shifted and scaled, with error bounds.

The nearest code of x maximises S_k = (x - m)·(c_k - m) - ½‖c_k - m‖², where m is the mean of the codebook. The product
of the row [x - m, 1, ‖x - m‖] and the code [c_k - m, E'_k - ½‖c_k - m‖², E''_k] is S_k plus E_k = E'_k + ‖x - m‖·E''_k,
which bounds the rounding error: an upper bound U_k >= S_k. docs/explanations/exactness.md has the proof.

The code with the largest dot product maximises S_k = x·c_k. That is the same without m and ‖c_k‖, and with E'_k = 0.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vq_kernels.search.top2 import padded

_UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
ROW_LIMIT = 2.0**42
_ROW_LIMIT = {torch.float32: ROW_LIMIT, torch.float64: 2.0**400}  # scaled rows that are longer get no bound
NEVER = {torch.float32: -(2.0**100), torch.float64: -(2.0**900)}  # the score of a code that must not win
TINY = {torch.float32: 2.0**-100, torch.float64: 2.0**-900}  # covers every underflow, even when flushed to zero
HIDDEN_NORM = 2.0**-50  # covers what a norm loses to squares that underflow
_LARGEST_FLOAT32_DIM = 1 << 15  # up to it, the 1 % added to the errors covers the smaller terms
SHORTEST_RADIUS, LONGEST_RADIUS = 2.0**-12, 2.0**12  # codebooks with a longest code in between are not scaled
_CODE_LIMIT = {torch.float32: 2.0**42, torch.float64: 2.0**420}  # with a longer scaled code, no row gets a bound


class CodebookOperand(NamedTuple):
    """A codebook, shifted by its mean and scaled so that nothing overflows, with its error bounds."""

    scale: Tensor  # [1], a power of two
    minus_mean: Tensor  # [D], times the scale
    matrix: Tensor  # [K padded, D + 2]: c - m, E' - h, E'', all scaled
    error_constant: Tensor  # [K], E'

    @property
    def lowest_threshold(self) -> float:
        """A score above those of codes that are not finite, and below all others for rows in range."""
        return NEVER[self.matrix.dtype] / 2

    def usable(self, num_codes: int) -> Tensor:
        """Return [K] bool, which of the num_codes codes are finite."""
        return self.matrix[:num_codes, -2] != NEVER[self.matrix.dtype]

    def errors(self, indices: Tensor, norms: Tensor) -> Tensor:
        """Return E [N] for the codes at indices [N] and rows with norms [N]."""
        return torch.addcmul(self.error_constant[indices], norms, self.matrix[:, -1][indices])

    def largest_errors(self, norms: Tensor) -> Tensor:
        """Return bounds [N] that hold for every code, for rows with norms [N]."""
        return torch.addcmul(self.error_constant.amax(), norms, self.matrix[:, -1].amax())

    def row_scales(self, x: Tensor) -> Tensor:
        """Return what to multiply the rows [N, D] by, [1] or [N, 1], powers of two."""
        return self.scale

    def costs(self, x: Tensor, codes: Tensor) -> Tensor:
        """Return what decides between codes [P, D] for the rows x [P, D], both float64: the least of [P] wins."""
        return squared_distances(x, codes)

    def in_float64(self, codebook: Tensor) -> "CodebookOperand":
        """Return the same of codebook [K, D] for scans in float64."""
        return prepare(codebook, torch.float64)

    def lower_bound(self, upper_bounds: Tensor, errors: Tensor, norms: Tensor) -> Tensor:
        """Return the lower bounds U - 2·E of the scores, for rows with norms [N].

        A row out of range gets NaN, which compares as false: it certifies nothing and rules out no code.
        """
        return torch.sub(upper_bounds, errors, alpha=2).masked_fill_(norms > _ROW_LIMIT[norms.dtype], torch.nan)


class ProductOperand(CodebookOperand):
    """A codebook scaled for a search of the largest dot product. Rows have scales of their own."""

    __slots__ = ()

    def row_scales(self, x: Tensor) -> Tensor:
        """Return powers of two [N, 1] that bring the largest entry of each row into [1/2, 1)."""
        return power_of_two_below(x.abs().amax(dim=1, keepdim=True))

    def costs(self, x: Tensor, codes: Tensor) -> Tensor:
        """Return minus the dot products [P], of scaled vectors."""
        return (x * -self.row_scales(x)).mul_(codes * self.scale).sum(dim=1)

    def in_float64(self, codebook: Tensor) -> CodebookOperand:
        """Return the same of codebook [K, D] for scans in float64."""
        return prepare_products(codebook, torch.float64)


def prepare(codebook: Tensor, dtype: torch.dtype = torch.float32) -> CodebookOperand:
    """Prepare the codebook [K, D] for scans in `dtype` (float32 or float64)."""
    num_codes, code_dim = codebook.shape
    wide = codebook.to(torch.promote_types(codebook.dtype, dtype))
    matrix = wide.new_empty(padded(num_codes), code_dim + 2, dtype=dtype)
    centred = matrix[:num_codes, :code_dim]
    scale, minus_mean, not_usable = 1.0, wide.mean(dim=0).neg_().to(dtype), None
    norms = _shift_and_scale(wide, scale, minus_mean, centred)
    radius = float(norms.amax())
    if not is_moderate(radius):
        scale, minus_mean, not_usable, norms = _shift_and_scale_any(wide, centred)
        radius = float(norms.amax())
    error_constant = _write_bounds(matrix, norms, norms.square(), radius, not_usable)
    return CodebookOperand(matrix.new_full((1,), scale), minus_mean, matrix, error_constant)


def prepare_products(codebook: Tensor, dtype: torch.dtype = torch.float32) -> ProductOperand:
    """Prepare the codebook [K, D] for scans in `dtype` that look for the largest dot product."""
    num_codes, code_dim = codebook.shape
    wide = codebook.to(torch.promote_types(codebook.dtype, dtype))
    not_usable = ~wide.isfinite().all(dim=1)
    wide = wide.masked_fill(not_usable[:, None], 0)
    scale = power_of_two_below(wide.abs().amax())[None]
    matrix = wide.new_empty(padded(num_codes), code_dim + 2, dtype=dtype)
    torch.mul(wide, scale, out=matrix[:num_codes, :code_dim])
    norms = torch.linalg.vector_norm(matrix[:num_codes, :code_dim], dim=1)
    error_constant = _write_bounds(matrix, norms, torch.zeros_like(norms), 1.0, not_usable)
    return ProductOperand(scale, matrix.new_zeros(code_dim), matrix, error_constant)


def _write_bounds(matrix: Tensor, norms: Tensor, sq_norms: Tensor, radius: float, not_usable: Tensor | None) -> Tensor:
    """Write the last two columns of matrix [K padded, D + 2], and the padding. Return error_constant [K].

    norms [K] and sq_norms [K], or zeros for dot products, are those of the codes; radius is the largest norm.
    """
    dtype, num_codes, code_dim = matrix.dtype, norms.shape[0], matrix.shape[1] - 2
    error = error_factor(code_dim, dtype)
    error_constant = (error * sq_norms).add_(TINY[dtype])  # one half for the product, one for the norm
    torch.sub(error_constant, sq_norms, alpha=0.5, out=matrix[:num_codes, code_dim])
    torch.mul(norms, error, out=matrix[:num_codes, code_dim + 1]).add_(error * HIDDEN_NORM)
    if not radius <= _CODE_LIMIT[dtype]:
        matrix[:num_codes, code_dim:] = torch.nan  # no bounds, so every row is decided by direct differences
    if not_usable is not None:
        matrix[:num_codes, code_dim].masked_fill_(not_usable, NEVER[dtype])
    if matrix.shape[0] > num_codes:
        matrix[num_codes:] = 0
        matrix[num_codes:, code_dim] = NEVER[dtype]
    return error_constant


def is_moderate(radius: float) -> bool:
    """Whether a codebook whose longest centred code has this length needs no scale. NaN does."""
    return SHORTEST_RADIUS <= radius <= LONGEST_RADIUS


def error_factor(code_dim: int, dtype: torch.dtype) -> float:
    """The f of the error bounds."""
    return 1.01 * (code_dim + 16) * (_UNIT[dtype] + _UNIT[torch.float64])


def _shift_and_scale_any(wide: Tensor, centred: Tensor) -> tuple[float, Tensor, Tensor | None, Tensor]:
    """`_shift_and_scale` for codes of any magnitude, of which some may not be finite; these become 0 in centred.

    Returns:
        The scale, minus the mean [D], which codes are not finite [K] bool (or None), and the norms [K].
    """
    not_usable, num_usable = None, wide.shape[0]
    largest = _largest_entry(wide)
    if not math.isfinite(largest):
        not_usable = ~wide.isfinite().all(dim=1)
        num_usable = max(1, num_usable - int(not_usable.sum()))
        wide = wide.masked_fill(not_usable[:, None], 0)
        largest = _largest_entry(wide)
    scale = _power_of_two_for(largest)
    minus_mean = (wide * -scale).sum(dim=0).div_(num_usable).to(centred.dtype)  # scaled first: no sum overflows
    norms = _shift_and_scale(wide, scale, minus_mean, centred, not_usable)
    radius = float(norms.amax())
    if radius < SHORTEST_RADIUS:
        finer = min(max(scale * _power_of_two_for(radius), 2.0**-100), 2.0**100)
        minus_mean *= finer / scale
        scale = finer
        norms = _shift_and_scale(wide, scale, minus_mean, centred, not_usable)
    return scale, minus_mean, not_usable, norms


def _largest_entry(values: Tensor) -> float:
    """The largest magnitude; NaN or inf if a value is."""
    least, largest = (float(extreme) for extreme in torch.aminmax(values))
    return max(-least, largest)  # both are NaN if one value is


def _power_of_two_for(radius: float) -> float:
    """The power of two, within 2^±100, that scales the radius into [1, 2); 1 for 0 and NaN."""
    return 2.0 ** (1 - math.frexp(min(max(radius, 2.0**-100), 2.0**100))[1]) if radius > 0 else 1.0


def squared_distances(x: Tensor, codes: Tensor) -> Tensor:
    """Squared distances [P] from rows x [P, D] to codes [P, D], by direct differences."""
    return (x - codes).square_().sum(dim=1)


def power_of_two_below(sizes: Tensor) -> Tensor:
    """Powers of two that bring `sizes` into [1/2, 1); limited to the dtype's normal numbers. NaN and inf count as 1."""
    limit = 1 - math.frexp(torch.finfo(sizes.dtype).tiny)[1]
    exponents = torch.frexp(sizes.nan_to_num(1, 1)).exponent.clamp_(-limit, limit)
    return torch.ldexp(torch.ones_like(sizes), -exponents)


def _shift_and_scale(
    wide: Tensor, scale: float, minus_mean: Tensor, centred: Tensor, left_out: Tensor | None = None
) -> Tensor:
    """Write wide·scale + minus_mean to centred [K, D], and 0 for the codes left_out [K] bool. Return the norms [K]."""
    torch.addcmul(minus_mean.to(wide.dtype), wide, wide.new_full((1,), scale), out=centred)
    if left_out is not None:
        centred.masked_fill_(left_out[:, None], 0)
    norms: Tensor = torch.linalg.vector_norm(centred, dim=1)
    return norms


def augment(x: Tensor, operand: CodebookOperand, left: Tensor, norms: Tensor) -> Tensor:
    """Write [(x - mean)·scale, 1, norm] for x [N, D] to the first N rows of left [.., D + 2], and the norms to norms.

    Return those N rows.
    """
    num_rows, code_dim = x.shape
    left, norms = left[:num_rows], norms[:num_rows]
    shifted = left[:, :code_dim]
    # Scaled first, so that a difference flushed to zero is small compared to the codebook. In the wider dtype, so that
    # it is rounded once.
    wider = torch.promote_types(x.dtype, left.dtype)
    x = x.to(wider)
    torch.addcmul(operand.minus_mean.to(wider), x, operand.row_scales(x).to(wider), out=shifted)
    torch.linalg.vector_norm(shifted, dim=1, out=norms)
    norms.add_(HIDDEN_NORM)
    left[:, code_dim] = 1
    left[:, code_dim + 1] = norms
    return left


def float32_is_sufficient(x: Tensor) -> bool:
    """Whether the error bounds hold for float32 products of rows like x [N, D] with the current settings.

    They hold for float32 rounding only. `torch.set_float32_matmul_precision`, `torch.backends.*.fp32_precision` and
    their older forms all change the setting read here. If it allows TF32 or bfloat16, the search uses float64 instead.
    """
    backend = torch.backends.cuda if x.is_cuda else torch.backends.mkldnn
    return x.shape[1] <= _LARGEST_FLOAT32_DIM and backend.matmul.fp32_precision in ("ieee", "none")
