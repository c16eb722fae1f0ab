"""The reference that defines "exact": brute force in float64, by direct differences."""

import torch
from torch import Tensor

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
