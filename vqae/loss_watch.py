"""Sums of losses, kept on the device, and the first step at which one was not finite."""

import torch
from torch import Tensor

from vqae.errors import DivergedError


class LossWatch:
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
