"""The training loop, and all that it needs to stop and go on."""

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vq_kernels.distributed import sum_over_ranks
from vqae.config import Config
from vqae.data.load import fingerprints, to_device, training_batches
from vqae.model.vqae import VQAE, at_least_float32, load_weights
from vqae.runtime.distributed import Agreement, barrier, is_rank0, parallel, world_size
from vqae.runtime.errors import DivergedError, UsageError
from vqae.runtime.process import Interrupted, Launch, SignalHandler, elapsed_s
from vqae.training.checkpoint import RunFolder, save_checkpoint
from vqae.training.metrics import Evaluation, LossMeter, collapse_warning, evaluate
from vqae.training.optim import build_optimizer, build_schedule
from vqae.training.report import ProgressReporter, plot_codebook, plot_curves, plot_reconstructions, write_events

_CLOSING_S = 6.0  # kept of --max-minutes for the last checkpoint, the plots and the interpreter's exit
_SHOWN_IMAGES = 48


class Trainer:
    """One run, from its first step or from a checkpoint; alone, or as one of several processes that share each batch.

    All processes have the same weights, statistics, generators and place in the run; the first one writes and prints.

    Args:
        config: the settings, checked.
        model: on `device`.
        train: [N, 3, H, W] uint8; val: [M, 3, H, W], M may be 0; test: [L, 3, H, W], L >= 1.
        dataset: what was really read, for the files.
        device: where to train.
        signals: asked, between steps, whether to stop; one process's are heeded by all.
        state: a checkpoint of the same settings to continue from.

    Raises:
        UsageError: the checkpoint was trained on another number of images, or its weights do not fit.
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
        self.fingerprints = fingerprints(train, val, test)  # a run goes on with the same images
        self.batch_size = min(config.batch_size, train.shape[0])
        self.steps_per_epoch = train.shape[0] // self.batch_size
        self.is_rank0 = is_rank0()
        self.agreement = Agreement(signals)

        self.epoch = 0  # finished epochs
        self.step = 0  # finished steps of the current one
        self.elapsed_before_s = 0.0  # of the processes that trained before this one
        self.train_s = 0.0  # of the current epoch's steps
        self.evaluation_s: float | None = None
        self.history: list[dict[str, Any]] = []
        self.best_val_mse = float("inf")
        self.test_counts = torch.zeros(config.num_codes, dtype=torch.int64)  # of the last evaluation
        self.losses = LossMeter(device)
        self.time_share = 0.0  # of --max-minutes, as of the last `_exchange`
        self._exchange()
        self.optimizer = build_optimizer(model, config)
        self.schedule = build_schedule(self.optimizer, config, self.progress)
        if state is not None:
            self._restore(state)
        self._exchange()
        self.forward: Callable[[Tensor], Any] = self._prepare_forward()
        self.saved_at = time.monotonic()
        self.reporter = ProgressReporter(self.progress(), silent=not self.is_rank0)

    # -- where the run is

    def progress(self) -> float:
        """Share of the run that is done, 0 to 1: of its steps, or of its time where that ends first."""
        by_steps = self._global_step() / (self.config.epochs * self.steps_per_epoch)
        return by_steps if self.config.max_minutes is None else min(1.0, max(by_steps, self.time_share))

    def _exchange(self) -> None:
        """Look at the clock and for signals; all processes do so at the same places, and take the same from it."""
        share = 0.0
        if self.config.max_minutes is not None:
            time_to_train_s = 60 * self.config.max_minutes - _CLOSING_S - self._evaluation_s()
            share = self._elapsed_s() / max(time_to_train_s, 1e-9)
        self.time_share = self.agreement.exchange(share)

    def _poll(self) -> None:
        """Raise `Interrupted` in all processes if a signal has come to one."""
        self._exchange()
        self.agreement.poll()

    def _global_step(self) -> int:
        return self.epoch * self.steps_per_epoch + self.step

    def _elapsed_s(self) -> float:
        return self.elapsed_before_s + elapsed_s()

    def _evaluation_s(self) -> float:
        """How long an evaluation takes: as the last one; before any, as training on as many images, or half of that
        where the encoder learns."""
        if self.evaluation_s is not None:
            return self.evaluation_s
        images = self.val.shape[0] + self.test.shape[0]
        share = 1.0 if self.model.encoder.frozen else 0.5
        return share * images * self.train_s / max(self.step * self.batch_size, 1)

    # -- the run

    def _prepare_forward(self) -> Callable[[Tensor], Any]:
        """The model's training pass, its encoder at rest or not as the run has it now."""
        self.model.encoder.freeze(self.progress() < self.config.unfreeze_encoder_at)
        self.model.train()
        together = parallel(self.model, self.device)  # looks at which parameters learn
        return torch.compile(together) if self.config.compile else together

    def run(self) -> None:
        """Train to the end, leaving every file of the run.

        Raises:
            Interrupted: a signal came, to this process or another; the run is saved.
            DivergedError: a loss was not finite; the last checkpoint is kept.
            UsageError: a file cannot be written.
        """
        with self.signals.deferred():
            try:
                if not self._global_step():
                    self._save(finished=False)  # from here on there is something to go on from
                # However little time there is, one step is taken and measured: every file of a run is then there.
                while not self.history or self.step or (self.epoch < self.config.epochs and self.progress() < 1):
                    self.train_steps(self.steps_per_epoch - self.step)
                    self._end_epoch()
                self._plot()
                self._save(finished=True)
            except Interrupted:
                self._save(finished=False)
                self.reporter.close()
                barrier()  # a process that ends before the others may have them killed
                if self.is_rank0:
                    advice = Launch.from_environment().how_to_go_on(self.folder.path)
                    step = self._global_step() if self.step else self.history[-1]["step"] if self.history else 0
                    print(f"saved at step {step}; {advice}", file=sys.stderr)
                raise
            finally:
                self.reporter.close()

    def train_steps(self, count: int) -> None:
        """The next `count` steps of the current epoch, fewer where the run's time ends before them."""
        self.model.train()
        batches = training_batches(
            self.train,
            self.batch_size,
            self.device,
            flip=self.config.flip,
            seed=self.config.seed,
            epoch=self.epoch,
            first_step=self.step,
        )
        start, before_s, last = time.monotonic(), self.train_s, self.step + count
        while self.step < last and (self.progress() < 1 or not self._global_step()):
            self._train_step(next(batches))
            self.train_s = before_s + time.monotonic() - start
            if self.device.type == "cpu":  # elsewhere it would mean to wait for the device
                self.losses.check()
            if self.reporter.due():
                self.reporter.show(self.progress(), self.losses.means(), int(self.model.quantizer.codes_used))
            if time.monotonic() - self.saved_at >= 60 * self.config.checkpoint_minutes:
                self._save(finished=False)
            self.agreement.poll()
        self.losses.check()
        self.train_s = before_s + time.monotonic() - start

    def _train_step(self, images: Tensor) -> None:
        """One step of SGD on the two losses, for images [B, 3, H, W] uint8, this process's part of the batch."""
        if self.model.encoder.frozen and self.progress() >= self.config.unfreeze_encoder_at:
            self.forward = self._prepare_forward()
        target = self.model.normalise(images)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp):
            output = self.forward(target)
        reconstruction_loss = F.mse_loss(at_least_float32(output.reconstruction), target)
        losses = torch.stack([reconstruction_loss, output.codebook_loss])  # [2], means over this process's part
        losses = losses * (images.shape[0] / self.batch_size)  # summed over the processes, means over the batch
        self.optimizer.zero_grad(set_to_none=True)
        # DistributedDataParallel divides the sum of the processes' gradients by their number.
        torch.autograd.backward(world_size() * losses.sum())
        self.optimizer.step()
        reconstruction_loss, codebook_loss = sum_over_ranks(losses.detach(), synchronise=True).unbind()
        self.losses.add(reconstruction_loss, codebook_loss, self._global_step() + 1)
        self.step += 1
        self._exchange()
        self.schedule.step()

    def _end_epoch(self) -> None:
        """Evaluate, record, save, and move on to the next epoch."""
        start = time.monotonic()
        test = self._evaluate(self.test)
        val = self._evaluate(self.val) if self.val.shape[0] else None
        self.evaluation_s = time.monotonic() - start
        val_mse = test.mse if val is None else val.mse
        if not math.isfinite(test.mse) or not math.isfinite(val_mse):
            raise DivergedError(f"the model's images were not finite after step {self._global_step()}")
        self._record(test, val)
        self._warn_of_collapse(test, val)
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
        self._exchange()

    def _evaluate(self, images: Tensor) -> Evaluation:
        return evaluate(self.model, images, self.config.batch_size, self.device, self._poll)

    def _record(self, test: Evaluation, val: Evaluation | None) -> None:
        """Append the epoch's line to the history, and show it."""
        reconstruction_loss, codebook_loss = self.losses.means()
        total_loss = reconstruction_loss + codebook_loss
        quantizer = self.model.quantizer
        encoder_group, decoder_group, _ = self.optimizer.param_groups
        line = {
            "epoch": round(self.epoch + self.step / self.steps_per_epoch, 4),
            "step": self._global_step(),
            "dataset": self.dataset,
            "reconstruction_loss": reconstruction_loss,
            "codebook_loss": codebook_loss,
            "reconstruction_loss_share": reconstruction_loss / total_loss if total_loss else math.nan,
            "codebook_loss_share": codebook_loss / total_loss if total_loss else math.nan,
            "train_mse": reconstruction_loss * self.model.pixel_std.item() ** 2,
            "val_mse": None if val is None else val.mse,
            "test_mse": test.mse,
            "psnr_db": test.psnr_db,
            "perplexity": test.perplexity,
            "codes_used": test.codes_used,
            "train_perplexity": quantizer.perplexity.item(),
            "train_codes_used": int(quantizer.codes_used),
            "restarts": int(quantizer.restarts),
            "images_per_s": self.step * self.batch_size / self.train_s if self.train_s else 0.0,
            "lr": decoder_group["lr"],
            "encoder_lr": encoder_group["lr"],
            "elapsed_s": self._elapsed_s(),
        }
        self.history.append(line)
        if self.is_rank0:
            write_events(self.folder.events, line)
        self.reporter.line(
            f"epoch {line['epoch']:g}/{self.config.epochs} ({self.dataset})  train MSE {line['train_mse']:.4f}  "
            f"test MSE {test.mse:.4f}  PSNR {test.psnr_db:.2f} dB  codes used {test.codes_used}/{quantizer.num_codes}  "
            f"perplexity {test.perplexity:.0f}  {line['images_per_s']:.0f} images/s"
        )

    def _warn_of_collapse(self, test: Evaluation, val: Evaluation | None) -> None:
        """Say, once an epoch at most, where hardly any codes are in use."""
        counts = test.counts if val is None else test.counts + val.counts
        config = dataclasses.replace(self.config, batch_size=self.batch_size)
        warning = collapse_warning(config, counts, self._global_step())
        if warning is not None:
            self.reporter.warn(warning)

    def _plot(self) -> None:
        """The run's three images; a signal is heeded before each."""
        self.model.eval()
        what = f"{self.dataset}, K = {self.config.num_codes}, test MSE {self.history[-1]['test_mse']:.4f}"
        shown = self.test[:: max(1, self.test.shape[0] // _SHOWN_IMAGES)][:_SHOWN_IMAGES].to(self.device)
        counts = self.test_counts.to(self.device)
        plots: tuple[Callable[[str], None], ...] = (
            lambda title: plot_reconstructions(self.model, shown, self.folder.reconstructions, title),
            lambda title: plot_codebook(self.model, counts, self.folder.codebook, title),
            lambda title: plot_curves(self.history, self.config.num_codes, self.folder.curves, title),
        )
        titles = (f"originals over reconstructions ({what})", f"codebook, by use on the test images ({what})", what)
        for plot, title in zip(plots, titles, strict=True):
            self._poll()
            if self.is_rank0:
                plot(title)

    # -- checkpoints

    def _model_state(self) -> dict[str, Any]:
        """What best.pt holds: enough to use the model."""
        return {
            "config": self.config.to_dict(),
            "dataset": self.dataset,
            "image_size": list(self.model.image_size),
            "model": self.model.state_dict(),
        }

    def _save(self, *, finished: bool) -> None:
        """Write last.pt: enough to go on, for as many processes as there will be."""
        if not self.is_rank0:
            return
        self.losses.check()
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        state = {
            **self._model_state(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rng": rng,
            "losses": self.losses.state_dict(),
            "test_counts": self.test_counts,
            "images": self.fingerprints,
            "epoch": self.epoch,
            "step": self.step,
            "train_s": self.train_s,
            "elapsed_s": self._elapsed_s(),
            "evaluation_s": self.evaluation_s,
            "history": self.history,
            "best_val_mse": self.best_val_mse,
            "finished": finished,
            "job": Launch.from_environment().job,
        }
        save_checkpoint(self.folder.last, state)
        self.saved_at = time.monotonic()

    def _restore(self, state: dict[str, Any]) -> None:
        """The opposite of `_save`."""
        before, now = state["images"], self.fingerprints
        if before[0][0] != now[0][0]:
            raise UsageError(f"--resume: the run trained on {before[0][0]} images, but now there are {now[0][0]}")
        if before != now:
            raise UsageError("--resume: the images must be those that the run began with, got others")
        load_weights(self.model, state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses.load_state_dict(state["losses"])
        self.test_counts = state["test_counts"]
        self.epoch, self.step, self.train_s = state["epoch"], state["step"], state["train_s"]
        self.elapsed_before_s, self.evaluation_s = state["elapsed_s"], state["evaluation_s"]
        self.history, self.best_val_mse = state["history"], state["best_val_mse"]
        self.schedule.load_state_dict(state["schedule"])
        if self.is_rank0:
            self.folder.write_metrics(self.history)  # a line that was being written when the run died is dropped
        torch.set_rng_state(state["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["rng"]:
            torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
