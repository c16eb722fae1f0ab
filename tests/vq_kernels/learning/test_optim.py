"""The count-normalised codebook step."""

from itertools import pairwise

import pytest
import torch

import vq_kernels
from tests.vq_kernels.plain import vector_quantizer
from vq_kernels import attach_count_normalised_step, count_normalised_param_group


@pytest.mark.parametrize("num_rows", [8, 1000])
@pytest.mark.parametrize("num_codes", [2, 64])
def test_a_step_moves_each_code_by_the_fraction(num_rows: int, num_codes: int) -> None:
    torch.manual_seed(0)
    quantizer = vector_quantizer(num_codes, 3)
    optimizer = torch.optim.SGD([count_normalised_param_group(quantizer, 0.25)], lr=9.0, momentum=0.9, weight_decay=0.1)
    attach_count_normalised_step(optimizer, quantizer)
    for _ in range(2):  # the second step shows that there is no momentum
        before = quantizer.codebook.detach().clone()
        x = torch.randn(num_rows, 3)
        _, indices, loss = quantizer(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for code in range(num_codes):
            members = x[indices == code]
            expected = before[code] + 0.25 * (members.mean(dim=0) - before[code]) if len(members) else before[code]
            torch.testing.assert_close(quantizer.codebook[code].detach(), expected, rtol=1e-5, atol=1e-6)


def test_fraction_one_is_a_k_means_step() -> None:
    torch.manual_seed(0)
    quantizer = vector_quantizer(16, 2, init="data")
    optimizer = torch.optim.SGD([count_normalised_param_group(quantizer, 1.0)])
    attach_count_normalised_step(optimizer, quantizer)
    x = torch.randn(2000, 2)
    losses = []
    for _ in range(20):
        loss = quantizer(x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(later <= earlier for earlier, later in pairwise(losses))
    assert losses[-1] < 0.8 * losses[0]


def test_without_the_hook_the_step_vanishes() -> None:
    torch.manual_seed(0)
    quantizer = vector_quantizer(64, 64)
    before = quantizer.codebook.detach().clone()
    optimizer = torch.optim.SGD([count_normalised_param_group(quantizer, 0.1)])
    handle = attach_count_normalised_step(optimizer, quantizer)
    handle.remove()
    quantizer(torch.randn(64, 64)).loss.backward()
    optimizer.step()
    assert (quantizer.codebook - before).abs().max() < 1e-3


@pytest.mark.parametrize("fraction", [0.0, -0.1, 2.0, float("nan")])
def test_a_fraction_that_diverges_is_rejected(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 2\), got"):
        count_normalised_param_group(vector_quantizer(4, 4), fraction)


def test_a_step_without_a_gradient_changes_nothing() -> None:
    quantizer = vector_quantizer(4, 4)
    optimizer = torch.optim.SGD([count_normalised_param_group(quantizer, 0.1)])
    attach_count_normalised_step(optimizer, quantizer)
    before = quantizer.codebook.detach().clone()
    optimizer.step()
    assert torch.equal(quantizer.codebook, before)


def test_the_old_names_warn_and_take_the_old_arguments() -> None:
    quantizer = vector_quantizer(4, 4)
    with pytest.warns(DeprecationWarning, match="gap_parameter_group was renamed to count_normalised_param_group"):
        group = vq_kernels.gap_parameter_group(quantizer=quantizer, share=0.5)
    assert group == count_normalised_param_group(quantizer, 0.5)
    with pytest.warns(DeprecationWarning, match="attach_gap_step was renamed to attach_count_normalised_step"):
        assert vq_kernels.attach_gap_step is attach_count_normalised_step
