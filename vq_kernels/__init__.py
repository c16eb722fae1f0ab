"""Vector quantization for PyTorch with an exact nearest-code search."""

import warnings
from typing import Any

from vq_kernels.compat import VectorQuantize
from vq_kernels.cosine import SimilarCode, most_similar_code
from vq_kernels.functional import Quantized, vector_quantize
from vq_kernels.learning.kmeans import KMeansResult, kmeans
from vq_kernels.learning.optim import attach_count_normalised_step, count_normalised_param_group
from vq_kernels.modules.base import QuantizerBase
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
from vq_kernels.search.reference import Verification, verify

__all__ = [
    "KMeansResult",
    "NearestCode",
    "NearestCodes",
    "PreparedCodebook",
    "Quantized",
    "ResidualVectorQuantizer",
    "SearchStatistics",
    "SimilarCode",
    "VectorQuantize",
    "VectorQuantizer",
    "Verification",
    "attach_count_normalised_step",
    "count_normalised_param_group",
    "kmeans",
    "most_similar_code",
    "nearest_code",
    "nearest_code_topk",
    "perplexity",
    "search_statistics",
    "select_backend",
    "vector_quantize",
    "verify",
]


def _gap_parameter_group(quantizer: QuantizerBase, share: float) -> dict[str, Any]:
    return count_normalised_param_group(quantizer, share)


_DEPRECATED = {
    "attach_gap_step": (attach_count_normalised_step, attach_count_normalised_step),
    "gap_parameter_group": (count_normalised_param_group, _gap_parameter_group),
}


def __getattr__(name: str) -> Any:
    if name not in _DEPRECATED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new, with_old_arguments = _DEPRECATED[name]
    warnings.warn(f"{name} was renamed to {new.__name__}", DeprecationWarning, stacklevel=2)
    return with_old_arguments
