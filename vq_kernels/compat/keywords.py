"""The keywords of vector_quantize_pytorch.VectorQuantize 1.32.0 that are not supported here."""

from collections.abc import Mapping
from typing import Any

_SAMPLING = "codes are not sampled, because the search does not store the distance to each code"
_OPTIMIZER = "pass `parameters()` to your own optimizer"
_AFFINE = "there is no affine reparametrisation"

Unsupported = Mapping[str, tuple[tuple[Any, ...], str]]

AT_CONSTRUCTION: Unsupported = {
    "commitment_use_cross_entropy_loss": ((False,), "pass the indices of a first call as `indices=` to a second one"),
    "codebook_diversity_loss_weight": ((0.0,), "it needs the distance from each row to each code, which is not stored"),
    "stochastic_sample_codes": ((False,), _SAMPLING),
    "straight_through": ((False,), f"{_SAMPLING}; rotation_trick=False passes the gradient straight through"),
    "in_place_codebook_optimizer": ((None,), _OPTIMIZER),
    "affine_param": ((False,), _AFFINE),
    "sync_update_v": ((0.0,), "there is no synchronous update rule"),
}
"""Not supported at construction: the values accepted, the default first, and the reason or an alternative."""

WITHOUT_EFFECT = frozenset(
    {
        "codebook_diversity_temperature",
        "sample_codebook_temp",
        "sync_affine_param",
        "affine_param_batch_decay",
        "affine_param_codebook_decay",
        "manual_in_place_optimizer_update",
    }
)
"""Keywords of options that are not supported. Without these they change nothing, so any value is accepted."""

IN_A_CALL: Unsupported = {
    "codebook_transform_fn": ((None,), "codes are searched without a transform"),
}
"""The same for the keywords of a call."""

RESIDUAL: Unsupported = {
    "implicit_neural_codebook": ((False,), "each vector would have a codebook of its own"),
    "beam_size": ((None, 1), "each stage chooses the nearest code"),
    "eval_beam_size": ((None, 1), "each stage chooses the nearest code"),
    "indices": ((None,), "in vector_quantize_pytorch it raises too"),
}
"""The same for `ResidualVQ` and `GroupedResidualVQ`, and their calls."""

RESIDUAL_WITHOUT_EFFECT = frozenset({"mlp_kwargs", "beam_score_quantizer_weights"})
"""The same for `ResidualVQ` and `GroupedResidualVQ`."""


def refuse_unsupported(
    given: Mapping[str, Any], unsupported: Unsupported, without_effect: frozenset[str] = frozenset()
) -> None:
    """Checks the keywords that a function does not name.

    Raises:
        TypeError: vector_quantize_pytorch has no such keyword.
        NotImplementedError: an unsupported keyword has another value than those accepted.
    """
    for name, value in given.items():
        if name in without_effect:
            continue
        if name not in unsupported:
            raise TypeError(f"VectorQuantize has no argument {name!r}")
        accepted, instead = unsupported[name]
        if value not in accepted:
            listed = " or ".join(map(repr, accepted))
            raise NotImplementedError(f"{name} is not supported; it must be {listed}, got {value!r}: {instead}")
