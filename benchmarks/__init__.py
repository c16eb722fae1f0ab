"""Benchmarks: their commands, what they share, and the committed results."""
