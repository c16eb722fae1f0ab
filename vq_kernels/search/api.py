"""The public functions of the exact nearest-code search, and the operator that they call.

`nearest_code` and `search_statistics` check their arguments and call the operator `vq_kernels::nearest_code`, which
selects a backend (backend.py) and runs its `search`. Where that is Triton, which does not wait for the device, they
call `vq_kernels::nearest_code_triton`, which CUDA graphs can capture. The operators are opaque to torch.compile and
torch.export. During export to ONNX, onnx_export.py replaces them.
"""

import functools
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

from vq_kernels.search import onnx_export
from vq_kernels.search.backend import (
    BACKENDS,
    Backend,
    Found,
    backend_module,
    captures_triton,
    choose_backend,
    has_float64,
)
from vq_kernels.search.operators import define_operator
from vq_kernels.search.validation import check_choice, check_codebook, check_dtype, check_pair, is_eager


class NearestCode(NamedTuple):
    """What `nearest_code` returns.

    Attributes:
        indices: [...], int64, in [0, K).
        codes: [..., D], the codebook's rows at `indices`, in x's dtype.
        sq_distances: [...], float32, the squared Euclidean distance to the code in the codebook's dtype.
    """

    indices: Tensor
    codes: Tensor
    sq_distances: Tensor


_register_namedtuple(NearestCode, serialized_type_name="vq_kernels.NearestCode")  # for torch.export.save


class SearchStatistics(NamedTuple):
    """The number of rows that each step of a search decided. They add up to N.

    Attributes:
        certified: the error bound of the first scan certified the best code.
        reranked: float64 distances to a few candidates decided.
        exhaustive: too many candidates, so the row was searched in float64.
    """

    certified: int
    reranked: int
    exhaustive: int

    @property
    def proved(self) -> int:
        """Deprecated name of `certified`."""
        return _with_deprecation_warning("proved", "certified", self.certified)

    @property
    def resolved(self) -> int:
        """Deprecated name of `reranked`."""
        return _with_deprecation_warning("resolved", "reranked", self.reranked)

    @property
    def drained(self) -> int:
        """Deprecated name of `exhaustive`."""
        return _with_deprecation_warning("drained", "exhaustive", self.exhaustive)


def _with_deprecation_warning(old: str, new: str, value: int) -> int:
    warnings.warn(f"SearchStatistics.{old} is deprecated, use {new}", DeprecationWarning, stacklevel=3)
    return value


@dataclass(frozen=True, eq=False, repr=False)
class PreparedCodebook:
    """A codebook prepared for repeated searches: shifted, scaled and rounded, with its norms and error bounds.

    Created by `PreparedCodebook.from_codebook` for one backend. It holds a copy of the codes, so later changes to the
    codebook do not affect it: `is_current` tells whether there were any. Prepare it again after the codebook has
    changed.

    Attributes:
        backend: "triton", "llvm" or "torch", the backend it is prepared for.
        operands: the tensors that backend reads.
    """

    _codes: Tensor
    backend: Backend
    operands: tuple[Tensor, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._codes, self.backend, self.operands)

    @functools.cached_property
    def codebook(self) -> Tensor:
        """[K, D], a copy of the codes. The next search after a write to it raises a RuntimeError."""
        with torch.inference_mode(False):
            return self._codes.clone()

    @classmethod
    def from_codebook(cls, codebook: Tensor, *, backend: str = "auto") -> "PreparedCodebook":
        """Prepare a codebook [K, D] (float32, float16, bfloat16 or float64).

        Raises:
            TypeError, ValueError: as `nearest_code`.
            RuntimeError: the backend cannot run here, with the reason.
        """
        check_codebook(codebook)
        with torch.inference_mode(False), torch.no_grad():  # not in inference mode, for use in training
            copy = codebook.detach().clone(memory_format=torch.contiguous_format)
            name, _ = choose_backend(copy, copy, backend)
            return cls(copy, name, tuple(backend_module(name).prepare(copy)))

    def is_current(self, codebook: Tensor) -> bool:
        """Return whether `codebook` [K, D] has the values, the dtype and the device that were prepared.

        It compares the values, however they were changed, and waits for the device.
        """
        mine = self._codes
        if (codebook.shape, codebook.dtype, codebook.device) != (mine.shape, mine.dtype, mine.device):
            return False
        return bool(((codebook == mine) | (codebook.isnan() & mine.isnan())).all())


