"""Backend selection."""

import functools
import os
import warnings
from importlib import import_module
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "torch"]
# What a backend's `search` returns: indices [N] int64, codes [N, D] in x's dtype, sq_distances [N] float64 (NaN for a
# row that is not finite), statistics [3] int64: the number of certified, reranked and exhaustive rows.
Found = tuple[Tensor, Tensor, Tensor, Tensor]

BACKENDS = ("auto", "triton", "torch")
ENVIRONMENT_VARIABLE = "VQ_KERNELS_BACKEND"
_LARGEST_TRITON_DIM = 1 << 15  # for a larger D, scores may leave the range that the kernels assume
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def choose_backend(x: Tensor, codebook: Tensor, backend: str = "auto") -> tuple[Backend, str]:
    """`select_backend` for tensors that have been checked."""
    source = "backend"
    if backend == "auto" and ENVIRONMENT_VARIABLE in os.environ:
        source, backend = ENVIRONMENT_VARIABLE, os.environ[ENVIRONMENT_VARIABLE]
    if backend not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "torch":
        return "torch", f"{source} asks for it"
    if backend == "auto" and x.device.type != "cuda":
        where = "" if has_float64(x.device) else f"; it runs on the CPU, as {x.device.type} has no float64"
        return "torch", f"x is on {x.device.type}, and the Triton kernels need CUDA{where}"
    obstacle = _triton_obstacle(x, codebook)
    if backend == "triton":
        if obstacle:
            raise RuntimeError(f"{source}='triton' cannot run here: {obstacle}")
        return "triton", f"{source} asks for it"
    if obstacle:
        _warn_once(f"vq_kernels searches with PyTorch instead of Triton: {obstacle}")
        return "torch", obstacle
    return "triton", "x is on CUDA, and Triton can run"


def captures_triton(x: Tensor, codebook: Tensor, backend: str) -> bool:
    """Whether a captured search or gradient is served by Triton, which never waits for the device."""
    fits = x.shape[-1] <= _LARGEST_TRITON_DIM
    return fits and _is_triton(x.device, x.dtype, codebook.dtype, backend)


def _is_triton(device: torch.device, dtype: torch.dtype, codebook_dtype: torch.dtype, backend: str) -> bool:
    x, codebook = (torch.empty(0, 1, dtype=each, device=device) for each in (dtype, codebook_dtype))
    try:
        return choose_backend(x, codebook, backend)[0] == "triton"
    except RuntimeError:  # raised where the operator runs
        return False


# As `torch.compiler.assume_constant_result` does, which would import torch._dynamo, and that Triton, with this package.
_is_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


def backend_module(name: str) -> ModuleType:
    """Return the module with the backend's `prepare` and `search`. Triton is imported on first use."""
    return import_module(f"vq_kernels.search.{'triton.launch' if name == 'triton' else 'torch_backend'}")


def has_float64(device: torch.device) -> bool:
    """Whether the device supports float64. If not, the CPU computes what needs it."""
    return device.type != "mps"


def _triton_obstacle(x: Tensor, codebook: Tensor) -> str:
    """Why Triton cannot search here, or an empty string."""
    for name, tensor in (("x", x), ("codebook", codebook)):
        if tensor.dtype not in TRITON_DTYPES:
            return f"{name} is {tensor.dtype}, and the kernels take float32, float16 and bfloat16"
    if x.shape[-1] > _LARGEST_TRITON_DIM:
        return f"D is {x.shape[-1]:,}, and the kernels take {_LARGEST_TRITON_DIM:,} at most"
    if torch.version.hip:
        return "this is a ROCm build of PyTorch"
    if x.device.type not in ("cuda", "cpu"):
        return f"x is on {x.device.type}"
    missing = _triton_missing()
    if missing:
        return missing
    if x.device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return "" if interpreted else "x is on the CPU, and TRITON_INTERPRET=1 is not set"
    major, minor = torch.cuda.get_device_capability(x.device)
    return "" if major >= 8 else f"the GPU is sm_{major}{minor}, and the kernels need sm_80 or newer"


@functools.cache
def _triton_missing() -> str:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return ""


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
