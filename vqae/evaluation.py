"""How good a model is on a set of pictures."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vq_kernels import perplexity
from vqae.batches import in_order
from vqae.model import VQAE


class Evaluation(NamedTuple):
    """Attributes: mse, mean squared error a pixel value, pixels in [0, 1]; psnr_db, of that mse, in dB; perplexity of
    the codes chosen; codes_used; images, how many."""

    mse: float
    psnr_db: float
    perplexity: float
    codes_used: int
    images: int


@torch.no_grad()
def evaluate(
    model: VQAE, pictures: Tensor, batch_size: int, device: torch.device, poll: Callable[[], None] = lambda: None
) -> Evaluation:
    """Encode and decode every picture in eval mode, and leave the model in the mode it was in.

    Args:
        model: on `device`.
        pictures: [N, 3, H, W] uint8, N >= 1.
        batch_size: pictures at a time.
        device: where to compute.
        poll: called before each batch; may raise to stop.
    """
    was_training = model.training
    model.eval()
    try:
        sq_error = torch.zeros((), dtype=torch.float64, device=device)
        counts = torch.zeros(model.quantizer.num_codes, dtype=torch.int64, device=device)
        for batch in in_order(pictures, batch_size, device):
            poll()
            indices = model.encode(batch)
            sq_error += (model.decode(indices) - batch.float() / 255).square().sum(dtype=torch.float64)
            counts += torch.bincount(indices, minlength=model.quantizer.num_codes)
    finally:
        model.train(was_training)
    mse = sq_error.item() / pictures.numel()
    return Evaluation(mse, psnr_db(mse), perplexity(counts).item(), int((counts > 0).sum()), pictures.shape[0])


def psnr_db(mse: float) -> float:
    """Peak signal-to-noise ratio in dB, of pixels in [0, 1]."""
    return -10 * math.log10(mse) if mse > 0 else math.inf
