"""The exact nearest-code search."""

from vq_kernels.search.api import (
    NearestCode,
    PreparedCodebook,
    SearchStatistics,
    nearest_code,
    search_statistics,
    select_backend,
)
from vq_kernels.search.topk import NearestCodes, nearest_code_topk

__all__ = [
    "NearestCode",
    "NearestCodes",
    "PreparedCodebook",
    "SearchStatistics",
    "nearest_code",
    "nearest_code_topk",
    "search_statistics",
    "select_backend",
]
