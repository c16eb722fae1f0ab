"""How the learning rate goes, and what one step does to the codebook."""

from collections.abc import Iterable
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from vqae.config import Config
from vqae.model.vqae import VQAE, build_model
from vqae.training.optim import build_optimizer, build_schedule, learning_rate_factor

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


@pytest.mark.parametrize("codebook_step", ["count_normalised", "plain"])
def test_encoder_decoder_and_codebook_have_a_parameter_group_each(codebook_step: str) -> None:
    rates = {"encoder_lr": 0.01, "lr": 0.3, "codebook_lr": 0.2}
    config = Config(num_codes=16, code_dim=8, weight_decay=5e-4, codebook_step=codebook_step, **rates)
    model = build_model(config, (8, 8))
    encoder, decoder, codebook = build_optimizer(model, config).param_groups
    assert codebook["params"] == [model.quantizer.codebook]
    assert (codebook["lr"], codebook["momentum"], codebook["weight_decay"]) == (0.2, 0, 0)
    assert (encoder["lr"], encoder["momentum"], encoder["weight_decay"]) == (0.01, 0.9, 5e-4)
    assert (decoder["lr"], decoder["momentum"], decoder["weight_decay"]) == (0.3, 0.9, 5e-4)
    assert ids(encoder["params"]) == ids(model.encoder.parameters())
    assert ids(decoder["params"]) == ids(model.decoder.parameters())


def ids(parameters: Iterable[torch.Tensor]) -> set[int]:
    return {id(parameter) for parameter in parameters}


def test_the_encoder_schedule_starts_when_it_is_unfrozen() -> None:
    options = {"lr": 0.3, "encoder_lr": 0.01, "codebook_lr": 0.2}
    config = Config(num_codes=16, code_dim=8, unfreeze_encoder_at=0.5, warmup=0.1, **options)
    optimizer = build_optimizer(build_model(config, (8, 8)), config)
    at = 0.0
    schedule = build_schedule(optimizer, config, lambda: at)

    def rates(progress: float) -> list[float]:
        nonlocal at
        at = progress
        optimizer.step()
        schedule.step()
        return [group["lr"] for group in optimizer.param_groups]

    assert rates(0.1) == [0, pytest.approx(0.3), pytest.approx(0.2)]
    assert rates(0.49)[0] == 0
    assert rates(0.525)[0] == pytest.approx(0.005)  # half of its own warm-up
    assert rates(0.55)[0] == pytest.approx(0.01)
    assert rates(0.6)[0] < 0.01
    assert rates(1.0) == pytest.approx([0, 0, 0], abs=1e-15)


def one_step(config: Config) -> tuple[VQAE, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The model after a step, the codebook before it, and the embeddings [B, D] and indices [B] that it saw."""
    torch.manual_seed(0)
    model = build_model(config, (8, 8))
    optimizer = build_optimizer(model, config)
    before = model.quantizer.codebook.detach().clone()
    seen = []
    handle = model.encoder.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
    images = torch.randn(12, 3, 8, 8)
    output = model(images)
    handle.remove()
    (F.mse_loss(output.reconstruction, images) + output.codebook_loss).backward()
    optimizer.step()
    return model, before, seen[0], output.indices


def test_count_normalised_step_moves_each_code_towards_its_mean() -> None:
    model, before, embeddings, indices = one_step(CONFIG)
    for code in range(CONFIG.num_codes):
        rows = embeddings[indices == code]
        if rows.shape[0]:
            expected = before[code] + CONFIG.codebook_lr * (rows.mean(dim=0) - before[code])
            torch.testing.assert_close(model.quantizer.codebook[code].detach(), expected)
        else:
            assert torch.equal(model.quantizer.codebook[code], before[code])


def test_a_plain_step_is_sgd_on_the_loss() -> None:
    config = Config(num_codes=16, code_dim=8, restart_after=0, codebook_step="plain", codebook_lr=0.1)
    model, before, _, _ = one_step(config)
    codebook = model.quantizer.codebook
    assert codebook.grad.any()
    assert torch.equal(codebook, before - 0.1 * codebook.grad)
