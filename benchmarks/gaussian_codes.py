"""Trains a codebook on Gaussian rows, by several methods, and measures its error and use on fresh rows.

    python benchmarks/gaussian_codes.py --out FILE
    python benchmarks/gaussian_codes.py --methods EMA SimVQ --steps 300 --out FILE

This is the setting of Fang et al. 2025, arXiv:2506.15078, whose published results are in benchmarks/tables/learning.py:
every step sees 50,000 new rows of N(2, I) with D = 8, and K = 16,384. Error and use are defined as there, on 200,000
new rows: the squared distance to the nearest code, summed over D, and the share of the codes that rows chose.

There is no encoder and no decoder. The rotation trick then changes nothing, because it changes only the gradient of
the encoder. Nor does DiVeQ, whose output is as far from a row as the nearest code, so that its error has the gradient
of the codebook loss. Both are the method "VQ, SGD".

A row is appended to FILE for each evaluation. A finished method is not repeated.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import the packages from the checkout

import torch
import tyro
from torch import Tensor, nn
from tqdm import trange

from benchmarks.results import append_row, environment, is_finished
from vq_kernels import Quantized, VectorQuantizer, nearest_code, vector_quantize

MEAN = 2.0
EVALUATED = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 1500, 2000)


class SimVQ(nn.Module):
    """Learns one linear map of random codes [K, D], which stay as they are (Zhu et al. 2024, arXiv:2411.02038)."""

    def __init__(self, num_codes: int, code_dim: int) -> None:
        super().__init__()
        self.register_buffer("random", torch.randn(num_codes, code_dim))
        self.map = nn.Linear(code_dim, code_dim)

    @property
    def codebook(self) -> Tensor:
        """The mapped codes [K, D]."""
        mapped: Tensor = self.map(self.random)
        return mapped

    def forward(self, x: Tensor) -> Quantized:
        """Quantizes x [..., D]."""
        return vector_quantize(x, self.codebook)


class CVQ(nn.Module):
    """Moves codes that are rarely used towards the row nearest to each (Zheng and Vedaldi 2023, arXiv:2307.15139)."""

    use: Tensor

    def __init__(self, num_codes: int, code_dim: int, *, decay: float = 0.9, commitment_weight: float = 0.0) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(num_codes, code_dim))
        self.register_buffer("use", torch.zeros(num_codes))  # the average share of the rows
        self.decay = decay
        self.commitment_weight = commitment_weight

    def forward(self, x: Tensor) -> Quantized:
        """Quantizes x [..., D]; in training mode, then moves the codes."""
        found = vector_quantize(x, self.codebook.clone(), commitment_weight=self.commitment_weight)
        if self.training:
            self._move(x.detach().reshape(-1, x.shape[-1]), found.indices.flatten())
        return found

    @torch.no_grad()
    def _move(self, rows: Tensor, indices: Tensor) -> None:
        num_codes = len(self.codebook)
        self.use.lerp_(torch.bincount(indices, minlength=num_codes) / len(rows), 1 - self.decay)
        share = torch.exp(-self.use * num_codes * 10 / (1 - self.decay) - 1e-3)[:, None]
        self.codebook.lerp_(rows[nearest_code(self.codebook, rows).indices], share)


_FIXED: dict[str, Any] = {"init": "normal", "restart_after": 0, "commitment_weight": 0.0, "warn": False}
METHODS: dict[str, tuple[Callable[[int, int], nn.Module], float | None]] = {  # and SGD's learning rate, as published
    "VectorQuantizer(K, D)": (VectorQuantizer, None),
    "VQ, SGD": (partial(VectorQuantizer, ema_decay=None, **_FIXED), 1.0),
    "EMA": (partial(VectorQuantizer, ema_decay=0.9, **_FIXED), None),
    "SimVQ": (SimVQ, 0.02),
    "CVQ": (CVQ, 3.0),
}


def train_step(quantizer: nn.Module, optimizer: torch.optim.Optimizer | None, x: Tensor) -> None:
    """Learns from rows [N, D]. The loss of the optimizer is summed over D."""
    loss = quantizer(x).loss
    if optimizer is not None:
        optimizer.zero_grad()
        torch.autograd.backward(loss * x.shape[-1])
        optimizer.step()


@dataclass(frozen=True)
class Options:
    """Train codebooks on Gaussian rows."""

    methods: tuple[str, ...] = tuple(METHODS)
    """Methods to run."""
    seeds: tuple[int, ...] = (0,)
    """Every method is run with each seed."""
    steps: int = 2000
    """Training steps. Codes are evaluated after 1, 2, 5, 10, 20, 50 and so on, and after the last one."""
    num_codes: int = 16_384
    """K."""
    code_dim: int = 8
    """D."""
    num_rows: int = 50_000
    """Rows of a step."""
    num_evaluated: int = 200_000
    """Rows of an evaluation."""
    out: Path | None = None
    """Append the rows to this file."""


def evaluate(codes: Tensor, options: Options) -> dict[str, float]:
    """The error, summed over D, and the share of the codes that fresh rows choose."""
    x = torch.randn(options.num_evaluated, options.code_dim) + MEAN
    found = nearest_code(x, codes)
    chosen = torch.bincount(found.indices, minlength=options.num_codes) > 0
    return {"error": found.sq_distances.mean().item(), "use": chosen.float().mean().item()}


def main(options: Options) -> None:
    """Runs each method, and prints and appends a row for each evaluation."""
    unknown = [name for name in options.methods if name not in METHODS]
    if unknown:
        raise SystemExit(f"--methods must be of {', '.join(METHODS)}, got {unknown[0]}")
    settings = {name: getattr(options, name) for name in ("num_codes", "code_dim", "num_rows", "num_evaluated")}
    for seed in options.seeds:
        for method in options.methods:
            name = {"method": method, "seed": seed}
            if options.out is not None and is_finished(options.out, {**name, "step": options.steps}, settings):
                continue
            torch.manual_seed(seed)
            make, lr = METHODS[method]
            quantizer = make(options.num_codes, options.code_dim)
            optimizer = None if lr is None else torch.optim.SGD(quantizer.parameters(), lr, momentum=0.9)
            for step in trange(1, options.steps + 1, desc=method, disable=None):
                train_step(quantizer, optimizer, torch.randn(options.num_rows, options.code_dim) + MEAN)
                if step in EVALUATED or step == options.steps:
                    with torch.no_grad():
                        figures = evaluate(cast(Tensor, quantizer.codebook), options)
                    print(f"{method:21} step {step:4}  error {figures['error']:.4f}  use {figures['use']:.1%}")
                    if options.out is not None:
                        row = {**name, "step": step, **figures, "settings": settings}
                        append_row(options.out, {**row, **environment(torch.device("cpu"))})


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python benchmarks/gaussian_codes.py", description=__doc__))
