"""`torch.func.vmap` over rows, codebooks and both, and codebooks [H, K, D] in one call, against a loop."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap

from vq_kernels import (
    PreparedCodebook,
    ResidualVectorQuantizer,
    VectorQuantize,
    VectorQuantizer,
    most_similar_code,
    nearest_code,
    nearest_code_topk,
    vector_quantize,
)
from vq_kernels.compat import GroupedResidualVQ, ResidualVQ
from vq_kernels.cross_entropy import code_cross_entropy

Call = Callable[[Tensor, Tensor], Sequence[Tensor]]
CALLS: dict[str, Call] = {
    "nearest": nearest_code,
    "topk": lambda x, codebook: nearest_code_topk(x, codebook, 3),
    "most similar": most_similar_code,
    "quantize": lambda x, codebook: vector_quantize(x, codebook, commitment_weight=0.25),
    "gradient": grad(lambda x, codebook: vector_quantize(x, codebook, commitment_weight=0.25).loss, argnums=(0, 1)),
    "cross-entropy": lambda x, codebook: [code_cross_entropy(x, codebook, torch.arange(x.shape[0]) % 8)],
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(found: Sequence[Tensor], each: list[Sequence[Tensor]]) -> None:
    for part, expected in zip(found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(part, torch.stack(expected), rtol=1e-6, atol=1e-7)
        if part.dtype == torch.int64:
            assert torch.equal(part, torch.stack(expected))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("batch", [1, 3])
def test_over_rows_and_codebooks(name: str, batch: int) -> None:
    call, x, codebooks = CALLS[name], draw(batch, 20, 4), draw(batch, 8, 4, seed=1)
    codebooks[:, 5:] = codebooks[:, :3]  # ties
    pairs = list(zip(x, codebooks, strict=True))
    check(vmap(call)(x, codebooks), [call(*pair) for pair in pairs])
    check(vmap(call, in_dims=(1, 2))(x.movedim(0, 1), codebooks.movedim(0, 2)), [call(*pair) for pair in pairs])
    check(vmap(call, in_dims=(0, None))(x, codebooks[0]), [call(rows, codebooks[0]) for rows in x])
    check(vmap(call, in_dims=(None, 0))(x[0], codebooks), [call(x[0], codebook) for codebook in codebooks])


@pytest.mark.parametrize("shape", [(20, 4), (2, 20, 4), (0, 4)])
def test_single_rows_and_more_dimensions(shape: tuple[int, ...]) -> None:
    x, codebook = draw(3, *shape), draw(8, 4, seed=1)
    check(vmap(nearest_code, in_dims=(0, None))(x, codebook), [nearest_code(rows, codebook) for rows in x])
    if x.dim() == 3 and x.numel():
        found = vmap(vmap(nearest_code, in_dims=(0, None)), in_dims=(0, None))(x, codebook)
        check(found, [nearest_code(rows, codebook) for rows in x])


def test_prepared_codebook_and_dtypes() -> None:
    x, codebook = draw(3, 20, 4).half(), draw(8, 4, seed=1).double()
    prepared = PreparedCodebook.from_codebook(codebook)
    check(vmap(lambda rows: nearest_code(rows, prepared))(x), [nearest_code(rows, codebook) for rows in x])


def test_gradients_through_vmap() -> None:
    x, codebooks = draw(3, 20, 4).requires_grad_(), draw(3, 8, 4, seed=1).requires_grad_()

    def loss(rows: Tensor, codebook: Tensor) -> Tensor:
        quantized, _, loss = vector_quantize(rows, codebook, commitment_weight=0.25)
        return quantized.square().sum() + loss

    found = torch.autograd.grad(vmap(loss)(x, codebooks).sum(), (x, codebooks))
    looped = torch.stack([loss(*pair) for pair in zip(x, codebooks, strict=True)]).sum()
    check(found, list(zip(*torch.autograd.grad(looped, (x, codebooks)), strict=True)))


@pytest.mark.parametrize(
    "module",
    [
        VectorQuantizer(8, 4, warn=False),
        VectorQuantizer(8, 2, heads=2, separate_codebooks=True, metric="cosine", warn=False),
        ResidualVectorQuantizer(2, 8, 4, warn=False),
        VectorQuantize(4, 8),
    ],
    ids=["plain", "heads", "residual", "drop-in"],
)
def test_modules(module: torch.nn.Module) -> None:
    x = draw(3, 1, 20, 4)
    module.eval()
    check(vmap(module)(x)[:2], [module(rows)[:2] for rows in x])
    module.train()
    with pytest.raises(RuntimeError, match=r"in training mode cannot run under torch\.func\.vmap, .* call eval\(\)"):
        vmap(module)(x)


def test_several_drop_ins_after_k_means() -> None:
    layers = [ResidualVQ(dim=4, num_quantizers=2, codebook_size=8, kmeans_init=True).eval() for _ in range(3)]
    x = draw(1, 20, 4)

    def indices() -> Tensor:
        parameters, buffers = stack_module_state(layers)
        states: Tensor = vmap(lambda *state: functional_call(layers[0], state, (x,))[1])(parameters, buffers)
        return states

    for layer in layers:
        with pytest.raises(RuntimeError, match="mapped before k-means; call it on a batch"):
            indices()
        layer(draw(1, 30, 4, seed=1))
    assert torch.equal(indices(), torch.stack([layer(x)[1] for layer in layers]))
    check(vmap(layers[0])(x[None])[:2], [layers[0](x)[:2]])


def test_a_drawn_number_of_stages_is_refused() -> None:
    for layer in (ResidualVQ, GroupedResidualVQ):
        with pytest.raises(RuntimeError, match=r"in training mode cannot run under torch\.func\.vmap"):
            vmap(layer(dim=4, num_quantizers=2, codebook_size=8, quantize_dropout=True))(draw(3, 1, 20, 4))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_codebook_for_each_x(backend: str) -> None:
    x, codebooks = draw(3, 2, 10, 4), draw(3, 8, 4, seed=1).double()
    found = nearest_code(x, codebooks, backend=backend)
    assert [part.shape for part in found] == [(3, 2, 10), (3, 2, 10, 4), (3, 2, 10)]
    check(found, [nearest_code(*pair) for pair in zip(x, codebooks, strict=True)])
    assert nearest_code(x[:1, 0], codebooks[:1]).indices.shape == (1, 10)
    assert nearest_code(x[:, 0, 0], codebooks).indices.shape == (3,)
    assert nearest_code(x[:, :0], codebooks).codes.shape == (3, 0, 10, 4)


@pytest.mark.parametrize(
    ("shape", "codebook_shape"),
    [((2, 10, 4), (3, 8, 4)), ((3, 10, 5), (3, 8, 4)), ((4,), (3, 8, 4)), ((0, 10, 4), (0, 8, 4))],
)
def test_a_codebook_for_each_x_does_not_fit(shape: tuple[int, ...], codebook_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x must be \[\d, \.\.\., 4\] to match codebook .* with H >= 1, got"):
        nearest_code(torch.zeros(shape), torch.zeros(codebook_shape))


def test_functions_for_one_codebook_refuse_several() -> None:
    for call in (vector_quantize, most_similar_code, PreparedCodebook.from_codebook):
        arguments = (draw(3, 8, 4),) if call == PreparedCodebook.from_codebook else (draw(3, 5, 4), draw(3, 8, 4))
        with pytest.raises(ValueError, match=r"codebook must be \[K, D\] with K >= 1 and D >= 1, got \(3, 8, 4\)"):
            call(*arguments)
