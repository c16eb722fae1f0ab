"""The straight-through estimator and the rotation trick, against explicit rotation matrices."""

import pytest
import torch
from torch import Tensor

from vq_kernels.gradient.autograd import rotation_trick, straight_through


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(u: Tensor, v: Tensor) -> Tensor:
    """Returns the rotation that takes u to v in the plane of these unit vectors, by its definition."""
    side = v - (u @ v) * u
    side = side / side.norm()
    cosine, sine = u @ v, v @ side
    return (
        torch.eye(len(u), dtype=u.dtype)
        + sine * (torch.outer(side, u) - torch.outer(u, side))
        + (cosine - 1) * (torch.outer(u, u) + torch.outer(side, side))
    )


def test_straight_through_passes_the_gradient_unchanged() -> None:
    x, codes = draw(5, 4).requires_grad_(), draw(5, 4, seed=1).requires_grad_()
    passed = straight_through(x, codes)
    assert torch.equal(passed, codes)
    passed.backward(draw(5, 4, seed=2))
    assert x.grad is not None
    assert torch.equal(x.grad, draw(5, 4, seed=2))
    assert codes.grad is None


@pytest.mark.parametrize("code_dim", [2, 3, 64])
def test_rotation_trick_rotates_and_scales_the_gradient(code_dim: int) -> None:
    x, codes, gradient = draw(6, code_dim).requires_grad_(), draw(6, code_dim, seed=1), draw(6, code_dim, seed=2)
    turned = rotation_trick(x, codes)
    assert torch.equal(turned, codes)
    turned.backward(gradient)
    assert x.grad is not None
    for row, code, g, found in zip(x.detach(), codes, gradient, x.grad, strict=True):
        matrix = rotation(row / row.norm(), code / code.norm()) * code.norm() / row.norm()
        torch.testing.assert_close(matrix @ row, code)  # the matrix maps the row to the code
        torch.testing.assert_close(found, matrix.t() @ g)


def test_zero_rows_get_finite_gradients() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    rotation_trick(x, torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0] * 4])).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rotated_in_float32(dtype: torch.dtype) -> None:
    x, codes, gradient = (draw(5, 64, seed=seed).to(dtype) for seed in range(3))
    rotation_trick(x.requires_grad_(), codes).backward(gradient)
    wide = x.detach().float().requires_grad_()
    rotation_trick(wide, codes.float()).backward(gradient.float())
    assert x.grad is not None
    assert wide.grad is not None
    assert torch.equal(x.grad, wide.grad.to(dtype))
