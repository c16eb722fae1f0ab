"""Arguments that do not fit are refused by name, with the rule and the value, before anything is computed."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from vq_kernels import ResidualVectorQuantizer, VectorQuantizer, kmeans

ROWS = torch.zeros(4, 2)


def vector(**options: Any) -> Any:
    return VectorQuantizer(**{"num_codes": 4, "code_dim": 2} | options)


def residual(**options: Any) -> Any:
    return ResidualVectorQuantizer(**{"num_quantizers": 3, "num_codes": 4, "code_dim": 2} | options)


def cluster(**options: Any) -> Any:
    return kmeans(ROWS, **{"num_codes": 2} | options)


def from_codebook(**options: Any) -> Any:
    return VectorQuantizer.from_codebook(**{"codebook": ROWS} | options)


def decode(indices: Any) -> Any:
    return vector().decode(indices)


def topk(k: Any) -> Any:
    return vector(init="normal").topk(ROWS, k)


OF_EACH = (vector, residual)
INTEGERS: tuple[tuple[tuple[Callable[..., Any], ...], str, int, str], ...] = (
    (OF_EACH, "num_codes", 1, ">= 1"),
    (OF_EACH, "code_dim", 1, ">= 1"),
    (OF_EACH, "heads", 1, ">= 1"),
    (OF_EACH, "restart_after", 0, "'auto' or >= 0"),
    ((residual,), "num_quantizers", 1, ">= 1"),
    ((cluster,), "num_codes", 1, ">= 1"),
    ((cluster,), "max_iterations", 0, ">= 0"),
    ((cluster,), "seed", 0, f"in [0, {2**63 - 1}]"),
)
NUMBERS: tuple[tuple[tuple[Callable[..., Any], ...], str, str], ...] = (
    (OF_EACH, "init_scale", ">= 0"),
    (OF_EACH, "restart_noise", ">= 0"),
    (OF_EACH, "commitment_weight", ">= 0"),
    (OF_EACH, "ema_eps", ">= 0"),
    (OF_EACH, "ema_decay", "'auto' or None or in [0, 1]"),
    ((residual,), "quantizer_dropout", "in [0, 1]"),
    ((cluster,), "tolerance", ">= 0"),
)
BOOLS: tuple[tuple[tuple[Callable[..., Any], ...], str], ...] = (
    (OF_EACH, "separate_codebooks"),
    (OF_EACH, "freeze_codebook"),
    (OF_EACH, "warn"),
    (OF_EACH, "synchronise"),
    ((cluster,), "progress"),
    ((cluster,), "synchronise"),
    ((from_codebook,), "freeze"),
)
CASES: list[tuple[Callable[..., Any], str, Any, str]] = [
    *((make, name, least - 1, rule) for makes, name, least, rule in INTEGERS for make in makes),
    *((make, name, value, "integer") for makes, name, *_ in INTEGERS for make in makes for value in (4.0, True, "4")),
    *((make, "channel_dim", 1.5, "an integer") for make in OF_EACH),
    *((make, name, value, rule) for makes, name, rule in NUMBERS for make in makes for value in (-0.1, math.nan)),
    *((make, name, value, "a number") for makes, name, _ in NUMBERS for make in makes for value in (True, "1")),
    *((make, "ema_decay", 1.5, "in [0, 1]") for make in OF_EACH),
    (vector, "init_scale", math.inf, "finite"),
    *((make, name, value, "True or False") for makes, name in BOOLS for make in makes for value in (1, "no", None)),
    (vector, "metric", "dot", "one of euclidean, cosine"),
    (vector, "backend", "cuda", "one of auto, triton, llvm, torch"),
    (vector, "init", "zeros", "one of normal, uniform, data, kmeans"),
    (vector, "init", np.zeros((4, 2)), "one of normal, uniform, data, kmeans"),
    (cluster, "init", np.zeros((2, 2)), "one of k-means++, random"),
    (from_codebook, "codebook", np.zeros((4, 2)), "a tensor"),
    (from_codebook, "codebook", torch.full((4, 2), torch.nan), "finite in torch.float32"),
    (decode, "indices", [0, 1], "a tensor"),
    *((topk, "k", value, rule) for value, rule in ((0, "in [1, 4]"), (5, "in [1, 4]"), (1.5, "an integer"))),
]


@pytest.mark.parametrize(("make", "name", "value", "rule"), CASES)
def test_an_argument_that_does_not_fit_is_named(make: Any, name: str, value: Any, rule: str) -> None:
    with pytest.raises((TypeError, ValueError)) as raised:
        make(**{name: value})
    message = str(raised.value)
    assert message.startswith(f"{name} must be ")
    assert rule in message
    if isinstance(value, str | int | float):
        assert message.endswith(f"got {value!r}")


@pytest.mark.parametrize("name", ["num_codes", "code_dim", "init", "freeze_codebook"])
def test_what_from_codebook_sets_is_not_taken(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must not be given, because from_codebook sets it, got 4"):
        from_codebook(**{name: 4})


def test_numbers_of_numpy_fit() -> None:
    quantizer = vector(num_codes=np.int64(8), ema_decay=np.float32(0.5), restart_after=np.int64(3))
    quantizer(torch.randn(5, 2))
    assert quantizer.codebook.shape == (8, 2)
