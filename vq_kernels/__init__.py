"""Vector quantization for PyTorch whose nearest-code search is exact."""

from vq_kernels.compat import VectorQuantize
from vq_kernels.functional import Quantized, vector_quantize
from vq_kernels.learning.optim import attach_gap_step, gap_parameter_group
from vq_kernels.modules.codebook import perplexity
from vq_kernels.modules.residual_vector_quantizer import ResidualVectorQuantizer
from vq_kernels.modules.vector_quantizer import VectorQuantizer
from vq_kernels.search import (
    NearestCode,
    NearestCodes,
    PreparedCodebook,
    SearchStatistics,
    nearest_code,
    nearest_code_topk,
    search_statistics,
    select_backend,
)

__all__ = [
    "NearestCode",
    "NearestCodes",
    "PreparedCodebook",
    "Quantized",
    "ResidualVectorQuantizer",
    "SearchStatistics",
    "VectorQuantize",
    "VectorQuantizer",
    "attach_gap_step",
    "gap_parameter_group",
    "nearest_code",
    "nearest_code_topk",
    "perplexity",
    "search_statistics",
    "select_backend",
    "vector_quantize",
]
