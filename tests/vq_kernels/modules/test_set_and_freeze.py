"""Codes that are set, frozen, loaded or initialised by k-means: what training may change of them, for every class."""

import copy
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.vq_kernels.plain import residual_quantizer, vector_quantizer
from vq_kernels import ResidualVectorQuantizer, VectorQuantize, VectorQuantizer, nearest_code
from vq_kernels.compat import GroupedResidualVQ, ResidualVQ

K, D = 12, 4
OWN = {"heads": 2, "separate_codebooks": True}
QUANTIZERS: dict[str, Callable[..., nn.Module]] = {
    "as it comes": lambda **o: VectorQuantizer(K, D, **o),
    "residual as it comes": lambda **o: ResidualVectorQuantizer(3, K, D, **o),
    "gradient": lambda **o: vector_quantizer(K, D, **o),
    "gradient, restarts": lambda **o: vector_quantizer(K, D, **{"restart_after": 1} | o),
    "averages": lambda **o: vector_quantizer(K, D, **{"ema_decay": 0.8} | o),
    "cosine averages": lambda **o: vector_quantizer(K, D, metric="cosine", **{"ema_decay": 0.8} | o),
    "data": lambda **o: vector_quantizer(K, D, **{"init": "data"} | o),
    "k-means": lambda **o: vector_quantizer(K, D, **{"init": "kmeans"} | o),
    "everything": lambda **o: vector_quantizer(K, D, **{"init": "data", "restart_after": 1, "ema_decay": 0.8} | o),
    "heads": lambda **o: vector_quantizer(K, D, **OWN, **{"init": "data", "restart_after": 1} | o),
    "residual": lambda **o: residual_quantizer(3, K, D, **{"init": "data", "restart_after": 1} | o),
    "residual averages, heads": lambda **o: residual_quantizer(
        3, K, D, **OWN, **{"init": "kmeans", "restart_after": 1, "ema_decay": 0.8} | o
    ),
}
DROP_INS: dict[str, Callable[..., nn.Module]] = {
    "drop-in": lambda **o: VectorQuantize(D, K, kmeans_init=True, threshold_ema_dead_code=2, **o),
    "drop-in, heads, cosine": lambda **o: VectorQuantize(
        2 * D,
        K,
        heads=2,
        separate_codebook_per_head=True,
        codebook_dim=D,
        kmeans_init=True,
        use_cosine_sim=True,
        threshold_ema_dead_code=2,
        **o,
    ),
    "drop-in, learnable": lambda **o: VectorQuantize(
        D, K, kmeans_init=True, learnable_codebook=True, ema_update=False, threshold_ema_dead_code=2, **o
    ),
}
MODULES = QUANTIZERS | DROP_INS
every_module = pytest.mark.parametrize("name", MODULES)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes_for(module: Any) -> Tensor:
    """Codes far from the rows, and one near them."""
    codes = draw(*module.codebook.shape, seed=1) - 20
    codes[..., 0, :] = 0.1
    return codes


def train(module: Any, num_steps: int = 10, optimizer: Any = None, set_to_none: bool = True) -> None:
    """Trains by an optimizer whose weight decay also moves a parameter with a zero gradient."""
    channels = D * module.heads
    before = nn.Linear(channels, channels)
    optimizer = optimizer or torch.optim.AdamW([*before.parameters(), *module.parameters()], lr=0.1, weight_decay=0.1)
    for step in range(num_steps):
        quantized, _, loss = module(before(draw(40, channels, seed=10 + step)))
        optimizer.zero_grad(set_to_none=set_to_none)
        (quantized.square().mean() + loss).backward()
        optimizer.step()


@every_module
def test_codes_that_were_set_and_frozen_stay_bit_equal(name: str) -> None:
    module: Any = MODULES[name](freeze_codebook=True)
    module.set_codes(codes_for(module))
    before = module.codebook.clone()
    train(module, set_to_none=False)
    assert torch.equal(module.codebook, before)
    if name in QUANTIZERS:
        assert module.usage_counts.sum() > 0
        assert not module.restarts
        assert not module.steps_unused.any()
        assert not module.decode(module(draw(5, module.heads * D)).indices).requires_grad