def nearest_code(x: Tensor, codebook: Tensor | PreparedCodebook, *, backend: Backend = "auto") -> NearestCode:
    """Find the codebook row closest to each vector, exactly.

    The indices equal those of a float64 brute-force search over the same values, with the lowest index on a tie. (If
    two distances agree to within float64's own rounding, 1e-13 relative, either index may be returned.) Neither
    autocast nor the precision setting of float32 matrix products changes the result. The [N, K] distances are never
    stored. Models export to ONNX, where the search is exact too: see `vq_kernels.search.onnx_export`.

    Args:
        x: [..., D], float32, float16, bfloat16 or float64, any strides.
        codebook: [K, D], K >= 1, on x's device; its dtype may differ from x's. Or a `PreparedCodebook`. Or [H, K, D]
            for x [H, ..., D], H >= 1: x[h] is searched in codebook[h].
        backend: "auto", "triton", "llvm" or "torch"; see `select_backend`. Only "torch" supports float64.

    Returns:
        NearestCode(indices [...] int64 in [0, K), codes [..., D] in x's dtype, sq_distances [...] float32, within 1e-5
        relative, inf if float32 overflows). Not differentiable: see `vector_quantize`. A row with NaN or Inf gets
        index 0 and a NaN distance. A code with NaN or Inf is never chosen, unless no code is finite; the index is then
        0.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: D, the device or K does not match, the backend is unknown, or the codebook was prepared for another
            one.
        RuntimeError: the backend cannot run here, with the reason.

    Source: van den Oord et al. 2017, arXiv:1711.00937, eq. 1.
    """
    if isinstance(codebook, Tensor) and codebook.dim() == 3:
        check_dtype("x", x)
        if not codebook.shape[0] or x.dim() < 2 or (x.shape[0], x.shape[-1]) != (codebook.shape[0], codebook.shape[2]):
            num_codebooks, _, code_dim = codebook.shape
            wanted = f"[{num_codebooks}, ..., {code_dim}] to match codebook {tuple(codebook.shape)} with H >= 1"
            raise ValueError(f"x must be {wanted}, got {tuple(x.shape)}")
        each = [nearest_code(*pair, backend=backend) for pair in zip(x, codebook, strict=True)]
        return NearestCode(*(torch.stack(parts) for parts in zip(*each, strict=True)))
    indices, codes, sq_distances, _ = _search(x, codebook, backend)
    if x.dim() == 2:
        return NearestCode(indices, codes, sq_distances.float())
    return NearestCode(indices.view(x.shape[:-1]), codes.view(x.shape), sq_distances.view(x.shape[:-1]).float())


def search_statistics(x: Tensor, codebook: Tensor | PreparedCodebook, *, backend: Backend = "auto") -> SearchStatistics:
    """Count the rows of x that each step of the search decides. Arguments and errors as for `nearest_code`."""
    statistics = _search(x, codebook, backend)[3]
    return SearchStatistics(*statistics.tolist())


