"""How the learning rate goes, and what one step does to the codebook."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from vqae.checkpoint import build_model
from vqae.config import Config
from vqae.model import VQAE
from vqae.recipe import build_optimizer, learning_rate_factor

CONFIG = Config(num_codes=16, code_dim=8, hidden_dims=(16,), restart_after=0)


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 0.99])
def test_the_learning_rate_rises_to_1_and_falls_to_0(warmup: float) -> None:
    assert learning_rate_factor(warmup, warmup) == 1
    assert learning_rate_factor(1.0, warmup) == pytest.approx(0, abs=1e-15)
    steps = [step / 1000 for step in range(1001)]
    factors = [learning_rate_factor(progress, warmup) for progress in steps]
    assert all(0 <= factor <= 1 for factor in factors)
    for (progress, factor), (_, following) in pairwise(zip(steps, factors, strict=True)):
        if progress >= warmup:
            assert following <= factor
        elif progress + 1e-3 <= warmup:
            assert following >= factor > 0


def test_past_the_end_the_learning_rate_stays_0() -> None:
    assert learning_rate_factor(1.5, 0.05) == 0


@pytest.mark.parametrize("codebook_step", ["share", "plain"])
def test_every_parameter_is_in_one_group_and_the_codebook_in_its_own(codebook_step: str) -> None:
    config = Config(num_codes=16, code_dim=8, codebook_step=codebook_step, lr=0.3, codebook_lr=0.2)
    model = build_model(config, (8, 8))
    network, codebook = build_optimizer(model, config).param_groups
    assert codebook["params"] == [model.quantizer.codebook]
    assert (codebook["lr"], codebook["momentum"], codebook["weight_decay"]) == (0.2, 0, 0)
    assert (network["lr"], network["momentum"], network["weight_decay"]) == (0.3, 0.9, 5e-4)
    names = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in network["params"]} == names - {id(model.quantizer.codebook)}


def one_step(config: Config) -> tuple[VQAE, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The model after a step, the codebook before it, and the embeddings [B, D] and indices [B] that it saw."""
    torch.manual_seed(0)
    model = build_model(config, (8, 8))
    optimizer = build_optimizer(model, config)
    before = model.quantizer.codebook.detach().clone()
    seen = []
    handle = model.encoder.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
    pictures = torch.randn(12, 3, 8, 8)
    output = model(pictures)
    handle.remove()
    (F.mse_loss(output.reconstruction, pictures) + output.codebook_loss).backward()
    optimizer.step()
    return model, before, seen[0], output.indices


def test_a_step_closes_a_share_of_each_chosen_codes_gap() -> None:
    model, before, embeddings, indices = one_step(CONFIG)
    for code in range(CONFIG.num_codes):
        rows = embeddings[indices == code]
        if rows.shape[0]:
            expected = before[code] + CONFIG.codebook_lr * (rows.mean(dim=0) - before[code])
            torch.testing.assert_close(model.quantizer.codebook[code].detach(), expected)
        else:
            assert torch.equal(model.quantizer.codebook[code], before[code])


def test_a_plain_step_is_sgd_on_the_loss() -> None:
    model, before, _, _ = one_step(Config(num_codes=16, code_dim=8, restart_after=0, codebook_step="plain"))
    codebook = model.quantizer.codebook
    assert codebook.grad.any()
    assert torch.equal(codebook, before - 0.1 * codebook.grad)
