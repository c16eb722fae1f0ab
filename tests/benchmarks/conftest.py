"""Images to train on."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of noisy colours, 8 x 8: 48 training and 16 test images."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 48), ("test", 16)):
        (folder / split / "colours").mkdir(parents=True)
        for index in range(count):
            pixels = generator.normal(generator.uniform(0, 255, 3), 30, (8, 8, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / split / "colours" / f"{index:02}.png")
    return folder
