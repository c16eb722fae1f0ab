"""Losses, evaluation, and the warning about a collapsed codebook."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vq_kernels import perplexity
from vq_kernels.distributed import sum_over_ranks
from vqae.config import Config
from vqae.data.load import evaluation_batches
from vqae.model.vqae import VQAE
from vqae.runtime.errors import DivergedError


class Evaluation(NamedTuple):
    """Metrics on a set of images."""

    mse: float  # mean squared error per pixel value, for pixels in [0, 1]
    psnr_db: float  # peak signal-to-noise ratio in dB, inf if the MSE is 0
    perplexity: float  # exp of the entropy of the code usage, 1 to K; the mean over the stages of a residual quantizer
    codes_used: int  # number of codes used at least once, in all stages
    images: int  # number of images
    counts: Tensor  # [K] or [Q, K] int64, number of images per code


@torch.no_grad()
def evaluate(
    model: VQAE, images: Tensor, batch_size: int, device: torch.device, poll: Callable[[], None] = lambda: None
) -> Evaluation:
    """Reconstruct images [N, 3, H, W] uint8, N >= 1, in eval mode. The model's mode is restored.

    Several processes share each batch, and all return the metrics of the whole set. `poll` is called before each batch
    on every rank, and may raise to stop.
    """
    was_training = model.training
    model.eval()
    try:
        sq_error = torch.zeros((), dtype=torch.float64, device=device)
        counts = torch.zeros(model.quantizer.codebook.shape[:-1], dtype=torch.int64, device=device)
        first = torch.arange(0, counts.numel(), counts.shape[-1], device=device)  # of each stage, [Q]
        for batch in evaluation_batches(images, batch_size, device):
            poll()
            if batch.shape[0]:
                indices = model.encode(batch)
                sq_error += (model.decode(indices) - batch.float() / 255).square().sum(dtype=torch.float64)
                positions = (indices.view(batch.shape[0], -1) + first).flatten()
                counts += torch.bincount(positions, minlength=counts.numel()).view_as(counts)
    finally:
        model.train(was_training)
    counts, sq_error = (sum_over_ranks(total, synchronise=True) for total in (counts, sq_error))
    mse = sq_error.item() / images.numel()
    codes_used = int((counts > 0).sum())
    return Evaluation(mse, psnr_db(mse), perplexity(counts).mean().item(), codes_used, images.shape[0], counts)


def psnr_db(mse: float) -> float:
    """Peak signal-to-noise ratio in dB for pixels in [0, 1], inf if `mse` is 0."""
    return -10 * math.log10(mse) if mse else math.inf


class LossMeter:
    """Sums the losses (reconstruction_loss, codebook_loss) of an epoch in float64, without host synchronisation."""

    def __init__(self, device: torch.device, sums: Tensor | None = None, steps: int = 0) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=device) if sums is None else sums.to(device)
        self.steps = steps
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    def add(self, losses: Tensor, step: int) -> None:
        """Add the losses [2] of a step."""
        losses = losses.detach().double()
        bad = ~losses.isfinite().all() & (self._first_bad < 0)
        self._first_bad = torch.where(bad, step, self._first_bad)
        self.sums += losses
        self.steps += 1

    def check(self) -> None:
        """Raise DivergedError if a loss was not finite. Synchronises with the device."""
        step = int(self._first_bad)
        if step >= 0:
            raise DivergedError(f"a loss was not finite at step {step}")

    def means(self) -> tuple[float, float]:
        """Mean reconstruction_loss and codebook_loss, NaN before the first step."""
        reconstruction, codebook = (self.sums / self.steps if self.steps else self.sums * torch.nan).tolist()
        return reconstruction, codebook


def collapse_warning(config: Config, counts: Tensor, images_seen: int) -> str | None:
    """A warning if held-out images use fewer than half of the codes they could use in a stage, otherwise None.

    - Only held-out images count, because a reset code is used immediately by the training image whose embedding it got.
    - The number of codes they could use is the expected number of different codes if each image chose a code at random.
    - There is no warning before 2·restart_after training images. By then every unused code has been reset, and has had
      another restart_after images to be chosen.

    `counts` [K] or [Q, K] is the number of validation and test images per code, `images_seen` that of training images
    so far.
    """
    num_codes = counts.shape[-1]
    num_images, codes_used = int(counts.sum(-1).max()), int((counts > 0).sum(-1).min())
    expected = num_codes * (1 - (1 - 1 / num_codes) ** num_images)
    if codes_used >= expected / 2 or images_seen < 2 * config.restart_after:
        return None
    if config.restart_after == 0:
        advice = f"--restart-after {Config.restart_after}, to reset unused codes to embeddings"
    elif config.codebook_step == "plain":
        advice = "--codebook-step count_normalised, because plain SGD hardly moves the codes"
    elif config.embedding_norm == "none":
        advice = (
            f"--encoder-lr below {config.encoder_lr:g} or --embedding-norm batch, so that embeddings stay near codes"
        )
    else:
        advice = f"--restart-after below {config.restart_after}, to reset unused codes sooner"
    return (
        f"warning: {num_images:,} held-out images use {codes_used} of {num_codes} codes, "
        f"fewer than half of those they could use: try {advice}"
    )
