"""The search as Triton kernels."""
