"""The contenders of the search benchmarks: common alternatives, this library, and bare matrix products.

The class of precision is that for float32 input. With 16-bit input, all but cdist and faiss compute in 16 bits; those
two convert it to float32. The timed call includes everything that a caller has to do for a new codebook, except for the
-prepared contenders.
"""

import importlib
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vq_kernels import PreparedCodebook, nearest_code
from vq_kernels.search.backend import Backend

Search = Callable[[], Tensor]  # one timed call: indices [N] of any integer dtype, or the scores [N, K] of a product

Precision = Literal["exact", "float32", "TF32", "16 bits"]

_CHUNK_ROWS = (512, 2048, 8192, 32768, 131072)


@dataclass(frozen=True)
class Contender:
    """A way to search."""

    name: str
    precision: Precision  # the class of its arithmetic for float32 input
    build: Callable[[Tensor, Tensor], Search]  # from x [N, D] and codebook [K, D]; building is not timed
    devices: tuple[str, ...] = ("cpu", "cuda")
    package: str = ""  # required in addition to this library's dependencies
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    upcasts: bool = False  # whether it computes in float32 for 16-bit input too
    is_product: bool = False  # a bare product finds no index
    backend: Literal["", "llvm", "torch", "triton"] = ""  # of this library

    def precision_for(self, dtype: torch.dtype) -> Precision:
        """The class of its arithmetic for input of this dtype."""
        keeps = dtype == torch.float32 or self.upcasts or self.precision == "exact"
        return self.precision if keeps else "16 bits"

    def obstacle(self, device_type: str, dtype: torch.dtype) -> str:
        """The reason why it cannot run here; empty if it can."""
        if self.package and importlib.util.find_spec(self.package.partition(".")[0]) is None:
            return "not installed"
        if device_type not in self.devices:
            return f"runs only on {' and '.join(self.devices)}"
        if dtype not in self.dtypes:
            return f"does not take {str(dtype).removeprefix('torch.')}"
        return ""


def _expansion(x: Tensor, codebook: Tensor) -> Tensor:
    """Indices [N] of the smallest |c|^2 - 2 x.c; |x|^2 is the same for all codes."""
    sq_norms = codebook.square().sum(dim=1)
    return torch.addmm(sq_norms, x, codebook.t(), alpha=-2).argmin(dim=1)


def _build_cdist(x: Tensor, codebook: Tensor) -> Search:
    return lambda: torch.cdist(x.float(), codebook.float()).argmin(dim=1)


def _build_cdist_gather(x: Tensor, codebook: Tensor) -> Search:
    def search() -> Tensor:
        indices = torch.cdist(x, codebook).argmin(dim=1)
        codes = codebook[indices]
        (x - codes).square().sum(dim=1)
        return indices

    return search


def _build_addmm(x: Tensor, codebook: Tensor) -> Search:
    return lambda: _expansion(x, codebook)


def _build_addmm_chunked(x: Tensor, codebook: Tensor) -> Search:
    def search(rows: int) -> Tensor:
        starts = range(0, x.shape[0], rows)
        return torch.cat([_expansion(x[start : start + rows], codebook) for start in starts])

    def elapsed(rows: int) -> float:
        search(rows)[-1].item()  # warms up
        seconds: list[float] = []
        while len(seconds) < 3 and sum(seconds) < 0.5:
            start = time.perf_counter()
            search(rows)[-1].item()  # waits for a GPU
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    affordable = [rows for rows in _CHUNK_ROWS if rows == _CHUNK_ROWS[0] or rows * codebook.shape[0] <= 1 << 28]
    best_rows = min(affordable, key=elapsed)
    return lambda: search(best_rows)


def _build_addmm_compiled(x: Tensor, codebook: Tensor) -> Search:
    torch.compiler.reset()  # every shape compiles anew, without reaching the recompilation limit
    compiled = torch.compile(_expansion, dynamic=False)
    return lambda: compiled(x, codebook)


