"""The trainer's benchmark, in small."""

import json
from pathlib import Path

import pytest

from benchmarks import train
from vqae.training.trainer import Trainer


def test_it_prints_the_ratio_of_both_loops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "line.jsonl"
    train.main(train.Options(batch_size=4, steps=1, turns=2, device="cpu", out=out))
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(out.read_text()) == line
    assert len(line["ratios"]) == 2
    assert line["ratio"] == pytest.approx(sum(line["ratios"]) / 2, abs=2e-3)
    assert min(line["trainer_images_per_s"], line["bare_images_per_s"]) > 0


def test_the_encoder_learns_in_every_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    rests = []

    def train_steps(trainer: Trainer, count: int) -> None:
        before(trainer, count)
        rests.append(trainer.model.encoder.frozen)

    before = Trainer.train_steps
    monkeypatch.setattr(Trainer, "train_steps", train_steps)
    train.main(train.Options(batch_size=2, steps=1, turns=3, device="cpu"))
    assert rests == [False] * 4
