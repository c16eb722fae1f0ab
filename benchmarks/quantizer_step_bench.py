"""A training step of `VectorQuantize` beside vector_quantize_pytorch's: forward, backward and moving averages.

    python benchmarks/quantizer_step_bench.py --out results/quantizer_step.jsonl

Both layers have the same codebook and get the same x, normally distributed. First the answers of one step are checked:
our indices against float64 brute force (all rows, or a seeded part of at least 4,096 of them), our loss and x's
gradient against theirs, on the rows where both chose the same code. If one is wrong, nothing is timed, and the exit
status is 1. Then both take steps in turns, in one process, and the medians of the ratios count; memory is the most that
a step holds beyond what was held before it. It prints one JSON line, such as

    {"op": "VectorQuantize step", "status": "ok", "time_ratio": ..., "memory_ratio": ..., "ours_ms": ..., ...}
"""

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import tyro
from search_report import Environment
from search_timing import CudaEvents, WallClock, peak_mib, time_in_turn
from search_verification import checked_rows, wrong_rows
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize as Theirs

from vq_kernels import VectorQuantize

ROUNDING = 2e-5
"""How far loss and gradient may lie from theirs, relative to the largest number: float32's rounding, in two orders."""


@dataclass(frozen=True)
class Options:
    """Time a training step of the quantizer beside vector_quantize_pytorch's."""

    batch: int = 8
    """b of x [b, n, dim]."""
    length: int = 1024
    """n."""
    dim: int = 256
    """Channels, and dimensions of the codes."""
    num_codes: int = 8192
    """K."""
    turns: int = 10
    """Steps of each that are timed."""
    device: str = "cpu"
    """cpu, or a GPU such as cuda."""
    threads: int | None = None
    """CPU threads; none: as many as PyTorch takes."""
    seed: int = 0
    """Of x, of the codebook and of the choice of checked rows."""
    out: Path | None = None
    """Append the JSON line to this file too."""


@dataclass(frozen=True)
class Answer:
    """What one training step gave: indices [N], loss [], x's gradient [N, dim]."""

    indices: Tensor
    loss: Tensor
    gradient: Tensor


class Stepper:
    """A layer, and the step that is timed: the gradients of loss and quantized go back to x."""

    def __init__(self, layer: Any, x: Tensor, direction: Tensor) -> None:
        self.layer = layer
        self.x = x.clone().requires_grad_()
        self.direction = direction

    def step(self) -> Answer:
        """Forward and backward; the averages move."""
        quantized, indices, loss = self.layer(self.x)
        (gradient,) = torch.autograd.grad([quantized, loss], self.x, [self.direction, torch.ones_like(loss)])
        return Answer(indices.flatten(), loss.detach(), gradient.flatten(0, 1))


def run(options: Options) -> dict[str, Any]:
    """Verify, time and weigh both; what the JSON line says."""
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    ours, theirs = make_pair(options, device)
    checks = verify(ours, theirs, options.seed)
    line = {
        "op": "VectorQuantize step",
        "status": "WRONG" if checks["wrong_rows"] or not checks["same_loss_and_gradient"] else "ok",
        "batch": options.batch,
        "length": options.length,
        "dim": options.dim,
        "num_codes": options.num_codes,
        "threads": torch.get_num_threads(),
        "vector_quantize_pytorch": version("vector-quantize-pytorch"),
        **asdict(Environment.here(device)),
        **checks,
    }
    if line["status"] == "ok":
        line |= compare(ours.step, theirs.step, options.turns, device)
    return line


def make_pair(options: Options, device: torch.device) -> tuple[Stepper, Stepper]:
    """Ours and theirs, with the same codes and x."""
    generator = torch.Generator().manual_seed(options.seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    codes = draw(options.num_codes, options.dim)
    x, direction = (draw(options.batch, options.length, options.dim) for _ in range(2))
    ours = VectorQuantize(options.dim, options.num_codes).to(device)
    ours.codebook = codes
    theirs = Theirs(options.dim, options.num_codes).to(device)
    theirs.load_state_dict(ours.state_dict())
    return Stepper(ours, x, direction), Stepper(theirs, x, direction)


def verify(ours: Stepper, theirs: Stepper, seed: int) -> dict[str, Any]:
    """One step of each: how many rows are wrong, how far loss and gradient lie apart."""
    codes = ours.layer.codebook.clone()
    found, expected = ours.step(), theirs.step()
    x = ours.x.detach().flatten(0, 1)
    rows = checked_rows(x.shape[0], *codes.shape, seed=seed).to(x.device)
    same = found.indices == expected.indices
    apart = {
        "loss_difference": _relative_difference(found.loss, expected.loss),
        "gradient_difference": _relative_difference(found.gradient[same], expected.gradient[same]),
    }
    return {
        "checked_rows": rows.numel(),
        "wrong_rows": int(wrong_rows(x[rows], codes, found.indices[rows]).sum()),
        "wrong_rows_theirs": int(wrong_rows(x[rows], codes, expected.indices[rows]).sum()),
        **apart,
        "same_loss_and_gradient": max(apart.values()) <= ROUNDING,
    }


def compare(
    ours: Callable[[], object], theirs: Callable[[], object], turns: int, device: torch.device
) -> dict[str, Any]:
    """Times in turns and the memory of a step each; both have run once."""
    timer = CudaEvents() if device.type == "cuda" else WallClock()
    elapsed_ms = time_in_turn({"ours": ours, "theirs": theirs}, timer, rounds=turns, burst_ms=0)
    ratios = [one / other for one, other in zip(elapsed_ms["ours"], elapsed_ms["theirs"], strict=True)]
    ours_mib, theirs_mib = (peak_mib(call, device) for call in (ours, theirs))
    return {
        "time_ratio": statistics.median(ratios),
        "time_ratios": ratios,
        "ours_ms": statistics.median(elapsed_ms["ours"]),
        "theirs_ms": statistics.median(elapsed_ms["theirs"]),
        "timing": timer.method,
        "memory_ratio": ours_mib / theirs_mib if ours_mib is not None and theirs_mib else None,
        "ours_peak_mib": ours_mib,
        "theirs_peak_mib": theirs_mib,
    }


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest number; 0 for no numbers."""
    if not expected.numel():
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max())


def main(options: Options) -> int:
    """Print the line; the exit status."""
    line = run(options)
    text = json.dumps(line)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a") as stream:
            stream.write(text + "\n")
    return 0 if line["status"] == "ok" else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, prog="python benchmarks/quantizer_step_bench.py", description=__doc__)))
