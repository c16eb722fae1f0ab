"""The output of a run: progress, TensorBoard events, plots."""

import io
import math
import os
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any, TextIO

import matplotlib as mpl
import torch
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm

from vqae.model.vqae import VQAE
from vqae.training.checkpoint import atomic_write, write_error

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

_LINE_EVERY_S, _BAR_EVERY_S = 30.0, 0.5
_DPI = 100
_TITLE_HEIGHT, _TITLE_CHARACTER_WIDTH = 40, 9  # pixels


class ProgressReporter:
    """Shows losses, codes used and the time left: a progress bar on a terminal, otherwise an occasional line.

    `progress` is the fraction of the run that is already done, 0 to 1. With `silent`, nothing is printed.
    """

    def __init__(self, progress: float, *, silent: bool = False) -> None:
        self._silent = silent
        self._bar = tqdm(
            total=1.0,
            initial=progress,
            disable=silent or None,  # None: if stderr is not a terminal
            bar_format="{percentage:3.0f}%|{bar}| {postfix[0]}",
            postfix=[""],
            dynamic_ncols=True,
        )
        self._every_s = _LINE_EVERY_S if self._bar.disable else _BAR_EVERY_S
        self._start = (time.monotonic(), progress)
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether to call `show`. Its arguments may require a host synchronisation."""
        return not self._silent and time.monotonic() - self._last >= self._every_s

    def show(self, progress: float, losses: tuple[float, float], codes_used: int) -> None:
        """Show the state of the run."""
        self._last = time.monotonic()
        start_time, start_progress = self._start
        done = progress - start_progress
        left_s = (self._last - start_time) * (1 - progress) / done if done > 0 else 0.0
        text = (
            f"reconstruction {losses[0]:.4f}  codebook {losses[1]:.4f}  codes used {codes_used}  "
            f"{int(left_s // 60)}:{int(left_s % 60):02d} left"
        )
        if self._bar.disable:
            print(f"{progress:4.0%}  {text}", file=sys.stderr, flush=True)
        else:
            self._bar.postfix[0] = text
            self._bar.update(progress - self._bar.n)

    def line(self, text: str, file: TextIO | None = None) -> None:
        """Print a line above the progress bar, to stdout by default."""
        if not self._silent:
            file = sys.stdout if file is None else file
            self._bar.write(text, file=file)
            file.flush()

    def close(self) -> None:
        """Close the progress bar."""
        self._bar.close()


def write_events(folder: Path, line: dict[str, Any], writer: Any = None) -> Any:
    """Write the metrics of an epoch as TensorBoard events of its step.

    Nothing is written without tensorboard, or, with a warning, if the path is not in UTF-8.

    Events that an interrupted process wrote for the same or a later step are hidden. Raises UsageError if the disk is
    full or the folder is not writable. Returns the SummaryWriter, which continues its file if it is given next time.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    if os.fsencode(folder) != str(folder).encode(errors="replace"):  # TensorBoard encodes every path in UTF-8
        warnings.warn(f"no TensorBoard events are written: the path {str(folder)!r} is not in UTF-8", stacklevel=2)
        return None
    # SummaryWriter writes in a thread. flush() raises the thread's OSError, so its traceback is not needed.
    excepthook, threading.excepthook = threading.excepthook, lambda _: None
    try:
        writer = writer or SummaryWriter(folder, purge_step=line["step"])
        for name, value in line.items():
            if isinstance(value, str):
                writer.add_text(name, value, line["step"])
            elif value is not None and name not in ("epoch", "step"):
                writer.add_scalar(name, value, line["step"])
        writer.flush()
        return writer
    except OSError as error:
        raise write_error(folder, error) from None
    finally:
        threading.excepthook = excepthook


@torch.no_grad()
def plot_reconstructions(model: VQAE, images: Tensor, file: Path, title: str, columns: int = 16) -> None:
    """Plot images [B, 3, H, W], uint8 or floats in [0, 1], above their reconstructions by a model in eval mode."""
    originals = images.float() / 255 if images.dtype == torch.uint8 else images
    decoded = model.decode(model.encode(images))
    rows = []
    for start in range(0, originals.shape[0], columns):
        for part in (originals[start : start + columns], decoded[start : start + columns]):
            rows += [part, part.new_ones(columns - part.shape[0], *part.shape[1:])]  # fill the row with white
    _write_grid(torch.cat(rows), columns, file, title)


