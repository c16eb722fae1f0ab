"""The vector-quantized auto-encoder that vq_kernels was made for."""

from vqae import clock as clock  # first: its time is the process's start
from vqae.model import VQAE

__all__ = ["VQAE"]
