"""What a run shows: progress lines or a bar, and plots."""

import io
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vqae.config import Config
from vqae.model.vqae import VQAE, build_model
from vqae.training import report
from vqae.training.report import _PANELS, ProgressReporter, plot_codebook, plot_curves, plot_reconstructions

TITLE_HEIGHT = 40


def build(image_size: tuple[int, int]) -> VQAE:
    torch.manual_seed(0)
    return build_model(Config(num_codes=18, code_dim=8, hidden_dims=(16,)), image_size).eval()


def opened(file: Path) -> tuple[np.ndarray, str]:
    """Pixels [H, W, 3] uint8 and title of a PNG."""
    with Image.open(file) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")), image.info["Title"]


@pytest.mark.parametrize(
    ("image_size", "count", "grid"),
    [
        ((32, 32), 16, (2 * 66 + 2, 16 * 66 + 2)),
        ((32, 32), 17, (4 * 66 + 2, 16 * 66 + 2)),  # the second row is filled up with white
        ((64, 48), 16, (2 * 66 + 2, 16 * 50 + 2)),
        ((80, 80), 16, (2 * 82 + 2, 16 * 82 + 2)),
    ],
)
def test_reconstructions_have_their_size(
    tmp_path: Path, image_size: tuple[int, int], count: int, grid: tuple[int, int]
) -> None:
    images = torch.zeros(count, 3, *image_size, dtype=torch.uint8)
    plot_reconstructions(build(image_size), images, tmp_path / "out.png", "synthetic")
    pixels, title = opened(tmp_path / "out.png")
    assert pixels.shape == (grid[0] + TITLE_HEIGHT, grid[1], 3)
    assert title == "synthetic"


def test_originals_are_above_their_reconstructions(tmp_path: Path) -> None:
    model = build((32, 32))
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8, generator=generator)
    decoded = model.decode(model.encode(images))
    plot_reconstructions(model, images, tmp_path / "out.png", "synthetic")
    pixels, _ = opened(tmp_path / "out.png")
    for column in (0, 15):
        for row, expected in ((0, images[column] / 255), (1, decoded[column])):
            top, left = TITLE_HEIGHT + 2 + 66 * row, 2 + 66 * column
            shown = pixels[top : top + 64 : 2, left : left + 64 : 2] / 255  # every pixel was doubled
            np.testing.assert_allclose(shown, expected.permute(1, 2, 0).numpy(), atol=1.01 / 255)


def test_narrow_plots_leave_room_for_the_title(tmp_path: Path) -> None:
    title = "originals above reconstructions of one image"
    plot_reconstructions(build((32, 32)), torch.zeros(1, 3, 32, 32), tmp_path / "out.png", title, columns=1)
    pixels, _ = opened(tmp_path / "out.png")
    assert pixels.shape[1] == 9 * len(title)
    assert (pixels[:TITLE_HEIGHT, [0, -1]] == 255).all()
    assert (pixels[:TITLE_HEIGHT] < 100).any()


def test_the_codebook_shows_the_most_used_first_and_dims_the_unused(tmp_path: Path) -> None:
    model = build((32, 32))
    counts = torch.zeros(18, dtype=torch.int64)
    counts[[3, 17]] = torch.tensor([5, 9])
    plot_codebook(model, counts, tmp_path / "out.png", "codebook, by use (synthetic, K = 18)")
    pixels, title = opened(tmp_path / "out.png")
    assert title == "codebook, by use (synthetic, K = 18)"
    assert pixels.shape[0] == TITLE_HEIGHT + 3 * 34 + 2  # six columns
    left = (pixels.shape[1] - (6 * 34 + 2)) // 2 + 2
    decoded = model.decode(torch.tensor([17, 3, 0])) * torch.tensor([1, 1, 0.25])[:, None, None, None]
    for column, expected in enumerate(decoded):
        shown = pixels[TITLE_HEIGHT + 2 :, left + 34 * column :][:32, :32] / 255
        np.testing.assert_allclose(shown, expected.permute(1, 2, 0).numpy(), atol=1.01 / 255)


