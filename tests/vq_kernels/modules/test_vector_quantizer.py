"""VectorQuantizer: initialisation, dead-code resets, usage statistics, the state dict."""

import copy
import io

import pytest
import torch

from tests.vq_kernels.plain import vector_quantizer
from vq_kernels import nearest_code, perplexity


def rows(num_rows: int, code_dim: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_rows, code_dim, generator=torch.Generator().manual_seed(seed))


def test_forward_searches_and_keeps_leading_dimensions() -> None:
    torch.manual_seed(0)
    quantizer = vector_quantizer(20, 4)
    x = rows(30).view(2, 3, 5, 4)
    quantized, indices, loss = quantizer(x)
    assert torch.equal(indices, nearest_code(x, quantizer.codebook).indices)
    assert torch.equal(quantized, quantizer.codebook[indices])
    assert loss.requires_grad


@pytest.mark.parametrize(("init", "largest"), [("normal", 6.0), ("uniform", 0.1)])
def test_random_initialisations(init: str, largest: float) -> None:
    torch.manual_seed(0)
    quantizer = vector_quantizer(500, 8, init=init, init_scale=1.0 if init == "normal" else 0.1)
    magnitude = quantizer.codebook.abs().max().item()
    assert largest / 2 < magnitude <= largest


def test_data_initialisation_takes_distinct_rows_of_the_first_batch_once() -> None:
    torch.manual_seed(0)
    quantizer = vector_quantizer(8, 4, init="data", restart_noise=0.0)
    x = rows(20)
    quantizer(x)
    chosen = nearest_code(quantizer.codebook, x)
    assert not chosen.sq_distances.any()
    assert chosen.indices.unique().numel() == 8
    assert quantizer.restarts == 0
    before = quantizer.codebook.clone()
    quantizer(rows(20, seed=1))
    assert torch.equal(quantizer.codebook, before)


def test_data_initialisation_with_fewer_rows_than_codes_keeps_codes_apart() -> None:
    torch.manual_seed(0)
    quantizer = vector_quantizer(50, 4, init="data")
    quantizer(rows(20))
    assert quantizer.codebook.unique(dim=0).shape[0] == 50


def test_a_code_is_reset_after_the_given_steps_and_not_before() -> None:
    torch.manual_seed(0)
    quantizer = vector_quantizer(3, 2, restart_after=2, restart_noise=0.0)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[0.0, 0.0], [1e3, 1e3], [-1e3, 1e3]]))
    x = rows(10, 2)
    for step in (1, 2):
        quantizer(x)
        assert quantizer.steps_unused.tolist() == [0, step, step]
        assert quantizer.codebook[1, 0] == 1e3
    quantizer(x)
    assert quantizer.codebook.abs().max() < 10
    assert quantizer.restarts == 2
    assert (quantizer.batch_counts > 0).all()


def test_no_reset_in_eval_mode_or_if_off() -> None:
    torch.manual_seed(0)
    quantizer = vector_quantizer(50, 4, restart_after=1).eval()
    before = copy.deepcopy(quantizer.state_dict())
    for _ in range(3):
        quantizer(rows(5))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    never = vector_quantizer(50, 4, restart_after=0)
    codebook = never.codebook.clone()
    for _ in range(5):
        never(rows(5))
    assert torch.equal(never.codebook, codebook)


def test_codes_are_not_reset_to_nonfinite_rows() -> None:
    torch.manual_seed(0)
    quantizer = vector_quantizer(10, 4, init="data")
    x = rows(10)
    x[::2] = torch.nan
    quantizer(x)
    assert quantizer.codebook.isfinite().all()


def test_an_empty_batch_changes_only_the_step_count() -> None:
    quantizer = vector_quantizer(10, 4, init="data", restart_after=3)
    before = quantizer.codebook.clone()
    assert quantizer(torch.empty(0, 4)).loss == 0
    assert torch.equal(quantizer.codebook, before)
    assert quantizer.needs_data


def test_usage_statistics() -> None:
    quantizer = vector_quantizer(4, 1)
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[0.0], [1.0], [2.0], [3.0]]))
    assert quantizer.perplexity == 0
    quantizer(torch.tensor([[0.1], [1.1], [0.9], [-5.0]]))
    assert quantizer.usage_counts.tolist() == [2, 2, 0, 0]
    assert quantizer.perplexity.item() == pytest.approx(2.0)
    quantizer(torch.tensor([[2.0]]))
    assert quantizer.batch_counts.tolist() == [0, 0, 1, 0]
    assert quantizer.usage_counts.tolist() == [2, 2, 1, 0]
    assert quantizer.codes_used == 3
    quantizer.reset_usage()
    assert quantizer.codes_used == 0


@pytest.mark.parametrize(
    ("counts", "expected"), [([1, 1, 1, 1], 4.0), ([5, 0, 0], 1.0), ([0, 0], 0.0), ([1, 3], 1.7547653)]
)
def test_perplexity(counts: list[int], expected: float) -> None:
    assert perplexity(torch.tensor(counts)).item() == pytest.approx(expected)


def test_training_continues_from_a_state_dict() -> None:
    torch.manual_seed(0)
    first = vector_quantizer(30, 4, init="data", restart_after=2)
    first(rows(20))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = vector_quantizer(30, 4, init="data", restart_after=2)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    for step in range(1, 5):
        for quantizer in (first, second):
            torch.manual_seed(step)
            quantizer(rows(20, seed=step))
        for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    assert first.restarts > 0
