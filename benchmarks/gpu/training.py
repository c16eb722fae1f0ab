"""Stage "training": seconds to the target, and pictures a second beside the same model in plain PyTorch.

The file training.jsonl gets a line a piece, told apart by "op":

    run         a run of vqae.train on all training pictures: test MSE epoch by epoch, seconds to a test MSE of 0.0300
    step        the time of one step alone, its batch on the GPU: this library's model, and plain_model.py's
    loop        pictures a second of the plain model with its DataLoader; the trainer's own are in the runs, those of
                the epochs in which its encoder rests apart from those in which it learns, as the plain one always does
    bare loop   what benchmarks/train_bench.py prints
"""

import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gpu.commands import Finished, run_command, tail
from gpu.pictures import load_pictures, picture_flags
from gpu.plain_model import PlainTraining
from gpu.results import ROOT, Line, Results
from gpu.stage import FINISHED, Context, Pace
from gpu.timing import quantiles_ms
from vqae import VQAE
from vqae.config import Config
from vqae.model.vqae import build_model
from vqae.training.optim import build_optimizer

TARGET_MSE = 0.0300
_LENGTHS = (4, 6, 8, 12, 24, 48)  # of runs, in epochs
_FIRST_LENGTH = 12
_SHORT_LENGTH = 4
_VARIANTS: tuple[tuple[str, ...], ...] = (("--amp",), ("--amp", "--compile"))
_LOOP_S = 15.0


def run(context: Context) -> str:
    """Do what pieces the results do not hold yet."""
    results = context.results("training")
    if context.data_dir is None and not context.rehearse:
        return "skipped: no --data-dir"
    pictures = load_pictures(context)
    assert pictures is not None
    failed = train(results, context, 2 if context.rehearse else _FIRST_LENGTH, ())
    pace = Pace(context)
    done = [pace.do(partial(piece, results, context, pictures), piece) for piece in (steps, loop)]
    if not all(done):
        return "steps and loop left: no time left"
    if context.rehearse:
        return f"failed: {failed}" if failed else FINISHED
    bare_loop(results, context)
    while not failed:
        wanted = next_run(results)
        if wanted is None:
            return FINISHED
        if context.left_s() < 30 + 3 * wanted[0]:  # seconds to start, and more than an epoch takes
            return "runs of other lengths left: no time left"
        failed = train(results, context, *wanted)
    return f"failed: {failed}"


def next_run(results: Results) -> tuple[int, tuple[str, ...]] | None:
    """The run that may reach the target sooner, by its epochs and flags: shorter where the best one reached it, else
    longer; then the best length with other flags. None where all have been tried."""
    best = best_of(results)
    if best is None:
        return _FIRST_LENGTH, ()
    reached = best["seconds_to_target"] is not None
    place = _LENGTHS.index(best["epochs"]) + (-1 if reached else 1)
    if 0 <= place < len(_LENGTHS) and not results.has(op="run", epochs=_LENGTHS[place], flags=""):
        return _LENGTHS[place], ()
    for flags in _VARIANTS:
        if not results.has(op="run", epochs=best["epochs"], flags=" ".join(flags)):
            return best["epochs"], flags
    return None


def best_of(results: Results) -> Line | None:
    """The run that reached the target first; where none has, the one with the least test MSE."""
    runs = list(results.matching(op="run", status="ok"))
    return min(runs, key=lambda run: (run["seconds_to_target"] or math.inf, run["test_mse"]), default=None)


def train(results: Results, context: Context, epochs: int, flags: tuple[str, ...]) -> str:
    """One run and its line; what went wrong, or nothing."""
    name = {"epochs": epochs, "flags": " ".join(flags)}
    if results.has(op="run", status="ok", **name):
        return ""
    out, finished = run_training(context, epochs, flags)
    if finished.exit_code != 0:
        status = "stopped at the time limit" if finished.exit_code is None else "failed"
        results.add(op="run", status=status, **name, output=tail(finished.output))
        return f"the run of {epochs} epochs {' '.join(flags)} {status}; see {results.file.name}"
    lines = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    config = Config.read(out / "config.json")
    results.add(op="run", status="ok", **name, wall_s=round(finished.seconds, 1), **read_run(lines, config))
    return ""


def run_training(context: Context, epochs: int, flags: tuple[str, ...]) -> tuple[Path, Finished]:
    """`python -m vqae.train` on all pictures; the run's folder, and how it ended."""
    out = context.work / "runs" / "-".join([f"{epochs}", *(flag.strip("-") for flag in flags)])
    command = [sys.executable, "-m", "vqae.train", "--out", str(out), "--overwrite", "--epochs", str(epochs), *flags]
    if context.rehearse:
        command += ["--num-codes", "8", "--code-dim", "8", "--hidden-dims", "8", "--device", "cpu"]
    command += ["--batch-size", str(_config(context).batch_size), *picture_flags(context)]
    return out, run_command(command, seconds=context.left_s() - 10)


def trained_model(context: Context) -> VQAE:
    """The model of --checkpoint; else of a short run, made now where this machine has none.

    Raises:
        RuntimeError: the run failed; says how it ended.
    """
    checkpoint = context.checkpoint
    if checkpoint is None:
        epochs = 1 if context.rehearse else _SHORT_LENGTH
        checkpoint = context.work / "runs" / str(epochs) / "best.pt"
        if not checkpoint.exists():
            _, finished = run_training(context, epochs, ())
            if finished.exit_code != 0:
                raise RuntimeError(f"no model for the embeddings: {tail(finished.output)}")
    return VQAE.load(checkpoint, context.device)


