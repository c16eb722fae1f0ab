"""The encoder: ResNet-18, with convolutions that skip kernel taps which only see padding."""

from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18

FEATURE_DIM = 512  # of ResNet-18


class Encoder(nn.Module):
    """ResNet-18 without its classifier: [B, 3, H, W] -> [B, D].

    Args:
        code_dim: D. 512 uses the features themselves, any other D adds a linear layer.
        norm: "batch" appends a BatchNorm without affine parameters, "none" does not.

    Source: He et al. 2016, arXiv:1512.03385.
    """

    def __init__(self, code_dim: int, norm: Literal["batch", "none"] = "batch") -> None:
        super().__init__()
        self.features = resnet18(weights=None)
        self.features.fc = nn.Identity()
        TrimmedConv2d.convert(self.features)
        self.features.to(memory_format=torch.channels_last)
        self.project = nn.Identity() if code_dim == FEATURE_DIM else nn.Linear(FEATURE_DIM, code_dim)
        self.norm = nn.BatchNorm1d(code_dim, affine=False) if norm == "batch" else nn.Identity()
        self.frozen = False

    def freeze(self, frozen: bool = True) -> None:
        """Freeze or unfreeze the encoder. A frozen encoder has no gradients and stays in eval mode."""
        self.frozen = frozen
        self.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> Self:
        """Set training mode. A frozen encoder stays in eval mode."""
        return super().train(mode and not self.frozen)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images [B, 3, H, W] to embeddings [B, D]."""
        features = self.features(images.contiguous(memory_format=torch.channels_last))
        embeddings: Tensor = self.norm(self.project(features))
        return embeddings


class TrimmedConv2d(nn.Conv2d):
    """nn.Conv2d without the kernel taps that only see padding. Weights, outputs and gradients are the same.

    With a 3 x 3 kernel and padding 1, only one of the nine taps meets a 1 x 1 feature map. For 32 x 32 images, this
    applies to the last stage of ResNet-18, which has three quarters of the weights.
    """

    @classmethod
    def convert(cls, module: nn.Module) -> None:
        """Convert every plain nn.Conv2d in `module` in place. Parameters and their names do not change."""
        for child in module.modules():
            if type(child) is nn.Conv2d and isinstance(child.padding[0], int) and child.padding_mode == "zeros":
                child.__class__ = cls

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        if self.dilation != (1, 1):
            return super().forward(input)
        (height, width), (kernel_height, kernel_width) = input.shape[-2:], self.kernel_size
        top, bottom, pad_rows = _live_taps(height, kernel_height, self.stride[0], int(self.padding[0]))
        left, right, pad_columns = _live_taps(width, kernel_width, self.stride[1], int(self.padding[1]))
        if (bottom - top, right - left) == self.kernel_size:
            return super().forward(input)
        weight = self.weight[:, :, top:bottom, left:right]
        return F.conv2d(input, weight, self.bias, self.stride, (pad_rows, pad_columns), groups=self.groups)


def _live_taps(size: int, kernel: int, stride: int, padding: int) -> tuple[int, int, int]:
    """First tap and last tap + 1 that meet a pixel along one side, and the padding for a kernel of only these taps.

    Returns the whole kernel if no tap meets a pixel, or if no symmetric padding gives the same outputs.
    """
    outputs = (size + 2 * padding - kernel) // stride + 1
    live = [t for t in range(kernel) if any(0 <= i * stride - padding + t < size for i in range(outputs))]
    live = live or list(range(kernel))
    first, last = live[0], live[-1] + 1
    trimmed = padding - first
    if trimmed < 0 or (size + 2 * trimmed - (last - first)) // stride + 1 != outputs:
        return 0, kernel, padding
    return first, last, trimmed
