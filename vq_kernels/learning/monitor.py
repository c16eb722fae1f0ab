"""Notices that a quantizer diverges or collapses in training, without waiting for the device."""

import math
import warnings

import torch
from torch import Tensor

from vq_kernels.search.validation import is_tracing

FIRST, PERIOD, PATIENCE = 10, 50, 5
"""Step 10 gives the error to compare with. A collapse is reported when five in a row of every 50th step show it."""


class TrainingMonitor:
    """Looks at the values of a training step at the next check, when the device has computed them long since."""

    def __init__(self) -> None:
        self.done = False
        self._read_waiting = False
        self._first: tuple[float, float] | None = None
        self._checks_low = 0
        self._copied: Tensor | None = None

    @torch.no_grad()
    def check(self, rows: Tensor, sq_distances: Tensor, counts: Tensor, steps_unused: Tensor) -> str | None:
        """Looks at the step of the last check, and keeps the values of this one. Returns what is wrong, once, or None.

        Args:
            rows: [C, M, D], what was quantized.
            sq_distances: the squared distances to the codes that were chosen.
            counts: [P, K] int64, the rows of the batch that chose each code.
            steps_unused: [P, K] int64, the steps since each code was last chosen.
        """
        if self.done or torch._C._are_functorch_transforms_active():
            return None
        problem = None if self._copied is None else self._problem(*self._copied.tolist())
        self.done = problem is not None
        values = _values(rows, sq_distances, counts, steps_unused)
        if self._copied is None:
            self._copied = torch.zeros(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        self._copied.copy_(values, non_blocking=True)
        return problem

    def warn_of_waiting(self, needs_data: Tensor, init: str) -> None:
        """Warns once if a codebook waits for data. The first call alone waits for the device, and none in a capture."""
        captures = torch.compiler.is_compiling() or is_tracing() or torch._C._are_functorch_transforms_active()
        captures = captures or (needs_data.is_cuda and torch.cuda.is_current_stream_capturing())
        if self._read_waiting or captures or needs_data.is_meta or type(needs_data) is not Tensor:  # or a fake tensor
            return
        self._read_waiting = True
        if bool((needs_data >= 1).any()):
            warnings.warn(
                f"the codes wait for data: init={init!r} takes them from the first batch in training mode, unless "
                "freeze_codebook is set; train on one before, or call fit, set_codes or load_state_dict, or pass "
                "warn=False to hide this warning",
                stacklevel=4,
            )

    def _problem(self, error: float, square: float, share_of_codes_chosen: float, share_unused: float) -> str | None:
        if self._first is None:
            self._first = error, square
        first_error, first_square = self._first
        if math.isnan(square):
            return "the input of the quantizer holds NaN"
        if not math.isfinite(error):
            return f"the quantizer diverges: its mean squared error is {error}"
        away = error > square / 4 and square > 100 * first_square  # the rows grow, and the codes do not follow
        if away and error > 1000 * first_error > 0:
            return f"the quantizer diverges: its mean squared error grew from {first_error:.3g} to {error:.3g}"
        collapsed = share_of_codes_chosen < 1 or share_unused > 0.5
        self._checks_low = self._checks_low + 1 if collapsed else 0
        if self._checks_low < PATIENCE:
            return None
        if share_unused > 0.5:
            return f"the codebook collapses: {share_unused:.0%} of the codes have not been chosen for long"
        return "the codebook collapses: nearly all rows choose the same few codes"


def warn_of(problem: str | None, commitment_weight: float, restart_after: int | str, init: str) -> None:
    """Warns of a problem that `check` returned, and names the argument to change."""
    if problem is None:
        return
    if "NaN" in problem:
        advice = "check what computes it, pass mask for padding"
    elif "diverges" in problem and commitment_weight < 0.25:
        advice = f"pass commitment_weight=0.25 (it is {commitment_weight})"
    elif "diverges" in problem:
        advice = "lower the learning rate"
    elif restart_after == 0:
        advice = "pass restart_after='auto' (it is 0), so that unused codes are reset"
    elif init in ("normal", "uniform"):
        advice = f"pass init='data' (it is {init!r})"
    else:
        advice = "lower the learning rate, check that the input varies, pass mask for padding and silence"
    warnings.warn(f"{problem}; {advice}, or warn=False to hide this warning", stacklevel=3)


def _values(rows: Tensor, sq_distances: Tensor, counts: Tensor, steps_unused: Tensor) -> Tensor:
    """Returns [4] float32: the mean squared error; the mean square of the rows; the perplexity relative to that of a
    collapse; the share of unused codes.

    A perplexity is that of a collapse below 3, K/4 and a quarter of the rows. A code is unused if it was not chosen
    while 100 rows for each code passed. The worst of all codebooks counts.
    """
    num_rows, num_codes = counts.sum(dim=1), counts.shape[1]  # [P]
    shares = counts / num_rows.clamp(min=1)[:, None]
    perplexity = torch.special.entr(shares).sum(dim=1).exp()
    relative = perplexity / (num_rows / 4).clamp(max=min(3.0, num_codes / 4))
    relative = torch.where(num_rows > 0, relative, torch.inf)  # a stage that was dropped
    unused = (steps_unused * num_rows[:, None] > 100 * num_codes).float().mean(dim=1)
    error = sq_distances.float().sum() / max(rows.numel(), 1)
    square = rows.float().square().sum() / max(rows.numel(), 1)
    return torch.stack([error, square, relative.min(), unused.max()])