@every_module
@pytest.mark.parametrize("way", ["attribute", "module"])
def test_codes_can_be_frozen_and_freed_in_training(name: str, way: str) -> None:
    module: Any = MODULES[name]()
    module.set_codes(codes_for(module))
    optimizer = torch.optim.AdamW([*module.parameters(), nn.Parameter(torch.ones(1))], lr=0.1)
    train(module, 2, optimizer)
    if way == "attribute":
        module.freeze_codebook = True
    else:
        module.requires_grad_(False)
    before = module.codebook.detach().clone()
    train(module, 10, optimizer)
    assert torch.equal(module.codebook, before)
    if way == "attribute":
        module.requires_grad_(True)  # as for the discriminator's step of a GAN
        train(module, 1)
        assert torch.equal(module.codebook, before)
        module.freeze_codebook = False
    else:
        module.requires_grad_(True)
    train(module, 1)
    assert not torch.equal(module.codebook, before)


def residual_vq(**options: Any) -> nn.Module:
    return ResidualVQ(dim=D, num_quantizers=2, codebook_size=K, kmeans_init=True, **options)


@pytest.mark.parametrize(
    "construct",
    [
        residual_vq,
        lambda: residual_vq(shared_codebook=True, threshold_ema_dead_code=2),
        lambda: GroupedResidualVQ(dim=2 * D, groups=2, num_quantizers=2, codebook_size=K, threshold_ema_dead_code=2),
    ],
    ids=["residual", "shared", "grouped"],
)
def test_requires_grad_freezes_the_stages_of_a_drop_in(construct: Callable[[], nn.Module]) -> None:
    module: Any = construct()
    rows = draw(40, 2 * D if isinstance(module, GroupedResidualVQ) else D)
    module(rows)
    before = module.requires_grad_(False).codebooks.clone()
    for step in range(10):
        module.train()(rows + step)
    assert torch.equal(module.codebooks, before)
    module.requires_grad_(True)(rows + 1)
    assert not torch.equal(module.codebooks, before)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_requires_grad_leaves_codes_that_wait_for_data_as_they_are(name: str) -> None:
    module: Any = QUANTIZERS[name](warn=False).requires_grad_(False)
    before = {key: value.clone() for key, value in module.state_dict().items() if "counts" not in key}
    train(module)
    assert all(torch.equal(module.state_dict()[key], value) for key, value in before.items())
    assert copy.deepcopy(module).freeze_codebook
    module.freeze_codebook = False
    train(module, 1)
    assert not torch.equal(module.codebook, before["codebook"])


@pytest.mark.parametrize("ema_decay", [0.8, None])
def test_requires_grad_of_a_parent_reaches_parameters_alone(ema_decay: float | None) -> None:
    module = vector_quantizer(K, D, ema_decay=ema_decay)
    nn.Sequential(module).requires_grad_(False)
    assert module.freeze_codebook == (ema_decay is None)


