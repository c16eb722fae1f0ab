"""Weights made from images: what encoder and decoder are worth before the first step."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vqae import VQAE
from vqae.config import Config
from vqae.model import pca_init
from vqae.model.pca_init import init_by_pca
from vqae.model.vqae import build_model


def smooth_images(count: int, size: int = 32, rank: int = 6) -> Tensor:
    """[count, 3, size, size] uint8: mixtures of a few smooth patterns, the first the strongest, and a little noise."""
    generator = torch.Generator().manual_seed(0)
    patterns = F.interpolate(torch.randn(rank, 3, 3, 3, generator=generator), size=(size, size), mode="bilinear")
    weights = torch.randn(count, rank, generator=generator) / torch.arange(1, rank + 1)
    images = 127 + 40 * torch.einsum("nr,rchw->nchw", weights, patterns)
    return (images + torch.randn(images.shape, generator=generator)).clamp(0, 255).to(torch.uint8)


def begun(images: Tensor, seed: int = 0, code_dim: int = 8, hidden_dims: Sequence[int] = (32,)) -> VQAE:
    torch.manual_seed(seed)
    config = Config(num_codes=16, code_dim=code_dim, hidden_dims=tuple(hidden_dims))
    model = build_model(config, (images.shape[2], images.shape[3]))
    init_by_pca(model, images)
    return model.eval()


@torch.no_grad()
def unexplained(model: VQAE, images: Tensor) -> float:
    """The error of decoding the embeddings themselves, as a share of the images' variance."""
    x = model.normalise(images)
    error = (model.decoder(model.encoder(x)) - x).square().mean()
    return float(error / (x - x.mean(0)).square().mean())


@torch.no_grad()
def distance_ratios(model: VQAE, images: Tensor) -> Tensor:
    """Distances between embeddings over those between their images, a number for each pair of neighbours in a row."""
    x = model.normalise(images)
    return model.encoder(x).diff(dim=0).norm(dim=1) / x.flatten(1).diff(dim=0).norm(dim=1)


def test_embeddings_keep_the_distances_between_images() -> None:
    images = smooth_images(400)
    ratios = distance_ratios(begun(images[:300]), images[300:])
    assert ratios.std() / ratios.mean() < 0.1
    torch.manual_seed(0)
    at_random = distance_ratios(build_model(Config(num_codes=16, code_dim=8), (32, 32)).eval(), images[300:])
    assert at_random.std() / at_random.mean() > 0.2


@pytest.mark.parametrize(("code_dim", "hidden_dims"), [(8, (32,)), (8, ()), (8, (24, 16)), (512, (1024,))])
def test_the_decoder_reconstructs_new_images(code_dim: int, hidden_dims: tuple[int, ...]) -> None:
    images = smooth_images(600)
    assert unexplained(begun(images[:500], code_dim=code_dim, hidden_dims=hidden_dims), images[500:]) < 0.1


def test_embeddings_are_as_large_as_random_codes() -> None:
    images = smooth_images(300)
    model = begun(images)
    with torch.no_grad():
        embeddings = model.encoder(model.normalise(images))
    assert float(embeddings.square().mean()) == pytest.approx(1, abs=0.1)


def test_all_parameters_can_be_trained_after_the_initialisation() -> None:
    images = smooth_images(64)
    model = begun(images).train()
    output = model(model.normalise(images))
    F.mse_loss(output.reconstruction, model.normalise(images)).backward()
    still = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    # A branch that begins at zero gives its own weights no gradient until its last BatchNorm has moved.
    assert all(
        ".conv" in name or ".bn1." in name or ".downsample.0." in name for name in still if "codebook" not in name
    )
    assert not any(name.endswith("bn2.weight") for name in still)


@pytest.mark.parametrize("size", [1, 5, 32, 40])
@pytest.mark.parametrize("count", [1, 2, 70])
def test_weights_are_finite_however_few_and_small_the_images(size: int, count: int) -> None:
    for images in (smooth_images(count, size), torch.full((count, 3, size, size), 9, dtype=torch.uint8)):
        state = begun(images).state_dict()
        assert all(tensor.isfinite().all() for tensor in state.values())


def test_ridge_regression_with_few_and_many_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 60, generator=generator) + 3, torch.randn(40, 2, generator=generator) - 5
    for num_columns in (60, 20):  # more columns than rows, and fewer
        part = x[:, :num_columns]
        centred = (part - part.mean(0)).double()
        system = centred.T @ centred / 40 + 1e-2 * centred.square().mean() * torch.eye(num_columns)
        expected = torch.linalg.solve(system, centred.T @ (y - y.mean(0)).double() / 40).T
        weight, bias = pca_init._ridge_regression(part, y)
        torch.testing.assert_close(weight.double(), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(weight @ part.mean(0) + bias, y.mean(0))


def test_initialisation_depends_on_the_seed_and_keeps_the_mode() -> None:
    images = smooth_images(100)
    first, again, other = (begun(images, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["decoder.0.weight"], other["decoder.0.weight"])
    model = build_model(Config(num_codes=4, code_dim=4), (32, 32)).train()
    init_by_pca(model, images)
    assert model.training
    assert all(weight.requires_grad for weight in model.parameters())
