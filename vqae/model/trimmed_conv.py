"""Convolutions that skip the part of their kernel that only ever sees padding."""

from torch import Tensor, nn
from torch.nn import functional as F


class TrimmedConv2d(nn.Conv2d):
    """nn.Conv2d with the same weights, outputs and gradients, without the taps that no pixel reaches.

    A 3 x 3 kernel with padding 1 on a 1 x 1 feature map multiplies eight ninths of its weights with zeros: ResNet-18's
    last stage on 32 x 32 pictures, which holds three quarters of its weights. Here only the live taps take part; the
    others get their gradient, zero, as before.
    """

    @classmethod
    def adopt(cls, module: nn.Module) -> None:
        """Make every plain nn.Conv2d inside of `module` a TrimmedConv2d, in place; parameters and names stay."""
        for child in module.modules():
            if type(child) is nn.Conv2d and isinstance(child.padding[0], int) and child.padding_mode == "zeros":
                child.__class__ = cls

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        if self.dilation != (1, 1):
            return super().forward(input)
        top, bottom, pad_rows = _live_taps(input.shape[-2], self.kernel_size[0], self.stride[0], int(self.padding[0]))
        left, right, pad_columns = _live_taps(
            input.shape[-1], self.kernel_size[1], self.stride[1], int(self.padding[1])
        )
        if (bottom - top, right - left) == self.kernel_size:
            return super().forward(input)
        weight = self.weight[:, :, top:bottom, left:right]
        return F.conv2d(input, weight, self.bias, self.stride, (pad_rows, pad_columns), groups=self.groups)


def _live_taps(size: int, kernel: int, stride: int, padding: int) -> tuple[int, int, int]:
    """First and last + 1 of the taps that meet a pixel, along one side, and the padding that a kernel of only those
    needs; all taps where none meets one, or where no symmetric padding gives the same outputs."""
    outputs = (size + 2 * padding - kernel) // stride + 1
    live = [t for t in range(kernel) if any(0 <= i * stride - padding + t < size for i in range(outputs))]
    if not live:
        return 0, kernel, padding
    first, last = live[0], live[-1] + 1
    trimmed = padding - first
    if trimmed < 0 or (size + 2 * trimmed - (last - first)) // stride + 1 != outputs:
        return 0, kernel, padding
    return first, last, trimmed
