"""The quantizers train well as they come, at every batch size, and warn once where training goes wrong."""

import copy
import math
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.vq_kernels.plain import PLAIN, residual_quantizer, vector_quantizer
from vq_kernels import ResidualVectorQuantizer, VectorQuantizer, kmeans, nearest_code
from vq_kernels.learning.monitor import PATIENCE, PERIOD


def clusters(dim: int, offset: float = 0.0) -> Callable[[int], Tensor]:
    """Draws rows [N, dim] around 100 centres."""
    generator = torch.Generator().manual_seed(0)
    centres = 1.5 * torch.randn(100, dim, generator=generator) + offset

    def draw(count: int) -> Tensor:
        chosen = torch.randint(100, (count,), generator=generator)
        return centres[chosen] + torch.randn(count, dim, generator=generator)

    return draw


def train(quantizer: nn.Module, draw: Callable[[int], Tensor], num_steps: int, num_rows: int) -> None:
    parameters = list(quantizer.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-2) if parameters else None
    for _ in range(num_steps):
        loss = quantizer(draw(num_rows)).loss
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@pytest.mark.parametrize(("num_rows", "num_steps"), [(16, 600), (64, 300), (1024, 60)])
def test_the_codebook_reaches_k_means_at_every_batch_size(num_rows: int, num_steps: int) -> None:
    torch.manual_seed(0)
    draw = clusters(8, offset=5.0)
    quantizer = VectorQuantizer(64, 8)
    train(quantizer, draw, num_steps, num_rows)
    x = draw(4096)
    reached = nearest_code(x, quantizer.codebook).sq_distances.mean()
    assert reached < 1.08 * nearest_code(x, kmeans(draw(16384), 64).codebook).sq_distances.mean()
    quantizer.reset_usage()
    quantizer(x)
    assert quantizer.perplexity > 45


def test_every_stage_reaches_k_means() -> None:
    torch.manual_seed(0)
    draw = clusters(8, offset=5.0)
    quantizer, fitted = ResidualVectorQuantizer(3, 32, 8), ResidualVectorQuantizer(3, 32, 8)
    train(quantizer, draw, 60, 1024)
    fitted.fit(draw(16384))
    x = draw(4096)
    for stages in (1, 2, 3):
        errors = [F.mse_loss(q.decode(q.encode(x)[:, :stages]), x) for q in (quantizer, fitted)]
        assert errors[0] < 1.08 * errors[1]


class Autoencoder(nn.Module):
    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8))
        self.quantizer = quantizer
        self.decoder = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 16))

    def fit(self, num_steps: int, lr: float) -> tuple[float, float]:
        """The reconstruction error of the last step, and the quantizer's loss."""
        draw = clusters(16)
        optimizer = torch.optim.Adam(self.parameters(), lr)
        for _ in range(num_steps):
            x = draw(256)
            quantized, _, loss = self.quantizer(self.encoder(x))
            reconstruction = F.mse_loss(self.decoder(quantized), x)
            optimizer.zero_grad()
            (reconstruction + loss).backward()
            optimizer.step()
        return reconstruction.item(), loss.item()


