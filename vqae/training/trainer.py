"""The training loop: steps, epochs, evaluation, checkpoints."""

import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vq_kernels.distributed import sum_over_ranks
from vqae.config import Config
from vqae.data.load import fingerprints, to_device, training_batches
from vqae.model.vqae import VQAE, at_least_float32, load_weights
from vqae.runtime.distributed import data_parallel, is_rank0, max_over_ranks, world_size
from vqae.runtime.errors import DivergedError, UsageError
from vqae.runtime.process import Interrupted, Launch, SignalHandler, elapsed_s
from vqae.training.captured_step import CapturedStep
from vqae.training.checkpoint import RunFolder, save_checkpoint
from vqae.training.metrics import Evaluation, LossMeter, collapse_warning, evaluate
from vqae.training.optim import build_optimizer, build_schedule
from vqae.training.report import ProgressReporter, plot_codebook, plot_curves, plot_reconstructions, write_events

_CLOSING_S = 6.0  # part of --max-minutes reserved for the last checkpoint, the plots and the exit of the interpreter
_NUM_PLOTTED = 48  # test images in reconstructions.png
_SAVED = ("epoch", "step", "train_s", "evaluation_s", "history", "best_val_mse", "test_counts")  # kept in last.pt

_logger = logging.getLogger(__name__)


