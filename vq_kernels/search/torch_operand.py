"""Both sides of the PyTorch backend's matrix product: the codebook and the rows, shifted, scaled, with their errors.

The nearest code of x maximises S_k = (x - m)·(c_k - m) - ½‖c_k - m‖², where m is the codebook's mean. A row
[x - m, 1, ‖x - m‖] times a code's [c_k - m, E'_k - ½‖c_k - m‖², E''_k] is S_k plus the bound E_k = E'_k + ‖x - m‖·E''_k
of all that rounding does to it: an upper bound U_k >= S_k. docs/exactness.md derives it.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vq_kernels.search.largest_two import num_slots

UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
ROW_LIMIT = {torch.float32: 2.0**30, torch.float64: 2.0**400}  # longer rows (in units of the codebook) are not scanned
NEVER = {torch.float32: -(2.0**100), torch.float64: -(2.0**900)}  # the score of a code that must not win
_TINY = {torch.float32: 2.0**-100, torch.float64: 2.0**-900}  # covers every underflow, even flushed to zero
_SHORTEST_RADIUS = 2.0**-12  # a codebook that is shorter once it is shifted is scaled anew


class CodebookOperand(NamedTuple):
    """The codebook as a scan reads it: shifted by its mean, scaled to a radius of about 1, with its error bounds."""

    scale: Tensor  # [1], a power of two
    mean: Tensor  # [D], times the scale
    matrix: Tensor  # [K padded, D + 2]: the scaled code, -h + its error, the error for a unit of a row's norm
    error_constant: Tensor  # [K]

    def usable(self, num_codes: int) -> Tensor:
        """[K] bool: which of the num_codes codes are finite."""
        return self.matrix[:num_codes, -2] != NEVER[self.matrix.dtype]

    def error(self, norms: Tensor, indices: Tensor) -> Tensor:
        """The error bounds of the scores of rows with these norms [N] and codes indices [N]."""
        return norms * self.matrix[:, -1][indices] + self.error_constant[indices]


def prepare(codebook: Tensor, dtype: torch.dtype = torch.float32) -> CodebookOperand:
    """What a scan in `dtype` (float32 or float64) needs of the codebook [K, D]."""
    num_codes, code_dim = codebook.shape
    wide = codebook.to(torch.promote_types(codebook.dtype, dtype))
    usable, mean = torch.ones(num_codes, dtype=torch.bool, device=codebook.device), wide.mean(dim=0)
    if not mean.isfinite().all():  # NaN or Inf, or an overflow: the latter's mean is far from the middle, but as right
        usable = wide.isfinite().all(dim=1)
        mean = torch.where(usable[:, None], wide, 0.0).sum(dim=0) / usable.sum().clamp(min=1)
        mean = mean.nan_to_num()
        wide = torch.where(usable[:, None], wide, mean)

    padded = -(-num_codes // num_slots(num_codes)) * num_slots(num_codes)
    matrix = wide.new_empty(padded, code_dim + 2, dtype=dtype)
    centred = matrix[:num_codes, :code_dim]
    least, largest = torch.aminmax(wide)
    scale = _power_of_two_for(torch.maximum(largest, -least))  # so that the difference does not overflow
    norms = _shift_and_scale(wide, mean, scale, centred)
    radius = norms.amax()
    if radius < _SHORTEST_RADIUS:
        scale = (scale * _power_of_two_for(radius).to(scale.dtype)).clamp(2.0**-100, 2.0**100)
        norms = _shift_and_scale(wide, mean, scale, centred)

    error = 1.01 * (code_dim + 16) * (UNIT[dtype] + UNIT[torch.float64])
    sq_norms = norms.square()
    error_constant = (error * sq_norms).add_(_TINY[dtype])  # half for the product, half for the norm
    matrix[:num_codes, code_dim] = torch.where(usable, error_constant - sq_norms / 2, NEVER[dtype])
    matrix[:num_codes, code_dim + 1] = error * norms + _TINY[dtype]
    matrix[num_codes:] = 0
    matrix[num_codes:, code_dim] = NEVER[dtype]
    return CodebookOperand(scale.to(dtype), (mean * scale).to(dtype), matrix, error_constant)


def _power_of_two_for(radius: Tensor) -> Tensor:
    """[1]: the power of two, within 2^±100, that brings the radius [] into [1, 2); 1 for a radius of 0."""
    exponent = math.frexp(min(max(float(radius), 2.0**-100), 2.0**100))[1] if radius > 0 else 1
    return radius.new_full((1,), 2.0 ** (1 - exponent))


def _shift_and_scale(wide: Tensor, mean: Tensor, scale: Tensor, centred: Tensor) -> Tensor:
    """Write (wide - mean)·scale to centred [K, D], each number rounded once; the codes' norms [K]."""
    shift = -(mean * scale).to(centred.dtype)  # as the rows will subtract it
    torch.addcmul(shift.to(wide.dtype), wide, scale, out=centred)
    norms: Tensor = torch.linalg.vector_norm(centred, dim=1)
    return norms


def augment(x: Tensor, operand: CodebookOperand, left: Tensor, norms: Tensor) -> Tensor:
    """[(x - mean)·scale, 1, norm] for x [N, D], in the first N rows of left [.., D + 2]; the norms also in norms."""
    num_rows, code_dim = x.shape
    left, norms = left[:num_rows], norms[:num_rows]
    shifted = left[:, :code_dim]
    # Scaled first: a difference flushed to zero afterwards is small beside the codebook. All in the wider of both
    # dtypes, so that it is rounded once.
    wider = torch.promote_types(x.dtype, left.dtype)
    torch.addcmul(-operand.mean.to(wider), x.to(wider), operand.scale.to(wider), out=shifted)
    torch.linalg.vector_norm(shifted, dim=1, out=norms)
    norms.add_(2.0**-50)  # what squares that underflowed may hide
    left[:, code_dim] = 1
    left[:, code_dim + 1] = norms
    return left
