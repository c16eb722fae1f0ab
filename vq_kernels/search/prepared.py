"""A codebook made ready once, for many searches."""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from vq_kernels.search import torch_backend
from vq_kernels.search.backend import BACKENDS, Backend, choose_backend
from vq_kernels.search.checks import check_choice, check_codebook


def backend_module(name: str) -> ModuleType:
    """The module with a backend's `prepare` and `search`. Triton is imported here, on first use."""
    if name == "torch":
        return torch_backend
    return import_module("vq_kernels.search.triton_backend")


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
