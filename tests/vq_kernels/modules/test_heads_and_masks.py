"""Channel dimensions, heads and masks, against plain rows quantized with one codebook at a time."""

import copy

import pytest
import torch
from torch import Tensor

from tests.vq_kernels.plain import vector_quantizer
from vq_kernels import VectorQuantizer, nearest_code, vector_quantize


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(**options: object) -> VectorQuantizer:
    torch.manual_seed(0)
    return vector_quantizer(20, 4, **options)


@pytest.mark.parametrize(("channel_dim", "shape"), [(1, (2, 4, 3, 5)), (-3, (2, 4, 3, 5)), (0, (4, 7)), (2, (2, 3, 4))])
def test_channels_in_any_dimension(channel_dim: int, shape: tuple[int, ...]) -> None:
    quantizer = make(channel_dim=channel_dim)
    x = draw(*shape).requires_grad_()
    quantized, indices, loss = quantizer(x)
    rows = x.movedim(channel_dim, -1)
    assert quantized.shape == x.shape
    assert torch.equal(indices, nearest_code(rows, quantizer.codebook).indices)
    assert torch.equal(quantized.movedim(channel_dim, -1), quantizer.codebook[indices])
    assert torch.equal(quantizer.decode(indices), quantized)
    upstream = draw(*shape, seed=1)
    torch.autograd.backward([quantized, loss], [upstream, torch.tensor(1.0)])
    assert torch.equal(x.grad, upstream)


def test_heads_that_share_a_codebook_equal_separate_rows() -> None:
    quantizer, plain = make(heads=3, commitment_weight=0.5), make(commitment_weight=0.5)
    assert quantizer.codebook.shape == (20, 4)
    results = []
    for module, shape in ((quantizer, (2, 5, 12)), (plain, (2, 5, 3, 4))):
        x = draw(2, 5, 12).view(shape).requires_grad_()
        quantized, indices, loss = module(x)
        (quantized.square().sum() + loss).backward()
        assert indices.shape == (2, 5, 3)
        assert torch.equal(module.decode(indices), quantized)
        results.append((quantized.view(2, 5, 12), indices, loss, x.grad.view(2, 5, 12), module.codebook.grad))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(quantizer.usage_counts, plain.usage_counts)


def test_product_quantization_has_a_codebook_for_each_head() -> None:
    quantizer = make(heads=3, separate_codebooks=True, commitment_weight=0.5, channel_dim=1)
    assert quantizer.codebook.shape == (3, 20, 4)
    assert quantizer.usage_counts.shape == (3, 20)
    x = draw(2, 12, 5).requires_grad_()
    quantized, indices, loss = quantizer(x)
    (quantized.square().sum() + loss).backward()
    assert indices.shape == (2, 5, 3)
    assert torch.equal(quantizer.decode(indices), quantized)

    losses = []
    for head in range(3):
        part = x.detach().movedim(1, -1)[..., 4 * head : 4 * head + 4].requires_grad_()
        codebook = quantizer.codebook[head].detach().requires_grad_()
        alone = vector_quantize(part, codebook, commitment_weight=0.5)
        (alone.quantized.square().sum() + alone.loss / 3).backward()
        assert torch.equal(indices[..., head], alone.indices)
        torch.testing.assert_close(x.grad.movedim(1, -1)[..., 4 * head : 4 * head + 4], part.grad)
        torch.testing.assert_close(quantizer.codebook.grad[head], codebook.grad)
        assert torch.equal(quantizer.usage_counts[head], torch.bincount(alone.indices.flatten(), minlength=20))
        losses.append(alone.loss.detach())
    torch.testing.assert_close(loss.detach(), torch.stack(losses).mean())
    assert quantizer.perplexity.shape == quantizer.codes_used.shape == (3,)


def test_separate_codebooks_are_reset_to_their_part_of_a_row() -> None:
    quantizer = make(heads=2, separate_codebooks=True, init="data", restart_after=1, restart_noise=0.0)
    x = draw(30, 8) + torch.tensor([100.0] * 4 + [-100.0] * 4)
    quantizer(x)
    assert not quantizer.needs_data.any()
    for head in range(2):
        assert not nearest_code(quantizer.codebook[head], x[:, 4 * head : 4 * head + 4]).sq_distances.any()
    assert quantizer.restarts == 0
    quantizer(x[:1])
    quantizer(x[:1])
    assert quantizer.restarts == 2 * 19


