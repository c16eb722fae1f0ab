"""Images to train on, and training in this process."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqae import train
from vqae.config import Config
from vqae.runtime.process import SignalHandler


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


@pytest.fixture
def train_here() -> Callable[[Config], None]:
    """A replacement for `training_runs.run_training` that trains in this process, which has imported torch."""

    def run_training(config: Config) -> None:
        file = config.out.with_name("settings.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(config.to_dict()))
        train.main(["--config", str(file), "--resume"], SignalHandler())

    return run_training
