"""Compares a training step of a drop-in with vector_quantize_pytorch's: forward, backward and moving averages.

    python benchmarks/quantizer_step.py --out results/quantizer_step.jsonl
    python benchmarks/quantizer_step.py --layer ResidualVQ --num-quantizers 8 --num-codes 1024 --dim 128

Both layers have the same codebooks and get the same normally distributed x. One step is checked first: our indices
against float64 brute force, our loss and gradient against theirs on the rows where both chose the same code. If one is
wrong, nothing is timed and the exit status is 1. Then both take steps alternately in one process. The time ratio is the
median of the ratios of the turns. Memory is what a step allocates beyond what was allocated before it. It prints one
JSON line, such as

    {"op": "VectorQuantize step", "status": "ok", "time_ratio": 0.18, "memory_ratio": 0.08, "ours_ms": 300.1, ...}
"""

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import the package from the checkout

import torch
import tyro
import vector_quantize_pytorch
from torch import Tensor

from benchmarks.results import Row, append_row, environment
from benchmarks.timing import TIMING, peak_mib, time_in_turn
from benchmarks.verification import checked_rows, wrong_rows
from vq_kernels import compat

ROUNDING = 2e-5  # how much loss and gradient may differ from theirs, relative to the largest number


@dataclass(frozen=True)
class Options:
    """Compare the time of a training step with that of vector_quantize_pytorch's."""

    layer: Literal["VectorQuantize", "ResidualVQ", "GroupedResidualVQ", "SimVQ", "ResidualSimVQ"] = "VectorQuantize"
    """The class to compare."""
    num_quantizers: int = 1
    """Stages of a residual layer."""
    groups: int = 1
    """Groups of GroupedResidualVQ."""
    batch: int = 8
    """b of x [b, n, dim]."""
    length: int = 1024
    """n of x [b, n, dim]."""
    dim: int = 256
    """dim of x [b, n, dim]."""
    num_codes: int = 8192
    """K."""
    turns: int = 10
    """Timed steps of each."""
    device: str = "cpu"
    """cpu, or a GPU such as cuda."""
    seed: int = 0
    """Seed of x, of the codebook and of the choice of checked rows."""
    out: Path | None = None
    """Append the JSON line to this file too."""


class Answer(NamedTuple):
    """The result of one training step."""

    indices: Tensor  # [G, N, Q]: groups, rows, stages
    loss: Tensor  # [G, Q]
    gradient: Tensor  # of x, [N, dim]


@dataclass(frozen=True)
class Stepper:
    """A layer and its timed step. The gradients of loss and quantized flow back to x."""

    layer: Any
    x: Tensor
    direction: Tensor

    @property
    def codebooks(self) -> Tensor:
        """[G, Q, K, D]."""
        codes: Tensor = self.layer.codebooks if hasattr(self.layer, "codebooks") else self.layer.codebook
        codes = codes.detach()
        return codes.view(*[1] * (4 - codes.dim()), *codes.shape)

    def step(self) -> Answer:
        """Runs forward and backward. The moving averages are updated."""
        quantized, indices, loss = self.layer(self.x)
        inputs = [self.x, *self.layer.parameters()]
        gradient, *_ = torch.autograd.grad([quantized, loss], inputs, [self.direction, torch.ones_like(loss)])
        num_groups, num_stages = self.codebooks.shape[:2]
        return Answer(
            indices.reshape(num_groups, -1, num_stages),
            loss.detach().view(num_groups, num_stages),
            gradient.flatten(0, 1),
        )


def run(options: Options) -> Row:
    """Verifies both layers and measures their time and memory."""
    device = torch.device(options.device)
    ours, theirs = make_pair(options, device)
    checks = verify(ours, theirs, options.seed)
    status = "WRONG" if checks["wrong_rows"] or not checks["same_loss_and_gradient"] else "ok"
    names = ("batch", "length", "dim", "num_codes", "num_quantizers", "groups")
    sizes = {name: getattr(options, name) for name in names}
    row = {"op": f"{options.layer} step", "status": status, **sizes, **environment(device), **checks}
    return row | compare(ours.step, theirs.step, options.turns, device) if row["status"] == "ok" else row


