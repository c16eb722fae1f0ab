"""How codebooks learn: moving averages, k-means, dead codes, optimizers."""
