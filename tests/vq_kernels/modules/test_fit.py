"""`fit` sets all codebooks of a quantizer by k-means."""

import pytest
import torch
from torch import Tensor

from tests.vq_kernels.plain import residual_quantizer, vector_quantizer
from vq_kernels import kmeans


def clustered(num_rows: int = 2000, channels: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, channels, generator=generator)
    return centres[torch.arange(num_rows) % 40] + 0.2 * torch.randn(num_rows, channels, generator=generator)


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_one_codebook_is_that_of_kmeans(ema_decay: float | None) -> None:
    x = clustered()
    quantizer = vector_quantizer(32, 8, init="data", ema_decay=ema_decay)
    (result,) = quantizer.fit(x, seed=3)
    expected = kmeans(x, 32, seed=3)
    assert torch.equal(quantizer.codebook, expected.codebook)
    assert result.inertia == expected.inertia
    assert not quantizer.needs_data
    assert (quantizer.eval()(x).quantized - x).square().sum().item() == pytest.approx(result.inertia, rel=1e-5)


def test_each_head_and_each_stage_get_their_own() -> None:
    x = clustered(channels=16)
    grouped = residual_quantizer(3, 16, 8, heads=2, separate_codebooks=True)
    results = grouped.fit(x, max_iterations=20)
    assert len(results) == 6
    for head in range(2):
        residual = x[:, 8 * head : 8 * head + 8]
        for stage in range(3):
            expected = kmeans(residual, 16, max_iterations=20)
            torch.testing.assert_close(grouped.codebook[head, stage], expected.codebook)
            nearest = torch.cdist(residual, expected.codebook).argmin(dim=1)
            residual = residual - expected.codebook[nearest]
    assert results[2].inertia < results[1].inertia < results[0].inertia


def test_batches_and_channels_first() -> None:
    x = clustered(1024).view(4, 16, 16, 8).movedim(-1, 1)
    quantizer = residual_quantizer(2, 40, 8, channel_dim=1)
    whole = quantizer.fit(x)
    before = quantizer.eval()(x).loss
    parts = quantizer.fit([x[:1], x[1:]], seed=0)
    for one, other in zip(whole, parts, strict=True):
        assert one.inertia == pytest.approx(other.inertia, rel=0.1)  # other rows are drawn to begin with
    assert quantizer(x).loss < 1.1 * before


def test_heads_that_share_a_codebook() -> None:
    x = clustered(500, 16)
    quantizer = vector_quantizer(20, 8, heads=2)
    quantizer.fit(x)
    assert torch.equal(quantizer.codebook, kmeans(x.reshape(-1, 8), 20).codebook)


def test_cosine_is_spherical_kmeans() -> None:
    x = clustered(channels=16)
    quantizer = vector_quantizer(32, 8, metric="cosine", heads=2, separate_codebooks=True)
    results = quantizer.fit(x, seed=2)
    for head, result in enumerate(results):
        part = x[:, 8 * head : 8 * head + 8]
        assert torch.equal(quantizer.codebook[head], kmeans(part, 32, metric="cosine", seed=2).codebook)
        assert torch.equal(result.counts, quantizer.encode(x)[:, head].bincount(minlength=32))


def test_bad_input_leaves_the_codes() -> None:
    x = clustered()
    quantizer = vector_quantizer(32, 8)
    before = quantizer.codebook.detach().clone()
    with pytest.raises(TypeError, match="x must be a tensor or re-iterable"):
        quantizer.fit(iter([x]))
    with pytest.raises(TypeError, match="multiple values for keyword argument 'metric'"):
        quantizer.fit(x, metric="cosine")
    with pytest.raises(ValueError, match="x must have 8 channels in dimension -1"):
        quantizer.fit(x[:, :7])
    with pytest.raises(ValueError, match="x must be finite"):
        quantizer.fit(x / 0)
    assert torch.equal(quantizer.codebook, before)
