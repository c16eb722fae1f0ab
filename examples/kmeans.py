"""k-means on a file of vectors that is read in batches.

python examples/kmeans.py
"""

import tempfile

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vq_kernels import kmeans


class VectorFile(Dataset[torch.Tensor]):
    """The float32 vectors [N, D] of a memory-mapped file."""

    def __init__(self, file: str, code_dim: int) -> None:
        self.rows = np.memmap(file, np.float32, mode="r+").reshape(-1, code_dim)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        """Return a batch."""
        return torch.from_numpy(self.rows[indices])


if __name__ == "__main__":
    torch.manual_seed(0)
    centres = 10 * torch.randn(100, 16)
    points = centres[torch.randint(100, (20_000,))] + torch.randn(20_000, 16)
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        points.numpy().tofile(file.name)
        loader = DataLoader(VectorFile(file.name, 16), batch_size=4096, collate_fn=lambda batch: batch)
        for init in ("random", "k-means++"):
            result = kmeans(loader, num_codes=100, init=init)
            error = result.inertia / len(points)
            print(f"{init:>9}: mean squared distance {error:6.2f} after {result.num_iterations} iterations")
    print(f"variance of the noise: {points.shape[1]}")
