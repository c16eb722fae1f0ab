"""Draws the figures of README.md and of docs/**/*.md in docs/images.

    python -m benchmarks.figures                                    # those of the committed results
    python -m benchmarks.figures --runs RUN... --data-dir DIR       # also codes_per_image.png, of runs of vqae.train

collapse.png shows codes before and after training on the rows of `gaussian_codes.py` in two dimensions. gaussian.png
and rate_distortion.png show benchmarks/results/cpu. codes_per_image.png shows test images and their reconstructions by
each run, from the fewest codes per image to the most.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import tyro
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torchvision.utils import make_grid

from benchmarks.gaussian_codes import MEAN, METHODS, train_step
from benchmarks.results import ROOT, Row
from benchmarks.tables.learning import PUBLISHED
from benchmarks.tables.rows import cpu_rows
from vq_kernels import nearest_code
from vqae.data.load import load_split
from vqae.model.vqae import VQAE, model_from_checkpoint
from vqae.training.checkpoint import load_checkpoint

IMAGES = ROOT / "docs" / "images"


def collapse(num_codes: int = 64, num_steps: int = 300) -> Figure:
    """Codes [K, 2] before and after training, and rows."""
    shown = ("VQ, SGD", "EMA", "VectorQuantizer(K, D)")
    figure, axes = plt.subplots(1, len(shown) + 1, figsize=(12, 3.3), layout="constrained", sharex=True, sharey=True)
    torch.manual_seed(0)
    start = torch.randn(num_codes, 2)
    _scatter(axes[0], "random codes", start, torch.randn(1000, 2) + MEAN)
    for axis, name in zip(axes[1:], shown, strict=True):
        torch.manual_seed(0)
        make, lr = METHODS[name]
        quantizer = make(num_codes, 2)
        optimizer = None if lr is None else torch.optim.SGD(quantizer.parameters(), lr, momentum=0.9)
        for _ in range(num_steps):
            train_step(quantizer, optimizer, torch.randn(1000, 2) + MEAN)
        _scatter(axis, name, _codes(quantizer), torch.randn(1000, 2) + MEAN)
    return figure


def _codes(quantizer: nn.Module) -> Tensor:
    return cast(Tensor, quantizer.codebook).detach()


def _scatter(axis: Axes, name: str, codes: Tensor, rows: Tensor) -> None:
    found = nearest_code(rows, codes)
    used = torch.bincount(found.indices, minlength=len(codes)) > 0
    axis.scatter(rows[:, 0], rows[:, 1], s=3, color="lightgray", label="rows")
    axis.scatter(codes[used, 0], codes[used, 1], s=14, color="tab:blue", label="codes in use")
    axis.scatter(codes[~used, 0], codes[~used, 1], s=14, color="tab:red", marker="x", linewidth=1, label="unused codes")
    error = found.sq_distances.mean().item()
    axis.set_title(f"{name}\nerror {error:.3f}, {int(used.sum())} of {len(codes)} codes", fontsize=10)
    axis.set_aspect("equal")
    if name == "random codes":
        axis.legend(fontsize=7, loc="upper left")


def gaussian(rows: list[Row]) -> Figure:
    """Error and use by training step, beside the published errors."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for color, method in enumerate(dict.fromkeys([*(row["method"] for row in rows), *PUBLISHED])):
        own = [row for row in rows if row["method"] == method and row["seed"] == rows[0]["seed"]]
        look = {"color": f"C{color}", "label": method}
        if own:
            steps = [row["step"] for row in own]
            left.plot(steps, [row["error"] for row in own], marker=".", **look)
            right.plot(steps, [100 * row["use"] for row in own], marker=".", **look)
        if method in PUBLISHED:
            errors, use = PUBLISHED[method]
            named = f"{method}, published"
            left.plot([*errors], [*errors.values()], linestyle=":", color=look["color"], label=None if own else named)
            right.plot(max(errors), 100 * use, marker="x", color=look["color"], label=None if own else named)
    left.set(xscale="log", yscale="log", xlabel="training step", ylabel="error (dotted: published)")
    right.set(xscale="log", xlabel="training step", ylabel="codes used, % (x: published)", ylim=(0, 105))
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3, which="both")
    return figure


def rate_distortion(rows: list[Row], num_codes: int = 512) -> Figure:
    """Test MSE by bits per image, for 1, 2, 4 and more codes of K = num_codes."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for method, shown in (("kmeans", "residual k-means of the pixels"), ("model", "vqae")):
        own = [row for row in rows if row["method"] == method and row["num_codes"] == num_codes]
        points: dict[int, list[float]] = {}
        for row in sorted(own, key=lambda row: int(row["num_quantizers"])):
            points.setdefault(row["num_quantizers"], []).append(row["test_mse"])
        bits = [q * math.log2(num_codes) for q in points]
        axis.plot(bits, [sum(mse) / len(mse) for mse in points.values()], marker="o", label=shown)
    axis.set(xlabel="bits per image", ylabel="test MSE per pixel value")
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


@torch.no_grad()
def codes_per_image(models: list[VQAE], images: Tensor, columns: int = 16) -> Figure:
    """Some of the images [N, 3, H, W] uint8 above their reconstructions by each model, fewest codes per image first."""
    models = sorted(models, key=lambda model: model.quantizer.codebook.numel())
    images = images[:: len(images) // columns][:columns]
    lines = [images.float() / 255, *(model.decode(model.encode(images)) for model in models)]
    grid = make_grid(torch.cat(lines), nrow=columns, padding=2, pad_value=1.0).permute(1, 2, 0)
    figure, axis = plt.subplots(figsize=(10, 10 * grid.shape[0] / grid.shape[1]), layout="constrained")
    axis.imshow(grid.repeat_interleave(2, 0).repeat_interleave(2, 1).numpy(), interpolation="nearest")
    axis.set_axis_off()
    return figure


@dataclass(frozen=True)
class Options:
    """Draw the figures of the documentation."""

    runs: tuple[Path, ...] = ()
    """Runs of vqae.train with different --num-quantizers, for codes_per_image.png."""
    data_dir: Path | None = None
    """Folder of their test images."""
    out: Path = IMAGES
    """Folder to write to."""


def main(options: Options) -> None:
    """Writes the files."""
    figures = {
        "collapse": collapse(),
        "gaussian": gaussian(cpu_rows("gaussian_codes")),
        "rate_distortion": rate_distortion(cpu_rows("rate_distortion")),
    }
    if options.runs and options.data_dir:
        models = [model_from_checkpoint(load_checkpoint(run / "best.pt")).eval() for run in options.runs]
        images, _ = load_split("imagefolder", options.data_dir, "test")
        figures["codes_per_image"] = codes_per_image(models, images)
    for name, figure in figures.items():
        figure.savefig(options.out / f"{name}.png", dpi=100)
        plt.close(figure)
        print(options.out / f"{name}.png")


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m benchmarks.figures", description=__doc__))
