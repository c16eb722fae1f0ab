"""The keywords of a call, the bridge and the attributes of `VectorQuantize` beside those of theirs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vector_quantize_pytorch import Sequential, hierarchical_vq

from tests.vq_kernels.compat.side_by_side import (
    DIM,
    LEARNABLE,
    NUM_CODES,
    OWN_CODES,
    Theirs,
    assert_all_close,
    assert_close,
    assert_same_step,
    draw,
    draw_input,
    pair,
    step,
)
from vq_kernels import VectorQuantize
from vq_kernels.compat import GroupedResidualVQ, ResidualVQ

TOPK_MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "cosine": {"use_cosine_sim": True},
    "projection": {"codebook_dim": 6},
    "straight-through": {"rotation_trick": False},
    "learnable": LEARNABLE,
    "no commitment": {"commitment_weight": 0.0},
    "channel first": {"channel_last": False},
    "images": {"accept_image_fmap": True},
    "volumes": {"accept_3d_fmap": True},
    "orthogonal": {"orthogonal_reg_weight": 2.0},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("keywords", TOPK_MODES.values(), ids=TOPK_MODES)
def test_topk(keywords: dict[str, Any], training: bool) -> None:
    for k in (1, 3, NUM_CODES + 5):
        ours, theirs = (layer.train(training) for layer in pair(**keywords))
        x = draw_input(keywords)
        assert_same_step(step(ours, x, topk=k), step(theirs, x, topk=k))


@pytest.mark.parametrize("zeros", [True, False])
def test_topk_with_a_mask(zeros: bool) -> None:
    mask = torch.arange(20).expand(3, 20) < torch.tensor([[20], [0], [7]])
    layers = pair(return_zeros_for_masked_padding=zeros)
    assert_same_step(*(step(layer, draw(3, 20, DIM), topk=3, mask=mask) for layer in layers))


def test_topk_of_single_vectors_and_its_breakdown() -> None:
    ours, theirs = pair()
    assert_same_step(step(ours, draw(40, DIM), topk=2), step(theirs, draw(40, DIM), topk=2))
    found, expected = (layer(draw(40, DIM), topk=2, return_loss_breakdown=True)[3] for layer in (ours, theirs))
    assert_close(found.commitment.detach(), expected.commitment.detach()[:, 0])  # theirs keeps a dimension of size 1


def test_topk_of_zero_vectors_comes_in_the_order_of_the_codes() -> None:
    indices = VectorQuantize(DIM, NUM_CODES, use_cosine_sim=True)(torch.zeros(4, DIM), topk=3)[1]
    assert indices.tolist() == [[0, 1, 2]] * 4


def test_topk_that_does_not_fit() -> None:
    layer, x = VectorQuantize(DIM, NUM_CODES), draw(3, 20, DIM)
    with pytest.raises(ValueError, match="topk must be >= 1, got 0"):
        layer(x, topk=0)
    with pytest.raises(ValueError, match="topk needs heads=1, got 2"):
        VectorQuantize(DIM, NUM_CODES, **OWN_CODES)(x, topk=2)
    with pytest.raises(ValueError, match="topk and indices must not both be given"):
        layer(x, topk=2, indices=torch.zeros(3, 20, dtype=torch.int64))


@pytest.mark.parametrize("keywords", [{}, {"use_cosine_sim": True}, OWN_CODES, {"codebook_dim": 6}])
def test_manual_updates_and_update_indices(keywords: dict[str, Any]) -> None:
    ours, theirs = pair(manual_ema_update=True, **keywords)
    before = ours.codebook.clone()
    for layer in (ours, theirs):
        indices = layer(draw(3, 20, DIM))[1]
        assert_close(layer.codebook, before)
        layer.update_indices(draw(3, 20, DIM, seed=1), indices)
        layer.update_ema_indices(draw(3, 20, DIM, seed=2), indices)
        layer._codebook.update_ema()
    assert not torch.equal(ours.codebook, before)
    assert_all_close(ours.state_dict(), theirs.state_dict())


def test_update_indices_with_a_mask_and_images() -> None:
    mask = torch.arange(20).expand(3, 20) < torch.tensor([[20], [0], [7]])
    results = []
    for layer in pair():
        indices = layer(draw(3, 20, DIM), mask=mask, topk=1)[1][..., 0]
        layer.update_indices(draw(3, 20, DIM), indices, mask=mask)
        results.append(layer.state_dict())
    assert_all_close(*results)
    by_index, by_step = (pair(accept_image_fmap=True)[0] for _ in range(2))
    x = draw(3, DIM, 4, 5)
    by_index.update_indices(x, by_step(x)[1])
    assert_all_close(by_index.state_dict(), by_step.state_dict())
    with pytest.raises(ValueError, match=r"indices must be \(3, 4, 5\) to match x, got \(3, 4\)"):
        by_index.update_indices(x, torch.zeros(3, 4, dtype=torch.int64))


WEIGHTS: dict[str, Tensor | Callable[[Tensor, Tensor], Tensor]] = {
    "[K]": torch.arange(NUM_CODES) / NUM_CODES,
    "[C, K]": (torch.arange(NUM_CODES) / NUM_CODES).expand(2, -1),
    "a function": lambda sums, counts: (counts > 1) * 1.0 + 0 * sums[..., 0],
}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_weighted_averages(weight: Any) -> None:
    ours, theirs = pair(**(OWN_CODES if getattr(weight, "ndim", 2) == 2 else {}))
    for seed in range(2):
        x = draw(3, 20, DIM, seed=seed)
        assert_same_step(step(ours, x, ema_update_weight=weight), step(theirs, x, ema_update_weight=weight))
    with pytest.raises(ValueError, match=r"ema_update_weight must be \(32,\) or \([12], 32\), got \(3,\)"):
        ours(x, ema_update_weight=torch.ones(3))


def test_accumulated_averages() -> None:
    ours, theirs = pair()
    for seed, accumulate in enumerate([True, True, False, False, True, False]):
        x = draw(3, 20, DIM, seed=seed)
        assert_same_step(step(ours, x, accum_ema_update=accumulate), step(theirs, x, accum_ema_update=accumulate))


@pytest.mark.parametrize("threshold", [0, 1e-9])
@pytest.mark.parametrize("at_construction", [True, False])
def test_ema_update_in_a_call(at_construction: bool, threshold: float) -> None:
    ours, theirs = pair(ema_update=at_construction, threshold_ema_dead_code=threshold)
    for seed, ema_update in enumerate([None, not at_construction, at_construction]):
        x = draw(3, 20, DIM, seed=seed)
        assert_same_step(step(ours, x, ema_update=ema_update), step(theirs, x, ema_update=ema_update))


@pytest.mark.parametrize("threshold", [0, 1e-9])
def test_the_bridge(threshold: float) -> None:
    layers = []
    for layer_class in (VectorQuantize, Theirs):
        torch.manual_seed(0)
        bridge = nn.Linear(DIM, DIM)
        layers.append(layer_class(DIM, NUM_CODES, vq_bridge=bridge, threshold_ema_dead_code=threshold))
    ours, theirs = layers
    theirs.load_state_dict(ours.state_dict())
    for seed in range(3):
        assert_same_step(step(ours, draw(3, 20, DIM, seed=seed)), step(theirs, draw(3, 20, DIM, seed=seed)))
    quantized, indices, _ = ours.eval()(draw(3, 20, DIM))
    assert_close(quantized, theirs.eval()(draw(3, 20, DIM))[0])
    assert_close(ours.get_output_from_indices(indices), quantized)  # theirs returns other codes


@pytest.mark.parametrize(
    ("name", "value"), [("decay", 0.5), ("eps", 0.1), ("ema_update", False), ("manual_ema_update", True)]
)
def test_writing_an_attribute_of_the_codebook(name: str, value: Any) -> None:
    layers = pair()
    for layer in layers:
        setattr(layer._codebook, name, value)
        assert getattr(layer._codebook, name) == value
    assert_same_step(*(step(layer, draw(3, 20, DIM)) for layer in layers))


def test_dead_codes_may_be_reset_from_now_on() -> None:
    """In theirs only if `threshold_ema_dead_code` was more than 0 at construction."""
    ours, theirs = pair(ema_update=False), pair(ema_update=False, threshold_ema_dead_code=1)[1]
    layers = ours[0], theirs
    for layer in layers:
        layer._codebook.threshold_ema_dead_code = layer._codebook.reset_cluster_size = 2
    assert_same_step(*(step(layer, draw(3, 20, DIM)) for layer in layers))


def test_replacing_codes() -> None:
    for keywords in ({}, {"use_cosine_sim": True}):
        results = []
        for layer in pair(**keywords, threshold_ema_dead_code=2):
            torch.manual_seed(0)
            layer._codebook.replace(draw(1, 60, DIM), batch_mask=torch.arange(NUM_CODES)[None] % 3 == 0)
            results.append(layer.state_dict())
            assert layer._codebook.has_dead_code_replacement
        assert_all_close(*results)
    layer, rows, mask = VectorQuantize(DIM, NUM_CODES), draw(1, 60, DIM), torch.arange(60)[None] < 8
    before = layer.codebook.clone()
    layer._codebook.replace(rows, torch.ones(1, NUM_CODES, dtype=torch.bool), seq_mask=mask)  # of 32 codes, 8 get a row
    changed = layer.codebook[(layer.codebook != before).any(dim=1)]
    assert torch.equal(changed[changed[:, 0].argsort()], rows[0, :8][rows[0, :8, 0].argsort()])
    layer._codebook.threshold_ema_dead_code = 1000
    layer._codebook.expire_codes_(rows + 100, seq_mask=~mask)
    assert (layer.codebook[:, None] == rows[0, 8:] + 100).all(dim=2).any(dim=1).all()


@pytest.mark.parametrize("name", ["commitment_weight", "orthogonal_reg_weight", "rotation_trick", "freeze_codebook"])
def test_writing_an_attribute_of_the_layer(name: str) -> None:
    layers = pair(orthogonal_reg_weight=1.0)
    for layer in layers:
        setattr(layer, name, False if name == "rotation_trick" else True if name == "freeze_codebook" else 0.3)
    assert_same_step(*(step(layer, draw(3, 20, DIM)) for layer in layers))


def test_writing_where_the_channels_are() -> None:
    layers = pair()
    for layer in layers:
        layer.channel_last = False
    assert_same_step(*(step(layer, draw(3, DIM, 20)) for layer in layers))


def test_public_names_of_the_codebook() -> None:
    for keywords in ({}, {"use_cosine_sim": True}, OWN_CODES, LEARNABLE):
        ours, theirs = pair(**keywords)
        for name in ("codebook_size", "num_codebooks", "decay", "eps", "kmeans_iters", "threshold_ema_dead_code"):
            assert getattr(ours._codebook, name) == getattr(theirs._codebook, name)
        for name in ("use_cosine_sim", "learnable_codebook", "ema_update", "manual_ema_update"):
            assert getattr(ours._codebook, name) == getattr(theirs._codebook, name)
        assert_close(ours._codebook.transform_input(draw(9, 4)), theirs._codebook.transform_input(draw(9, 4)))
    results = []
    for layer in pair(kmeans_init=True):
        torch.manual_seed(0)
        layer._codebook.init_embed_(draw(1, 60, DIM))
        before = layer.codebook.clone()
        layer._codebook.init_embed_(draw(1, 60, DIM, seed=1))
        assert torch.equal(layer.codebook, before)
        results.append(layer.state_dict())
    assert_all_close(*results)


def test_their_sequential_takes_ours() -> None:
    residual = {"dim": DIM, "num_quantizers": 2, "codebook_size": 8}
    for layer in (VectorQuantize(DIM, 8), ResidualVQ(**residual), GroupedResidualVQ(**residual, groups=2)):
        model = Sequential(nn.Linear(DIM, DIM), layer, nn.Linear(DIM, 3))
        assert model(draw(3, 20, DIM))[0].shape == (3, 20, 3)


def test_their_hierarchical_vq_runs_on_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for layer_class in (VectorQuantize, Theirs):
        monkeypatch.setattr(hierarchical_vq, "VectorQuantize", layer_class)
        torch.manual_seed(0)
        layer = hierarchical_vq.HierarchicalVQ(
            dim=DIM, codebook_size=NUM_CODES, scales=(1, 3, 8), threshold_ema_dead_code=0, kmeans_init=False
        )
        assert isinstance(layer.vq, layer_class)
        quantized, indices, loss = layer(draw(3, DIM, 8), lens=torch.tensor([8, 5, 2]))
        loss.backward()
        results.append([quantized.detach(), *indices, loss.detach(), layer.get_output_from_indices(indices).detach()])
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"vq_bridge": nn.Identity(), "learnable_codebook": False}, "vq_bridge needs learnable_codebook=True"),
        ({"vq_bridge": nn.Identity(), "ema_update": True}, "learnable_codebook=True needs ema_update=False"),
        ({"directional_reparam": True}, "needs threshold_ema_dead_code > 0, got 0"),
        ({"directional_reparam": True, "rotation_trick": True}, "must not both be True"),
        ({"orthogonal_reg_weight": -1.0}, "orthogonal_reg_weight must be >= 0, got -1.0"),
        ({"orthogonal_reg_max_codes": 0}, "orthogonal_reg_max_codes must be None or >= 1, got 0"),
        ({"orthogonal_reg_weight": 1.0, "orthogonal_reg_active_codes_only": True, **OWN_CODES}, "needs one codebook"),
    ],
)
def test_conflicting_keywords(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VectorQuantize(DIM, NUM_CODES, **keywords)
