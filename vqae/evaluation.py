"""How good a model is on a set of pictures."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vq_kernels import perplexity
from vq_kernels.ranks import sum_over_ranks
from vqae.batches import in_order
from vqae.model import VQAE


class Evaluation(NamedTuple):
    """What is measured on a set of pictures.

    Attributes:
        mse: mean squared error of a pixel value, pixels in [0, 1].
        psnr_db: of that mse, in dB; inf where it is 0.
        perplexity: exp of the entropy of the codes chosen, 1 to K.
        codes_used: how many codes were chosen at all.
        images: how many pictures.
        counts: [K] int64, the pictures that chose each code.
    """

    mse: float
    psnr_db: float
    perplexity: float
    codes_used: int
    images: int
    counts: Tensor


@torch.no_grad()
def evaluate(
    model: VQAE, pictures: Tensor, batch_size: int, device: torch.device, poll: Callable[[], None] = lambda: None
) -> Evaluation:
    """Encode and decode every picture in eval mode, and leave the model in the mode it was in.

    Several processes share the pictures, each taking its part of every batch, and all return the whole's figures.

    Args:
        model: on `device`.
        pictures: [N, 3, H, W] uint8, N >= 1.
        batch_size: pictures at a time, over all processes.
        device: where to compute.
        poll: called before each batch, as often in every process; may raise to stop.
    """
    was_training = model.training
    model.eval()
    try:
        sq_error = torch.zeros((), dtype=torch.float64, device=device)
        counts = torch.zeros(model.quantizer.num_codes, dtype=torch.int64, device=device)
        for batch in in_order(pictures, batch_size, device):
            poll()
            if not batch.shape[0]:
                continue
            indices = model.encode(batch)
            sq_error += (model.decode(indices) - batch.float() / 255).square().sum(dtype=torch.float64)
            counts += torch.bincount(indices, minlength=model.quantizer.num_codes)
    finally:
        model.train(was_training)
    counts, sq_error = (sum_over_ranks(total, synchronise=True) for total in (counts, sq_error))
    mse = sq_error.item() / pictures.numel()
    codes_used = int((counts > 0).sum())
    return Evaluation(mse, psnr_db(mse), perplexity(counts).item(), codes_used, pictures.shape[0], counts)


def psnr_db(mse: float) -> float:
    """Peak signal-to-noise ratio in dB, of pixels in [0, 1]; inf where mse is 0."""
    return -10 * math.log10(mse) if mse else math.inf
