"""Checks of keywords: those of vector_quantize_pytorch.VectorQuantize 1.32.0 without a meaning here, and ranges."""

from collections.abc import Mapping
from typing import Any

_SAMPLING = "codes are not sampled: the search is exact, and never stores a distance to each code"
_REGULARISER = "add the regulariser of the codebook to your own loss"
_OPTIMISER = "give `parameters()` to an optimizer of your own"
_AFFINE = "the affine reparametrisation is not there"
_DIVEQ = "noise on the direction is not there; rotation_trick=True is the default"

AT_CONSTRUCTION: dict[str, tuple[Any, str]] = {
    "sync_kmeans": (True, "the ranks would begin with unlike codebooks"),
    "commitment_use_cross_entropy_loss": (False, "pass the indices of a first call as `indices=` to a second one"),
    "orthogonal_reg_weight": (0.0, _REGULARISER),
    "orthogonal_reg_active_codes_only": (False, _REGULARISER),
    "orthogonal_reg_max_codes": (None, _REGULARISER),
    "codebook_diversity_loss_weight": (0.0, "it needs a distance from each row to each code, which is never stored"),
    "codebook_diversity_temperature": (100.0, "it needs a distance from each row to each code, which is never stored"),
    "stochastic_sample_codes": (False, _SAMPLING),
    "sample_codebook_temp": (1.0, _SAMPLING),
    "straight_through": (False, f"{_SAMPLING}; rotation_trick=False passes the gradient straight through"),
    "directional_reparam": (False, _DIVEQ),
    "directional_reparam_variance": (5e-3, _DIVEQ),
    "sync_affine_param": (False, _AFFINE),
    "vq_bridge": (None, "a network before the codebook is not there"),
    "manual_ema_update": (False, "the averages move with each training batch; freeze_codebook=True keeps them"),
    "in_place_codebook_optimizer": (None, _OPTIMISER),
    "manual_in_place_optimizer_update": (False, _OPTIMISER),
    "affine_param": (False, _AFFINE),
    "affine_param_batch_decay": (0.99, _AFFINE),
    "affine_param_codebook_decay": (0.9, _AFFINE),
    "sync_update_v": (0.0, "the synchronous update rule is not there"),
    "route_gradients_to_input": (True, "detach x instead"),
}
"""What is not supported at construction: the default there, the one value that is accepted, and a way without."""

IN_A_CALL: dict[str, tuple[Any, str]] = {
    "topk": (None, "each vector gets its nearest code alone"),
    "sample_codebook_temp": (None, _SAMPLING),
    "codebook_transform_fn": (None, "codes are searched as they are"),
    "ema_update_weight": (None, "all codes move by the same decay"),
    "accum_ema_update": (False, "the averages move with each training batch"),
    "ema_update": (None, "choose at construction, or pass freeze_codebook=True"),
}
"""The same, for the keywords of a call."""


def refuse_unsupported(given: Mapping[str, Any], unsupported: Mapping[str, tuple[Any, str]]) -> None:
    """Raise for a keyword that would change nothing.

    Raises:
        TypeError: a keyword that is not there, either.
        NotImplementedError: one that is there and not here, at another value than its default.
    """
    for name, value in given.items():
        if name not in unsupported:
            raise TypeError(f"VectorQuantize has no argument {name!r}")
        default, instead = unsupported[name]
        if value is not default and value != default:
            raise NotImplementedError(f"{name} is not supported but as {default!r}, got {value!r}: {instead}")
