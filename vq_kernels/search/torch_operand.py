"""Both sides of the PyTorch backend's matrix product: the codebook and the rows, shifted, scaled, with their errors.

The nearest code of x maximises S_k = (x - m)·(c_k - m) - ½‖c_k - m‖², where m is the codebook's mean. A row
[x - m, 1, ‖x - m‖] times a code's [c_k - m, E'_k - ½‖c_k - m‖², E''_k] is S_k plus the bound E_k = E'_k + ‖x - m‖·E''_k
of all that rounding does to it: an upper bound U_k >= S_k. docs/exactness.md derives it.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vq_kernels.search.largest_two import padded
from vq_kernels.search.precision import float32_products_are_exact_enough

_UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
_ROW_LIMIT = {torch.float32: 2.0**30, torch.float64: 2.0**400}  # longer rows (in units of the codebook) are not scanned
_NEVER = {torch.float32: -(2.0**100), torch.float64: -(2.0**900)}  # the score of a code that must not win
_TINY = {torch.float32: 2.0**-100, torch.float64: 2.0**-900}  # covers every underflow, even flushed to zero
_HIDDEN_NORM = 2.0**-50  # what squares that underflow may take from a norm
_LARGEST_FLOAT32_DIM = 1 << 15  # up to it the 1 % that the errors are raised by covers the smaller terms
_SHORTEST_RADIUS, _LONGEST_RADIUS = 2.0**-12, 2.0**12  # a codebook whose codes leave these once shifted is scaled


class CodebookOperand(NamedTuple):
    """The codebook as a scan reads it: shifted by its mean, scaled to a common size, with its error bounds."""

    scale: Tensor  # [1], a power of two
    minus_mean: Tensor  # [D], times the scale
    matrix: Tensor  # [K padded, D + 2]: the scaled code, -h + its error, the error for a unit of a row's norm
    error_constant: Tensor  # [K]

    @property
    def lowest_threshold(self) -> float:
        """Below the lower bound of every finite code's score, above that of any other."""
        return _NEVER[self.matrix.dtype] / 2

    def usable(self, num_codes: int) -> Tensor:
        """[K] bool: which of the num_codes codes are finite."""
        return self.matrix[:num_codes, -2] != _NEVER[self.matrix.dtype]

    def errors(self, indices: Tensor, norms: Tensor) -> Tensor:
        """The bounds E of the errors of the scores of codes indices with rows of these norms, [N] each."""
        return torch.addcmul(self.error_constant[indices], norms, self.matrix[:, -1][indices])

    def largest_errors(self, norms: Tensor) -> Tensor:
        """Bounds that hold for every code's score with rows of these norms, [N]."""
        return torch.addcmul(self.error_constant.amax(), norms, self.matrix[:, -1].amax())

    def lower_bound(self, upper_bounds: Tensor, errors: Tensor, norms: Tensor) -> Tensor:
        """The lower bounds of the scores with these upper bounds and errors, for rows of these norms, [N] each.

        NaN for a row out of range. NaN compares as false: nothing is proved by it, and no code ruled out.
        """
        return torch.sub(upper_bounds, errors, alpha=2).masked_fill_(norms > _ROW_LIMIT[norms.dtype], torch.nan)


def prepare(codebook: Tensor, dtype: torch.dtype = torch.float32) -> CodebookOperand:
    """What a scan in `dtype` (float32 or float64) needs of the codebook [K, D]."""
    num_codes, code_dim = codebook.shape
    wide = codebook.to(torch.promote_types(codebook.dtype, dtype))
    num_padded = padded(num_codes)
    matrix = wide.new_empty(num_padded, code_dim + 2, dtype=dtype)
    centred = matrix[:num_codes, :code_dim]
    scale, not_usable = 1.0, None
    minus_mean, norms = _shift_and_scale(wide, wide.mean(dim=0), scale, centred)
    if not _SHORTEST_RADIUS <= float(norms.amax()) <= _LONGEST_RADIUS:  # nor if it is NaN
        scale, not_usable, minus_mean, norms = _shift_and_scale_any(wide, centred)

    error = 1.01 * (code_dim + 16) * (_UNIT[dtype] + _UNIT[torch.float64])
    sq_norms = norms.square()
    error_constant = (error * sq_norms).add_(_TINY[dtype])  # half for the product, half for the norm
    torch.sub(error_constant, sq_norms, alpha=0.5, out=matrix[:num_codes, code_dim])
    torch.mul(norms, error, out=matrix[:num_codes, code_dim + 1]).add_(error * _HIDDEN_NORM + _TINY[dtype])
    if not_usable is not None:
        matrix[:num_codes, code_dim].masked_fill_(not_usable, _NEVER[dtype])
    if num_padded > num_codes:
        matrix[num_codes:] = 0
        matrix[num_codes:, code_dim] = _NEVER[dtype]
    return CodebookOperand(matrix.new_full((1,), scale), minus_mean, matrix, error_constant)


