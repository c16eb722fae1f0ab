"""The codebook's step: a share of the gap, whatever the batch and the codebook's size."""

from itertools import pairwise

import pytest
import torch

from vq_kernels import VectorQuantizer, attach_gap_step, gap_parameter_group


@pytest.mark.parametrize("num_rows", [8, 1000])
@pytest.mark.parametrize("num_codes", [2, 64])
def test_a_step_closes_the_share_of_the_gap(num_rows: int, num_codes: int) -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(num_codes, 3)
    optimizer = torch.optim.SGD([gap_parameter_group(quantizer, 0.25)], lr=9.0, momentum=0.9, weight_decay=0.1)
    attach_gap_step(optimizer, quantizer)
    for _ in range(2):  # a second one shows that no momentum is carried over
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


def test_a_share_of_one_is_a_step_of_k_means() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(16, 2, init="data")
    optimizer = torch.optim.SGD([gap_parameter_group(quantizer, 1.0)])
    attach_gap_step(optimizer, quantizer)
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
    quantizer = VectorQuantizer(64, 64)
    before = quantizer.codebook.detach().clone()
    optimizer = torch.optim.SGD([gap_parameter_group(quantizer, 0.1)])
    handle = attach_gap_step(optimizer, quantizer)
    handle.remove()
    quantizer(torch.randn(64, 64)).loss.backward()
    optimizer.step()
    assert (quantizer.codebook - before).abs().max() < 1e-3


@pytest.mark.parametrize("share", [0.0, -0.1, 2.0, float("nan")])
def test_a_share_that_diverges_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"share must be in \(0, 2\), got"):
        gap_parameter_group(VectorQuantizer(4, 4), share)


def test_a_step_without_a_gradient_is_left_alone() -> None:
    quantizer = VectorQuantizer(4, 4)
    optimizer = torch.optim.SGD([gap_parameter_group(quantizer, 0.1)])
    attach_gap_step(optimizer, quantizer)
    before = quantizer.codebook.detach().clone()
    optimizer.step()
    assert torch.equal(quantizer.codebook, before)
