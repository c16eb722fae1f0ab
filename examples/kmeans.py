"""k-means with `nearest_code`.

python examples/kmeans.py
"""

import torch
from torch import Tensor

from vq_kernels import nearest_code


def kmeans(points: Tensor, num_means: int, num_steps: int = 10) -> tuple[Tensor, list[float]]:
    """Return the means [K, D] of points [N, D], and the mean squared distance before each step."""
    means = points[torch.randperm(len(points))[:num_means]]
    errors = []
    for _ in range(num_steps):
        nearest, _, sq_distances = nearest_code(points, means)  # exact, without an [N, K] matrix
        errors.append(sq_distances.mean().item())
        sums = torch.zeros_like(means).index_add_(0, nearest, points)
        counts = nearest.bincount(minlength=num_means)[:, None]
        means = torch.where(counts > 0, sums / counts.clamp(min=1), means)
    return means, errors


if __name__ == "__main__":
    torch.manual_seed(0)
    centres = 10 * torch.randn(100, 16)
    points = centres[torch.randint(100, (20_000,))] + torch.randn(20_000, 16)
    means, errors = kmeans(points, num_means=200)
    for step, error in enumerate(errors):
        print(f"step {step}: mean squared distance {error:6.2f}")
    print(f"variance of the noise: {points.shape[1]}")
