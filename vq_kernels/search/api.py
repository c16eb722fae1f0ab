"""The search as users call it."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vq_kernels.search import onnx_export
from vq_kernels.search.backend import BACKENDS, Backend, backend_module, choose_backend, has_float64
from vq_kernels.search.validation import check_choice, check_codebook, check_pair

PRECISIONS = ("exact", "fast")


class NearestCode(NamedTuple):
    """What `nearest_code` returns.

    Attributes:
        indices: [...], int64, in [0, K).
        codes: [..., D], the codebook's rows at `indices`, in x's dtype.
        sq_distances: [...], float32, the squared Euclidean distance to the code as the codebook holds it.
    """

    indices: Tensor
    codes: Tensor
    sq_distances: Tensor


class SearchStatistics(NamedTuple):
    """How many rows each step of a search decided; they add up to N."""

    proved: int
    resolved: int
    drained: int


@dataclass(frozen=True, eq=False, repr=False)
class PreparedCodebook:
    """A codebook with all that a search needs of it: shifted, scaled, rounded, with its norms and error bounds.

    Made by `PreparedCodebook.from_codebook`, for one backend, which VQ_KERNELS_BACKEND may choose then. It owns a copy
    of the codes, so that no later write to the codebook it was made from changes it; prepare again after the codebook
    has changed.

    Attributes:
        codebook: [K, D], the copy.
        backend: "triton" or "torch", the backend it is prepared for.
        operands: what that backend reads, in its own layout.
    """

    codebook: Tensor
    backend: Backend
    operands: tuple[Tensor, ...]

    @classmethod
    def from_codebook(cls, codebook: Tensor, *, backend: str = "auto") -> "PreparedCodebook":
        """Prepare a codebook [K, D] (float32, float16, bfloat16 or float64) for repeated searches.

        Raises:
            TypeError, ValueError: as `nearest_code` does.
            RuntimeError: backend="triton" cannot run here; says why.
        """
        check_codebook(codebook)
        with torch.no_grad():
            copy = codebook.detach().clone(memory_format=torch.contiguous_format)
            name, _ = choose_backend(copy, copy, backend)
            return cls(copy, name, tuple(backend_module(name).prepare(copy)))


def unpacked(codebook: Tensor | PreparedCodebook, backend: Backend) -> tuple[Tensor, list[Tensor], Backend]:
    """The codes as a tensor, what is prepared of them (or nothing), and the backend to ask for.

    Raises:
        ValueError: an unknown backend, or another than the one that the codebook was prepared for.
    """
    check_choice("backend", backend, BACKENDS)
    if not isinstance(codebook, PreparedCodebook):
        return codebook, [], backend
    if backend not in ("auto", codebook.backend):
        raise ValueError(
            f"backend must be 'auto' or {codebook.backend!r}, which codebook was prepared for, got {backend!r}"
        )
    return codebook.codebook, list(codebook.operands), codebook.backend


def nearest_code(
    x: Tensor,
    codebook: Tensor | PreparedCodebook,
    *,
    backend: Backend = "auto",
    precision: Literal["exact", "fast"] = "exact",
) -> NearestCode:
    """The codebook row closest to each vector, exactly.

    The same indices as a float64 brute-force search over the same values; the lowest index on a tie. (Where two
    distances agree to within float64's own rounding, 1e-13 relative, either may be given.) Neither autocast nor the
    switches for float32 matrix products change a result. Of the [N, K] distances no more than a tile is ever
    held. A model that holds a search can be exported to ONNX, where it is as exact: see
    `vq_kernels.search.onnx_export`.

    Args:
        x: [..., D], float32, float16, bfloat16 or float64, any strides.
        codebook: [K, D], K >= 1, on x's device, its dtype may differ from x's; or a `PreparedCodebook`.
        backend: "auto", "triton" or "torch"; see `select_backend`. float64 is for "torch".
        precision: "exact"; or "fast", which takes the best of the first scan's rounded scores without a proof. What it
            costs depends on the lengths of x and of the codes, both less the codebook's mean: by "torch" the squared
            distance exceeds the least by at most 1.1·(D + 16)·2⁻²²·‖c‖·(‖x‖ + ‖c‖), c the code given; as a rule by a
            hundredth of that, in one row of a thousand. By "triton", which rounds to 16 bits, it is up to a thousand
            times as much, in up to 3 % of rows as a rule. Beside the distance that is much where a few far codes
            lengthen all others, or where x is far from all codes: then most rows may be wrong, and some by far.

    Returns:
        NearestCode(indices [...] int64 in [0, K), codes [..., D] in x's dtype, sq_distances [...] float32, within 1e-5
        relative, inf where float32 overflows). Not differentiable: see `vector_quantize`. A row holding NaN or Inf gets
        index 0 and a NaN distance. A code holding NaN or Inf is chosen only where there is no finite one; then 0 is.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: D, the device or K does not fit, an unknown backend or precision, or another backend than the one
            that the codebook was prepared for.
        RuntimeError: backend="triton" cannot run here; says why.

    Source: van den Oord et al. 2017, arXiv:1711.00937, eq. 1.
    """
    indices, codes, sq_distances, _ = _search(x, codebook, backend, precision)
    return NearestCode(indices.view(x.shape[:-1]), codes.view(x.shape), sq_distances.view(x.shape[:-1]))


def search_statistics(x: Tensor, codebook: Tensor | PreparedCodebook, *, backend: Backend = "auto") -> SearchStatistics:
    """How many of x's rows the first scan proved, how many were resolved among a few candidates by float64 differences,
    how many had too many candidates for that and were searched in float64. Arguments and errors as for `nearest_code`.
    """
    statistics = _search(x, codebook, backend, "exact")[3]
    return SearchStatistics(*statistics.tolist())


def select_backend(x: Tensor, codebook: Tensor | PreparedCodebook, backend: Backend = "auto") -> tuple[Backend, str]:
    """The backend that a search of x in codebook uses, and the reason.

    Args:
        x: [..., D].
        codebook: [K, D], on x's device; or a `PreparedCodebook`, which has a backend of its own.
        backend: "triton" or "torch" is taken as it is; "auto" (or what VQ_KERNELS_BACKEND puts in its place) takes
            Triton for CUDA tensors where it can run, else PyTorch, and warns, once for each reason, where a CUDA
            tensor has to do without Triton.

    Returns:
        (name, reason): name is "triton" or "torch".

    Raises:
        TypeError, ValueError: as `nearest_code` does.
        RuntimeError: backend="triton" cannot run here; says why.
    """
    codes, operands, backend = unpacked(codebook, backend)
    check_pair(x, codes)
    return (backend, "codebook was prepared for it") if operands else choose_backend(x, codes, backend)


def _search(
    x: Tensor, codebook: Tensor | PreparedCodebook, backend: Backend, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_choice("precision", precision, PRECISIONS)
    codebook, operands, backend = unpacked(codebook, backend)
    check_pair(x, codebook)
    rows = x.detach().reshape(-1, x.shape[-1])
    indices, codes, sq_distances, statistics = nearest_code_op(rows, codebook.detach(), operands, backend, precision)
    return indices, codes, sq_distances, statistics


@torch.library.custom_op("vq_kernels::nearest_code", mutates_args=())
def _operator(
    x: Tensor, codebook: Tensor, operands: list[Tensor], backend: str, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [N, D], codebook [K, D], operands of the backend (or none) -> indices, codes, sq_distances, statistics."""
    if not has_float64(x.device):
        found = _operator(x.cpu(), codebook.cpu(), [operand.cpu() for operand in operands], backend, precision)
        indices, codes, sq_distances, statistics = (result.to(x.device) for result in found)
        return indices, codes, sq_distances, statistics
    name, _ = choose_backend(x, codebook, backend)
    indices, codes, sq_distances, statistics = backend_module(name).search(x, codebook, operands, precision)
    return indices, codes, sq_distances, statistics


@_operator.register_fake
def _(
    x: Tensor, codebook: Tensor, operands: list[Tensor], backend: str, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows = x.shape[0]
    return (
        x.new_empty(num_rows, dtype=torch.int64),
        x.new_empty(x.shape),
        x.new_empty(num_rows, dtype=torch.float32),
        x.new_empty(3, dtype=torch.int64),
    )


def nearest_code_op(
    x: Tensor, codebook: Tensor, operands: list[Tensor], backend: str, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator, and what takes its place while a module is exported to ONNX; arguments and results are its own."""
    if torch.onnx.is_in_onnx_export():
        return onnx_export.search(x, codebook)
    indices, codes, sq_distances, statistics = _operator(x, codebook, operands, backend, precision)
    return indices, codes, sq_distances, statistics
