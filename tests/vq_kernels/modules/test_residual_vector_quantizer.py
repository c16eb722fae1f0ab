"""Residual quantization, against vector_quantize for each stage."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.vq_kernels.plain import residual_quantizer
from vq_kernels import (
    ResidualVectorQuantizer,
    attach_count_normalised_step,
    count_normalised_param_group,
    nearest_code,
    vector_quantize,
)
from vq_kernels.modules import base
from vq_kernels.search.reference import brute_force_nearest

STAGES, CODES, DIM = 3, 20, 4


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(**options: Any) -> ResidualVectorQuantizer:
    torch.manual_seed(0)
    return residual_quantizer(STAGES, CODES, DIM, **options)


def by_hand(x: Tensor, codebook: Tensor, weight: float, num_stages: int = STAGES) -> tuple[Tensor, Tensor, Tensor]:
    """Returns quantized, indices and loss of x [N, D] in the first stages of codebook [Q, K, D]."""
    residual, quantized, indices, losses = x, torch.zeros_like(x), [], []
    for stage in range(num_stages):
        step = vector_quantize(residual, codebook[stage], commitment_weight=weight)
        residual = residual - step.quantized.detach()
        quantized = quantized + step.quantized.detach()
        indices.append(step.indices)
        losses.append(step.loss)
    return x + (quantized - x).detach(), torch.stack(indices, dim=-1), torch.stack(losses).mean()


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_equals_its_stages_in_sequence(weight: float) -> None:
    quantizer = make(commitment_weight=weight)
    assert quantizer.codebook.shape == (STAGES, CODES, DIM)
    x = draw(2, 30, DIM)
    upstream = draw(2, 30, DIM, seed=1)
    results = []
    for by in ("module", "hand"):
        leaf = x.clone().requires_grad_()
        codebook = quantizer.codebook if by == "module" else quantizer.codebook.detach().requires_grad_()
        if by == "module":
            quantized, indices, loss = quantizer(leaf)
        else:
            quantized, indices, loss = (
                part.view(2, 30, -1) if part.dim() else part for part in by_hand(leaf.view(-1, DIM), codebook, weight)
            )
        ((quantized * upstream).sum() + loss).backward()
        results.append((quantized.detach(), indices, loss.detach(), leaf.grad, codebook.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
    assert torch.equal(results[0][1], results[1][1])


def test_every_stage_is_exact() -> None:
    quantizer = make()
    x = draw(500, DIM) + 30
    with torch.no_grad():
        quantizer.codebook[0] += 30
    quantized, indices, _ = quantizer(x)
    residual = x
    for stage in range(STAGES):
        codes = quantizer.codebook[stage].detach()
        assert torch.equal(indices[:, stage], brute_force_nearest(residual, codes))
        residual = residual - codes[indices[:, stage]]
    assert torch.equal(quantizer.decode(indices), quantized)


def test_decoding_the_first_stages() -> None:
    quantizer = make()
    x = draw(200, DIM)
    indices = quantizer(x).indices
    fewer = torch.zeros_like(x)
    for stage in range(STAGES):
        fewer = fewer + quantizer.codebook[stage, indices[:, stage]]
        assert torch.equal(quantizer.decode(indices[:, : stage + 1]), fewer)
    indices[3, 1:] = -1
    assert torch.equal(quantizer.decode(indices)[3], quantizer.codebook[0, indices[3, 0]])


@pytest.mark.parametrize("options", [{}, {"heads": 2, "separate_codebooks": True, "channel_dim": 1}], ids=str)
def test_the_codes_of_each_stage(options: dict[str, Any]) -> None:
    quantizer = make(**options)
    x = draw(3, DIM * quantizer.heads, 7).movedim(1, quantizer.channel_dim)
    quantized, indices, loss, codes = quantizer(x, return_all_codes=True)
    assert torch.equal(codes, quantizer.get_codes_from_indices(indices))
    assert torch.equal(codes[0] + codes[1] + codes[2], quantized)
    assert torch.equal(codes[0], quantizer.decode(indices[..., :1]))
    assert torch.equal(quantizer.get_codes_from_indices(indices[..., :2]), codes[:2])
    assert torch.equal(loss, quantizer(x).loss)


def test_the_first_indices_equal_those_of_fewer_stages() -> None:
    quantizer = make()
    x = draw(100, DIM)
    coarser = residual_quantizer(2, CODES, DIM)
    with torch.no_grad():
        coarser.codebook.copy_(quantizer.codebook[:2])
    assert torch.equal(coarser(x).indices, quantizer(x).indices[:, :2])


@pytest.mark.parametrize("separate", [False, True])
def test_grouped(separate: bool) -> None:
    quantizer = make(heads=2, separate_codebooks=separate, channel_dim=1, commitment_weight=0.25)
    assert quantizer.codebook.shape == ((2, STAGES, CODES, DIM) if separate else (STAGES, CODES, DIM))
    x = draw(3, 2 * DIM, 7).requires_grad_()
    quantized, indices, loss = quantizer(x)
    (quantized.square().sum() + loss).backward()
    assert indices.shape == (3, 7, 2, STAGES)
    assert torch.equal(quantizer.decode(indices), quantized)
    assert quantizer.decode(indices[..., :1]).shape == x.shape
    codebook = quantizer.codebook.detach().expand(2, STAGES, CODES, DIM).clone().requires_grad_()
    parts = x.detach().movedim(1, -1).reshape(-1, 2, DIM).requires_grad_()
    total = torch.zeros(())
    for head in range(2):
        expected = by_hand(parts[:, head], codebook[head], 0.25)
        assert torch.equal(indices[..., head, :].reshape(-1, STAGES), expected[1])
        total = total + expected[0].square().sum() + expected[2] / 2
    total.backward()
    torch.testing.assert_close(x.grad.movedim(1, -1).reshape(-1, 2, DIM), parts.grad)
    torch.testing.assert_close(quantizer.codebook.grad, codebook.grad if separate else codebook.grad.sum(dim=0))


OPTIONS: dict[str, dict[str, Any]] = {
    "gradients": {"commitment_weight": 0.5},
    "averages": {"commitment_weight": 0.5, "ema_decay": 0.5},
    "restarts": {"commitment_weight": 0.5, "init": "data", "restart_after": 1},
    "averages, restarts": {"commitment_weight": 0.5, "ema_decay": 0.5, "restart_after": 1},
    "grouped": {"commitment_weight": 0.5, "heads": 2, "separate_codebooks": True, "restart_after": 2},
    "dropout": {"commitment_weight": 0.5, "quantizer_dropout": 1.0, "restart_after": 2},
    "dropout, averages": {"commitment_weight": 0.5, "quantizer_dropout": 1.0, "ema_decay": 0.5},
}


@pytest.mark.parametrize("name", ["gradients", "averages", "grouped"])
def test_padding_has_no_effect(name: str) -> None:
    options = {**OPTIONS[name], "restart_after": 0}
    masked, alone = make(**options), make(**options)
    mask = torch.arange(14).view(2, 7) % 3 != 1
    for step in range(3):
        x = draw(2, 7, DIM * masked.heads, seed=step)
        x[~mask] = torch.inf
        x.requires_grad_()
        rows = x.detach()[mask].requires_grad_()
        found, expected = masked(x, mask), alone(rows)
        for result in (found, expected):
            (result.quantized.square().sum() + result.loss).backward()
        assert torch.equal(found.indices[mask], expected.indices)
        assert torch.equal(found.quantized[mask], expected.quantized)
        assert (found.indices[~mask] == -1).all()
        assert not found.quantized[~mask].any()
        torch.testing.assert_close((found.loss, x.grad[mask]), (expected.loss, rows.grad))
        assert not x.grad[~mask].any()
        for (key, value), other in zip(masked.state_dict().items(), alone.state_dict().values(), strict=True):
            torch.testing.assert_close(value, other, msg=key)
    if masked.ema_decay is None:
        torch.testing.assert_close(masked.codebook.grad, alone.codebook.grad)


def test_dropped_stages_have_no_effect() -> None:
    quantizer = make(quantizer_dropout=1.0, commitment_weight=0.25)
    drawn = set()
    for seed in range(20):
        torch.manual_seed(seed)
        x = draw(40, DIM, seed=seed).requires_grad_()
        unused = quantizer.steps_unused.clone()
        quantizer.zero_grad()
        quantized, indices, loss = quantizer(x)
        (quantized.square().sum() + loss).backward()
        num_stages = int((indices[0] >= 0).sum())
        drawn.add(num_stages)
        assert (indices[:, :num_stages] >= 0).all()
        assert (indices[:, num_stages:] == -1).all()

        leaf, codebook = x.detach().requires_grad_(), quantizer.codebook.detach().requires_grad_()
        expected = by_hand(leaf, codebook, 0.25, num_stages)
        (expected[0].square().sum() + expected[2]).backward()
        assert torch.equal(indices[:, :num_stages], expected[1])
        torch.testing.assert_close((quantized, loss), (expected[0], expected[2]))
        torch.testing.assert_close(x.grad, leaf.grad)
        torch.testing.assert_close(quantizer.codebook.grad, codebook.grad)
        assert torch.equal(quantizer.decode(indices), quantized)
        assert torch.equal(quantizer.steps_unused[num_stages:], unused[num_stages:])
        assert not quantizer.batch_counts[num_stages:].any()
    assert drawn == {1, 2, 3}
    assert (quantizer.eval()(x).indices >= 0).all()


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.5, "restart_after": 1}, {"heads": 2}], ids=str)
def test_n_q_stages_equal_a_quantizer_of_fewer(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make(commitment_weight=0.5, separate_codebooks=True, **options)
    fewer = residual_quantizer(2, CODES, DIM, commitment_weight=0.5, separate_codebooks=True, **options)
    before = copy.deepcopy(whole.state_dict())
    axis = whole.codebook.dim() - 3
    fewer.load_state_dict({key: value.narrow(axis, 0, 2) if value.dim() else value for key, value in before.items()})
    num_searches, search = [], base.choose
    monkeypatch.setattr(base, "choose", lambda *args, **keywords: num_searches.append(1) or search(*args, **keywords))
    for step in range(3):
        results = []
        for quantizer, keywords in ((whole, {"n_q": 2}), (fewer, {})):
            torch.manual_seed(step)
            x = draw(40, DIM * whole.heads, seed=step).requires_grad_()
            quantized, indices, loss = quantizer(x, **keywords)
            (quantized.square().sum() + loss).backward()
            results.append((quantized.detach(), indices, loss.detach(), x.grad))
        torch.testing.assert_close(*results)
    assert len(num_searches) == 2 * 3 * 2 * whole.heads
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(value.narrow(axis, 0, 2) if value.dim() else value, fewer.state_dict()[name])
        assert not value.dim() or torch.equal(value.select(axis, 2), before[name].select(axis, 2)), name
    if whole.codebook.requires_grad:
        assert not whole.codebook.grad.select(axis, 2).any()
    whole.eval()
    x = draw(40, DIM * whole.heads)
    assert torch.equal(whole.encode(x, n_q=1), whole.encode(x)[..., :1])
    assert torch.equal(whole(x, n_q=1).quantized, whole.decode(whole(x).indices[..., :1]))


@pytest.mark.parametrize("n_q", [0, STAGES + 1])
def test_invalid_n_q(n_q: int) -> None:
    for call in (make(), make().encode):
        with pytest.raises(ValueError, match=rf"n_q must be in \[1, {STAGES}\], got {n_q}"):
            call(draw(5, DIM), n_q=n_q)


def test_dropout_with_n_q() -> None:
    quantizer, num_active = make(quantizer_dropout=1.0), set()
    for seed in range(12):
        torch.manual_seed(seed)
        indices = quantizer(draw(5, DIM), n_q=2).indices
        assert indices.shape == (5, 2)
        num_active.add(int((indices[0] >= 0).sum()))
    assert num_active == {1, 2}


def test_no_random_numbers_without_a_dead_code() -> None:
    quantizer = residual_quantizer(2, 4, DIM, init="data", restart_after=2, ema_decay=0.5)
    x = draw(200, DIM)
    draws = []
    for step in range(6):
        if step == 3:
            quantizer.steps_unused[1, 2] = 2
        before = torch.get_rng_state()
        quantizer(x)
        draws.append(not torch.equal(torch.get_rng_state(), before))
    assert draws == [True, False, False, True, False, False]


def test_dropout_frequency() -> None:
    quantizer = make(quantizer_dropout=0.5)
    torch.manual_seed(0)
    whole = sum(bool((quantizer(draw(1, DIM)).indices >= 0).all()) for _ in range(400))
    assert 230 < whole < 305  # 2/3 of 400, within four standard deviations


def test_averages_of_dropped_stages_do_not_change() -> None:
    quantizer = make(**OPTIONS["dropout, averages"])
    for seed in range(6):
        torch.manual_seed(seed)
        before = copy.deepcopy(quantizer.state_dict())
        indices = quantizer(draw(40, DIM, seed=seed)).indices
        num_stages = int((indices[0] >= 0).sum())
        for name in ("codebook", "cluster_sizes", "cluster_sums"):
            after = quantizer.state_dict()[name]
            assert torch.equal(after[num_stages:], before[name][num_stages:])
            assert not torch.equal(after[:num_stages], before[name][:num_stages])


def test_each_stage_is_initialised_from_residuals() -> None:
    quantizer = make(init="data", restart_noise=0.0)
    x = draw(60, DIM)
    indices = quantizer(x).indices
    assert not quantizer.needs_data.any()
    residual = x
    for stage in range(STAGES):
        codes = quantizer.codebook[stage].detach()
        assert not nearest_code(codes, residual).sq_distances.any()
        residual = residual - codes[indices[:, stage]]


def test_dropped_stages_are_initialised() -> None:
    torch.manual_seed(1)
    quantizer = residual_quantizer(8, CODES, DIM, init="data", quantizer_dropout=1.0)
    before = quantizer.codebook.detach().clone()
    quantizer(draw(60, DIM))
    assert not quantizer.needs_data.any()
    assert (quantizer.codebook != before).any(dim=2).all()


def test_unused_codes_are_reset_in_each_stage() -> None:
    quantizer = make(restart_after=2, restart_noise=0.0)
    with torch.no_grad():
        quantizer.codebook[1, 5:] += 1000
    x = draw(100, DIM)
    for _ in range(2):
        quantizer(x)
    assert (quantizer.codebook[1, 5:] > 900).all()
    quantizer(x)
    assert quantizer.codebook.abs().max() < 10
    assert quantizer.restarts >= 15


@pytest.mark.parametrize("name", OPTIONS)
def test_training_lowers_the_error(name: str) -> None:
    quantizer = make(**OPTIONS[name], warn=False)
    parameters = list(quantizer.parameters())
    optimizer = torch.optim.Adam(parameters, lr=0.02) if parameters else None
    x = draw(200, DIM * quantizer.heads)
    before = F.mse_loss(quantizer.eval()(x).quantized, x)
    quantizer.train()
    for _ in range(30):
        loss = quantizer(x).loss
        if optimizer:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert F.mse_loss(quantizer.eval()(x).quantized, x) < 0.8 * before


@pytest.mark.parametrize("name", OPTIONS)
def test_activation_checkpointing_changes_nothing(name: str) -> None:
    results: list[list[Tensor]] = []
    for checkpointed in (False, True):
        quantizer, outcome = make(**OPTIONS[name]), []
        for step in range(4):
            torch.manual_seed(step)
            x = draw(25, DIM * quantizer.heads, seed=step).requires_grad_()

            def block(x: Tensor, quantizer: ResidualVectorQuantizer = quantizer) -> Tensor:
                quantized, _, loss = quantizer(x)
                return F.dropout(quantized.square(), 0.5).sum() + loss

            (checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)).backward()
            outcome += [x.grad, *(value.clone() for value in quantizer.state_dict().values())]
        results.append(outcome + [parameter.grad for parameter in quantizer.parameters()])
    for expected, found in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_memory_for_the_backward_does_not_grow_with_the_stages() -> None:
    saved = {}
    for num_quantizers in (1, 8):
        torch.manual_seed(0)
        quantizer = residual_quantizer(num_quantizers, 16, 32, commitment_weight=0.25)
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = draw(1000, 32).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = quantizer(x)
        assert result.loss.requires_grad
        saved[num_quantizers] = sum(kept.values()) - quantizer.codebook.nbytes
    assert saved[8] == saved[1] + 7 * 1000 * 8  # seven times the indices


def test_half_precision_is_widened() -> None:
    quantizer = make()
    x = draw(200, DIM).half()
    quantized, indices, loss = quantizer(x)
    wide = quantizer(x.float())
    assert (quantized.dtype, loss.dtype) == (torch.float16, torch.float32)
    assert torch.equal(indices, wide.indices)
    assert torch.equal(quantized, wide.quantized.half())


def test_the_count_normalised_step() -> None:
    quantizer = make()
    optimizer = torch.optim.SGD([count_normalised_param_group(quantizer, 1.0)])
    attach_count_normalised_step(optimizer, quantizer)
    x = draw(100, DIM)
    before = quantizer.codebook.detach().clone()
    indices, loss = quantizer(x)[1:]
    loss.backward()
    optimizer.step()
    residual = x
    for stage in range(STAGES):
        for code in indices[:, stage].unique():
            mean = residual[indices[:, stage] == code].mean(dim=0)
            torch.testing.assert_close(quantizer.codebook[stage, code].detach(), mean, rtol=1e-5, atol=1e-6)
        residual = residual - before[stage, indices[:, stage]]


def test_training_continues_from_a_state_dict() -> None:
    first, second = (make(**OPTIONS["averages, restarts"]) for _ in range(2))
    first(draw(20, DIM))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    for step in range(1, 4):
        for quantizer in (first, second):
            torch.manual_seed(step)
            quantizer(draw(20, DIM, seed=step))
    for (name, value), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    assert first.restarts > 0


def test_usage_statistics_of_each_stage() -> None:
    quantizer = make()
    indices = quantizer(draw(50, DIM)).indices
    assert quantizer.codes_used.tolist() == [indices[:, stage].unique().numel() for stage in range(STAGES)]
    assert ((quantizer.perplexity >= 1) & (quantizer.perplexity <= CODES)).all()
    quantizer.reset_usage()
    assert not quantizer.perplexity.any()


@pytest.mark.parametrize("shape", [(5, 4), (5, 0), (2, 5, 4)])
def test_invalid_indices(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"indices must be \[..., q\] with 1 <= q <= 3, got"):
        make().decode(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"indices must be \[..., 2, q\] with 1 <= q <= 3, got"):
        make(heads=2).decode(torch.zeros(shape, dtype=torch.int64))


def test_repr() -> None:
    shown = repr(make(quantizer_dropout=0.5))
    sizes, options = "num_quantizers=3, num_codes=20, code_dim=4", "init='normal', restart_after=0, ema_decay=None"
    assert shown == f"ResidualVectorQuantizer({sizes}, {options}, quantizer_dropout=0.5)"
