"""Constants and small helpers that the Triton kernels share."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton.language as tl
from torch import Tensor

# Half norm of a code that must never win (NaN, Inf, past K). A row scales it by 2**-40 to 2**20, which leaves it
# finite and at least 2**64, while no true score passes 2**60.
LARGE_HALF_NORM = tl.constexpr(2.0**104)
# The greatest score of a row is below this only where no code is finite.
NO_FINITE_CODE = tl.constexpr(-(2.0**62))
# Below every score, packed or not; finite, so that differences of it are never NaN.
LOWEST_SCORE = tl.constexpr(-3.0e38)
# A margin that marks a row with NaN or Inf; true margins are positive.
ROW_NOT_FINITE = tl.constexpr(-1.0)
# The least float64 that rounds past float32.
FLOAT32_OVERFLOW = tl.constexpr(3.4028235677973366e38)

# Whether the compiler may turn a product and a sum into one fused multiply-add; every launch states it, since Triton
# 3.10 changes the default. True is the default until 3.9. A fused operation rounds once instead of twice, so the error
# bounds hold either way (docs/exactness.md).
ENABLE_FP_FUSION = True


def ceil_div(numerator: int, denominator: int) -> int:
    """The least whole number that is at least numerator / denominator."""
    return -(-numerator // denominator)


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes a CUDA tensor's device the current one, on which Triton launches; nothing to do on the CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