class Trainer:
    """Trains a model from its first step or from a checkpoint, in a single process or as one of a process group.

    All ranks hold the same weights, random state and position in the run. Rank 0 writes and prints. A signal to one
    process stops all.

    Args:
        train: [N, 3, H, W] uint8; val: [M, 3, H, W], M may be 0; test: [L, 3, H, W], L >= 1.
        state: a checkpoint of a run with the same options. UsageError is raised if it does not fit.
    """

    def __init__(
        self,
        config: Config,
        model: VQAE,
        train: Tensor,
        val: Tensor,
        test: Tensor,
        dataset: str,
        device: torch.device,
        signals: SignalHandler,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.config, self.model, self.dataset, self.device, self.signals = config, model, dataset, device, signals
        self.folder = RunFolder(config.out)
        self.train, self.val, self.test = (to_device(images, device) for images in (train, val, test))
        self.fingerprints = fingerprints(train, val, test)
        self.batch_size = config.fitted_to(train.shape[0]).batch_size
        self.steps_per_epoch = train.shape[0] // self.batch_size
        self.is_rank0 = is_rank0()

        self.epoch = 0  # finished epochs
        self.step = 0  # finished steps of the current epoch
        self.elapsed_before_s = 0.0  # in earlier processes of this run
        self.train_s = 0.0  # of the current epoch's steps
        self.evaluation_s: float | None = None  # of the last evaluation
        self.history: list[dict[str, Any]] = []  # the lines of metrics.jsonl
        self.best_val_mse = math.inf
        self.test_counts = torch.zeros(model.quantizer.codebook.shape[:-1], dtype=torch.int64)  # of the last evaluation
        self.losses = LossMeter(device)
        self.time_used, self.signal = 0.0, 0  # see _synchronise

        self._synchronise()
        self.optimizer = build_optimizer(model, config)
        self.schedule = build_schedule(self.optimizer, config, self.progress)
        if state is not None:
            self._restore(state)
        self._synchronise()
        if state is not None and state["finished"]:  # an extended run: the learning rates of its new schedule
            for group, factor in zip(self.optimizer.param_groups, self.schedule.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * factor(self.global_step)
        self.captured_step = self._prepare_step()
        self.saved_at = time.monotonic()
        self.event_writer: Any = None  # see write_events
        self.reporter = ProgressReporter(self.progress(), silent=not self.is_rank0)

    @property
    def global_step(self) -> int:
        """Finished steps of the run."""
        return self.epoch * self.steps_per_epoch + self.step

    def progress(self) -> float:
        """The fraction of the run that is done, 0 to 1: by steps, or by time if that ends first."""
        by_steps = self.global_step / (self.config.epochs * self.steps_per_epoch)
        return by_steps if self.config.max_minutes is None else min(1.0, max(by_steps, self.time_used))

    def _synchronise(self) -> None:
        """Update the fraction of --max-minutes used and the signal received, to the maximum over all ranks."""
        used = 0.0
        if self.config.max_minutes is not None:
            available_s = 60 * self.config.max_minutes - _CLOSING_S - self._expected_evaluation_s()
            used = self._elapsed_s() / max(available_s, 1e-9)
        self.time_used, signal = max_over_ranks(used, self.signals.received)
        self.signal = int(signal)

    def _elapsed_s(self) -> float:
        return self.elapsed_before_s + elapsed_s()

    def _expected_evaluation_s(self) -> float:
        """Time of the last evaluation. Before any, a forward pass is taken for all of a frozen step, or half a step."""
        if self.evaluation_s is not None:
            return self.evaluation_s
        s_per_image = self.train_s / max(self.step * self.batch_size, 1) * (1.0 if self.model.encoder.frozen else 0.5)
        return s_per_image * (self.val.shape[0] + self.test.shape[0])

    def _poll(self) -> None:
        """Raise `Interrupted` on all ranks if a signal has arrived at any."""
        self._synchronise()
        if self.signal:
            raise Interrupted(self.signal)

    def run(self) -> None:
        """Train to the end and write every file of the run.

        Raises Interrupted after saving if a signal arrives at any process, DivergedError if a loss is not finite, and
        UsageError if a file cannot be written.
        """
        with self.signals.deferred():
            try:
                if not self.global_step:
                    self._save(finished=False)  # from now on the run can be resumed
                # At least one step and one evaluation, so that every file is written however short --max-minutes is.
                while not self.history or self.step or (self.epoch < self.config.epochs and self.progress() < 1):
                    self.train_steps(self.steps_per_epoch - self.step)
                    self._end_epoch()
                self._plot()
                self._save(finished=True)
            except Interrupted:
                self._save(finished=False)
                self.reporter.close()
                self._synchronise()  # wait for the others: torchrun may kill them once this process exits
                if self.is_rank0:
                    step = self.global_step if self.step else self.history[-1]["step"] if self.history else 0
                    advice = Launch.from_environment().resume_advice(self.folder.path)
                    print(f"saved at step {step}; {advice}", file=sys.stderr)
                raise
            finally:
                self.reporter.close()
                if self.event_writer is not None:
                    with contextlib.suppress(OSError):  # everything is flushed, or an error has been raised
                        self.event_writer.close()

    def train_steps(self, count: int) -> None:
        """Train for `count` steps of the current epoch, or until the time of the run is used up."""
        self.model.train()
        config = self.config
        batches = training_batches(
            self.train, self.batch_size, self.device, self.step, flip=config.flip, seed=config.seed, epoch=self.epoch
        )
        start, before_s, last = time.monotonic(), self.train_s, self.step + count
        while self.step < last and (self.progress() < 1 or not self.global_step):
            self._train_step(next(batches))
            self.train_s = before_s + time.monotonic() - start
            if self.device.type == "cpu":  # on a GPU it would synchronise
                self.losses.check()
            if self.reporter.due():
                self.reporter.show(self.progress(), self.losses.means(), int(self.model.quantizer.codes_used.sum()))
            if time.monotonic() - self.saved_at >= 60 * config.checkpoint_minutes:
                self._save(finished=False)
            if self.signal:
                raise Interrupted(self.signal)
        self.losses.check()
        self.train_s = before_s + time.monotonic() - start

    def _train_step(self, images: Tensor) -> None:
        """One SGD step on images [B, 3, H, W] uint8, this rank's share of the batch."""
        if self.model.encoder.frozen and self.progress() >= self.config.unfreeze_encoder_at:
            self.captured_step = self._prepare_step()
        losses = self.captured_step(images)
        self.losses.add(sum_over_ranks(losses, synchronise=True), self.global_step + 1)
        self.step += 1
        self._synchronise()
        self.schedule.step()

    def _prepare_step(self) -> CapturedStep:
        """Freeze or unfreeze the encoder as the run requires now, and return the step that trains it so."""
        self.model.encoder.freeze(self.progress() < self.config.unfreeze_encoder_at)
        self.model.train()
        model = data_parallel(self.model, self.device)  # after freezing: it registers the trainable parameters
        forward = torch.compile(model) if self.config.compile else model
        return CapturedStep(partial(self._update, forward), self.optimizer, self.device, capture=self._captures())

    def _captures(self) -> bool:
        """Whether to capture the step as a CUDA graph. Logs what forbids it."""
        if not self.config.cuda_graph or self.device.type != "cuda":
            return False
        obstacle = "of --compile" if self.config.compile else "processes share a batch" if world_size() > 1 else None
        if obstacle is not None:
            _logger.info("the training step is not captured as a CUDA graph, because %s", obstacle)
        return obstacle is None

    def _update(self, forward: Callable[[Tensor], Any], images: Tensor) -> Tensor:
        """Forward, backward and optimizer step. Returns the losses [2], this rank's part of the batch's mean."""
        target = self.model.normalise(images)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp):
            output = forward(target)
        reconstruction_loss = F.mse_loss(at_least_float32(output.reconstruction), target)
        losses = torch.stack([reconstruction_loss, output.codebook_loss])  # [2], means over this rank's share
        losses = losses * (images.shape[0] / self.batch_size)  # their sum over the ranks is the mean over the batch
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(world_size() * losses.sum())  # DistributedDataParallel averages over the ranks
        self.optimizer.step()
        return losses.detach()

    def _end_epoch(self) -> None:
        """Evaluate, report and save."""
        start = time.monotonic()
        test = evaluate(self.model, self.test, self.config.batch_size, self.device, self._poll)
        val = evaluate(self.model, self.val, self.config.batch_size, self.device, self._poll) if len(self.val) else None
        self.evaluation_s = time.monotonic() - start
        val_mse = test.mse if val is None else val.mse
        if not math.isfinite(test.mse) or not math.isfinite(val_mse):
            raise DivergedError(f"reconstructions were not finite after step {self.global_step}")
        self.history.append(self._metrics(test, val))
        self._report(test.counts if val is None else test.counts + val.counts)
        self.test_counts = test.counts.cpu()
        self.epoch, self.step, self.train_s = self.epoch + 1, 0, 0.0
        self.losses = LossMeter(self.device)
        self.model.quantizer.reset_usage()
        if val is None or val_mse < self.best_val_mse:
            self.best_val_mse = val_mse
            if self.is_rank0:
                save_checkpoint(self.folder.best, self._model_state())
        self._save(finished=False)
        if self.is_rank0:
            self.folder.write_metrics(self.history)
        self._synchronise()

    def _metrics(self, test: Evaluation, val: Evaluation | None) -> dict[str, Any]:
        """The epoch's line of metrics.jsonl."""
        reconstruction_loss, codebook_loss = self.losses.means()
        total_loss = reconstruction_loss + codebook_loss or math.nan
        quantizer = self.model.quantizer
        encoder_group, decoder_group, _ = self.optimizer.param_groups
        return {
            "epoch": round(self.epoch + self.step / self.steps_per_epoch, 4),
            "step": self.global_step,
            "dataset": self.dataset,
            "reconstruction_loss": reconstruction_loss,
            "codebook_loss": codebook_loss,
            "reconstruction_loss_share": reconstruction_loss / total_loss,
            "codebook_loss_share": codebook_loss / total_loss,
            "train_mse": reconstruction_loss * self.model.pixel_std.item() ** 2,
            "val_mse": None if val is None else val.mse,
            "test_mse": test.mse,
            "psnr_db": test.psnr_db,
            "perplexity": test.perplexity,
            "codes_used": test.codes_used,
            "train_perplexity": quantizer.perplexity.mean().item(),
            "train_codes_used": int(quantizer.codes_used.sum()),
            "restarts": int(quantizer.restarts),
            "images_per_s": self.step * self.batch_size / self.train_s if self.train_s else 0.0,
            "lr": decoder_group["lr"],
            "encoder_lr": encoder_group["lr"],
            "elapsed_s": self._elapsed_s(),
        }

    def _report(self, held_out_counts: Tensor) -> None:
        """Print and log the epoch's metrics, and warn if the codebook has collapsed."""
        line = self.history[-1]
        if self.is_rank0:
            self.event_writer = write_events(self.folder.events, line, self.event_writer)
        self.reporter.line(
            f"epoch {line['epoch']:g}/{self.config.epochs} ({self.dataset})  train MSE {line['train_mse']:.4f}  "
            f"test MSE {line['test_mse']:.4f}  PSNR {line['psnr_db']:.2f} dB  codes used {line['codes_used']}/"
            f"{self.test_counts.numel()}  perplexity {line['perplexity']:.0f}  {line['images_per_s']:.0f} images/s"
        )
        fitted = self.config.fitted_to(self.train.shape[0])
        warning = collapse_warning(fitted, held_out_counts, self.global_step * self.batch_size)
        if warning is not None:
            self.reporter.line(warning, sys.stderr)

    def _plot(self) -> None:
        """Write the plots of the run, polling for signals before each."""
        self.model.eval()
        stages = f"{self.config.num_quantizers} codes of " if self.config.num_quantizers > 1 else ""
        run = f"{self.dataset}, {stages}K = {self.config.num_codes}, test MSE {self.history[-1]['test_mse']:.4f}"
        images = self.test[:: max(1, self.test.shape[0] // _NUM_PLOTTED)][:_NUM_PLOTTED].to(self.device)
        counts, folder = self.test_counts.to(self.device), self.folder
        above, by_use = f"originals above reconstructions ({run})", f"codebook, most used codes first ({run})"
        plots: tuple[Callable[[], None], ...] = (
            lambda: plot_reconstructions(self.model, images, folder.reconstructions, above),
            lambda: plot_codebook(self.model, counts, folder.codebook, by_use),
            lambda: plot_curves(self.history, self.test_counts.shape, folder.curves, run),
        )
        for plot in plots:
            self._poll()
            if self.is_rank0:
                plot()

    def _model_state(self) -> dict[str, Any]:
        """The content of best.pt: what the model needs, and the fingerprints of the run's images."""
        return {
            "config": self.config.to_dict(),
            "dataset": self.dataset,
            "image_size": list(self.model.image_size),
            "images": self.fingerprints,
            "model": self.model.state_dict(),
        }

    def _save(self, *, finished: bool) -> None:
        """Write last.pt, from which any number of processes can resume.

        That of a finished run has no momentum, which takes as much space as the model. An extended run starts with 0.
        """
        if not self.is_rank0:
            return
        self.losses.check()
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        state = {
            **self._model_state(),
            **{name: getattr(self, name) for name in _SAVED},
            "optimizer": {**self.optimizer.state_dict(), **({"state": {}} if finished else {})},
            "schedule": self.schedule.state_dict(),
            "rng": rng,
            "losses": {"sums": self.losses.sums, "steps": self.losses.steps},
            "elapsed_s": self._elapsed_s(),
            "finished": finished,
            "job": Launch.from_environment().job,
        }
        save_checkpoint(self.folder.last, state)
        self.saved_at = time.monotonic()

    def _restore(self, state: dict[str, Any]) -> None:
        """The inverse of `_save`."""
        if state["images"] != self.fingerprints:
            counts = f"{state['images'][0][0]} training images then, {self.train.shape[0]} now"
            raise UsageError(f"--resume: the images must be those that the run began with, got others ({counts})")
        for name in _SAVED:
            setattr(self, name, state[name])
        load_weights(self.model, state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.losses = LossMeter(self.device, **state["losses"])
        self.elapsed_before_s = state["elapsed_s"]
        if self.is_rank0:
            self.folder.write_metrics(self.history)  # drop what a killed process wrote after the checkpoint
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
