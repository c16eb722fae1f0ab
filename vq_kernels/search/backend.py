"""Backend selection."""

import functools
import os
import warnings
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "llvm", "torch"]
# What a backend's `search` returns: indices [N] int64, codes [N, D] in x's dtype, sq_distances [N] float64 (NaN for a
# row that is not finite), statistics [3] int64: the number of certified, reranked and exhaustive rows.
Found = tuple[Tensor, Tensor, Tensor, Tensor]

BACKENDS = ("auto", "triton", "llvm", "torch")
ENVIRONMENT_VARIABLE = "VQ_KERNELS_BACKEND"
_LARGEST_DIM = 1 << 15  # for a larger D, scores may leave the range that the kernels assume
COMPILED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def choose_backend(x: Tensor, codebook: Tensor, backend: str = "auto") -> tuple[Backend, str]:
    """`select_backend` for tensors that have been checked."""
    source = "backend"
    if backend == "auto" and ENVIRONMENT_VARIABLE in os.environ:
        source, backend = ENVIRONMENT_VARIABLE, os.environ[ENVIRONMENT_VARIABLE]
    if backend not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend != "auto":
        obstacle = _OBSTACLES[backend](x, codebook)
        if obstacle:
            raise RuntimeError(f"{source}={backend!r} cannot run here: {obstacle}")
        return backend, f"{source} asks for it"  # type: ignore[return-value]
    if x.device.type == "cuda":
        obstacle = _triton_obstacle(x, codebook)
        if obstacle:
            _warn_once(f"vq_kernels searches with PyTorch instead of Triton: {obstacle}")
            return "torch", obstacle
        return "triton", "x is on CUDA, and Triton can run"
    if not has_float64(x.device):
        return "torch", f"it runs on the CPU, as {x.device.type} has no float64"
    obstacle = _llvm_obstacle(x, codebook)
    return ("torch", obstacle) if obstacle else ("llvm", f"x is on {x.device.type}, and llvmlite can compile for it")


def captures_triton(x: Tensor, codebook: Tensor, backend: str) -> bool:
    """Whether a captured search or gradient is served by Triton, which never waits for the device."""
    fits = x.shape[-1] <= _LARGEST_DIM
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
    """Return the module with the backend's `prepare` and `search`. Triton and llvmlite are imported on first use."""
    return import_module(f"vq_kernels.search.{'torch_backend' if name == 'torch' else name + '.launch'}")


def has_float64(device: torch.device) -> bool:
    """Whether the device supports float64. If not, the CPU computes what needs it."""
    return device.type != "mps"


def _obstacle(x: Tensor, codebook: Tensor) -> str:
    """Why compiled kernels cannot search here, or an empty string."""
    for name, tensor in (("x", x), ("codebook", codebook)):
        if tensor.dtype not in COMPILED_DTYPES:
            return f"{name} is {tensor.dtype}, and the kernels take float32, float16 and bfloat16"
    if x.shape[-1] > _LARGEST_DIM:
        return f"D is {x.shape[-1]:,}, and the kernels take {_LARGEST_DIM:,} at most"
    return ""


def _llvm_obstacle(x: Tensor, codebook: Tensor) -> str:
    if x.device.type != "cpu":
        return f"x is on {x.device.type}"
    return _obstacle(x, codebook) or _missing("llvmlite")


def _triton_obstacle(x: Tensor, codebook: Tensor) -> str:
    obstacle = _obstacle(x, codebook)
    if obstacle:
        return obstacle
    if torch.version.hip:
        return "this is a ROCm build of PyTorch"
    if x.device.type not in ("cuda", "cpu"):
        return f"x is on {x.device.type}"
    missing = _missing("triton")
    if missing:
        return missing
    if x.device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return "" if interpreted else "x is on the CPU, and TRITON_INTERPRET=1 is not set"
    major, minor = torch.cuda.get_device_capability(x.device)
    return "" if major >= 8 else f"the GPU is sm_{major}{minor}, and the kernels need sm_80 or newer"


@functools.cache
def _missing(package: str) -> str:
    try:
        import_module(package)
    except ImportError as error:
        return f"{package} cannot be imported ({error})"
    return ""


_OBSTACLES: dict[str, Callable[[Tensor, Tensor], str]] = {
    "triton": _triton_obstacle,
    "llvm": _llvm_obstacle,
    "torch": lambda x, codebook: "",
}


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
