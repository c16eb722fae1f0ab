"""The figures of the documentation: what they show, and that they can be drawn again."""

from collections.abc import Iterator

import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks.figures import codes_per_image, collapse, gaussian, rate_distortion
from vqae.config import Config
from vqae.model.vqae import build_model


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    plt.close("all")


def drawn(figure: Figure, panel: int = 0) -> dict[str, list[float]]:
    """The heights of the labelled curves of a panel."""
    return {line.get_label(): list(line.get_ydata()) for line in figure.axes[panel].get_lines()}


def test_only_the_default_uses_all_codes() -> None:
    titles = [axis.get_title() for axis in collapse(num_codes=16, num_steps=60).axes]
    used = [int(title.split(" of ")[0].split()[-1]) for title in titles]
    assert used[-1] == 16 > max(used[:-1])


def test_measured_errors_stand_beside_published_ones() -> None:
    rows = [{"method": "EMA", "seed": 0, "step": step, "error": 2.0, "use": 0.5} for step in (1, 10)]
    figure = gaussian(rows)
    assert drawn(figure)["EMA"] == [2.0, 2.0]
    assert drawn(figure, 1)["EMA"] == [50.0, 50.0]
    assert drawn(figure)["Wasserstein VQ, published"][-1] == 0.991


def test_the_curve_of_bits_shows_the_mean_over_seeds() -> None:
    names = ("method", "num_codes", "num_quantizers", "test_mse")
    lines = [("model", 512, 2, 1.0), ("model", 512, 1, 2.0), ("model", 512, 1, 4.0), ("model", 64, 1, 9.0)]
    figure = rate_distortion([dict(zip(names, line, strict=True)) for line in lines])
    assert drawn(figure)["vqae"] == [3.0, 1.0]
    assert list(figure.axes[0].get_lines()[1].get_xdata()) == [9.0, 18.0]


def test_the_images_stand_above_their_reconstructions() -> None:
    models = [build_model(Config(num_codes=4, num_quantizers=q, code_dim=8), (32, 32)).eval() for q in (2, 1)]
    images = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    shown = codes_per_image(models, images, columns=3).axes[0].get_images()[0].get_array()
    assert shown.shape == (2 * (3 * 34 + 2), 2 * (3 * 34 + 2), 3)
    second = torch.as_tensor(shown[::2, ::2][2:34, 36:68]).permute(2, 0, 1)  # every second image is taken
    torch.testing.assert_close(second, images[2] / 255)
    by_one = torch.as_tensor(shown[::2, ::2][36:68, 2:34]).permute(2, 0, 1)
    torch.testing.assert_close(by_one, models[1].decode(models[1].encode(images[:1]))[0].detach())
