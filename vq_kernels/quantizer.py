"""The quantizer as a module: a learnable codebook, its initialisation, its restarts, its usage."""

from typing import Literal

import torch
from torch import Tensor, nn

from vq_kernels.quantize import Quantized, vector_quantize
from vq_kernels.search.backend import BACKENDS, Backend
from vq_kernels.search.checks import check_choice

INITS = ("normal", "uniform", "data")


class VectorQuantizer(nn.Module):
    """Replaces each vector by its nearest code; the codebook learns by the gradient of the loss.

    Example, with num_codes=512 and code_dim=64: x [8, 16, 16, 64] gives quantized [8, 16, 16, 64], indices
    [8, 16, 16] and a loss to add to the model's own. Gradients are those of `vector_quantize`.

    Args:
        num_codes: K >= 1.
        code_dim: D >= 1.
        init: how the codebook begins: "normal", N(0, init_scale²); "uniform", in ±init_scale; "data", rows of the first
            training batch, evenly spaced from a random start.
        init_scale: >= 0, see `init`; with "data", unused.
        restart_after: a code that no row has chosen in this many training steps is put where a random row of the batch
            is, before the next search; 0: never. Counted in steps since its last use, so that it means the same at
            every batch size.
        restart_noise: standard deviation added to a restarted code, relative to the row's root mean square. It keeps
            codes apart where more of them restart than there are rows.
        commitment_weight: see `vector_quantize`; the specification has none.
        backend: see `nearest_code`.

    Attributes:
        codebook: [K, D], a Parameter.
        steps_unused: [K] int64, training steps since each code was last chosen.
        batch_counts: [K] int64, the rows of the last training batch that chose each code.
        usage_counts: [K] int64, rows that chose each code in training since `reset_usage`.
        restarts: [] int64, codes restarted since `reset_usage`.
        needs_data: [] bool, whether the codebook still waits for the first batch of init="data".

    Raises:
        ValueError: an argument outside of its range.

    Source: van den Oord et al. 2017, arXiv:1711.00937; restarts: Zeghidour et al. 2021, arXiv:2107.03312, section 3.3.
    """

    codebook: nn.Parameter
    steps_unused: Tensor
    batch_counts: Tensor
    usage_counts: Tensor
    restarts: Tensor
    needs_data: Tensor

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        init: Literal["normal", "uniform", "data"] = "normal",
        init_scale: float = 1.0,
        restart_after: int = 0,
        restart_noise: float = 0.01,
        commitment_weight: float = 0.0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_codes", num_codes, 1),
            ("code_dim", code_dim, 1),
            ("init_scale", init_scale, 0),
            ("restart_after", restart_after, 0),
            ("restart_noise", restart_noise, 0),
            ("commitment_weight", commitment_weight, 0),
        ):
            if not value >= least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        check_choice("init", init, INITS)
        check_choice("backend", backend, BACKENDS)
        self.num_codes = num_codes
        self.code_dim = code_dim
        self.init = init
        self.restart_after = restart_after
        self.restart_noise = restart_noise
        self.commitment_weight = commitment_weight
        self.backend: Backend = backend
        if init == "uniform":
            codes = torch.empty(num_codes, code_dim).uniform_(-init_scale, init_scale)
        else:
            codes = init_scale * torch.randn(num_codes, code_dim)
        self.codebook = nn.Parameter(codes)
        for name in ("steps_unused", "batch_counts", "usage_counts"):
            self.register_buffer(name, torch.zeros(num_codes, dtype=torch.int64))
        self.register_buffer("restarts", torch.zeros((), dtype=torch.int64))
        self.register_buffer("needs_data", torch.tensor(init == "data"))

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        sizes = f"num_codes={self.num_codes}, code_dim={self.code_dim}"
        return f"{sizes}, init={self.init!r}, restart_after={self.restart_after}"

    def forward(self, x: Tensor) -> Quantized:
        """Quantize x [..., D].

        In training mode it also restarts codes and keeps the usage statistics.

        Returns:
            Quantized(quantized [..., D] in x's dtype, indices [...] int64, loss []).

        Raises:
            TypeError, ValueError, RuntimeError: as for `vector_quantize`.
        """
        if self.training and x.numel() and (self.restart_after or self.init == "data"):
            self._restart(x.detach().reshape(-1, x.shape[-1]))
        result = vector_quantize(x, self.codebook, commitment_weight=self.commitment_weight, backend=self.backend)
        if self.training:
            self._count(result.indices.reshape(-1))
        return result

    @torch.no_grad()
    def _restart(self, x: Tensor) -> None:
        """Put the codes that are due at rows of x [N, D]. Written without a branch on data, for compiled graphs."""
        due = self.needs_data.expand(self.num_codes)  # [K]
        if self.restart_after:
            due = due | (self.steps_unused >= self.restart_after)
        rank = due.cumsum(0) - 1
        start = torch.randint(x.shape[0], (), device=x.device)
        rows = (start + rank * x.shape[0] // due.sum().clamp(min=1)) % x.shape[0]  # spread evenly, and distinct
        targets = x[rows].to(self.codebook.dtype)  # [K, D]
        spread = self.restart_noise * targets.square().mean(dim=1, keepdim=True).sqrt()
        targets = targets + spread * torch.randn_like(targets)
        due = due & targets.isfinite().all(dim=1)
        self.codebook.copy_(torch.where(due[:, None], targets, self.codebook))
        self.restarts += torch.where(self.needs_data, 0, due.sum())
        self.steps_unused.masked_fill_(due, 0)
        self.needs_data.fill_(False)

    @torch.no_grad()
    def _count(self, indices: Tensor) -> None:
        self.batch_counts.zero_().index_add_(0, indices, torch.ones_like(indices))
        self.usage_counts += self.batch_counts
        self.steps_unused += 1
        self.steps_unused.masked_fill_(self.batch_counts > 0, 0)

    @property
    def perplexity(self) -> Tensor:
        """[] float64: exp of the entropy of `usage_counts`; 1 to K, and 0 before any use."""
        return perplexity(self.usage_counts)

    @property
    def codes_used(self) -> Tensor:
        """[] int64: how many codes `usage_counts` has seen chosen."""
        return (self.usage_counts > 0).sum()

    @torch.no_grad()
    def reset_usage(self) -> None:
        """Begin `usage_counts` and `restarts` anew, at an epoch's start, say."""
        self.usage_counts.zero_()
        self.restarts.zero_()


def perplexity(counts: Tensor) -> Tensor:
    """exp(entropy), [] float64, of how often each code was chosen, counts [K]; 0 where all counts are."""
    share = counts.double() / counts.sum().clamp(min=1)
    entropy: Tensor = torch.special.entr(share).sum()
    return entropy.exp() * (counts.sum() > 0)
