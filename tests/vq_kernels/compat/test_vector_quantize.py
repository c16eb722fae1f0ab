"""`VectorQuantize` on empty batches, only padding, few rows, other dtypes, and masks of images."""

import copy
from typing import Any

import pytest
import torch

from tests.vq_kernels.compat.side_by_side import DIM, MODES, NUM_CODES, OWN_CODES, draw
from vq_kernels import VectorQuantize, nearest_code

FEW_MODES = ["default", "cosine", "heads with own codes, projection, cosine", "learnable", "k-means", "dead codes"]


@pytest.mark.parametrize("mode", FEW_MODES)
def test_an_empty_batch(mode: str) -> None:
    layer = VectorQuantize(DIM, NUM_CODES, **MODES[mode])
    before = copy.deepcopy(layer.state_dict())
    quantized, indices, loss = layer(torch.zeros(2, 0, DIM, requires_grad=True))
    assert quantized.shape == (2, 0, DIM)
    assert indices.shape[:2] == (2, 0)
    assert loss == 0
    assert torch.equal(layer.state_dict()["_codebook.initted"], before["_codebook.initted"])
    assert all(value.isfinite().all() for value in layer.state_dict().values())


@pytest.mark.parametrize("mode", FEW_MODES)
def test_a_batch_of_only_padding(mode: str) -> None:
    layer = VectorQuantize(DIM, NUM_CODES, **MODES[mode])
    x = torch.full((2, 5, DIM), torch.nan, requires_grad=True)
    quantized, indices, loss = layer(x, lens=torch.zeros(2, dtype=torch.int64))
    (quantized.sum() + loss).backward()
    assert loss == 0
    assert (indices == -1).all()
    assert not quantized.any()
    assert x.grad is not None
    assert not x.grad.any()
    assert layer._codebook.initted == (mode != "k-means")
    _, cross_entropy = layer(draw(2, 5, DIM), indices=torch.full_like(indices, -1))
    assert cross_entropy == 0


def test_k_means_with_fewer_rows_than_codes_repeats_them() -> None:
    layer = VectorQuantize(DIM, NUM_CODES, kmeans_init=True)
    x = draw(1, 20, DIM)
    layer.eval()(x)
    used = layer.codebook[layer._codebook.cluster_size[0] > 0]
    assert nearest_code(x, used).sq_distances.max() < 1e-6
    assert layer._codebook.cluster_size.sum() == 20
    before = layer.codebook.clone()
    layer(draw(1, 20, DIM, seed=1))
    assert torch.equal(layer.codebook, before)


def test_more_dead_codes_than_rows() -> None:
    torch.manual_seed(0)
    layer = VectorQuantize(DIM, NUM_CODES, threshold_ema_dead_code=2)
    replaced = torch.zeros(NUM_CODES, dtype=torch.bool)
    for seed in range(40):
        before = layer.codebook.clone()
        x = draw(1, 5, DIM, seed=seed)
        layer.expire_codes_(x)
        changed = (layer.codebook != before).any(dim=1)
        assert changed.sum() == 5
        assert layer.codebook[changed].sort(dim=0)[0].equal(x[0].sort(dim=0)[0])  # five rows, each once
        replaced |= changed
        layer._codebook.cluster_size.fill_(1)
    assert replaced.all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codes_reset_to_half_precision_rows_have_length_1_in_float32(dtype: torch.dtype) -> None:
    layer = VectorQuantize(DIM, NUM_CODES, threshold_ema_dead_code=2, use_cosine_sim=True)
    layer.expire_codes_(draw(1, 60, DIM).to(dtype))
    assert (layer.codebook.norm(dim=1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("keywords", [{}, {"use_cosine_sim": True}])
def test_other_dtypes_of_x(dtype: torch.dtype, keywords: dict[str, Any]) -> None:
    layer = VectorQuantize(DIM, NUM_CODES, **keywords)
    before = layer.codebook.clone()
    x = draw(3, 20, DIM).to(dtype).requires_grad_()
    quantized, indices, loss = layer(x)
    (quantized.sum() + loss).backward()
    assert quantized.dtype == dtype
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert torch.equal(quantized, before[indices].to(dtype))
    if not keywords:
        assert torch.equal(indices, nearest_code(x, before).indices)
    assert layer.codebook.dtype == torch.float32


def test_masks_of_images() -> None:
    """Theirs does not accept them."""
    layer = VectorQuantize(DIM, NUM_CODES, accept_image_fmap=True, **OWN_CODES)
    mask = torch.arange(20).view(1, 4, 5).expand(3, 4, 5) % 3 == 0
    quantized, indices, _ = layer(draw(3, DIM, 4, 5), mask=mask)
    assert (indices[~mask] == -1).all()
    assert (indices[mask] >= 0).all()
    assert not quantized.movedim(1, -1)[~mask].any()
