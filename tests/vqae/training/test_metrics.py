"""The metrics against their definitions, the sums of losses, and the warning about a collapsed codebook."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from vq_kernels import perplexity
from vqae.config import RECIPES, Config
from vqae.model.vqae import VQAE, build_model
from vqae.runtime.errors import DivergedError
from vqae.training.checkpoint import json_line
from vqae.training.metrics import LossMeter, collapse_warning, evaluate, psnr_db

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> VQAE:
    torch.manual_seed(0)
    return build_model(Config(num_codes=16, code_dim=64, hidden_dims=(16,)), (8, 8)).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (50, 3, 8, 8), dtype=torch.uint8, generator=generator)


def test_metrics_match_their_definitions(model: VQAE, images: Tensor) -> None:
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


def test_poll_is_called_before_every_batch(images: Tensor, model: VQAE) -> None:
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


def test_json_line_writes_null_for_infinity() -> None:
    line = json_line({"mse": 0.0, "psnr_db": math.inf, "loss": math.nan, "dataset": "synthetic", "images": 3})
    assert line == '{"mse": 0.0, "psnr_db": null, "loss": null, "dataset": "synthetic", "images": 3}'


# -- losses


def meter_of(*losses: tuple[float, float]) -> LossMeter:
    meter = LossMeter(CPU)
    for step, (reconstruction, codebook) in enumerate(losses, start=1):
        meter.add(torch.tensor([reconstruction, codebook], requires_grad=True), step)
    return meter


def test_means() -> None:
    meter = meter_of((1.0, 10.0), (2.0, 30.0))
    meter.check()
    assert meter.means() == (1.5, 20.0)
    assert not meter.sums.requires_grad


def test_means_of_nothing_are_nan() -> None:
    assert all(math.isnan(mean) for mean in LossMeter(CPU).means())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_bad_step_is_named(bad: float) -> None:
    for losses in ((bad, 1.0), (1.0, bad)):
        meter = meter_of((1.0, 1.0), losses, (bad, bad), (1.0, 1.0))
        with pytest.raises(DivergedError, match="not finite at step 2"):
            meter.check()


def test_a_restored_meter_continues() -> None:
    before = meter_of((1.0, 10.0), (2.0, 30.0))
    meter = LossMeter(CPU, before.sums, before.steps)
    meter.add(torch.tensor([6.0, 20.0]), 3)
    assert meter.means() == (3.0, 20.0)


# -- collapse

CONFIG = Config(restart_after=15_360, batch_size=256)  # 60 steps
LATE = 10_000_000  # images


def test_metrics_of_several_codes_per_image(images: Tensor) -> None:
    torch.manual_seed(0)
    model = build_model(Config(num_codes=16, num_quantizers=3, code_dim=64, hidden_dims=(16,)), (8, 8)).eval()
    result, indices = evaluate(model, images, 20, CPU), model.encode(images)
    counts = torch.stack([torch.bincount(stage, minlength=16) for stage in indices.unbind(1)])
    assert torch.equal(result.counts, counts)
    assert result.codes_used == (counts > 0).sum()
    assert result.perplexity == pytest.approx(perplexity(counts).mean().item())
    assert result.mse == pytest.approx((model.decode(indices) - images / 255).square().mean().item(), rel=1e-6)


def counts_of(num_codes: int, codes_used: int, num_images: int) -> Tensor:
    """[K] counts of so many images, which chose so many codes."""
    counts = torch.zeros(num_codes, dtype=torch.int64)
    counts[torch.arange(num_images) % codes_used] += 1  # one each, then the rest to the first
    counts[0] += num_images - int(counts.sum())
    return counts


@pytest.mark.parametrize(
    ("num_codes", "codes_used", "num_images", "warns"),
    [
        (512, 255, 100_000, True),  # everything can be reached: half of the codes is half of K
        (512, 256, 100_000, False),
        (512, 2, 6_000, True),
        (512, 36, 40, False),  # 40 images cannot choose 256 codes
        (512, 20, 40, False),  # evenly drawn, they reach 38.5
        (512, 19, 40, True),
        (1, 1, 1, False),
        (1, 1, 1000, False),
        (2, 1, 1000, False),  # exactly half
        (3, 1, 1000, True),
    ],
)
def test_warning_below_half_of_the_expected_codes(
    num_codes: int, codes_used: int, num_images: int, warns: bool
) -> None:
    counts = counts_of(num_codes, codes_used, num_images)
    assert counts.sum() == num_images
    warning = collapse_warning(CONFIG, counts, LATE)
    assert (warning is not None) == warns
    if warning is not None:
        assert warning.startswith(f"warning: {num_images:,} held-out images use {codes_used} of {num_codes} codes")


def test_no_warning_before_unused_codes_were_reset() -> None:
    counts = counts_of(512, 2, 6_000)
    assert collapse_warning(CONFIG, counts, 2 * 15_360 - 1) is None
    assert collapse_warning(CONFIG, counts, 2 * 15_360) is not None


def test_one_stage_of_few_codes_is_warned_of() -> None:
    counts = torch.stack([counts_of(512, codes_used, 6_000) for codes_used in (500, 20, 400)])
    warning = collapse_warning(CONFIG, counts, LATE)
    assert warning is not None
    assert warning.startswith("warning: 6,000 held-out images use 20 of 512 codes")
    assert collapse_warning(CONFIG, counts[::2], LATE) is None


def test_without_resets_the_warning_is_immediate() -> None:
    assert collapse_warning(dataclasses.replace(CONFIG, restart_after=0), counts_of(512, 2, 6_000), 1) is not None


@pytest.mark.parametrize(
    ("overrides", "option"),
    [
        (RECIPES["plain"], f"try --restart-after {Config.restart_after}, "),
        ({"codebook_step": "plain"}, "try --codebook-step count_normalised"),
        ({"codebook_step": "count_normalised", "embedding_norm": "none"}, "try --encoder-lr below 0.003"),
        ({"codebook_step": "count_normalised", "embedding_norm": "batch"}, "try --restart-after below 15360, "),
    ],
)
def test_the_warning_names_an_option(overrides: dict[str, object], option: str) -> None:
    warning = collapse_warning(dataclasses.replace(CONFIG, **overrides), counts_of(512, 2, 6_000), LATE)
    assert warning is not None
    assert option in warning