def _build_faiss(x: Tensor, codebook: Tensor) -> Search:
    faiss: Any = importlib.import_module("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    queries, codes = x.float().numpy(), codebook.float().numpy()

    def search() -> Tensor:
        index = faiss.IndexFlatL2(codes.shape[1])
        index.add(codes)
        return torch.from_numpy(index.search(queries, 1)[1][:, 0])

    return search


def _build_flash_kmeans(x: Tensor, codebook: Tensor) -> Search:
    assign: Any = importlib.import_module("flash_kmeans.assign_euclid_triton").euclid_assign_triton

    def search() -> Tensor:
        indices: Tensor = assign(x[None], codebook[None], x.float().square().sum(dim=1)[None])
        return indices[0]

    return search


def _build_ours(backend: Backend) -> Callable[[Tensor, Tensor], Search]:
    return lambda x, codebook: lambda: nearest_code(x, codebook, backend=backend).indices


def _build_ours_prepared(backend: Backend) -> Callable[[Tensor, Tensor], Search]:
    def build(x: Tensor, codebook: Tensor) -> Search:
        prepared = PreparedCodebook.from_codebook(codebook, backend=backend)
        return lambda: nearest_code(x, prepared).indices

    return build


def _build_gemm(dtype: torch.dtype | None, precision: str) -> Callable[[Tensor, Tensor], Search]:
    """Builds x.c^T in `dtype` (None: as given). It writes to a buffer that was touched before."""

    def build(x: Tensor, codebook: Tensor) -> Search:
        left, right = x.to(dtype or x.dtype), codebook.to(dtype or x.dtype).t()
        scores = torch.zeros(x.shape[0], codebook.shape[0], dtype=left.dtype, device=x.device)

        def search() -> Tensor:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(precision)
            try:
                return torch.mm(left, right, out=scores)
            finally:
                torch.set_float32_matmul_precision(before)

        return search

    return build


_CUDA = ("cuda",)
_FLOAT32 = (torch.float32,)
_BFLOAT16_GEMM = _build_gemm(torch.bfloat16, "highest")

_CONTENDERS = (
    Contender("cdist", "float32", _build_cdist, upcasts=True),  # torch.cdist + argmin
    Contender("cdist-gather", "float32", _build_cdist_gather),  # also the codes and the distances, as nearest_code
    Contender("addmm", "float32", _build_addmm),  # argmin of |c|^2 - 2 x.c
    Contender("addmm-chunked", "float32", _build_addmm_chunked),  # in chunks of rows, of the fastest of five sizes
    Contender("addmm-compiled", "float32", _build_addmm_compiled),  # under torch.compile
    Contender("faiss", "float32", _build_faiss, ("cpu",), "faiss", upcasts=True),  # IndexFlatL2
    Contender("flash-kmeans", "TF32", _build_flash_kmeans, _CUDA, "flash_kmeans"),  # svg-project/flash-kmeans
    Contender("llvm", "exact", _build_ours("llvm"), ("cpu",), "llvmlite", backend="llvm"),
    Contender("llvm-prepared", "exact", _build_ours_prepared("llvm"), ("cpu",), "llvmlite", backend="llvm"),
    Contender("torch", "exact", _build_ours("torch"), backend="torch"),
    Contender("torch-prepared", "exact", _build_ours_prepared("torch"), backend="torch"),
    Contender("triton", "exact", _build_ours("triton"), _CUDA, "triton", backend="triton"),
    Contender("triton-prepared", "exact", _build_ours_prepared("triton"), _CUDA, "triton", backend="triton"),
    Contender("gemm", "float32", _build_gemm(None, "highest"), is_product=True),  # x.c^T, which writes N x K
    Contender("gemm-tf32", "TF32", _build_gemm(None, "high"), _CUDA, dtypes=_FLOAT32, is_product=True),
    Contender("gemm-bfloat16", "16 bits", _BFLOAT16_GEMM, _CUDA, dtypes=_FLOAT32, is_product=True),
)

CONTENDERS = {contender.name: contender for contender in _CONTENDERS}  # in the order in which they run