def select_backend(x: Tensor, codebook: Tensor | PreparedCodebook, backend: Backend = "auto") -> tuple[Backend, str]:
    """Return the backend that searches x in codebook, and the reason.

    Args:
        x: [..., D].
        codebook: [K, D], on x's device; or a `PreparedCodebook`, whose backend is used.
        backend: "triton", "llvm" or "torch" is returned as it is. "auto" is replaced by the environment variable
            VQ_KERNELS_BACKEND if set; otherwise it selects Triton for CUDA tensors and LLVM for CPU tensors, if they
            can run, else PyTorch. If a CUDA tensor cannot use Triton, "auto" warns once per reason.

    Returns:
        (name, reason), where name is "triton", "llvm" or "torch".

    Raises:
        TypeError, ValueError: as `nearest_code`.
        RuntimeError: the backend cannot run here, with the reason.
    """
    codes, operands, backend = unpacked(codebook, backend)
    check_pair(x, codes)
    if not operands:
        return choose_backend(x, codes, backend)
    return cast(Backend, _reader(x, backend)), "codebook was prepared for it"


def _reader(x: Tensor, backend: str) -> str:
    """The backend that reads what this one prepared, for x."""
    return "torch" if backend == "llvm" and x.dtype == torch.float64 else backend


def unpacked(codebook: Tensor | PreparedCodebook, backend: Backend) -> tuple[Tensor, list[Tensor], Backend]:
    """Return the codes as a tensor, the prepared operands (empty for a tensor), and the backend to use.

    Raises:
        ValueError: the backend is unknown, or the codebook was prepared for another one.
        RuntimeError: the attribute `codebook` of a prepared one was written to.
    """
    check_choice("backend", backend, BACKENDS)
    if not isinstance(codebook, PreparedCodebook):
        return codebook, [], backend
    if backend not in ("auto", codebook.backend):
        raise ValueError(
            f"backend must be 'auto' or {codebook.backend!r}, which codebook was prepared for, got {backend!r}"
        )
    if not torch.compiler.is_compiling() and "codebook" in vars(codebook) and codebook.codebook._version:
        raise RuntimeError("codebook was written to after it was prepared; prepare the new codes by from_codebook")
    return codebook._codes, list(codebook.operands), codebook.backend


def _search(x: Tensor, codebook: Tensor | PreparedCodebook, backend: Backend) -> Found:
    codebook, operands, backend = unpacked(codebook, backend)
    check_pair(x, codebook)
    rows = x.detach() if x.dim() == 2 else x.detach().reshape(-1, x.shape[-1])
    return nearest_code_op(rows, codebook.detach(), operands, backend)


def nearest_code_op(x: Tensor, codebook: Tensor, operands: list[Tensor], backend: str) -> Found:
    """Search x [N, D] in codebook [K, D], without gradients, by the operator or what it does.

    During export to ONNX, its replacement is called.

    `operands` are the backend's prepared tensors, or empty.
    """
    if is_eager(x, codebook):
        return _search_by_backend(x, codebook, operands, backend)
    if torch.onnx.is_in_onnx_export():
        return onnx_export.search(x, codebook)
    operator = _triton_operator if captures_triton(x, codebook, backend) else _operator
    found: Found = operator(x, codebook, operands, backend)
    return found


def _search_by_backend(x: Tensor, codebook: Tensor, operands: list[Tensor], backend: str) -> Found:
    if not has_float64(x.device):
        indices, codes, sq_distances, statistics = _operator(
            x.cpu(), codebook.cpu(), [operand.cpu() for operand in operands], backend
        )
        return indices.to(x.device), codes.to(x.device), sq_distances.float().to(x.device), statistics.to(x.device)
    name = _reader(x, backend) if operands else choose_backend(x, codebook, backend)[0]
    found: Found = backend_module(name).search(x, codebook, operands)
    return found


def _fake(x: Tensor, codebook: Tensor, operands: list[Tensor], backend: str) -> Found:
    wide = torch.float64 if has_float64(x.device) else torch.float32
    indices, sq_distances = (x.new_empty(x.shape[0], dtype=dtype) for dtype in (torch.int64, wide))
    return indices, x.new_empty(x.shape), sq_distances, x.new_empty(3, dtype=torch.int64)


_operator = define_operator("nearest_code", _search_by_backend, _fake, num_row_outputs=3, waits=True)
_triton_operator = define_operator("nearest_code_triton", _search_by_backend, _fake, num_row_outputs=3)