@pytest.mark.parametrize("make", [lambda: VectorQuantizer(64, 8), lambda: ResidualVectorQuantizer(2, 16, 8)])
def test_an_autoencoder_trains_with_it(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    reconstruction, loss = Autoencoder(make()).fit(200, lr=1e-2)
    assert reconstruction < 2.2  # the variance of x is 3.2, the error within clusters 1
    assert loss < 1


# -- "auto"


def test_the_averages_hold_forty_rows_for_each_code() -> None:
    for num_rows, share in ((8, 8 / 160), (64, 0.2)):  # K = 4: 40·4 rows
        quantizer = vector_quantizer(4, 2, ema_decay="auto")
        quantizer(torch.randn(num_rows, 2))
        expected = (1 - share) * torch.ones(4) + share * 160 / num_rows * quantizer.batch_counts
        torch.testing.assert_close(quantizer.cluster_sizes, expected)


def test_masked_rows_do_not_shorten_the_averages() -> None:
    quantizer = vector_quantizer(4, 2, ema_decay="auto")
    quantizer(torch.randn(64, 2), mask=torch.arange(64) < 8)
    torch.testing.assert_close(quantizer.cluster_sizes.sum(), torch.tensor(0.95 * 4 + 8))


@pytest.mark.parametrize(("num_rows", "steps"), [(1, 160), (2, 80), (4, 40), (100, 20)])
def test_a_code_is_reset_after_20_steps_or_10_rows_for_each_code(num_rows: int, steps: int) -> None:
    quantizer = vector_quantizer(16, 2, restart_after="auto")
    quantizer.set_codes(torch.cat([torch.zeros(1, 2), torch.full((15, 2), 9.0)]))
    for step in range(steps):
        quantizer(torch.zeros(num_rows, 2))
        assert quantizer.restarts == 0, step
    quantizer(torch.zeros(num_rows, 2))
    assert quantizer.restarts == 15
    assert quantizer.steps_unused[1:].tolist() == 15 * [1]  # counted anew


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_a_codebook_larger_than_the_batch_fills_at_once(offset: float) -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(64, 8)
    for _ in range(20):
        quantizer(torch.randn(8, 8) + offset)
    assert quantizer.encode(torch.randn(2000, 8) + offset).unique().numel() > 56
    distances = torch.pdist(quantizer.codebook)
    assert (distances < 0.5).sum() < 10  # 224 pairs of copies in the first step


def test_no_rows_reset_no_code() -> None:
    quantizer = VectorQuantizer(4, 2)
    quantizer(torch.randn(8, 2))
    before = quantizer.codebook.clone()
    for _ in range(100):
        quantizer(torch.zeros(0, 2))
    assert torch.equal(quantizer.codebook, before)


# -- the loss


@pytest.mark.parametrize("make", [vector_quantizer, lambda *a, **o: residual_quantizer(2, *a, **o)])
def test_the_loss_holds_what_it_trains(make: Callable[..., Any]) -> None:
    x = torch.randn(50, 2, requires_grad=True)
    learnable = make(4, 2, commitment_weight=0.5)
    averaged = make(4, 2, commitment_weight=0.5, ema_decay=0.9)
    averaged.set_codes(learnable.codebook.detach())
    losses = learnable(x).loss, averaged.eval()(x).loss
    torch.testing.assert_close(losses[0], 3 * losses[1])  # (1 + w) and w
    gradients = [torch.autograd.grad(loss, x)[0] for loss in losses]
    assert gradients[0].abs().max() > 0
    assert torch.equal(*gradients)


def test_without_commitment_the_loss_of_averages_is_zero() -> None:
    x = torch.randn(50, 2, requires_grad=True)
    loss = vector_quantizer(4, 2, ema_decay=0.9)(x).loss
    loss.backward()
    assert loss == 0
    assert x.grad is not None
    assert not x.grad.any()


# -- warnings


def run_on(quantizer: nn.Module, x: Tensor, num_steps: int) -> list[str]:
    """Trains on the same rows in each step; returns the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(num_steps):
            quantizer(x)
    return [str(warning.message) for warning in caught]


def run_collapsed(quantizer: nn.Module, num_steps: int) -> list[str]:
    return run_on(quantizer, torch.ones(32, 2), num_steps)


ENOUGH = PATIENCE * PERIOD  # steps until a collapse is reported


def test_a_divergence_warns_once_and_names_the_argument() -> None:
    torch.manual_seed(0)
    diverging = Autoencoder(VectorQuantizer(64, 8, **PLAIN))
    with pytest.warns(UserWarning, match=r"diverges: its mean squared error grew from .*=0.25 \(it is 0.0\)") as found:
        diverging.fit(300, lr=3e-2)
    assert len(found) == 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.nan, "the input of the quantizer holds NaN; check what computes it, pass mask for padding"),
        (math.inf, "the quantizer diverges: its mean squared error is nan; lower the learning rate"),
    ],
)
def test_an_input_that_is_not_finite_warns(value: float, expected: str) -> None:
    (message,) = run_on(VectorQuantizer(4, 2), torch.full((32, 2), value), 2 * PERIOD)
    assert message.startswith(expected)


def test_a_divergence_without_commitment_is_seen() -> None:
    quantizer = VectorQuantizer(64, 8, commitment_weight=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(150):
            quantizer(1.2**step * torch.randn(64, 8))
    (warning,) = caught
    assert "pass commitment_weight=0.25 (it is 0.0)" in str(warning.message)


def test_an_error_that_grows_with_the_input_is_none() -> None:
    quantizer, x = VectorQuantizer(64, 8), torch.randn(16, 8)
    for step in range(150):
        quantizer(x if step < 12 else torch.randn(256, 8))  # at first there is a code for each row


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"restart_after": 0}, "pass restart_after='auto' (it is 0)"),
        ({"init": "normal"}, "pass init='data' (it is 'normal')"),
        ({}, "check that the input varies"),
    ],
)
def test_a_collapse_warns_once_and_names_the_argument(options: dict[str, Any], advice: str) -> None:
    quantizer = VectorQuantizer(16, 2, **options)
    assert run_collapsed(quantizer, ENOUGH - 1) == []
    (message,) = run_collapsed(quantizer, 1)
    assert "the codebook collapses" in message
    assert advice in message
    assert run_collapsed(quantizer, 2 * ENOUGH) == []


def test_codes_that_stay_unused_warn() -> None:
    (message,) = run_on(vector_quantizer(64, 2), 5 + 0.1 * torch.randn(64, 2), 10 * PERIOD)
    assert re.search(r"\d\d% of the codes have not been chosen for long; pass restart_after='auto'", message)


USES: dict[str, Callable[[Any, Tensor], Any]] = {
    "eval": lambda q, x: q.eval()(x),
    "encode": lambda q, x: q.encode(x),
    "topk": lambda q, x: q.topk(x, 2),
    "frozen": lambda q, x: (setattr(q, "freeze_codebook", True), q(x)),
}


@pytest.mark.parametrize("use", USES)
def test_codes_that_wait_for_data_warn_once_if_used(use: str) -> None:
    x = torch.randn(32, 2)
    quantizer = VectorQuantizer(4, 2)
    with pytest.warns(UserWarning, match="the codes wait for data: init='data' takes them") as found:
        USES[use](quantizer, x)
    assert len(found) == 1
    USES[use](quantizer, x)  # a second warning would be an error
    begun = VectorQuantizer(4, 2)
    begun(x)
    for ready in (begun, VectorQuantizer(4, 2, init="normal"), VectorQuantizer.from_codebook(x[:4])):
        USES[use](ready, x)
    USES[use](VectorQuantizer(4, 2, warn=False), x)


@pytest.mark.parametrize("make", [lambda q: q, copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))])  # noqa: S301
def test_copies_warn_too(make: Callable[[nn.Module], nn.Module]) -> None:
    quantizer = VectorQuantizer(16, 2)
    run_collapsed(quantizer, PERIOD)
    assert len(run_collapsed(make(quantizer), ENOUGH)) == 1


def test_no_warning_where_none_is_due() -> None:
    assert run_collapsed(VectorQuantizer(16, 2, warn=False), 2 * ENOUGH) == []
    frozen = VectorQuantizer.from_codebook(torch.randn(16, 2), freeze=True)
    assert run_collapsed(frozen, 2 * ENOUGH) == []
    assert run_collapsed(frozen.eval(), 2 * ENOUGH) == []
    assert run_collapsed(VectorQuantizer(2, 2), 2 * ENOUGH) == []  # cannot collapse
    dropped = ResidualVectorQuantizer(4, 16, 2, quantizer_dropout=1.0)
    for _ in range(2 * ENOUGH):
        dropped(torch.randn(64, 2))
