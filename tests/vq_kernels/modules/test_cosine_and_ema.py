"""The cosine metric and moving averages, with gradients, dead-code resets and activation checkpointing."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.vq_kernels.plain import vector_quantizer
from vq_kernels import VectorQuantizer, attach_count_normalised_step, count_normalised_param_group, nearest_code


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(**options: object) -> VectorQuantizer:
    torch.manual_seed(0)
    return vector_quantizer(20, 4, **options)


def test_cosine_takes_the_largest_dot_product_of_unit_vectors() -> None:
    torch.manual_seed(0)
    quantizer = vector_quantizer(1000, 4, metric="cosine")
    x = 100 * draw(2000, 4)
    quantized, indices, _ = quantizer(x)
    units, codes = F.normalize(x, dim=1), F.normalize(quantizer.codebook.detach(), dim=1)
    products = units.double() @ codes.double().t()
    chosen = products.gather(1, indices[:, None])[:, 0]
    assert (products.amax(dim=1) - chosen <= 1e-15).all()
    assert torch.equal(quantized, codes[indices])
    assert torch.equal(quantizer.decode(indices), quantized)
    assert (indices != nearest_code(x, quantizer.codebook).indices).any()


def test_cosine_gradients_pass_through_the_normalisation() -> None:
    quantizer = make(metric="cosine", commitment_weight=0.25)
    x = draw(30, 4).requires_grad_()
    quantized, indices, loss = quantizer(x)
    (quantized * draw(30, 4, seed=2)).sum().backward(retain_graph=True)
    loss.backward()
    found = x.grad, quantizer.codebook.grad

    x, codebook = x.detach().requires_grad_(), quantizer.codebook.detach().requires_grad_()
    units, codes = F.normalize(x, dim=1), F.normalize(codebook, dim=1)[indices]
    expected_loss = F.mse_loss(codes, units.detach()) + 0.25 * F.mse_loss(units, codes.detach())
    ((units * draw(30, 4, seed=2)).sum() + expected_loss).backward()
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(found, (x.grad, codebook.grad))


def test_half_precision_is_normalised_in_float32() -> None:
    quantizer = make(metric="cosine")
    x = draw(500, 4).half()
    quantized, indices, loss = quantizer(x)
    assert (quantized.dtype, loss.dtype) == (torch.float16, torch.float32)
    assert torch.equal(indices, quantizer(x.float()).indices)


@pytest.mark.parametrize("cosine", [False, True])
def test_codes_follow_the_mean_of_their_rows(cosine: bool) -> None:
    quantizer = make(ema_decay=0.75, ema_eps=0.0, metric="cosine" if cosine else "euclidean")
    assert not list(quantizer.parameters())
    sizes, sums = torch.ones(20), quantizer.codebook.clone()
    for step in range(3):
        x = draw(50, 4, seed=step)
        rows = F.normalize(x, dim=1) if cosine else x
        indices = quantizer(x).indices
        onehot = F.one_hot(indices, 20).float()
        sizes = 0.75 * sizes + 0.25 * onehot.sum(dim=0)
        sums = 0.75 * sums + 0.25 * onehot.t() @ rows
        means = sums / sizes[:, None]
        torch.testing.assert_close(quantizer.codebook, F.normalize(means, dim=1) if cosine else means)
    torch.testing.assert_close(quantizer.cluster_sizes, sizes)


def test_averages_ignore_nonfinite_rows_and_eval_mode() -> None:
    quantizer = make(ema_decay=0.5)
    before = quantizer.codebook.clone()
    quantizer.eval()(draw(50, 4))
    assert torch.equal(quantizer.codebook, before)
    x = draw(50, 4)
    x[7], x[9] = torch.nan, torch.inf
    quantizer.train()(x)
    assert quantizer.codebook.isfinite().all()
    assert not torch.equal(quantizer.codebook, before)


def test_gradient_of_x_with_ema() -> None:
    quantizer = make(ema_decay=0.5, commitment_weight=0.25)
    before = quantizer.codebook.clone()
    x = draw(30, 4).requires_grad_()
    quantized, indices, loss = quantizer(x)
    assert torch.equal(quantized, before[indices])
    torch.testing.assert_close(loss, 0.25 * F.mse_loss(x, before[indices]))
    (2 * quantized.sum() + loss).backward()
    torch.testing.assert_close(x.grad, 2 + 0.25 * 2 / 120 * (x.detach() - before[indices]))


def test_a_reset_code_stays_in_place_until_rows_choose_it() -> None:
    quantizer = make(ema_decay=0.5, restart_after=1, restart_noise=0.0, ema_eps=0.0)
    with torch.no_grad():
        quantizer.codebook[1:] += 1000  # code 0 takes all rows
    quantizer(draw(1, 4))
    x = draw(40, 4, seed=1)
    quantizer(x)
    assert quantizer.restarts == 19
    assert (quantizer.batch_counts > 0).all()
    assert quantizer.codebook.abs().max() < 10
    lone = quantizer.batch_counts == 1  # their only row is the one they were reset to
    restarted = torch.arange(20) > 0
    found = nearest_code(quantizer.codebook[lone & restarted], x)
    torch.testing.assert_close(found.sq_distances, torch.zeros_like(found.sq_distances), rtol=0, atol=1e-10)


def test_the_searched_codebook_is_not_saved() -> None:
    keys = list(make(ema_decay=0.5).state_dict())
    assert keys[:3] == ["codebook", "cluster_sizes", "cluster_sums"]
    assert "searched_codebook" not in keys


LEARNING = {
    "gradients": {"commitment_weight": 0.25},
    "restarts": {"restart_after": 1, "init": "data"},
    "averages": {"ema_decay": 0.5, "commitment_weight": 0.25},
    "averages, restarts": {"ema_decay": 0.5, "commitment_weight": 0.25, "restart_after": 1},
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", LEARNING)
def test_activation_checkpointing_changes_nothing(name: str, reentrant: bool) -> None:
    results = []
    for checkpointed in (False, True):
        quantizer = make(**LEARNING[name])
        layer = torch.nn.Linear(4, 4)
        for step in range(4):
            torch.manual_seed(step)
            x = draw(25, 4, seed=step).requires_grad_()

            def block(x: Tensor, layer: torch.nn.Module = layer, quantizer: VectorQuantizer = quantizer) -> Tensor:
                quantized, _, loss = quantizer(layer(x))
                return F.dropout(layer(quantized).square(), 0.5).sum() + loss

            loss = checkpoint(block, x, use_reentrant=reentrant) if checkpointed else block(x)
            loss.backward()
            quantizer.zero_grad()
            results.append((checkpointed, step, x.grad, layer.weight.grad.clone(), *quantizer.state_dict().values()))
    for without, with_it in zip(results[:4], results[4:], strict=True):
        for expected, found in zip(without[2:], with_it[2:], strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", LEARNING)
def test_a_second_batch_may_come_before_the_backward(name: str) -> None:
    quantizer = make(**LEARNING[name])
    layer = torch.nn.Linear(4, 4)
    first, second = (quantizer(layer(draw(25, 4, seed=seed))) for seed in (1, 2))
    (first.quantized.square().sum() + first.loss + second.quantized.square().sum() + second.loss).backward()
    assert layer.weight.grad.isfinite().all()


def test_the_count_normalised_step_with_separate_codebooks() -> None:
    quantizer = make(heads=2, separate_codebooks=True)
    optimizer = torch.optim.SGD([count_normalised_param_group(quantizer, 1.0)])
    attach_count_normalised_step(optimizer, quantizer)
    x = draw(50, 8)
    indices, loss = quantizer(x)[1:]
    loss.backward()
    optimizer.step()
    for head in range(2):
        for code in indices[:, head].unique():
            mean = x[indices[:, head] == code, 4 * head : 4 * head + 4].mean(dim=0)
            torch.testing.assert_close(quantizer.codebook[head, code].detach(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema_decay": 0.9}, "quantizer must have ema_decay=None, to learn by gradients, got 0.9"),
        ({"metric": "cosine"}, "quantizer must have metric 'euclidean', got 'cosine'"),
    ],
)
def test_the_count_normalised_step_is_for_plain_gradients(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count_normalised_param_group(make(**options), 0.1)


def test_the_count_normalised_hook_needs_a_gradient() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    with pytest.raises(ValueError, match=r"must have ema_decay=None, to learn by gradients, got 0\.9"):
        attach_count_normalised_step(optimizer, make(ema_decay=0.9))


def test_repr() -> None:
    assert repr(make()) == "VectorQuantizer(num_codes=20, code_dim=4, init='normal', restart_after=0, ema_decay=None)"
    shown = repr(make(heads=2, separate_codebooks=True, channel_dim=1, ema_decay=0.9, metric="cosine"))
    assert "ema_decay=0.9, metric='cosine', heads=2, channel_dim=1, separate_codebooks=True" in shown
