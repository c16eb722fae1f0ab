"""The images that a run leaves: reconstructions, the codebook, the curves."""

import io
import math
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm

from vqae.model.vqae import VQAE
from vqae.training.checkpoint import atomic_write

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

_UPSCALE_TO = 64  # pixels a small image's side is shown at, at least
_DPI = 100
_TITLE_HEIGHT, _TITLE_CHARACTER_WIDTH = 40, 9  # pixels


@torch.no_grad()
def plot_reconstructions(model: VQAE, images: Tensor, file: Path, title: str, columns: int = 16) -> None:
    """Originals over reconstructions.

    Args:
        model: in eval mode.
        images: [B, 3, H, W], uint8 or floats in [0, 1], on the model's device.
        file: the PNG to write.
        title: above the images.
        columns: images a row.
    """
    originals = images.float() / 255 if images.dtype == torch.uint8 else images
    decoded = model.decode(model.encode(images))
    rows = []
    for start in range(0, originals.shape[0], columns):
        rows += [_padded(part[start : start + columns], columns) for part in (originals, decoded)]
    _write_grid(torch.cat(rows), columns, file, title)


@torch.no_grad()
def plot_codebook(model: VQAE, counts: Tensor, file: Path, title: str) -> None:
    """Every code decoded, the most used first; a code that `counts` [K] never saw is dimmed."""
    order = counts.argsort(descending=True, stable=True)
    decoded = model.decode(order)
    unused = (counts[order] == 0)[:, None, None, None]
    columns = max(1, math.ceil(math.sqrt(2 * counts.numel())))  # twice as wide as high
    _write_grid(torch.where(unused, decoded * 0.25, decoded), columns, file, title, upscale_to=32)


# The panels of curves.png, a row a line: what the axis says, and the entries of metrics.jsonl that it shows.
_PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("MSE a pixel value", ("train_mse", "val_mse", "test_mse")),
    ("loss", ("reconstruction_loss", "codebook_loss")),
    ("share of the loss", ("reconstruction_loss_share", "codebook_loss_share")),
    ("codes used", ("train_codes_used", "codes_used")),
    ("perplexity", ("train_perplexity", "perplexity")),
    ("codes restarted in the epoch", ("restarts",)),
)


def plot_curves(history: list[dict[str, Any]], num_codes: int, file: Path, title: str) -> None:
    """MSE, losses, and the codebook's life against the epoch.

    Args:
        history: the lines of metrics.jsonl; what a line does not have, or has as None, leaves a gap.
        num_codes: K, at which the panels of codes used and perplexity end.
        file: the PNG to write.
        title: above the panels.
    """
    epochs = [line["epoch"] for line in history]
    figure, rows = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    axes = dict(zip((label for label, _ in _PANELS), rows.flat, strict=True))
    for label, names in _PANELS:
        for name in names:
            values = [math.nan if line.get(name) is None else line[name] for line in history]
            axes[label].plot(epochs, values, marker=".", label=name)
        axes[label].set(xlabel="epoch", ylabel=label)
        axes[label].grid(alpha=0.3)
        if history:
            axes[label].legend()
    axes["loss"].set_yscale("symlog", linthresh=1e-3)
    restarts = axes["codes restarted in the epoch"]
    restarts.set_yscale("symlog", linthresh=1)  # thousands at first, then hardly any
    restarts.set_ylim(0, max(1, restarts.get_ylim()[1]))
    axes["share of the loss"].set_ylim(0, 1)
    for label in ("codes used", "perplexity"):
        axes[label].set_ylim(0, 1.05 * num_codes)
        axes[label].axhline(num_codes, color="gray", linestyle="--", linewidth=1)
    figure.suptitle(title)
    _write_figure(figure, file, title)


def _padded(row: Tensor, columns: int) -> Tensor:
    """[B, 3, H, W] with white images appended up to a full row."""
    return torch.cat([row, row.new_ones(columns - row.shape[0], *row.shape[1:])])


def _write_grid(images: Tensor, columns: int, file: Path, title: str, upscale_to: int = _UPSCALE_TO) -> None:
    """Write images [B, 3, H, W] in [0, 1] as a titled grid, enlarged without smoothing where they are small."""
    enlarge = max(1, upscale_to // max(images.shape[2:]))
    shown = images.cpu().repeat_interleave(enlarge, dim=2).repeat_interleave(enlarge, dim=3)
    grid = make_grid(shown, nrow=columns, padding=2, pad_value=1.0).permute(1, 2, 0).numpy()  # [height, width, 3]
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


_LINE_EVERY_S = 30.0
_BAR_EVERY_S = 0.5


class ProgressReporter:
    """Losses, codes used and the time left.

    Args:
        progress: share of the run that is already done, 0 to 1.
        silent: say nothing: another process does.
    """

    def __init__(self, progress: float, *, silent: bool = False) -> None:
        self._silent = silent
        self._bar = tqdm(
            total=1.0,
            initial=progress,
            disable=silent or None,  # None: where stderr is no terminal
            bar_format="{percentage:3.0f}%|{bar}| {postfix[0]}",
            postfix=[""],
            dynamic_ncols=True,
        )
        self._every_s = _LINE_EVERY_S if self._bar.disable else _BAR_EVERY_S
        self._start = (time.monotonic(), progress)
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether it is time to show something: reading the figures may mean waiting for the device."""
        return not self._silent and time.monotonic() - self._last >= self._every_s

    def show(self, progress: float, losses: tuple[float, float], codes_used: int) -> None:
        """Show where the run is."""
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

    def line(self, text: str) -> None:
        """A line of its own, to stdout."""
        if not self._silent:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def warn(self, text: str) -> None:
        """A line of its own, to stderr."""
        if not self._silent:
            self._bar.write(text, file=sys.stderr)
            sys.stderr.flush()

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._bar.close()


def write_events(folder: Path, line: dict[str, Any]) -> None:
    """Write an epoch's figures as events of its step; a file that an earlier process wrote for it is replaced.

    Each file is written whole: TensorBoard's own writer has a thread, in which a full disk would end as a traceback.

    Raises:
        UsageError: as `atomic_write`.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard.summary import scalar, text
    except ImportError:
        return
    events = [Event(file_version="brain.Event:2")]
    for name, value in line.items():
        if isinstance(value, str):
            events.append(Event(step=line["step"], summary=text(name, value)))  # type: ignore[no-untyped-call]
        elif value is not None and name not in ("epoch", "step"):
            events.append(Event(step=line["step"], summary=scalar(name, value)))  # type: ignore[no-untyped-call]
    buffer = io.BytesIO()
    records = RecordWriter(buffer)
    for event in events:
        event.wall_time = time.time()
        records.write(event.SerializeToString())
    atomic_write(folder / f"events.out.tfevents.{line['step']:010d}", buffer.getbuffer())
