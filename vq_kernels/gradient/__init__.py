"""The gradient of the codebook: a segmented sum over each code's rows."""

from vq_kernels.gradient.autograd import codebook_gradient_op, difference_sums

__all__ = ["codebook_gradient_op", "difference_sums"]
