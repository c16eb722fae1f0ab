"""Figures about a model, against their definitions."""

import math

import pytest
import torch
from torch import Tensor

from vqae.config import Config
from vqae.model.vqae import VQAE, build_model
from vqae.training.checkpoint import json_line
from vqae.training.metrics import evaluate, psnr_db

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> VQAE:
    torch.manual_seed(0)
    return build_model(Config(num_codes=16, code_dim=64, hidden_dims=(16,)), (8, 8)).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (50, 3, 8, 8), dtype=torch.uint8, generator=generator)


def test_figures_are_what_their_names_say(model: VQAE, images: Tensor) -> None:
    result = evaluate(model, images, 50, CPU)
    indices = model.encode(images)
    errors = model.decode(indices).double() - images.double() / 255
    counts = torch.bincount(indices, minlength=16)
    share = counts[counts > 0].double() / 50
    assert result.mse == pytest.approx(errors.square().mean().item(), rel=1e-6)
    assert result.psnr_db == pytest.approx(-10 * math.log10(result.mse))
    assert result.perplexity == pytest.approx(math.exp(-(share * share.log()).sum()))
    assert result.codes_used == (counts > 0).sum()
    assert result.images == 50
    assert torch.equal(result.counts, counts)


def test_the_batch_size_does_not_matter(model: VQAE, images: Tensor) -> None:
    whole, parts = evaluate(model, images, 50, CPU), evaluate(model, images, 7, CPU)
    assert torch.equal(parts.counts, whole.counts)
    assert parts.mse == pytest.approx(whole.mse, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_as_it_was(images: Tensor, model: VQAE, training: bool) -> None:
    model.train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, images, 50, CPU)
    assert model.training == training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()


def test_it_asks_before_every_batch_whether_to_stop(images: Tensor, model: VQAE) -> None:
    asked = []

    def poll() -> None:
        asked.append(len(asked))
        if len(asked) == 3:
            raise KeyboardInterrupt

    model.train()
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, images, 10, CPU, poll)
    assert model.training
    model.eval()


def test_psnr() -> None:
    assert psnr_db(0.01) == pytest.approx(20)
    assert psnr_db(1.0) == 0
    assert psnr_db(0.0) == math.inf
    assert math.isnan(psnr_db(math.nan))


def test_json_has_no_word_for_infinity() -> None:
    line = json_line({"mse": 0.0, "psnr_db": math.inf, "loss": math.nan, "dataset": "synthetic", "images": 3})
    assert line == '{"mse": 0.0, "psnr_db": null, "loss": null, "dataset": "synthetic", "images": 3}'