@every_module
def test_codes_that_were_set_move_by_one_step(name: str) -> None:
    """No first batch, no old average and no reset replaces them: those without rows stay."""
    torch.manual_seed(0)
    module: Any = MODULES[name]()
    train(module, 3, torch.optim.SGD(module.parameters(), lr=0.1) if list(module.parameters()) else None)
    module.set_codes(codes_for(module))
    before = module.codebook.detach().clone()
    rows = 0.1 + 0.01 * draw(40, D * module.heads, seed=3)
    module(rows)
    after = module.codebook.detach()
    torch.testing.assert_close(after[..., 1:, :], before[..., 1:, :], rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() < 0.2
    if name in QUANTIZERS:
        assert not module.needs_data.any()


@pytest.mark.parametrize("way", ["set_codes", "fit", "from_codebook", "load_state_dict"])
def test_averages_move_codes_that_were_set_by_a_small_step(way: str) -> None:
    """By about 1 - λ of the way to the mean of their rows: as if averages had led there."""
    x = draw(300, D)
    quantizer = vector_quantizer(K, D, ema_decay=0.9)
    quantizer(x)
    if way == "fit":
        quantizer.fit(x, max_iterations=1)
    elif way == "from_codebook":
        quantizer = VectorQuantizer.from_codebook(x[:K], ema_decay=0.9, restart_after=0)
    elif way == "load_state_dict":
        quantizer.load_state_dict({"codebook": x[:K]}, strict=False)
    else:
        quantizer.set_codes(x[:K])
    before = quantizer.codebook.clone()
    indices = quantizer(x[:200]).indices
    for code, old, new in zip(range(K), before, quantizer.codebook, strict=True):
        n = int((indices == code).sum())
        assert n > 0
        size = 200 * (n + 1) / (200 + K)
        share = 0.1 * n / (0.9 * size + 0.1 * n)
        assert 0.08 < share < 0.13
        expected = old + share * (x[:200][indices == code].mean(dim=0) - old)
        torch.testing.assert_close(new, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["set_codes", "fit", "from_codebook"])
@pytest.mark.parametrize("num_rows", [1, 3, 20])
@pytest.mark.parametrize(("ema_decay", "most"), [("auto", 0.25), (0.8, 0.5), (0.99, 0.5)])
def test_a_small_first_batch_does_not_make_set_codes_light(
    way: str, num_rows: int, ema_decay: float | Literal["auto"], most: float
) -> None:
    """The next batch, of 25 rows for each code, moves them by a part of the way to the means of their rows.

    With "auto" that is a fifth. With a number, codes have the weight of 40 rows or more.
    """
    x = draw(300, D)
    quantizer = vector_quantizer(K, D, ema_decay=ema_decay)
    if way == "fit":
        quantizer.fit(x[:100], max_iterations=0)
    elif way == "from_codebook":
        quantizer = VectorQuantizer.from_codebook(x[:K], ema_decay=ema_decay, restart_after=0)
    else:
        quantizer.set_codes(x[:K])
    set_codes = quantizer.codebook.clone()
    quantizer(draw(num_rows, D, seed=2))
    before = quantizer.codebook.clone()
    assert (before - set_codes).norm() < 0.05 * set_codes.norm()
    indices = quantizer(x).indices
    means = torch.stack([x[indices == code].mean(dim=0) for code in range(K)])
    assert (quantizer.codebook - before).norm() < most * (means - before).norm()


def test_rows_count_alike_in_batches_of_any_size() -> None:
    x, codes = draw(96, D), draw(K, D, seed=1)
    whole, parts = (VectorQuantizer.from_codebook(codes, restart_after=0) for _ in range(2))
    for quantizer, sizes in ((whole, [96]), (parts, [1, 5, 30, 60])):
        quantizer(draw(1, D, seed=2))
        for rows in x.split(sizes):
            quantizer(rows)
    moved = (whole.codebook - codes).norm()
    assert (whole.codebook - parts.codebook).norm() < 0.2 * moved


@pytest.mark.parametrize("name", [name for name in MODULES if "averages" in name or name in DROP_INS])
def test_a_step_without_rows_leaves_set_codes_in_place(name: str) -> None:
    module: Any = MODULES[name]()
    module.set_codes(codes_for(module))
    before = module.codebook.detach().clone()
    x = draw(6, D * module.heads)
    module(x, mask=torch.zeros(6, dtype=torch.bool))
    torch.testing.assert_close(module.codebook.detach(), before, rtol=1e-6, atol=1e-6)


@every_module
def test_invalid_codes_are_refused(name: str) -> None:
    module: Any = MODULES[name]()
    codes = codes_for(module)
    shape = ", ".join(map(str, codes.shape))
    with pytest.raises(ValueError, match=rf"codes must be \({shape}\), got "):
        module.set_codes(codes[..., :-1])
    with pytest.raises(ValueError, match=r"codes must be finite in torch.float32, got 1 NaN or Inf"):
        module.set_codes(torch.where(torch.arange(codes.numel()).view_as(codes) == 0, 1e300, codes.double()))
    with pytest.raises(TypeError, match=r"codes must be float32, .* got torch.int64"):
        module.set_codes(codes.long())


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_init_takes_a_tensor(name: str, dtype: torch.dtype) -> None:
    w = codes_for(QUANTIZERS[name]()).to(dtype)
    module: Any = QUANTIZERS[name](init=w)
    expected = w.float() if "cosine" not in name else nn.functional.normalize(w.float(), dim=-1)
    torch.testing.assert_close(module.codebook.detach(), expected, rtol=1e-6, atol=0)
    assert not module.needs_data.any()
    assert "init='codes'" in repr(module)
    with pytest.raises(ValueError, match=r"init must be \(.*\), got \(3, 3\)"):
        QUANTIZERS[name](init=draw(3, 3))


@pytest.mark.parametrize(
    ("kind", "shape", "sizes"),
    [
        (VectorQuantizer, (K, D), {"heads": 1}),
        (VectorQuantizer, (2, K, D), {"heads": 2}),
        (VectorQuantizer, (1, K, D), {"heads": 1}),
        (ResidualVectorQuantizer, (3, K, D), {"heads": 1, "num_quantizers": 3}),
        (ResidualVectorQuantizer, (2, 3, K, D), {"heads": 2, "num_quantizers": 3}),
    ],
)
@pytest.mark.parametrize("freeze", [False, True])
def test_from_codebook(kind: Any, shape: tuple[int, ...], sizes: dict[str, int], freeze: bool) -> None:
    w = nn.Parameter(draw(*shape))
    module = kind.from_codebook(w, freeze=freeze, commitment_weight=0.5)
    assert torch.equal(module.codebook.detach().view_as(w), w)
    for name, value in {**sizes, "num_codes": K, "code_dim": D, "commitment_weight": 0.5}.items():
        assert getattr(module, name) == value
    train(module)
    assert module.freeze_codebook == freeze == torch.equal(module.codebook.detach().view_as(w), w)
    with pytest.raises(ValueError, match=r"codebook must have . or . dimensions, got 1"):
        kind.from_codebook(draw(4))


@pytest.mark.parametrize("name", ["k-means", "residual averages, heads"])
def test_kmeans_starts_at_the_first_batch_with_rows(name: str) -> None:
    torch.manual_seed(0)
    module: Any = QUANTIZERS[name](restart_after=0, backend="torch", warn=False)
    x = draw(200, D * module.heads)
    assert module.needs_data.all()
    module(x, mask=torch.zeros(200, dtype=torch.bool))
    assert module.needs_data.all()
    module.freeze_codebook = True
    module(x)
    assert module.needs_data.all()
    module.freeze_codebook = False
    first = module(x)
    assert not module.needs_data.any()
    torch.manual_seed(0)
    sampled: Any = QUANTIZERS[name](init="data", restart_after=0)
    sampled(x)
    errors = [F.mse_loss(each.eval()(x).quantized, x) for each in (module, sampled)]
    assert errors[0] < 0.9 * errors[1]
    before = module.train().codebook.detach().clone()
    module(100 + x)
    if name == "k-means":
        assert torch.equal(module.codebook, before)
        means = torch.stack([x[first.indices == k].mean(dim=0) for k in range(K)])
        assert (means - before).abs().max() < 0.5
        assert nearest_code(x, before).indices.unique().numel() == K


def test_kmeans_under_checkpointing_starts_once_and_leaves_the_random_state() -> None:
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        module = QUANTIZERS["k-means"](restart_after=1)
        x = draw(60, D).requires_grad_()

        def block(x: Tensor, module: nn.Module = module) -> Tensor:
            quantized, _, loss = module(x)
            total: Tensor = nn.functional.dropout(quantized, 0.5).square().sum() + loss
            return total

        loss = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        loss.backward()
        results.append({"loss": loss.detach(), "x": x.grad, **module.state_dict()})
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


def test_a_reset_code_counts_as_new() -> None:
    quantizer = QUANTIZERS["gradient"](restart_after=3)
    quantizer.set_codes(codes_for(quantizer))
    far = 1000 + torch.zeros(5, D)  # the first row that is near a code; the others stay unused
    for _ in range(3):
        quantizer(far)
    unused = quantizer.batch_counts == 0
    assert (quantizer.steps_unused[unused] == 3).all()
    quantizer(torch.full((1, D), 1000.0))
    assert quantizer.restarts == unused.sum()
    assert quantizer.steps_unused.max() <= 1  # not 4: the reset codes are as new
    for _ in range(2):
        quantizer(torch.full((1, D), 1000.0))
    assert quantizer.restarts == unused.sum()  # they have three steps again


def alone(module: nn.Module) -> nn.Module:
    """Codes without the state of their training."""
    codes = nn.Module()
    codes.codebook = module.codebook
    return codes


SAVED: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], str]] = {
    "with": (
        lambda: vector_quantizer(K, D, ema_decay=0.9),
        lambda: vector_quantizer(K, D, ema_decay=None),
        "saved with ema_decay; construct it so too",
    ),
    "without": (
        lambda: residual_quantizer(2, K, D, ema_decay=None),
        lambda: residual_quantizer(2, K, D, ema_decay=0.9),
        "saved without ema_decay; construct the module with ema_decay=None",
    ),
    "alone": (
        lambda: alone(vector_quantizer(K, D)),
        lambda: vector_quantizer(K, D),
        "q.needs_data .* without it; to load codes alone, use set_codes or from_codebook",
    ),
    "codes": (
        lambda: vector_quantizer(K, D),
        lambda: vector_quantizer(K + 1, D),
        "num_codes=12; the module has num_codes=13",
    ),
    "dim": (lambda: vector_quantizer(K, D), lambda: vector_quantizer(K, 5), "code_dim=4; the module has code_dim=5"),
    "stages": (
        lambda: residual_quantizer(2, K, D),
        lambda: residual_quantizer(3, K, D),
        "num_quantizers=2; the module has num_quantizers=3",
    ),
    "heads": (
        lambda: vector_quantizer(K, D, **OWN),
        lambda: vector_quantizer(K, D, heads=3, separate_codebooks=True),
        "heads=2; the module has heads=3",
    ),
    "separate": (
        lambda: vector_quantizer(K, D, **OWN),
        lambda: vector_quantizer(K, D, heads=2),
        "saved with other heads: codes",
    ),
    "drop-in": (
        lambda: VectorQuantize(D, K),
        lambda: VectorQuantize(D, K + 1),
        "codebook_size=12; the module has codebook_size=13",
    ),
}