def _shift_and_scale_any(wide: Tensor, centred: Tensor) -> tuple[float, Tensor | None, Tensor, Tensor]:
    """`_shift_and_scale` for a codebook of any size, or with codes that are not finite: the scale, which codes are not
    finite [K] bool (None: all are), minus the mean, the norms."""
    not_usable = None
    largest = _largest_entry(wide)
    if not math.isfinite(largest):
        usable = wide.isfinite().all(dim=1)
        not_usable = ~usable
        wide = torch.where(usable[:, None], wide, 0.0)
        largest = _largest_entry(wide)
        mean = (wide.sum(dim=0) / usable.sum().clamp(min=1)).nan_to_num_()
        wide = torch.where(usable[:, None], wide, mean)
    else:
        mean = wide.mean(dim=0).nan_to_num_()  # [D]; any vector would be as right: a sum that overflows, too
    scale = _power_of_two_for(largest)  # so that the difference does not overflow
    minus_mean, norms = _shift_and_scale(wide, mean, scale, centred)
    radius = float(norms.amax())
    if radius < _SHORTEST_RADIUS:
        scale = min(max(scale * _power_of_two_for(radius), 2.0**-100), 2.0**100)
        minus_mean, norms = _shift_and_scale(wide, mean, scale, centred)
    return scale, not_usable, minus_mean, norms


def _largest_entry(values: Tensor) -> float:
    """The largest magnitude; NaN or infinite where one is."""
    least, largest = (float(extreme) for extreme in torch.aminmax(values))
    return max(-least, largest)  # both are NaN, if one is


def _power_of_two_for(radius: float) -> float:
    """The power of two, within 2^±100, that brings the radius into [1, 2); 1 for a radius of 0, and for NaN."""
    return 2.0 ** (1 - math.frexp(min(max(radius, 2.0**-100), 2.0**100))[1]) if radius > 0 else 1.0


def _shift_and_scale(wide: Tensor, mean: Tensor, scale: float, centred: Tensor) -> tuple[Tensor, Tensor]:
    """Write (wide - mean)·scale to centred [K, D], each number rounded once; -mean·scale as the rows will add it [D],
    and the codes' norms [K]."""
    minus_mean = (mean * -scale).to(centred.dtype)
    torch.addcmul(minus_mean.to(wide.dtype), wide, wide.new_full((1,), scale), out=centred)
    return minus_mean, torch.linalg.vector_norm(centred, dim=1)


def float32_will_do(x: Tensor) -> bool:
    """Whether the error bounds hold for float32 products of rows like x [N, D], here and now."""
    return x.shape[1] <= _LARGEST_FLOAT32_DIM and float32_products_are_exact_enough(x.device.type)


def augment(x: Tensor, operand: CodebookOperand, left: Tensor, norms: Tensor) -> Tensor:
    """[(x - mean)·scale, 1, norm] for x [N, D], in the first N rows of left [.., D + 2]; the norms also in norms."""
    num_rows, code_dim = x.shape
    left, norms = left[:num_rows], norms[:num_rows]
    shifted = left[:, :code_dim]
    # Scaled first: a difference flushed to zero afterwards is small beside the codebook. All in the wider of both
    # dtypes, so that it is rounded once.
    wider = torch.promote_types(x.dtype, left.dtype)
    torch.addcmul(operand.minus_mean.to(wider), x.to(wider), operand.scale.to(wider), out=shifted)
    torch.linalg.vector_norm(shifted, dim=1, out=norms)
    norms.add_(_HIDDEN_NORM)
    left[:, code_dim] = 1
    left[:, code_dim + 1] = norms
    return left
