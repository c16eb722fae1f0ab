"""The exact nearest-code search."""

from vq_kernels.search.backend import select_backend
from vq_kernels.search.nearest_code import NearestCode, SearchStatistics, nearest_code, search_statistics
from vq_kernels.search.prepared import PreparedCodebook

__all__ = ["NearestCode", "PreparedCodebook", "SearchStatistics", "nearest_code", "search_statistics", "select_backend"]