def make_pair(options: Options, device: torch.device) -> tuple[Stepper, Stepper]:
    """Our layer and theirs, with the same codes and the same x. Each stage has smaller codes than the one before."""
    generator = torch.Generator().manual_seed(options.seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    x, direction = (draw(options.batch, options.length, options.dim) for _ in range(2))
    arguments: dict[str, Any] = {"dim": options.dim, "codebook_size": options.num_codes}
    if "Residual" in options.layer:
        arguments["num_quantizers"] = options.num_quantizers
    if options.layer == "GroupedResidualVQ":
        arguments["groups"] = options.groups
    ours, theirs = (getattr(package, options.layer)(**arguments) for package in (compat, vector_quantize_pytorch))
    for group in getattr(ours, "rvqs", [ours]):
        for stage, quantizer in enumerate(getattr(group, "layers", [group])):
            codes = 0.9**stage * draw(options.num_codes, options.dim // options.groups)
            if hasattr(quantizer, "frozen_codebook"):
                quantizer.frozen_codebook = codes
            else:
                quantizer.codebook = codes
    ours, theirs = ours.to(device), theirs.to(device)
    theirs.load_state_dict(ours.state_dict())
    return Stepper(ours, x.requires_grad_(), direction), Stepper(theirs, x, direction)


def verify(ours: Stepper, theirs: Stepper, seed: int) -> Row:
    """Takes one step of each. Counts wrong rows and compares loss and gradient."""
    codebooks = ours.codebooks.clone()
    found, expected = ours.step(), theirs.step()
    x = ours.x.detach().flatten(0, 1)
    num_groups, num_stages, *sizes = codebooks.shape
    rows = checked_rows(x.shape[0], *sizes, seed=seed)[:: num_groups * num_stages].to(x.device)
    same = found.indices == expected.indices  # [G, N, Q]
    agree = same.all(dim=1).cumprod(dim=1).bool()  # [G, Q]: a row that differs changes the losses of later stages
    loss_difference = _relative_difference(found.loss[agree], expected.loss[agree])
    same = same.all(dim=2).all(dim=0)
    gradient_difference = _relative_difference(found.gradient[same], expected.gradient[same])
    wrong, theirs_wrong = (_num_wrong(x[rows], codebooks, one.indices[:, rows]) for one in (found, expected))
    return {
        **{"checked_rows": rows.numel(), "wrong_rows": wrong, "wrong_rows_theirs": theirs_wrong},
        **{"loss_difference": loss_difference, "gradient_difference": gradient_difference},
        "same_loss_and_gradient": max(loss_difference, gradient_difference) <= ROUNDING,
    }


def compare(ours: Callable[[], object], theirs: Callable[[], object], turns: int, device: torch.device) -> Row:
    """Times both in turns and measures the memory of one step each. Both have run once."""
    elapsed_ms = time_in_turn({"ours": ours, "theirs": theirs}, device, rounds=turns, burst_ms=0)
    ratios = [one / other for one, other in zip(elapsed_ms["ours"], elapsed_ms["theirs"], strict=True)]
    ours_mib, theirs_mib = (peak_mib(call, device) for call in (ours, theirs))
    memory_ratio = ours_mib / theirs_mib if ours_mib is not None and theirs_mib else None
    return {
        **{"time_ratio": statistics.median(ratios), "time_ratios": ratios, "timing": TIMING[device.type]},
        **{f"{name}_ms": statistics.median(values) for name, values in elapsed_ms.items()},
        **{"memory_ratio": memory_ratio, "ours_peak_mib": ours_mib, "theirs_peak_mib": theirs_mib},
    }


def _num_wrong(x: Tensor, codebooks: Tensor, indices: Tensor) -> int:
    """Counts the wrong ones of indices [G, M, Q] for rows x [M, G·D], each stage for the residual that it got."""
    total = 0
    for residual, stages, chosen in zip(x.chunk(len(codebooks), dim=1), codebooks, indices, strict=True):
        for codes, index in zip(stages, chosen.unbind(-1), strict=True):
            total += int(wrong_rows(residual, codes, index).sum())
            residual = residual - codes[index]
    return total


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference divided by the largest element; 0 for empty tensors."""
    if not expected.numel():
        return 0.0
    return float((found - expected).abs().max() / expected.abs().max())


def main(options: Options) -> int:
    """Prints the line and returns the exit status."""
    row = run(options)
    print(json.dumps(row))
    if options.out is not None:
        append_row(options.out, row)
    return 0 if row["status"] == "ok" else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, prog="python benchmarks/quantizer_step.py", description=__doc__)))
