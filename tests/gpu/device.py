"""Where the first checks for a GPU run: on the GPU, or, with TRITON_INTERPRET=1, at small sizes in the interpreter."""

import os

import pytest
import torch
from torch import Tensor

SMALL = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not SMALL else "cpu"
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cpu" and not SMALL, reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes in numpy, which warns of Inf
]


def gaussian(n: int, k: int, d: int, *, offset: float = 0.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x [n, d] and a codebook [k, d], drawn on the CPU."""
    generator = torch.Generator().manual_seed(0)
    return tuple((torch.randn(rows, d, generator=generator) + offset).to(DEVICE, dtype) for rows in (n, k))
