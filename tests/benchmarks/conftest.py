"""Pictures to train on, and training in this process."""

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
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder: 48 noisy colours of 8 x 8 to train on, 16 to test."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for split, count in (("train", 48), ("test", 16)):
        (folder / split / "colours").mkdir(parents=True)
        for index in range(count):
            pixels = generator.normal(generator.uniform(0, 255, 3), 30, (8, 8, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / split / "colours" / f"{index:02}.png")
    return folder


@pytest.fixture
def train_here() -> Callable[[Config], None]:
    """Does what `train_runs.run_training` does, in this process: torch is loaded already."""

    def run_training(config: Config) -> None:
        file = config.out.with_name("settings.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(config.to_dict()))
        train.main(["--config", str(file), "--resume"], SignalHandler())

    return run_training
