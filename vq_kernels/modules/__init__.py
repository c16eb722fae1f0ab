"""The quantizers as modules."""
