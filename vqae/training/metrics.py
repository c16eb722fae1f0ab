"""How good a model is on a set of images."""

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
    """What is measured on a set of images.

    Attributes:
        mse: mean squared error of a pixel value, pixels in [0, 1].
        psnr_db: of that mse, in dB; inf where it is 0.
        perplexity: exp of the entropy of the codes chosen, 1 to K.
        codes_used: how many codes were chosen at all.
        images: how many images.
        counts: [K] int64, the images that chose each code.
    """

    mse: float
    psnr_db: float
    perplexity: float
    codes_used: int
    images: int
    counts: Tensor


@torch.no_grad()
def evaluate(
    model: VQAE, images: Tensor, batch_size: int, device: torch.device, poll: Callable[[], None] = lambda: None
) -> Evaluation:
    """Encode and decode every image in eval mode, and leave the model in the mode it was in.

    Several processes share the images, each taking its part of every batch, and all return the whole's figures.

    Args:
        model: on `device`.
        images: [N, 3, H, W] uint8, N >= 1.
        batch_size: images at a time, over all processes.
        device: where to compute.
        poll: called before each batch, as often in every process; may raise to stop.
    """
    was_training = model.training
    model.eval()
    try:
        sq_error = torch.zeros((), dtype=torch.float64, device=device)
        counts = torch.zeros(model.quantizer.num_codes, dtype=torch.int64, device=device)
        for batch in evaluation_batches(images, batch_size, device):
            poll()
            if not batch.shape[0]:
                continue
            indices = model.encode(batch)
            sq_error += (model.decode(indices) - batch.float() / 255).square().sum(dtype=torch.float64)
            counts += torch.bincount(indices, minlength=model.quantizer.num_codes)
    finally:
        model.train(was_training)
    counts, sq_error = (sum_over_ranks(total, synchronise=True) for total in (counts, sq_error))
    mse = sq_error.item() / images.numel()
    codes_used = int((counts > 0).sum())
    return Evaluation(mse, psnr_db(mse), perplexity(counts).item(), codes_used, images.shape[0], counts)


def psnr_db(mse: float) -> float:
    """Peak signal-to-noise ratio in dB, of pixels in [0, 1]; inf where mse is 0."""
    return -10 * math.log10(mse) if mse else math.inf


class LossMeter:
    """Adds up the losses of an epoch without waiting for the device.

    Attributes:
        sums: [2] float64: reconstruction_loss and codebook_loss, summed over `steps` steps.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self.steps = 0

    def add(self, reconstruction_loss: Tensor, codebook_loss: Tensor, global_step: int) -> None:
        """Take in one step's losses, each []."""
        losses = torch.stack([reconstruction_loss.detach(), codebook_loss.detach()]).double()
        bad = ~losses.isfinite().all() & (self._first_bad < 0)
        self._first_bad = torch.where(bad, global_step, self._first_bad)
        self.sums += losses
        self.steps += 1

    def check(self) -> None:
        """Raise DivergedError if a loss was not finite. Waits for the device."""
        step = int(self._first_bad)
        if step >= 0:
            raise DivergedError(f"a loss was not finite at step {step}")

    def means(self) -> tuple[float, float]:
        """Mean reconstruction_loss and codebook_loss; NaN before any step."""
        reconstruction, codebook = (self.sums / self.steps if self.steps else self.sums * torch.nan).tolist()
        return reconstruction, codebook

    def state_dict(self) -> dict[str, Tensor | int]:
        """For a checkpoint in the middle of an epoch."""
        return {"sums": self.sums, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        """The opposite of `state_dict`."""
        self.sums.copy_(torch.as_tensor(state["sums"]))
        self.steps = int(state["steps"])


def collapse_warning(config: Config, counts: Tensor, step: int) -> str | None:
    """What to say, after an epoch, of a codebook of which fewer than half is in use; None where that is not so.

    The rule, and why it is this one:

    - It counts on images held out from training. A code that restarts is chosen at once by the image that it was
      put at, so that training's own count calls a collapsed codebook well used as long as it restarts.
    - Half means half of the codes that as many images would reach by choosing evenly: 40 images cannot choose 256.
    - It waits until every code that began unused was restarted, and had as long again to find images of its own:
      2·restart_steps. Without restarts there is nothing to wait for: what no image of an epoch chose got no
      gradient, and will get none.

    Args:
        config: the run's settings.
        counts: [K] int64, how many images of validation and test chose each code.
        step: training steps so far.
    """
    num_codes, num_images = counts.numel(), int(counts.sum())
    codes_used = int((counts > 0).sum())
    expected = num_codes * (1 - (1 - 1 / num_codes) ** num_images)  # of num_images drawn evenly
    if codes_used >= expected / 2 or step < 2 * config.restart_steps:
        return None
    return (
        f"warning: the {num_images:,} images held out chose {codes_used} of {num_codes} codes, "
        f"fewer than half of those they could: look at {_option_to_look_at(config)}"
    )


def _option_to_look_at(config: Config) -> str:
    """The option that most likely is to blame, and what it does about it."""
    if config.restart_after == 0:
        return f"--restart-after {Config.restart_after}, which puts codes that are never chosen at embeddings"
    if config.codebook_step == "plain":
        return "--codebook-step count_normalised: by plain SGD the codes hardly move"
    if config.embedding_norm == "none":
        return (
            f"--encoder-lr, now {config.encoder_lr:g}: a slower encoder leaves the embeddings near the codes, "
            "as --embedding-norm batch does"
        )
    return f"--restart-after, now {config.restart_after} images: fewer bring unused codes back sooner"