@pytest.mark.parametrize("case", SAVED)
def test_a_state_dict_of_another_configuration_says_what_differs(case: str) -> None:
    saved, module, message = SAVED[case]
    state = nn.ModuleDict({"q": saved()}).state_dict()
    with pytest.raises(RuntimeError, match=message):
        nn.ModuleDict({"q": module()}).load_state_dict(state)


def test_without_strict_missing_averages_start_at_the_loaded_codes() -> None:
    source, quantizer = vector_quantizer(K, D), QUANTIZERS["averages"]()
    missing = quantizer.load_state_dict(source.state_dict(), strict=False)
    assert missing.missing_keys == ["cluster_sizes", "cluster_sums"]
    quantizer(draw(5, D), mask=torch.zeros(5, dtype=torch.bool))
    torch.testing.assert_close(quantizer.codebook, source.codebook.detach(), rtol=1e-5, atol=1e-6)
    waiting = QUANTIZERS["data"]()
    waiting.load_state_dict({"codebook": source.codebook}, strict=False)
    waiting(draw(5, D))
    assert torch.equal(waiting.codebook, source.codebook)
    unexpected = source.load_state_dict(quantizer.state_dict(), strict=False)
    assert unexpected.unexpected_keys == ["cluster_sizes", "cluster_sums"]
