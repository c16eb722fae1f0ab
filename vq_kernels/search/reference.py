"""The reference that defines "exact": brute force in float64, by direct differences; and an audit by it."""

from typing import NamedTuple

import torch
from torch import Tensor

from vq_kernels.search.backend import has_float64
from vq_kernels.search.validation import check_pair

# Distances held at a time. On a CPU they fit into a core's caches; a GPU needs more work per launch.
_BUFFER_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}


def brute_force_nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """Find the nearest code of each row by float64 brute force, with the lowest index on a tie.

    Args:
        x: [N, D], any floating dtype. A row with NaN or Inf gets index 0.
        codebook: [K, D], any floating dtype. A code with NaN or Inf is never chosen, unless no code is finite.

    Returns:
        indices [N], int64.
    """
    wide_codes = codebook.double()
    numbers = torch.arange(codebook.shape[0], device=x.device)
    unusable = ~wide_codes.isfinite().all(dim=1)  # [K]
    indices = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    rows = max(1, _BUFFER_ELEMENTS.get(x.device.type, 1 << 18) // codebook.shape[0])
    for start in range(0, x.shape[0], rows):
        block = x[start : start + rows].double()
        distances = torch.zeros(block.shape[0], codebook.shape[0], dtype=torch.float64, device=x.device)
        for d in range(x.shape[1]):  # one dimension at a time, without a [rows, K, D] tensor
            distances += (block[:, d, None] - wide_codes[None, :, d]).square_()
        distances.masked_fill_(unusable, torch.inf)
        least = distances.amin(dim=1, keepdim=True)
        first = torch.where(distances == least, numbers, codebook.shape[0]).amin(dim=1)
        indices[start : start + rows] = torch.where(block.isfinite().all(dim=1), first, 0)
    return indices


class Verification(NamedTuple):
    """What `verify` returns.

    Attributes:
        num_rows: the rows that were checked.
        num_wrong: the rows W among them whose index is not that of a nearest code.
        rows: [W] int64, their positions among all rows of x, flattened.
        nearest: [W] int64, the indices of their nearest codes.
        sq_distances: [W] float64, the squared distances to the codes at the given indices.
        least_sq_distances: [W] float64, the squared distances to the nearest codes.
    """

    num_rows: int
    num_wrong: int
    rows: Tensor
    nearest: Tensor
    sq_distances: Tensor
    least_sq_distances: Tensor


@torch.no_grad()
def verify(x: Tensor, codebook: Tensor, indices: Tensor) -> Verification:
    """Check whether each index is that of a nearest code. The indices may come from any quantizer.

    Distances are sums of float64 differences over the values as they are. An index is right if its distance equals the
    least one to within the rounding of these sums, (D + 2)·2⁻⁵² relative. This is slow: N·K·D operations without a
    matrix product.

    Args:
        x: [..., D], float32, float16, bfloat16 or float64.
        codebook: [K, D], on x's device.
        indices: [...], any integer dtype, in [0, K); -1 marks padding. Padding, and rows that hold NaN or Inf, are not
            checked.

    Returns:
        Verification(num_rows, num_wrong, rows, nearest, sq_distances, least_sq_distances).

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: a shape, the device or an index does not fit.
    """
    check_pair(x, codebook)
    if indices.dtype == torch.bool or indices.is_floating_point() or indices.is_complex():
        raise TypeError(f"indices must have an integer dtype, got {indices.dtype}")
    if indices.shape != x.shape[:-1]:
        raise ValueError(f"indices must be {tuple(x.shape[:-1])} to match x, got {tuple(indices.shape)}")
    if not has_float64(x.device):
        x, codebook = x.cpu(), codebook.cpu()
    rows, given = x.reshape(-1, x.shape[-1]), indices.reshape(-1).to(x.device, torch.int64)
    num_codes, code_dim = codebook.shape
    outside = given[(given < -1) | (given >= num_codes)]
    if outside.numel():
        raise ValueError(f"indices must be in [0, {num_codes}), or -1 for padding, got {int(outside[0])}")
    checked = ((given >= 0) & rows.isfinite().all(dim=1)).nonzero()[:, 0]
    rows, given = rows[checked], given[checked]
    nearest = brute_force_nearest(rows, codebook)
    found, least = (_sq_distances(rows, codebook, chosen) for chosen in (given, nearest))
    wrong = ~(found <= least * (1 + (code_dim + 2) * 2.0**-52)) & (given != nearest)
    parts = (part[wrong] for part in (checked, nearest, found, least))
    return Verification(rows.shape[0], int(wrong.sum()), *parts)


def _sq_distances(rows: Tensor, codebook: Tensor, indices: Tensor) -> Tensor:
    """[N] float64: of rows [N, D] to the codes at indices [N]."""
    return (rows.double() - codebook[indices].double()).square().sum(dim=1)
