"""The vector-quantized auto-encoder that vq_kernels was made for."""

from typing import TYPE_CHECKING, Any

from vqae.runtime import process as process  # first: its time is the process's start

if TYPE_CHECKING:
    from vqae.model.vqae import VQAE

__all__ = ["VQAE"]


def __getattr__(name: str) -> Any:
    """VQAE, loaded at its first use: torch takes seconds, in which the commands already handle signals."""
    if name == "VQAE":
        from vqae.model.vqae import VQAE

        return VQAE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