@torch.no_grad()
def plot_codebook(model: VQAE, counts: Tensor, file: Path, title: str) -> None:
    """Plot every code decoded, sorted by its count in `counts` [K]. Codes that were never used are dimmed.

    Of counts [Q, K], the codes of the first stage are plotted.
    """
    is_residual = counts.dim() > 1
    counts = counts[0] if is_residual else counts
    order = counts.argsort(descending=True, stable=True)
    decoded = model.decode(order[:, None] if is_residual else order)
    unused = (counts[order] == 0)[:, None, None, None]
    columns = max(1, math.ceil(math.sqrt(2 * counts.numel())))  # twice as wide as high
    _write_grid(torch.where(unused, decoded * 0.25, decoded), columns, file, title, upscale_to=32)


# The panels of curves.png: label of the y axis, and the keys of metrics.jsonl that are plotted.
_PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("MSE per pixel value", ("train_mse", "val_mse", "test_mse")),
    ("loss", ("reconstruction_loss", "codebook_loss")),
    ("fraction of the loss", ("reconstruction_loss_share", "codebook_loss_share")),
    ("codes used", ("train_codes_used", "codes_used")),
    ("perplexity", ("train_perplexity", "perplexity")),
    ("dead-code resets per epoch", ("restarts",)),
)


def plot_curves(history: list[dict[str, Any]], codes: torch.Size, file: Path, title: str) -> None:
    """Plot the lines of metrics.jsonl over the epochs. Missing values and None leave a gap.

    `codes` is the shape of the codes, (K,) or (Q, K).
    """
    epochs = [line["epoch"] for line in history]
    figure, rows = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for axis, (label, names) in zip(rows.flat, _PANELS, strict=True):
        for name in names:
            values = [math.nan if line.get(name) is None else line[name] for line in history]
            axis.plot(epochs, values, marker=".", label=name)
        axis.set(xlabel="epoch", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend()
        if label == "loss":
            axis.set_yscale("symlog", linthresh=1e-3)
        elif names == ("restarts",):
            axis.set_yscale("symlog", linthresh=1)  # thousands in the first epoch, then hardly any
        elif label.startswith("fraction"):
            axis.set_ylim(0, 1)
        elif label in ("codes used", "perplexity"):
            most = codes[-1] if label == "perplexity" else codes.numel()
            axis.set_ylim(0, 1.05 * most)
            axis.axhline(most, color="gray", linestyle="--", linewidth=1)
    figure.suptitle(title)
    _write_figure(figure, file, title)


def _write_grid(images: Tensor, columns: int, file: Path, title: str, upscale_to: int = 64) -> None:
    """Write images [B, 3, H, W] in [0, 1] as a grid with a title. Small images are enlarged to about `upscale_to`."""
    factor = max(1, upscale_to // max(images.shape[2:]))
    enlarged = images.cpu().repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    grid = make_grid(enlarged, nrow=columns, padding=2, pad_value=1.0).permute(1, 2, 0).numpy()  # [height, width, 3]
    grid_height, grid_width = grid.shape[:2]
    height, width = grid_height + _TITLE_HEIGHT, max(grid_width, _TITLE_CHARACTER_WIDTH * len(title))
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    axis = figure.add_axes(((width - grid_width) / 2 / width, 0, grid_width / width, grid_height / height))
    axis.imshow(grid, interpolation="nearest", aspect="auto")
    axis.set_axis_off()
    figure.text(0.5, 1 - _TITLE_HEIGHT / 2 / height, title, ha="center", va="center", fontsize=11)
    _write_figure(figure, file, title)


def _write_figure(figure: Figure, file: Path, title: str) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Title": title})
    plt.close(figure)
    atomic_write(file, buffer.getbuffer())
