"""The LLVM backend: compiles the kernels on first use, and runs them in PyTorch's number of threads."""

import ctypes
import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import llvmlite.binding as llvm
import torch
from torch import Tensor

from vq_kernels.search.backend import Found
from vq_kernels.search.llvm.compile import address_of, compile_module, openmp
from vq_kernels.search.llvm.kernels import CODES_AT_A_TIME, STATE_ROWS, build_module
from vq_kernels.search.top2 import padded
from vq_kernels.search.torch_bounds import (
    LONGEST_RADIUS,
    NEVER,
    SHORTEST_RADIUS,
    TINY,
    CodebookOperand,
    error_factor,
    is_moderate,
)
from vq_kernels.search.torch_bounds import prepare as prepare_in_torch

_CACHED_ELEMENTS = 1 << 15  # of the rows of a chunk, and of the codes of a block
_FEW_ROWS = 4  # for which preparing a codebook would take longer than the search
_THREAD_PRODUCTS = 1 << 19  # multiply-adds for which another thread pays

_pool = functools.cache(ThreadPoolExecutor)
_forked: list[bool] = []


def _after_fork() -> None:
    """Start threads of its own in a forked process, which has none of OpenMP's or of the pool's."""
    _forked.append(True)
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


class Kernels:
    """The kernels for tiles of `lanes` rows, compiled for this CPU or the given one; see `compile_module`."""

    def __init__(self, lanes: int, *target: str) -> None:
        self.lanes = lanes
        functions = compile_module(build_module(lanes, openmp=openmp() is not None), *target)
        self.prepare_codes, self.search = functions["prepare_codes"], functions["search"]
        self.search_few, self.search_as_member = functions["search_few"], functions.get("search_as_member")


@functools.cache
def kernels() -> Kernels:
    """Compile for this CPU. A tile has two vectors of rows."""
    features = llvm.get_host_cpu_features()
    return Kernels(32 if features.get("avx512f") else 16 if features.get("avx2") else 8)


def prepare(codebook: Tensor) -> tuple[Tensor, ...]:
    """Return the operand of the codebook [K, D]: float32, float16 or bfloat16, on the CPU."""
    num_codes, code_dim = codebook.shape
    codes = readable(codebook).contiguous()
    sums = codes.new_zeros(code_dim, dtype=torch.float64)
    minus_mean, error_constant = codes.new_empty(code_dim), codes.new_empty(num_codes)
    matrix = codes.new_empty(padded(num_codes), code_dim + 2)
    outputs = (output.data_ptr() for output in (sums, minus_mean, matrix, error_constant))
    constants = (error_factor(code_dim, torch.float32), TINY[torch.float32], NEVER[torch.float32])
    radius = kernels().prepare_codes(codes.data_ptr(), num_codes, matrix.shape[0], code_dim, *constants, *outputs)
    if not is_moderate(radius):
        return prepare_in_torch(codebook)
    return CodebookOperand(codes.new_ones(1), minus_mean, matrix, error_constant)


def search(x: Tensor, codebook: Tensor, prepared: list[Tensor]) -> Found:
    """Find the nearest code of each row.

    Args:
        x: [N, D], float32, float16 or bfloat16, any strides, on the CPU.
        codebook: [K, D], likewise; its dtype may differ from x's.
        prepared: what `prepare(codebook)` returned, as a list; or empty to prepare here.

    Returns:
        As described at `Found`. Rows that are not finite count as certified.
    """
    rows, source = readable(x), readable(codebook).contiguous()
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    indices, codes = rows.new_empty(len(x), dtype=torch.int64), rows.new_empty(x.shape)
    outputs = (indices, codes, rows.new_empty(len(x), dtype=torch.float64))
    statistics = None
    if len(x) <= _FEW_ROWS and not prepared:
        constants = (error_factor(x.shape[1], torch.float32), TINY[torch.float32], SHORTEST_RADIUS, LONGEST_RADIUS)
        if not kernels().search_few(
            rows.data_ptr(), rows.stride(0), len(x), source.data_ptr(), *source.shape, *constants,
            *(output.data_ptr() for output in outputs),
        ):  # fmt: skip
            statistics = torch.tensor([len(x), 0, 0], device="cpu")
    if statistics is None:
        statistics = _search_prepared(rows, source, prepared or prepare(codebook), outputs)
    return indices, codes.to(x.dtype), outputs[2], statistics


def _search_prepared(
    rows: Tensor, codebook: Tensor, operand: Sequence[Tensor], outputs: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Write the outputs of rows [N, D] and return the statistics [3]. rows and codebook are `readable`."""
    scale, minus_mean, matrix, error_constant = operand
    (num_rows, code_dim), lanes = rows.shape, kernels().lanes
    num_threads = min(torch.get_num_threads(), 1 + num_rows * matrix.numel() // _THREAD_PRODUCTS)
    share = max(1, -(-num_rows // (num_threads * lanes))) * lanes
    num_shares = max(1, -(-num_rows // share))
    chunk_rows = max(1, min(share, _CACHED_ELEMENTS // code_dim) // lanes) * lanes
    block_codes = max(1, _CACHED_ELEMENTS // code_dim // CODES_AT_A_TIME) * CODES_AT_A_TIME
    scratch = rows.new_empty(num_shares, chunk_rows * (code_dim + STATE_ROWS) + code_dim)
    statistics = rows.new_zeros(num_shares, 3, dtype=torch.int64)
    shared = (
        rows.data_ptr(), rows.stride(0), codebook.data_ptr(), codebook.shape[0], code_dim, scale.data_ptr(),
        minus_mean.data_ptr(), matrix.data_ptr(), matrix.shape[0], error_constant.data_ptr(), chunk_rows, block_codes,
        *(output.data_ptr() for output in outputs),
    )  # fmt: skip

    def search_share(number: int) -> None:
        last = min((number + 1) * share, num_rows)
        kernels().search(number * share, last, *shared, scratch[number].data_ptr(), statistics[number].data_ptr())

    if num_shares == 1:
        search_share(0)
    elif kernels().search_as_member is None or _forked:
        list(_pool(num_shares).map(search_share, range(num_shares)))
    else:
        values = (num_rows, share, scratch.stride(0), *shared, scratch.data_ptr(), statistics.data_ptr())
        packed = (ctypes.c_int64 * len(values))(*values)
        openmp().GOMP_parallel(ctypes.c_void_p(address_of(kernels().search_as_member)), packed, num_shares, 0)
    return statistics.sum(dim=0) if num_shares > 1 else statistics[0]


def readable(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, with its values in memory."""
    return tensor.float().resolve_neg()
