"""Where the first checks for a GPU run: on the GPU, or, with TRITON_INTERPRET=1, at small sizes in the interpreter.

VQ_KERNELS_SMALL_TESTS=1 takes the small sizes on a GPU too, for compute-sanitizer.
"""

import os

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SMALL = INTERPRETED or os.environ.get("VQ_KERNELS_SMALL_TESTS") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter computes in numpy, which warns of Inf
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]


def gaussian(n: int, k: int, d: int, *, offset: float = 0.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x [n, d] and a codebook [k, d], drawn on the CPU."""
    generator = torch.Generator().manual_seed(0)
    return tuple((torch.randn(rows, d, generator=generator) + offset).to(DEVICE, dtype) for rows in (n, k))
