"""Codebooks that are constructed, set, loaded and saved."""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from vq_kernels.cosine import unit
from vq_kernels.gradient.autograd import METRICS, Metric
from vq_kernels.learning.recompute import NUM_SAMPLES
from vq_kernels.modules.training_step import CodebookStep, flat
from vq_kernels.search.backend import BACKENDS, Backend, has_float64
from vq_kernels.search.validation import check_at_least, check_bool, check_choice, check_dtype


class Codebook(CodebookStep):
    """P codebooks of K codes of dimension D: the base class of the quantizers.

    Args:
        leading: the shape in front of [K, D]; P is its product.
        num_codes, code_dim, init_scale, restart_noise, ema_eps, synchronise, backend: as for `VectorQuantizer`.
        init: as there; or "kaiming_uniform", as vector_quantize_pytorch.
        kmeans_iters: iterations of k-means.
        restart_after: steps without use after which `_reset_unused` resets a code, see `VectorQuantizer`; 0 disables
            this.
        min_cluster_size: average number of rows below which `CompatCodebook` resets a code; 0 disables this.
        metric: "cosine" normalises the means of rows.
        learnable: whether the codes are a Parameter or a buffer.
        follows_means: whether the codes are set to the means of their rows.
        ema_decay: λ of the moving averages, see `VectorQuantizer`, or None for no averages.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """

    size_names: ClassVar[tuple[str, ...]]
    """The arguments that give the sizes of `codebook`, the last ones if it has fewer dimensions."""

    _set_size: float = -1
    """The average number of rows of codes that were set; negative: that of their first batch."""

    def __init__(
        self,
        leading: tuple[int, ...],
        num_codes: int,
        code_dim: int,
        *,
        init: Literal["normal", "uniform", "data", "kaiming_uniform", "kmeans"] | Tensor,
        init_scale: float = 1.0,
        kmeans_iters: int = 10,
        restart_after: int | Literal["auto"] = 0,
        restart_noise: float = 0.0,
        min_cluster_size: float = 0.0,
        metric: Metric = "euclidean",
        learnable: bool,
        follows_means: bool,
        ema_decay: float | Literal["auto"] | None,
        ema_eps: float,
        synchronise: bool,
        backend: Backend,
    ) -> None:
        super().__init__()
        check_at_least(1, integer=True, num_codes=num_codes, code_dim=code_dim)
        check_at_least(0, init_scale=init_scale, restart_noise=restart_noise, ema_eps=ema_eps)
        check_at_least(0, integer=True, others=("auto",), restart_after=restart_after)
        check_at_least(0, 1, others=("auto", None), ema_decay=ema_decay)
        check_bool(synchronise=synchronise)
        check_choice("metric", metric, METRICS)
        check_choice("backend", backend, BACKENDS)
        self.num_codes = num_codes
        self.code_dim = code_dim
        self.init = "codes" if isinstance(init, Tensor) else init
        self.kmeans_iters = kmeans_iters
        self.restart_after = restart_after
        self.restart_noise = restart_noise
        self.min_cluster_size = min_cluster_size
        self.metric: Metric = metric
        self.learnable = learnable
        self.follows_means = follows_means
        self.ema_decay = ema_decay
        self.ema_eps = ema_eps
        self.synchronise = synchronise
        self.backend: Backend = backend
        self._drawn = [False] * math.prod(leading)  # see `_draws`

        codes = self._initial_codes((*leading, num_codes, code_dim), init_scale)
        if learnable:
            self.register_parameter(self.state_names[0], nn.Parameter(codes))
        else:
            self.register_buffer(self.state_names[0], codes)
        if ema_decay is not None:
            wide = torch.promote_types(codes.dtype, torch.float32)
            self.register_buffer(self.state_names[1], torch.ones(*leading, num_codes, dtype=wide))
            self.register_buffer(self.state_names[2], codes.to(wide, copy=True))
        changes_after_search = follows_means or min_cluster_size > 0
        searched = flat(codes.clone(), 2) if changes_after_search else None
        self.register_buffer("searched_codebook", searched, persistent=False)
        samples = torch.zeros(math.prod(leading), NUM_SAMPLES, code_dim)
        self.register_buffer("searched_rows", samples, persistent=False)
        self._register_counts((*leading, num_codes))
        if isinstance(init, Tensor):
            self._set_all(init, "init", codes.shape)

    def _initial_codes(self, shape: tuple[int, ...], scale: float) -> Tensor:
        codes = torch.zeros(shape)
        if self.init == "kaiming_uniform":
            nn.init.kaiming_uniform_(codes)
            return unit(codes) if self.metric == "cosine" else codes
        if self.init in ("kmeans", "codes"):
            return codes
        return codes.uniform_(-scale, scale) if self.init == "uniform" else scale * codes.normal_()

    def _register_counts(self, shape: tuple[int, ...]) -> None:
        for name in ("steps_unused", "batch_counts", "usage_counts"):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("restarts", torch.zeros((), dtype=torch.int64))
        needed = float(self.init in ("data", "kmeans"))  # no bool, so that `AveragedModel` can average it
        self.register_buffer("needs_data", torch.full(shape[:-1], needed, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Converts or moves the module. The averages stay in float32, because half precision would lose small steps."""
        averages = {name: self._buffers[name] for name in self.state_names[1:] if name in self._buffers}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in averages.items():
            after = self._buffers[name]
            if after is not None and before is not None and after.dtype.itemsize < 4:
                self._buffers[name] = before.to(after.device)
        return self

    def set_codes(self, codes: Tensor) -> None:
        """Sets all codes. They count as just used, and are no longer initialised from data.

        With moving averages, each code gets the weight that batches such as the next training batch lead to, or that of
        40 rows if this is more. So batches of usual size move it by 1 - ema_decay of the way to the mean of its rows at
        most, and a first batch of few rows does not make it light. With the cosine as well, the codes are normalised.

        Args:
            codes: of the shape of `codebook`, finite, of any dtype of `nearest_code`, on any device.

        Raises:
            TypeError, ValueError: codes do not fit.
            RuntimeError: `codebook` is sharded or has a parametrization.
        """
        self._set_all(codes, "codes", getattr(self, self.state_names[0]).shape)

    @torch.no_grad()
    def _set_all(self, codes: Tensor, name: str, shape: torch.Size) -> None:
        """Does the work of `set_codes`; `name` and `shape` are those of the user's argument."""
        self._check_owned()
        check_dtype(name, codes)
        if codes.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(codes.shape)}")
        own = self._codes
        codes = codes.to(own.dtype)
        if not codes.isfinite().all():
            raise ValueError(f"{name} must be finite in {own.dtype}, got {(~codes.isfinite()).sum()} NaN or Inf")
        codes = (codes if self.learnable else self._normalise(codes)).to(own.device)
        for p, each in enumerate(codes.reshape(own.shape)):
            self._set_codes(p, torch.ones((), dtype=torch.bool, device=own.device), each, self._set_size)
        self._end_wait()

    def _end_wait(self) -> None:
        self.steps_unused.zero_()
        self.needs_data.zero_()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Loads the state, with errors that name the argument that differs. Missing averages are set from the codes.

        Only the caller knows whether it is strict, so the keys of averages explain themselves.
        """
        for name, buffer in self.named_buffers(recurse=False):
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and saved.dtype == torch.bool:  # an older one, or vector_quantize_pytorch's
                state_dict[prefix + name] = saved.to(buffer.dtype)
        codes, sizes, _ = (state_dict.get(prefix + name) for name in self.state_names)
        if (
            codes is not None
            and others[0].get("assign_to_params_buffers")
            and getattr(self, self.state_names[0]).is_meta
        ):
            self._leave_meta(codes.device)
        own, names = getattr(self, self.state_names[0]), self.size_names
        codes_alone = "needs_data" in self._buffers and prefix + "needs_data" not in state_dict
        without_averages = sizes is None and self.ema_decay is not None
        if codes is not None and (codes_alone or without_averages) and codes.shape == own.shape:
            self._set_all(codes, "codes", own.shape)
        super()._load_from_state_dict(state_dict, prefix, *others)
        *keys, errors = others[-3:]
        if codes is not None and codes.dim() != own.dim():
            errors.append(f"this state dict was saved with other {' or '.join(names[:-2])}: codes {tuple(codes.shape)}")
        elif codes is not None:
            for name, theirs, ours in zip(names[-own.dim() :], codes.shape, own.shape, strict=True):
                if theirs != ours:
                    errors.append(f"this state dict was saved with {name}={theirs}; the module has {name}={ours}")
        missing = {
            self.state_names[1]: "without ema_decay; construct the module with ema_decay=None",
            "needs_data": "without it; to load codes alone, use set_codes or from_codebook",
        }
        unexpected = {self.state_names[1]: "with ema_decay; construct it so too"}
        for found, reasons in zip(keys, (missing, unexpected), strict=True):
            explained = {prefix + name: _Explained(prefix + name, reason) for name, reason in reasons.items()}
            found[:] = [explained.get(key, key) for key in found]

    def _leave_meta(self, device: torch.device) -> None:
        """Makes on `device` what a state dict that is assigned may lack. It counts nothing yet."""
        for name, buffer in list(self.named_buffers(recurse=False)):
            if buffer.is_meta:
                setattr(self, name, torch.zeros_like(buffer, device=device))
        codes = getattr(self, self.state_names[0])
        if codes.is_meta:
            setattr(
                self, self.state_names[0], nn.Parameter(torch.zeros_like(codes, device=device), codes.requires_grad)
            )

    @property
    def perplexity(self) -> Tensor:
        """[...] float64: the perplexity of `usage_counts` for each codebook, from 1 to K; 0 before any use."""
        return perplexity(self.usage_counts)

    @property
    def codes_used(self) -> Tensor:
        """[...] int64: the number of codes with a count in `usage_counts`, for each codebook."""
        return (self.usage_counts > 0).sum(dim=-1)

    @torch.no_grad()
    def reset_usage(self) -> None:
        """Sets `usage_counts` and `restarts` to 0, for example at the start of an epoch."""
        self.usage_counts.zero_()
        self.restarts.zero_()


def perplexity(counts: Tensor) -> Tensor:
    """Returns exp(entropy) of how often each code was chosen, [...] float64, for counts [..., K]; 0 if all are 0.

    On a device without float64 it is computed on the CPU and returned in float32.
    """
    if not has_float64(counts.device):
        return perplexity(counts.cpu()).to(counts.device, torch.float32)
    total = counts.sum(dim=-1)
    entropy: Tensor = torch.special.entr(counts.double() / total.clamp(min=1)[..., None]).sum(dim=-1)
    return entropy.exp() * (total > 0)


class _Explained(str):
    """A key of a state dict, which an error message shows with the reason why it is missing or unexpected."""

    reason: str

    def __new__(cls, key: str, reason: str) -> Self:
        """Returns the key, equal to a plain one."""
        explained = super().__new__(cls, key)
        explained.reason = reason
        return explained

    def __format__(self, spec: str) -> str:
        return f"{super().__format__(spec)} (this state dict was saved {self.reason})"
