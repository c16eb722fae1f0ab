"""Checks of public arguments, done before any computation."""

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, bfloat16, float16, float32, float64, strided

SUPPORTED_DTYPES = (float32, float16, bfloat16, float64)


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is one."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")


def check_dtype(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is a dense tensor of a supported dtype."""
    check_tensor(name, tensor)
    if tensor.dtype not in SUPPORTED_DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")
    if tensor.layout != strided or tensor.is_nested:
        kind = "a nested one" if tensor.is_nested else f"one of layout {tensor.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {kind}")


def check_codebook(codebook: Tensor) -> None:
    """Raise TypeError or ValueError unless `codebook` is [K, D] with K, D >= 1, of a supported dtype."""
    check_dtype("codebook", codebook)
    if codebook.dim() != 2 or codebook.shape[0] < 1 or codebook.shape[1] < 1:
        raise ValueError(f"codebook must be [K, D] with K >= 1 and D >= 1, got {tuple(codebook.shape)}")


def check_pair(x: Tensor, codebook: Tensor) -> None:
    """Raise TypeError or ValueError unless x [..., D] can be searched in codebook [K, D]."""
    check_codebook(codebook)
    check_dtype("x", x)
    code_dim = codebook.shape[1]
    if x.dim() < 1 or x.shape[-1] != code_dim:
        raise ValueError(f"x must be [..., {code_dim}] to match codebook {tuple(codebook.shape)}, got {tuple(x.shape)}")
    if x.device != codebook.device:
        raise ValueError(f"codebook must be on x's device, {x.device}, got {codebook.device}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_at_least(
    least: float,
    most: float = math.inf,
    *,
    integer: bool = False,
    others: tuple[str | None, ...] = (),
    **arguments: Any,
) -> None:
    """Raise TypeError unless each argument is a number, or an integer; ValueError unless it is finite and in range.

    A bool is neither. The values in `others` are allowed too.
    """
    kind: Any = Integral if integer else Real
    noun = "an integer" if integer else "a number"
    prefix = "".join(f"{other!r} or " for other in others)
    for name, value in arguments.items():
        if isinstance(value, str | None) and value in others:
            continue
        if isinstance(value, bool) or not isinstance(value, kind):
            raise TypeError(f"{name} must be {prefix}{noun}, got {value!r}")
        if not least <= value <= most or value == math.inf:
            rule = f"in [{least}, {most}]" if most < math.inf else "finite" if value == math.inf else f">= {least}"
            raise ValueError(f"{name} must be {prefix}{rule}, got {value}")


def check_bool(**arguments: Any) -> None:
    """Raise TypeError unless each argument is True or False."""
    for name, value in arguments.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def is_tracing() -> bool:
    """Returns whether `torch.jit.trace` is running."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def is_eager(x: Tensor, codebook: Tensor) -> bool:
    """Whether an operator may be called as a function: nothing captures it, transforms it or counts what it does.

    The dispatcher takes 10 us a call, a tenth of the search of one row.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) is type(codebook) is Tensor
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None  # private: nothing public tells
        and not is_tracing()
    )


def check_not_given(arguments: dict[str, Any], function: str, *names: str) -> None:
    """Raise TypeError if one of `names` is among the arguments, because `function` sets it itself."""
    for name in names:
        if name in arguments:
            raise TypeError(f"{name} must not be given, because {function} sets it, got {arguments[name]!r}")


def check_not_traced() -> None:
    """Raise RuntimeError inside `torch.jit.trace`, for what updates the state of a module."""
    if is_tracing():
        raise RuntimeError(
            "a quantizer in training mode cannot be traced by torch.jit.trace; call eval() first, or use torch.export"
        )


def is_vmapped() -> bool:
    """Returns whether `torch.func.vmap` is running. False while a graph is being captured."""
    if torch.compiler.is_compiling():
        return False
    from torch._functorch import pyfunctorch  # private: nothing public tells

    levels = pyfunctorch.retrieve_all_functorch_interpreters()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


def unmapped(tensor: Tensor) -> Tensor:
    """Returns the tensor with the dimensions that `torch.func.vmap` hides."""
    while is_vmapped() and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def check_no_vmap() -> None:
    """Raise RuntimeError inside `torch.func.vmap`, for what updates the state of a module."""
    if is_vmapped():
        raise RuntimeError(
            "a quantizer in training mode cannot run under torch.func.vmap, because it updates its counts and codes; "
            "call eval() first, or use vector_quantize"
        )