OPTIONS = {
    "plain": {},
    "commitment": {"commitment_weight": 0.5},
    "heads": {"heads": 2, "commitment_weight": 0.5},
    "own codebooks": {"heads": 2, "separate_codebooks": True, "commitment_weight": 0.5},
    "cosine": {"metric": "cosine", "commitment_weight": 0.5},
    "averages": {"ema_decay": 0.5, "commitment_weight": 0.5},
    "averages, cosine, own codebooks": {
        "ema_decay": 0.5,
        "metric": "cosine",
        "heads": 2,
        "separate_codebooks": True,
        "commitment_weight": 0.5,
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_padding_has_no_effect(name: str) -> None:
    masked = make(**OPTIONS[name])
    alone = copy.deepcopy(masked)
    mask = torch.arange(14).view(2, 7) % 3 != 1
    channels = 4 * masked.heads
    for step in range(3):
        x = draw(2, 7, channels, seed=step)
        x[~mask] = torch.nan
        x.requires_grad_()
        rows = x.detach()[mask].requires_grad_()
        found, expected = masked(x, mask), alone(rows)
        for result, leaf in ((found, x), (expected, rows)):
            (result.quantized.square().sum() + result.loss).backward()
            assert leaf.grad.isfinite().all()
        assert torch.equal(found.indices[mask], expected.indices)
        assert (found.indices[~mask] == -1).all()
        assert torch.equal(found.quantized[mask], expected.quantized)
        assert not found.quantized[~mask].any()
        torch.testing.assert_close(found.loss, expected.loss)
        torch.testing.assert_close(x.grad[mask], rows.grad)
        assert not x.grad[~mask].any()
        if masked.ema_decay is None:  # the codes have not moved
            assert torch.equal(masked.decode(found.indices), found.quantized)
            torch.testing.assert_close(masked.codebook.grad, alone.codebook.grad)
        for (key, value), other in zip(masked.state_dict().items(), alone.state_dict().values(), strict=True):
            torch.testing.assert_close(value, other, msg=key)


def test_codes_are_not_reset_to_padding() -> None:
    quantizer = make(init="data", restart_noise=0.0)
    x, mask = draw(60, 4), torch.arange(60) % 2 == 0
    x[~mask] = 100.0
    quantizer(x, mask)
    found = nearest_code(quantizer.codebook, x)
    assert not found.sq_distances.any()
    assert mask[found.indices].all()
    assert found.indices.unique().numel() == 20


def test_a_batch_of_only_padding_changes_only_the_step_count() -> None:
    quantizer = make(init="data", restart_after=1, commitment_weight=1.0)
    before = quantizer.codebook.detach().clone()
    x = draw(5, 4).requires_grad_()
    quantized, indices, loss = quantizer(x, torch.zeros(5, dtype=torch.bool))
    (quantized.sum() + loss).backward()
    assert loss == 0
    assert not quantized.any()
    assert (indices == -1).all()
    assert not x.grad.any()
    assert not quantizer.codebook.grad.any()
    assert torch.equal(quantizer.codebook, before)
    assert quantizer.needs_data
    assert (quantizer.steps_unused == 1).all()


def test_minus_one_decodes_to_zero() -> None:
    quantizer = make(heads=2)
    decoded = quantizer.decode(torch.tensor([[3, -1], [-1, -1]]))
    assert torch.equal(decoded[0, :4], quantizer.codebook[3])
    assert not decoded[0, 4:].any()
    assert not decoded[1].any()
    decoded.sum().backward()
    assert quantizer.codebook.grad.nonzero()[:, 0].unique().tolist() == [3]


def test_invalid_inputs() -> None:
    quantizer = make(heads=2, channel_dim=1)
    with pytest.raises(ValueError, match=r"x must have 8 channels in dimension 1, got \(3, 4, 8\)"):
        quantizer(draw(3, 4, 8))
    with pytest.raises(ValueError, match=r"x must have 8 channels in dimension 1, got \(8,\)"):
        quantizer(draw(8))
    with pytest.raises(TypeError, match=r"x must be float32, .*, got torch.int64"):
        quantizer(torch.zeros(3, 8, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"mask must be \(3, 5\) to match x, got \(3, 8\)"):
        quantizer(draw(3, 8, 5), torch.ones(3, 8, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask must be bool, got torch.int64"):
        quantizer(draw(3, 8, 5), torch.ones(3, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"the module must be on x's device, meta, got cpu"):
        quantizer(torch.zeros(3, 8, 5, device="meta"))
    with pytest.raises(ValueError, match=r"indices must be \[..., 2\], one for each head, got \(3, 5\)"):
        quantizer.decode(torch.zeros(3, 5, dtype=torch.int64))
