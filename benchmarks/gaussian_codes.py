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
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import the packages from the checkout

import torch
import tyro
from torch import Tensor, nn
from tqdm import trange

from benchmarks.results import append_row, environment, is_finished
from vq_kernels import VectorQuantizer, nearest_code, vector_quantize

MEAN = 2.0
EVALUATED = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 1500, 2000)


class Learner(nn.Module):
    """Learns codes [K, D], which begin as N(0, I), by SGD with momentum on the codebook loss, summed over D."""

    def __init__(self, num_codes: int, code_dim: int, lr: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_codes, code_dim))
        self.optimizer = torch.optim.SGD(self.trained(), lr=lr, momentum=0.9)

    def trained(self) -> list[nn.Parameter]:
        """The parameters that the optimizer trains."""
        return [self.weight]

    def codes(self) -> Tensor:
        """The codes [K, D] that are searched."""
        return self.weight

    def learn(self, x: Tensor) -> None:
        """Takes a step on rows [N, D]."""
        found = vector_quantize(x, self.codes())
        self.optimizer.zero_grad()
        torch.autograd.backward(found.loss * x.shape[1])
        self.optimizer.step()


class SimVQ(Learner):
    """Learns one linear map of codes that stay as they are (Zhu et al. 2024, arXiv:2411.02038)."""

    def __init__(self, num_codes: int, code_dim: int) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.randn(num_codes, code_dim), requires_grad=False)
        self.map = nn.Linear(code_dim, code_dim)
        self.optimizer = torch.optim.SGD(self.map.parameters(), lr=0.02, momentum=0.9)

    def codes(self) -> Tensor:
        """The mapped codes [K, D]."""
        mapped: Tensor = self.map(self.weight)
        return mapped


class CVQ(Learner):
    """Moves codes that are rarely used towards the row nearest to each (Zheng and Vedaldi 2023, arXiv:2307.15139)."""

    def __init__(self, num_codes: int, code_dim: int, decay: float = 0.9) -> None:
        super().__init__(num_codes, code_dim, lr=3.0)
        self.decay = decay
        self.use = torch.zeros(num_codes)  # the average share of the rows

    def learn(self, x: Tensor) -> None:
        """Takes a step by the gradient, then moves the codes to their anchors."""
        super().learn(x)
        codes = self.weight.data
        counts = torch.bincount(nearest_code(x, codes).indices, minlength=len(codes))
        self.use.lerp_(counts / len(x), 1 - self.decay)
        share = torch.exp(-self.use * len(codes) * 10 / (1 - self.decay) - 1e-3)[:, None]
        codes.lerp_(x[nearest_code(codes, x).indices], share)


class Quantizer(Learner):
    """Learns by a `VectorQuantizer` with these arguments."""

    def __init__(self, num_codes: int, code_dim: int, **arguments: Any) -> None:
        nn.Module.__init__(self)
        self.quantizer = VectorQuantizer(num_codes, code_dim, **arguments)

    def codes(self) -> Tensor:
        """The codebook [K, D]."""
        return self.quantizer.codebook

    def learn(self, x: Tensor) -> None:
        """Updates the averages of the quantizer."""
        self.quantizer(x)


def averages(num_codes: int, code_dim: int) -> Learner:
    """Moving averages alone, with the decay of the published setting."""
    return Quantizer(num_codes, code_dim, init="normal", ema_decay=0.9, restart_after=0, warn=False)


METHODS: dict[str, Callable[[int, int], Learner]] = {
    "VectorQuantizer(K, D)": Quantizer,
    "VQ, SGD": Learner,
    "EMA": averages,
    "SimVQ": SimVQ,
    "CVQ": CVQ,
}


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
            learner = METHODS[method](options.num_codes, options.code_dim)
            for step in trange(1, options.steps + 1, desc=method, disable=None):
                learner.learn(torch.randn(options.num_rows, options.code_dim) + MEAN)
                if step in EVALUATED or step == options.steps:
                    with torch.no_grad():
                        figures = evaluate(learner.codes(), options)
                    print(f"{method:21} step {step:4}  error {figures['error']:.4f}  use {figures['use']:.1%}")
                    if options.out is not None:
                        row = {**name, "step": step, **figures, "settings": settings}
                        append_row(options.out, {**row, **environment(torch.device("cpu"))})


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python benchmarks/gaussian_codes.py", description=__doc__))
