"""The scores of the PyTorch backend and their errors enclose the exact scores."""

import pytest
import torch
from torch import Tensor

from vq_kernels.search.torch_bounds import augment, prepare

N, K, D = 200, 100, 24


def exact_scores(x: Tensor, codebook: Tensor, minus_mean: Tensor, scale: Tensor) -> Tensor:
    """S [N, K] in float64, whose rounding is far below the float32 bounds."""
    rows, codes = (t.double() * scale.double() + minus_mean.double() for t in (x, codebook))
    return rows @ codes.t() - 0.5 * codes.square().sum(dim=1)


@pytest.mark.parametrize("offset", [0.0, 3.0, 1000.0])
@pytest.mark.parametrize("log_size", [-120, -30, -13, -12, -11, 0, 8, 9, 10, 11, 60, 115])
def test_scores_lie_within_their_bounds(log_size: int, offset: float) -> None:
    generator = torch.Generator().manual_seed(log_size)
    x, codebook = (2.0**log_size * (torch.randn(size, D, generator=generator) + offset) for size in (N, K))
    operand = prepare(codebook)
    norms = torch.empty(N)
    left = augment(x, operand, torch.empty(N, D + 2), norms)
    upper_bounds = (left @ operand.matrix[:K].t()).double()
    errors = operand.errors(torch.arange(K).repeat(N, 1), norms[:, None]).double()
    scores = exact_scores(x, codebook, operand.minus_mean, operand.scale)
    assert (upper_bounds >= scores).all()
    assert (upper_bounds - 2 * errors <= scores).all()
    assert (errors <= 1e-4 * (norms[:, None] * codebook_radius(operand.matrix) + 1)).all()  # small enough to be useful


def codebook_radius(matrix: Tensor) -> Tensor:
    """The length of the longest code."""
    return matrix[:, :D].norm(dim=1).amax()


@pytest.mark.parametrize("log_size", [-13, -11, 0, 9, 11])
def test_codes_of_common_magnitude_are_not_scaled(log_size: int) -> None:
    torch.manual_seed(0)
    codebook = 2.0**log_size * torch.nn.functional.normalize(torch.randn(K, D), dim=1)
    radius = codebook_radius(prepare(codebook).matrix)
    assert (prepare(codebook).scale == 1) == (-12 < log_size < 12)
    assert 0.5 <= radius / prepare(codebook).scale / 2.0**log_size <= 2


def test_codes_that_are_not_finite_cannot_win() -> None:
    torch.manual_seed(0)
    codebook = torch.randn(K, D)
    codebook[[3, 50]] = torch.tensor([[torch.nan], [torch.inf]])
    operand = prepare(codebook)
    left = augment(torch.randn(N, D), operand, torch.empty(N, D + 2), torch.empty(N))
    scores = left @ operand.matrix.t()
    assert (~operand.usable(K)).nonzero()[:, 0].tolist() == [3, 50]
    never = torch.ones(operand.matrix.shape[0], dtype=torch.bool)
    never[:K] = ~operand.usable(K)
    assert (scores[:, never] < operand.lowest_threshold).all()
    assert (scores[:, ~never] > operand.lowest_threshold).all()
