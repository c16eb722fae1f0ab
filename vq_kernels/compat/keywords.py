"""The keywords of vector_quantize_pytorch.VectorQuantize 1.32.0 that are not supported here."""

from collections.abc import Mapping
from typing import Any

_SAMPLING = "codes are not sampled, because the search does not store the distance to each code"
_REGULARISER = "add a regulariser of the codebook to your own loss"
_OPTIMIZER = "pass `parameters()` to your own optimizer"
_AFFINE = "there is no affine reparametrisation"
_DIVEQ = "there is no directional noise; rotation_trick=True is the default"

AT_CONSTRUCTION: dict[str, tuple[Any, str]] = {
    "sync_kmeans": (True, "the ranks would start with different codebooks"),
    "commitment_use_cross_entropy_loss": (False, "pass the indices of a first call as `indices=` to a second one"),
    "orthogonal_reg_weight": (0.0, _REGULARISER),
    "orthogonal_reg_active_codes_only": (False, _REGULARISER),
    "orthogonal_reg_max_codes": (None, _REGULARISER),
    "codebook_diversity_loss_weight": (0.0, "it needs the distance from each row to each code, which is not stored"),
    "codebook_diversity_temperature": (100.0, "it needs the distance from each row to each code, which is not stored"),
    "stochastic_sample_codes": (False, _SAMPLING),
    "sample_codebook_temp": (1.0, _SAMPLING),
    "straight_through": (False, f"{_SAMPLING}; rotation_trick=False passes the gradient straight through"),
    "directional_reparam": (False, _DIVEQ),
    "directional_reparam_variance": (5e-3, _DIVEQ),
    "sync_affine_param": (False, _AFFINE),
    "vq_bridge": (None, "there is no network before the codebook"),
    "manual_ema_update": (False, "the averages are updated by each training batch; freeze_codebook=True keeps them"),
    "in_place_codebook_optimizer": (None, _OPTIMIZER),
    "manual_in_place_optimizer_update": (False, _OPTIMIZER),
    "affine_param": (False, _AFFINE),
    "affine_param_batch_decay": (0.99, _AFFINE),
    "affine_param_codebook_decay": (0.9, _AFFINE),
    "sync_update_v": (0.0, "there is no synchronous update rule"),
    "route_gradients_to_input": (True, "detach x instead"),
}
"""Not supported at construction: the default, which is the only value accepted, and the reason or an alternative."""

IN_A_CALL: dict[str, tuple[Any, str]] = {
    "topk": (None, "each vector gets only its nearest code"),
    "sample_codebook_temp": (None, _SAMPLING),
    "codebook_transform_fn": (None, "codes are searched without a transform"),
    "ema_update_weight": (None, "all codes have the same decay"),
    "accum_ema_update": (False, "the averages are updated by each training batch"),
    "ema_update": (None, "choose it at construction, or pass freeze_codebook=True"),
}
"""The same for the keywords of a call."""


def refuse_unsupported(given: Mapping[str, Any], unsupported: Mapping[str, tuple[Any, str]]) -> None:
    """Checks the keywords that a function does not name.

    Raises:
        TypeError: vector_quantize_pytorch has no such keyword.
        NotImplementedError: an unsupported keyword differs from its default.
    """
    for name, value in given.items():
        if name not in unsupported:
            raise TypeError(f"VectorQuantize has no argument {name!r}")
        default, instead = unsupported[name]
        if value is not default and value != default:
            raise NotImplementedError(f"{name} is not supported; it must be {default!r}, got {value!r}: {instead}")
