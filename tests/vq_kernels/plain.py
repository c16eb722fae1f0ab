"""Quantizers that learn by the gradient of the loss and by nothing else, for tests of one feature at a time."""

from typing import Any

from vq_kernels import ResidualVectorQuantizer, VectorQuantizer

PLAIN: dict[str, Any] = {"init": "normal", "restart_after": 0, "ema_decay": None, "commitment_weight": 0.0}


def vector_quantizer(*sizes: int, **options: Any) -> VectorQuantizer:
    return VectorQuantizer(*sizes, **PLAIN | options)


def residual_quantizer(*sizes: int, **options: Any) -> ResidualVectorQuantizer:
    return ResidualVectorQuantizer(*sizes, **PLAIN | options)