NAMES = [name for _, names in _PANELS for name in names]


@pytest.mark.parametrize("num_epochs", [1, 3])
@pytest.mark.parametrize("val_mse", [0.1, None])
def test_curves(tmp_path: Path, num_epochs: int, val_mse: float | None) -> None:
    history: list[dict[str, Any]] = [
        {"epoch": epoch + 1.0, **dict.fromkeys(NAMES, 1.0), "val_mse": val_mse} for epoch in range(num_epochs)
    ]
    plot_curves(history, torch.Size([18]), tmp_path / "out.png", "synthetic, K = 18")
    pixels, title = opened(tmp_path / "out.png")
    assert pixels.shape == (700, 1300, 3)
    assert title == "synthetic, K = 18"


def test_curves_of_huge_losses(tmp_path: Path) -> None:
    history = [{"epoch": 1.0, **dict.fromkeys(NAMES, 0.0), "reconstruction_loss": 1e30, "codebook_loss": math.inf}]
    plot_curves(history, torch.Size([18]), tmp_path / "out.png", "synthetic")
    assert (tmp_path / "out.png").exists()


def test_curves_plot_every_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each entry is a line in a panel, with its values; what an older line lacks is a gap."""
    figures = []
    monkeypatch.setattr(report, "_write_figure", lambda figure, *_: figures.append(figure))
    history: list[dict[str, Any]] = [
        {"epoch": 1.0, "restarts": 4000, "train_mse": 0.5},
        {"epoch": 2.0, **{name: index / len(NAMES) for index, name in enumerate(NAMES)}},
    ]
    plot_curves(history, torch.Size([18]), tmp_path / "out.png", "synthetic")
    (figure,) = figures
    lines = {line.get_label(): line.get_ydata() for axis in figure.axes for line in axis.get_lines()}
    for index, name in enumerate(NAMES):
        first = {"restarts": 4000, "train_mse": 0.5}.get(name, math.nan)
        np.testing.assert_equal(lines[name], [first, index / len(NAMES)])
    ends = {axis.get_ylabel(): axis.get_ylim()[1] for axis in figure.axes}
    assert ends["codes used"] == ends["perplexity"] == pytest.approx(1.05 * 18)
    assert ends["fraction of the loss"] == 1
    assert ends["dead-code resets per epoch"] >= 4000
    report.plt.close(figure)


# -- progress


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_progress_output(monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO]) -> None:
    shown = stream()
    monkeypatch.setattr(sys, "stderr", shown)
    reporter = ProgressReporter(0.25)
    reporter.show(0.5, (1.5, 0.75), 308)
    reporter.close()
    text = shown.getvalue()
    for part in ("50%", "reconstruction 1.5000", "codebook 0.7500", "codes used 308", "0:00 left"):
        assert part in text
    assert ("|" in text) == (stream is Terminal)
    assert text.endswith("\n")


def test_the_time_left_is_estimated_by_the_pace_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, now = io.StringIO(), [100.0]
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    reporter = ProgressReporter(0.2)  # of a resumed run
    now[0] += 90
    assert reporter.due()
    reporter.show(0.5, (1.0, 1.0), 1)
    assert "2:30 left" in shown.getvalue()
    assert not reporter.due()


def test_lines_go_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = ProgressReporter(0.0)
    reporter.line("epoch 1")
    assert capsys.readouterr().out == "epoch 1\n"


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_warnings_go_to_stderr_on_a_line_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stream: type[io.StringIO]
) -> None:
    shown = stream()
    monkeypatch.setattr(sys, "stderr", shown)
    reporter = ProgressReporter(0.5)
    reporter.line("warning: few codes", sys.stderr)
    reporter.close()
    assert "warning: few codes" in re.split(r"[\r\n]", shown.getvalue())
    assert capsys.readouterr().out == ""
