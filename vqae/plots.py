"""The pictures that a run leaves: reconstructions, the codebook, the curves."""

import io
import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from torch import Tensor
from torchvision.utils import make_grid

from vqae.checkpoint import write_whole
from vqae.model import VQAE

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

_UPSCALE_TO = 64  # pixels a small picture's side is shown at, at least
_DPI = 100
_TITLE_HEIGHT, _TITLE_CHARACTER_WIDTH = 40, 9  # pixels


@torch.no_grad()
def plot_reconstructions(model: VQAE, pictures: Tensor, file: Path, title: str, columns: int = 16) -> None:
    """Originals over reconstructions.

    Args:
        model: in eval mode.
        pictures: [B, 3, H, W], uint8 or floats in [0, 1], on the model's device.
        file: the PNG to write.
        title: above the pictures.
        columns: pictures a row.
    """
    originals = pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures
    decoded = model.decode(model.encode(pictures))
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
    """[B, 3, H, W] with white pictures appended up to a full row."""
    return torch.cat([row, row.new_ones(columns - row.shape[0], *row.shape[1:])])


def _write_grid(pictures: Tensor, columns: int, file: Path, title: str, upscale_to: int = _UPSCALE_TO) -> None:
    """Write pictures [B, 3, H, W] in [0, 1] as a titled grid, enlarged without smoothing where they are small."""
    enlarge = max(1, upscale_to // max(pictures.shape[2:]))
    shown = pictures.cpu().repeat_interleave(enlarge, dim=2).repeat_interleave(enlarge, dim=3)
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
    write_whole(file, buffer.getbuffer())
