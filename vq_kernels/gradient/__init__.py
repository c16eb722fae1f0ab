"""Gradients of quantization; the codebook's gradient is a segmented sum over the rows of each code."""
