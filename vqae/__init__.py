"""A vector-quantized autoencoder for images, built on vq_kernels."""

from typing import TYPE_CHECKING, Any

from vqae.runtime import process as process  # first: its time is the process's start

if TYPE_CHECKING:
    from vqae.model.vqae import VQAE

__all__ = ["VQAE"]


def __getattr__(name: str) -> Any:
    """Load VQAE on first use: importing torch takes seconds, during which the commands already handle signals."""
    if name == "VQAE":
        from vqae.model.vqae import VQAE

        return VQAE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
