"""Drop-in replacements for the quantizers of other libraries."""

from vq_kernels.compat.grouped_residual_vq import GroupedResidualVQ
from vq_kernels.compat.losses import LossBreakdown
from vq_kernels.compat.random_projection import RandomProjectionQuantizer
from vq_kernels.compat.residual_vq import ResidualVQ
from vq_kernels.compat.sim_vq import ResidualSimVQ, SimVQ
from vq_kernels.compat.vector_quantize import VectorQuantize

__all__ = [
    "GroupedResidualVQ",
    "LossBreakdown",
    "RandomProjectionQuantizer",
    "ResidualSimVQ",
    "ResidualVQ",
    "SimVQ",
    "VectorQuantize",
]
