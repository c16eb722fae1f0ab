"""BatchNorm over the batch of all processes, on any device. nn.SyncBatchNorm supports GPUs only."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vq_kernels.distributed import rank_and_world, sum_over_ranks


class SyncBatchNorm(_BatchNorm):
    """nn.BatchNorm1d and nn.BatchNorm2d whose training statistics are those of the batch of all processes.

    Parameters and buffers keep their names. In eval mode, and in a single process, the outputs are bit-identical. The
    gradients of weight and bias are this process's part, which DistributedDataParallel sums.

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167.
    """

    @classmethod
    def convert(cls, module: nn.Module) -> None:
        """Convert every nn.BatchNorm1d and nn.BatchNorm2d in `module` in place."""
        for child in module.modules():
            if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d):
                child.__class__ = cls

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, ...] -> [B, C, ...], with B of this process. At least one process must have a row."""
        if not self.training or rank_and_world(synchronise=True)[1] == 1:
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        dims = [dim for dim in range(x.dim()) if dim != 1]
        # The mean first, then the squared deviations from it: E[x²] - E[x]² would cancel. Totals are float64.
        sums = torch.cat([x.sum(dims), x.new_tensor([x.numel() / x.shape[1]])])
        total, count = _SumOverRanks.apply(sums.double()).split([x.shape[1], 1])
        centred = x - _per_channel(total / count, x)
        variance = _SumOverRanks.apply(centred.square().sum(dims).double()) / count
        self._track(total / count, variance, count)

        scale = (variance + self.eps).rsqrt().to(x.dtype)
        output = centred * _per_channel(scale if self.weight is None else scale * self.weight, x)
        if self.bias is not None:
            output = output + _per_channel(self.bias, x)
        return output.to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input must be [B, C, ...], got {tuple(input.shape)}")

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Update the running statistics with a batch of mean [C], biased variance [C] and count [1]."""
        if not self.track_running_stats:
            return
        num_batches = self.get_buffer("num_batches_tracked").add_(1)
        step = 1 / num_batches if self.momentum is None else self.momentum
        for name, value in (("running_mean", mean), ("running_var", variance * (count / (count - 1)))):
            running = self.get_buffer(name)
            running += step * (value.to(running.dtype) - running)


class _SumOverRanks(torch.autograd.Function):
    """The sum over all ranks. Its gradient is the sum of the gradients of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return sum_over_ranks(x, synchronise=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient, synchronise=True)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """[C] in the shape [1, C, 1, ...] and the dtype of x [B, C, ...]."""
    return values.to(x.dtype).view(1, -1, *[1] * (x.dim() - 2))
