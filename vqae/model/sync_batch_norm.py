"""BatchNorm by the statistics of all processes' batch, on any device: torch's SyncBatchNorm takes no CPU tensors."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from vq_kernels.distributed import rank_and_world, sum_over_ranks


class SyncBatchNorm(_BatchNorm):
    """nn.BatchNorm1d and nn.BatchNorm2d whose batch, in training, is that of all processes together.

    Parameters, buffers and their names are the same. In eval mode, and in a process alone, so are the numbers, bit for
    bit. Which processes there are is asked for at every call.

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167.
    """

    @classmethod
    def convert(cls, module: nn.Module) -> None:
        """Make every nn.BatchNorm1d and nn.BatchNorm2d inside of `module` a SyncBatchNorm, in place."""
        for child in module.modules():
            if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d):
                child.__class__ = cls

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, ...] -> [B, C, ...], B of this process; some process must hold a row."""
        if not self.training or rank_and_world(synchronise=True)[1] == 1:
            return super().forward(input)
        output: Tensor
        output, mean, variance, count = _SyncBatchNorm.apply(input, self.weight, self.bias, self.eps)
        self._track(mean, variance, count)
        return output

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input must be [B, C, ...], got {tuple(input.shape)}")

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics by a batch of mean [C] and biased variance [C] over `count` [] numbers each."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        step = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        unbiased = variance * (count / (count - 1))
        self.running_mean += step * (mean.to(self.running_mean.dtype) - self.running_mean)
        self.running_var += step * (unbiased.to(self.running_var.dtype) - self.running_var)


class _SyncBatchNorm(torch.autograd.Function):
    """(x [B, C, ...], weight [C], bias [C]) -> (y as x, mean [C], biased variance [C], count []).

    With x' = (x - mean) / std over the n rows and pixels of all processes, and g the gradient at y,

        y = weight·x' + bias,    grad x = weight / std · (g - Σg / n - x'·Σ(g·x') / n),

    the sums over all processes too. The gradients of weight and bias are this process's part of the sums: summing or
    averaging gradients is DistributedDataParallel's business.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)  # of statistics
        mean, variance, count = _global_statistics(x, dtype)
        y = F.batch_norm(x, mean.to(dtype), variance.to(dtype), weight, bias, training=False, eps=eps)
        ctx.save_for_backward(x, weight, mean.to(dtype), (variance + eps).rsqrt().to(dtype), count)
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean, inverse_std, count = ctx.saved_tensors
        dims = _all_but_channels(x)
        normalised = (x - _per_channel(mean, x)) * _per_channel(inverse_std, x)
        grad_y = grad_y.to(normalised.dtype)
        sums = torch.stack([grad_y.sum(dims), (grad_y * normalised).sum(dims)])  # [2, C]
        grad_bias, grad_weight = sums.unbind() if weight is not None else (None, None)

        means = (sum_over_ranks(sums.double(), synchronise=True) / count).to(sums.dtype)
        scale = inverse_std if weight is None else inverse_std * weight
        grad_x = grad_y - _per_channel(means[0], x) - normalised.mul_(_per_channel(means[1], x))
        return grad_x.mul_(_per_channel(scale, x)).to(x.dtype), grad_weight, grad_bias, None


def _global_statistics(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], biased variance [C] and count [] of x's channels over all processes, in float64.

    Each process gives its own mean and its squared deviations from that: E[x²] - E[x]² would cancel.

    Source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance".
    """
    rank, world_size = rank_and_world(synchronise=True)
    dims = _all_but_channels(x)
    count = x.numel() // x.shape[1]
    mean = x.sum(dims, dtype=dtype) / max(count, 1)
    deviation = (x - _per_channel(mean, x)).square_().sum(dims)
    own = torch.cat([mean.double(), deviation.double(), mean.new_full((1,), count, dtype=torch.float64)])
    gathered = own.new_zeros(world_size, own.numel())
    gathered[rank] = own
    gathered = sum_over_ranks(gathered, synchronise=True)

    means, deviations, counts = torch.split(gathered, [x.shape[1], x.shape[1], 1], dim=1)  # [W, C], [W, C], [W, 1]
    total = counts.sum()
    global_mean = (counts * means).sum(0) / total
    variance = (deviations + counts * (means - global_mean).square()).sum(0) / total
    return global_mean, variance, total


def _all_but_channels(x: Tensor) -> list[int]:
    return [dim for dim in range(x.dim()) if dim != 1]


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """[C] as [1, C, 1, ...], to meet x [B, C, ...]."""
    return values.view(1, -1, *[1] * (x.dim() - 2))
