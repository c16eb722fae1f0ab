"""Vector quantization for PyTorch whose nearest-code search is exact."""

from vq_kernels.codebook_step import attach_gap_step, gap_parameter_group
from vq_kernels.quantize import Quantized, vector_quantize
from vq_kernels.quantizer import VectorQuantizer, perplexity
from vq_kernels.search import (
    NearestCode,
    PreparedCodebook,
    SearchStatistics,
    nearest_code,
    search_statistics,
    select_backend,
)

__all__ = [
    "NearestCode",
    "PreparedCodebook",
    "Quantized",
    "SearchStatistics",
    "VectorQuantizer",
    "attach_gap_step",
    "gap_parameter_group",
    "nearest_code",
    "perplexity",
    "search_statistics",
    "select_backend",
    "vector_quantize",
]
