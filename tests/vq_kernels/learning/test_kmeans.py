"""k-means on the first batch."""

import pytest
import torch

from vq_kernels.learning.kmeans import kmeans_if_needed


@pytest.mark.parametrize("cosine", [False, True])
def test_k_means_finds_separate_clusters(cosine: bool) -> None:
    centres = torch.eye(4) * 5
    rows = (
        centres.repeat(50, 1) + 0.1 * torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    ).requires_grad_(False)
    if cosine:
        rows = torch.nn.functional.normalize(rows, dim=1)
    rows[3] = torch.nan
    best = torch.inf
    for seed in range(10):  # Lloyd's algorithm may end in another local optimum
        torch.manual_seed(seed)
        means, counts, done = kmeans_if_needed(
            torch.tensor(True), rows, torch.ones(200).bool(), 4, 10, cosine, False, "auto"
        )
        assert done
        assert counts.sum() == 199
        best = min(best, float(torch.cdist(centres / (5 if cosine else 1), means).amin(dim=1).max()))
    assert best < 0.1


def test_k_means_does_nothing_if_not_needed_or_without_rows() -> None:
    for needed, num_rows in ((False, 5), (True, 0)):
        options = (torch.ones(num_rows).bool(), 3, 10, False, False, "auto")
        means, counts, done = kmeans_if_needed(torch.tensor(needed), torch.ones(num_rows, 2), *options)
        assert not done
        assert means.shape == (3, 2)
        assert not counts.any()
