"""Drop-in replacements for the quantizers of other libraries."""

from vq_kernels.compat.vector_quantize import LossBreakdown, VectorQuantize

__all__ = ["LossBreakdown", "VectorQuantize"]
