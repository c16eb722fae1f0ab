"""Images to train on, a finished run, and a way to run the commands in this process."""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.vqae.commands import TINY, Outcome
from vqae import train
from vqae.runtime.process import SignalHandler, run_command

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests are run under nohup, which ignores it


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Runs of this process and of others add up numbers in the same order."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder: 64 noisy colours of 32 x 32 to train on, 32 to test."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 64), ("test", 32)):
        (folder / split / "colours").mkdir(parents=True)
        for index in range(count):
            pixels = generator.normal(generator.uniform(0, 255, 3), 30, (32, 32, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / split / "colours" / f"{index:02}.png")
    return folder


@pytest.fixture(scope="session")
def tiny(images: Path) -> tuple[str, ...]:
    """Arguments of a run on these images, all but --out."""
    return (*TINY, "--dataset", "imagefolder", "--data-dir", str(images))


@pytest.fixture(scope="session")
def finished_run(tiny: tuple[str, ...], one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run; to be read, not written to."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train.main([*tiny, "--out", str(folder)], SignalHandler())
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command of vqae as `python -m` does, in this process: command("vqae.train", "--out", folder)."""
    logger = logging.getLogger("vqae")

    def run(module: str, *arguments: object) -> Outcome:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        level = logger.level
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        try:
            with pytest.raises(SystemExit) as exit_info:
                run_command(module)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            logger.setLevel(level)
        captured = capsys.readouterr()
        assert isinstance(exit_info.value.code, int)
        return Outcome(exit_info.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def environment() -> dict[str, str]:
    """For processes of their own: one thread, and output as soon as it is printed."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