def read_run(lines: list[dict[str, Any]], config: Config) -> dict[str, Any]:
    """What the lines of a run's metrics.jsonl say: test MSE by epoch, and when the target was reached.

    Returns:
        images_per_s: of all epochs but the first, which compiles; resting_images_per_s, learning_images_per_s: of those
            in which the encoder rests all the time, and learns all the time. None where there is none.
        seconds_to_target: of the steps alone, up to the end of the first epoch with a test MSE of at most the target;
            elapsed_to_target: from the process's start, so with reading the pictures and all evaluations. None where
            the target was not reached.
    """
    train_s, step = 0.0, 0
    seconds = elapsed = None
    history = []
    for line in lines:
        train_s += (line["step"] - step) * config.batch_size / line["images_per_s"]
        step = line["step"]
        history.append([line["epoch"], round(train_s, 2), line["test_mse"]])
        if seconds is None and line["test_mse"] <= TARGET_MSE:
            seconds, elapsed = train_s, line["elapsed_s"]
    last = lines[-1]
    kept = {name: last[name] for name in ("test_mse", "psnr_db", "perplexity", "codes_used", "elapsed_s")}
    start = config.unfreeze_encoder_at * config.epochs
    later = lines[1:] or lines
    resting = [line for line in later if line["epoch"] <= start]
    learning = [line for line in later if line["epoch"] - 1 >= start]
    return {
        "target_mse": TARGET_MSE, "seconds_to_target": seconds, "elapsed_to_target": elapsed, **kept,
        "images_per_s": _mean_rate(later), "resting_images_per_s": _mean_rate(resting),
        "learning_images_per_s": _mean_rate(learning), "train_s": train_s, "history": history,
    }  # fmt: skip


def _mean_rate(lines: list[dict[str, Any]]) -> float | None:
    """Of epochs with as many pictures each: what their time together makes of them."""
    return len(lines) / sum(1 / line["images_per_s"] for line in lines) if lines else None


def steps(results: Results, context: Context, pictures: Tensor) -> None:
    """The lines of one whole step alone, in float32 and under bfloat16 autocast."""
    config = _config(context)
    batch = torch.randn(config.batch_size, 3, *pictures.shape[2:], device=context.device)
    for name, amp in (("this library", False), ("plain", False), ("this library", True), ("plain", True)):
        if results.has(op="step", model=name, amp=amp):
            continue
        step = our_step(config, batch, amp) if name == "this library" else _plain_step(config, batch, pictures, amp)
        low, middle, high = quantiles_ms(step, context.device, count=1 if context.rehearse else 100)
        times = {"p20_ms": low, "p50_ms": middle, "p80_ms": high}
        results.add(op="step", model=name, amp=amp, batch_size=batch.shape[0], **times)


def our_step(config: Config, batch: Tensor, amp: bool, *, rests: bool = False) -> Callable[[], None]:
    """A step of the trainer: the model, its encoder at rest or not, both losses, the optimiser."""
    model = build_model(config, (batch.shape[2], batch.shape[3])).to(batch.device)
    model.encoder.freeze(rests)
    model.train()
    optimizer = build_optimizer(model, config)

    def step() -> None:
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=amp):
            output = model(batch)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(F.mse_loss(output.reconstruction.float(), batch) + output.codebook_loss)
        optimizer.step()

    return step


def _plain_step(config: Config, batch: Tensor, pictures: Tensor, amp: bool) -> Callable[[], None]:
    training = PlainTraining(config, pictures[:2].cpu(), batch.device, amp=amp)
    return lambda: training.step(batch)


def loop(results: Results, context: Context, pictures: Tensor) -> None:
    """The line of the plain model's whole loop: its pictures a second after a start of 20 steps."""
    if results.has(op="loop"):
        return
    config = _config(context)
    training = PlainTraining(config, pictures.cpu(), context.device)
    batches = training.batches()
    warm_up, seconds = (1, 0.1) if context.rehearse else (20, _LOOP_S)
    for _ in range(warm_up):
        training.step(next(batches))
    count, start = 0, _now(context)
    while time.monotonic() - start < seconds:
        for _ in range(1 if context.rehearse else 25):
            training.step(next(batches))
            count += 1
    elapsed = _now(context) - start
    rate = count * config.batch_size / elapsed
    results.add(
        op="loop", model="plain", images_per_s=rate, step_ms=1e3 * elapsed / count, batch_size=config.batch_size
    )


def bare_loop(results: Results, context: Context) -> None:
    """The line of benchmarks/train_bench.py: the trainer beside a loop without quantizer and data."""
    if results.has(op="bare loop") or context.left_s() < 40:
        return
    command = [sys.executable, str(ROOT / "benchmarks" / "train_bench.py"), "--device", "cuda", "--steps", "50"]
    finished = run_command(command, seconds=context.left_s() - 5)
    lines = [line for line in finished.output.splitlines() if line.startswith('{"trainer_images_per_s"')]
    found = json.loads(lines[-1]) if lines else {"output": tail(finished.output)}
    results.add(op="bare loop", **found)


def _now(context: Context) -> float:
    """The time when the device has done what it was given."""
    if context.device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()


def _config(context: Context) -> Config:
    """The settings of the model: the defaults, or a small one to rehearse with."""
    return Config(num_codes=8, code_dim=8, hidden_dims=(8,), batch_size=4) if context.rehearse else Config()
