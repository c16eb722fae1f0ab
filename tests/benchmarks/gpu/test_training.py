"""The training stage: what a run's lines say, which run comes next, and that the plain model learns."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import sweep, training
from gpu.commands import Finished
from gpu.pictures import load_pictures, picture_folder
from gpu.plain_model import PlainModel, PlainTraining, plain_quantize
from gpu.results import Results, make_header, read_lines
from gpu.stage import FINISHED, Context
from gpu.training import best_of, next_run, read_run

from vq_kernels import vector_quantize
from vqae.config import Config
from vqae.model.vqae import build_model


def context(folder: Path, *, rehearse: bool = True, data_dir: Path | None = None) -> Context:
    header = make_header((), "abc", rehearse=True)
    deadline = time.monotonic() + 600
    return Context(out=folder, work=folder, header=header, deadline=deadline, rehearse=rehearse, data_dir=data_dir)


def epoch(number: int, test_mse: float, images_per_s: float) -> dict[str, Any]:
    kept = {"psnr_db": 15.0, "perplexity": 300.0, "codes_used": 512}
    return {"epoch": number, "step": 10 * number, "test_mse": test_mse, "images_per_s": images_per_s,
            "elapsed_s": 5.0 + 2 * number, **kept}  # fmt: skip


def test_the_target_is_reached_at_the_end_of_the_first_epoch_below_it() -> None:
    lines = [epoch(1, 0.05, 100.0), epoch(2, 0.03, 200.0), epoch(3, 0.028, 400.0)]
    found = read_run(lines, Config(batch_size=20, epochs=3, unfreeze_encoder_at=0.5))
    assert found["seconds_to_target"] == pytest.approx(200 / 100 + 200 / 200)
    assert found["elapsed_to_target"] == 9.0
    assert found["train_s"] == pytest.approx(3.5)
    assert found["images_per_s"] == pytest.approx(2 / (1 / 200 + 1 / 400))
    assert (found["resting_images_per_s"], found["learning_images_per_s"]) == (None, pytest.approx(400.0))
    assert found["history"] == [[1, 2.0, 0.05], [2, 3.0, 0.03], [3, 3.5, 0.028]]


def test_a_target_that_is_missed_is_none() -> None:
    found = read_run([epoch(1, 0.0301, 100.0)], Config(batch_size=20, epochs=1))
    assert (found["seconds_to_target"], found["elapsed_to_target"]) == (None, None)
    assert found["images_per_s"] == 100.0


def test_epochs_of_a_resting_encoder_are_told_from_those_of_a_learning_one() -> None:
    rates = (10.0, 300.0, 600.0, 200.0, 80.0, 120.0)
    lines = [epoch(number, 0.05, rate) for number, rate in enumerate(rates, start=1)]
    found = read_run(lines, Config(batch_size=20, epochs=6, unfreeze_encoder_at=0.55))  # it begins in the fourth epoch
    assert found["resting_images_per_s"] == pytest.approx(400.0)
    assert found["learning_images_per_s"] == pytest.approx(96.0)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_the_plain_model_has_the_layers_of_the_models(norm: str) -> None:
    config = Config(num_codes=8, code_dim=8, hidden_dims=(8,), embedding_norm=norm)
    ours = build_model(config, (8, 8))
    plain = PlainModel(config, (8, 8))
    counted = [sorted((*parameter.shape,) for parameter in model.parameters()) for model in (ours, plain)]
    assert counted[0] == counted[1]
    norms = [sum(name.endswith("running_mean") for name, _ in model.named_buffers()) for model in (ours, plain)]
    assert norms[0] == norms[1] == 20 + (norm == "batch")


def with_runs(folder: Path, *runs: tuple[int, str, float | None, float]) -> Results:
    results = Results(folder / "training.jsonl", make_header((), "abc", rehearse=True))
    for epochs, flags, seconds, mse in runs:
        results.add(op="run", status="ok", epochs=epochs, flags=flags, seconds_to_target=seconds, test_mse=mse)
    return results


@pytest.mark.parametrize(
    ("runs", "following"),
    [
        ([], (12, ())),
        ([(12, "", 30.0, 0.029)], (8, ())),
        ([(12, "", 30.0, 0.029), (8, "", None, 0.031)], (12, ("--amp",))),
        ([(12, "", None, 0.031)], (24, ())),
        ([(12, "", None, 0.031), (24, "", 60.0, 0.0299)], (24, ("--amp",))),
        ([(4, "", 8.0, 0.029)], (4, ("--amp",))),
        ([(48, "", None, 0.031), (48, "--amp", None, 0.032)], (48, ("--amp", "--compile"))),
        ([(4, "", 8.0, 0.03), (4, "--amp", 9.0, 0.03), (4, "--amp --compile", 9.0, 0.03)], None),
    ],
)
def test_the_next_run_is_the_one_that_may_be_sooner(
    tmp_path: Path, runs: list[tuple[int, str, float | None, float]], following: tuple[int, tuple[str, ...]] | None
) -> None:
    assert next_run(with_runs(tmp_path, *runs)) == following


def test_the_best_run_is_the_first_at_the_target_else_the_nearest(tmp_path: Path) -> None:
    assert best_of(with_runs(tmp_path / "none")) is None
    missed = best_of(with_runs(tmp_path / "missed", (12, "", None, 0.032), (24, "", None, 0.031)))
    assert missed is not None
    assert missed["epochs"] == 24
    reached = best_of(with_runs(tmp_path / "reached", (12, "", 30.0, 0.0299), (24, "", 50.0, 0.028)))
    assert reached is not None
    assert reached["epochs"] == 12


def test_a_run_that_fails_fails_the_stage_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "run_command", lambda command, seconds: Finished(1, "error: broke", 1.0))
    here = context(tmp_path)
    results = here.results("training")
    assert "the run of 2 epochs  failed" in training.train(results, here, 2, ())
    assert results.has(op="run", status="failed", output="error: broke")
    with pytest.raises(RuntimeError, match="no model for the embeddings: error: broke"):
        training.trained_model(here)


def test_without_pictures_what_needs_them_is_left(tmp_path: Path) -> None:
    here = context(tmp_path, rehearse=False)
    assert training.run(here) == sweep.run(here) == "skipped: no --data-dir"
    assert load_pictures(here) is None
    with pytest.raises(ValueError, match="--data-dir must be given for pictures, got none"):
        picture_folder(here)


def test_the_plain_quantizer_is_the_librarys() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 8, generator=generator, requires_grad=True)
    codebook = torch.randn(7, 8, generator=generator, requires_grad=True)
    for plain, ours in zip(plain_quantize(x, codebook), vector_quantize(x, codebook), strict=True):
        torch.testing.assert_close(plain, ours)
    weights = torch.randn(50, 8, generator=generator)
    gradients = []
    for quantize in (plain_quantize, vector_quantize):
        quantized, _, loss = quantize(x, codebook)
        gradients.append(torch.autograd.grad((quantized * weights).sum() + loss, [x, codebook]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_plain_model_learns() -> None:
    torch.manual_seed(0)
    pictures = torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8)
    config = Config(num_codes=8, code_dim=8, hidden_dims=(8,), batch_size=8)
    plain = PlainTraining(config, pictures, torch.device("cpu"))
    before = plain.model.codebook.detach().clone()
    batches = plain.batches()
    for _ in range(3):  # past the end of the first epoch
        batch = next(batches)
        assert batch.shape == (8, 3, 8, 8)
        plain.step(batch)
    assert not torch.equal(plain.model.codebook, before)
    assert all(torch.isfinite(parameter).all() for parameter in plain.model.parameters())


def test_a_sweep_goes_on_with_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another machine left is put back before the benchmark begins, and what it did is kept though it is cut."""
    seen = []

    def run_command(command: list[str], seconds: float) -> Finished:
        assert seconds < here.left_s() - 20, "a run that is stopped has to save itself"
        file = Path(command[command.index("--out") + 1]) / "results.jsonl"
        seen.append([(line["method"], line["num_codes"]) for line in read_lines(file)])
        number = command[command.index("--num-codes") + 1]
        with file.open("a") as stream:
            stream.write(f'{{"method": "model", "num_codes": {number}, "seed": 0}}\n')
        return Finished(None if len(seen) == 1 else 0, "", 1.0)

    monkeypatch.setattr(sweep, "run_command", run_command)
    here = context(tmp_path)
    kept = here.results("rate_distortion")
    kept.add(method="kmeans", num_codes=2, seed=0)
    Results(kept.file, {**kept.header, "sources": "older"}).add(method="kmeans", num_codes=16, seed=0)
    assert sweep.run(here) == "2 of 2 pieces done: no time left"
    assert sweep.run(here) == FINISHED
    assert seen == [[("kmeans", 2)]]
    assert [(line["method"], line["rehearsal"]) for line in read_lines(kept.file)] == [
        ("kmeans", True), ("kmeans", True), ("model", True)]  # fmt: skip


def test_a_sweep_does_one_k_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def run_command(command: list[str], seconds: float) -> Finished:
        done.append(int(command[command.index("--num-codes") + 1]))
        return Finished(0, "", 1.0)

    monkeypatch.setattr(sweep, "run_command", run_command)
    monkeypatch.setattr(sweep, "picture_flags", lambda context: [])
    assert sweep.run(context(tmp_path, rehearse=False, data_dir=tmp_path)) == FINISHED
    assert done == list(sweep.NUM_CODES)
    late = dataclasses.replace(context(tmp_path, rehearse=False, data_dir=tmp_path), deadline=time.monotonic() + 60)
    assert sweep.run(late) == "0 of 12 pieces done: no time left"
    assert len(done) == len(sweep.NUM_CODES)
