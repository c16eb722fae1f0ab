"""Codebooks and stored codes go to faiss and back unchanged, and faiss finds in them what brute force finds."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.vq_kernels.plain import residual_quantizer, vector_quantizer
from vq_kernels import ResidualVectorQuantizer, VectorQuantizer, nearest_code_topk
from vq_kernels.compat.faiss import from_faiss, indices_from_faiss, to_faiss

faiss = pytest.importorskip("faiss")


def rows(num_rows: int = 600, channels: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, channels, generator=torch.Generator().manual_seed(seed))


def product(num_codes: int = 16, heads: int = 3, **options: Any) -> VectorQuantizer:
    return vector_quantizer(num_codes, 12 // heads, heads=heads, separate_codebooks=True, **options).eval()


def residual(num_codes: int = 16, **options: Any) -> ResidualVectorQuantizer:
    return residual_quantizer(3, num_codes, 12, **options).eval()


QUANTIZERS = {
    "product": product,
    "product, 5 bits": lambda: product(32),  # an index crosses the boundary of a byte
    "product, 10 bits": lambda: product(1024),
    "one part": lambda: product(64, heads=1),
    "shared codebook": lambda: vector_quantizer(16, 4, heads=3).eval(),
    "frozen": lambda: product(freeze_codebook=True),
    "ema": lambda: product(ema_decay=0.9, init="normal"),
    "residual": residual,
    "residual, 7 bits": lambda: residual(128),
    "bfloat16": lambda: residual().bfloat16(),
}


@pytest.fixture(params=QUANTIZERS)
def quantizer(request: pytest.FixtureRequest) -> VectorQuantizer | ResidualVectorQuantizer:
    torch.manual_seed(0)
    made: VectorQuantizer | ResidualVectorQuantizer = QUANTIZERS[request.param]()
    return made


def test_round_trip_is_bit_equal(quantizer: VectorQuantizer | ResidualVectorQuantizer) -> None:
    indices = quantizer.encode(rows())
    index = to_faiss(quantizer, indices)
    assert index.is_trained
    assert index.ntotal == 600
    loaded = faiss.deserialize_index(faiss.serialize_index(index))
    assert torch.equal(indices_from_faiss(loaded), indices)
    for source in (loaded, loaded.pq if isinstance(quantizer, VectorQuantizer) else loaded.rq):
        back = from_faiss(source)
        assert type(back) is type(quantizer)
        assert torch.equal(back.codebook, quantizer.codebook.float().expand_as(back.codebook))
        assert torch.equal(back.eval().decode(indices), quantizer.float().decode(indices))


def test_codes_reconstruct_the_same_vectors(quantizer: VectorQuantizer | ResidualVectorQuantizer) -> None:
    indices = quantizer.float().encode(rows(), dtype=torch.int16)
    reconstructed = torch.from_numpy(to_faiss(quantizer, indices).reconstruct_n(0, 600))
    torch.testing.assert_close(reconstructed, quantizer.decode(indices), rtol=1e-6, atol=1e-6)
    added = to_faiss(quantizer)
    added.add(rows().numpy())  # encoded by faiss: the same codes, as no two distances are close to equal
    assert (indices_from_faiss(added) == indices).float().mean() > 0.999


def test_search_is_that_of_brute_force_over_the_decoded_vectors(
    quantizer: VectorQuantizer | ResidualVectorQuantizer,
) -> None:
    indices = quantizer.float().encode(rows())
    distances, found = to_faiss(quantizer, indices).search(rows(20, seed=1).numpy(), 10)
    expected = nearest_code_topk(rows(20, seed=1), quantizer.decode(indices), 10)
    torch.testing.assert_close(torch.from_numpy(distances), expected.sq_distances, rtol=1e-4, atol=1e-4)
    decoded = quantizer.decode(indices)
    at_found = (decoded[torch.from_numpy(found)] - rows(20, seed=1)[:, None]).square().sum(dim=2)
    torch.testing.assert_close(at_found, expected.sq_distances, rtol=1e-4, atol=1e-4)


def test_an_index_trained_by_faiss() -> None:
    x = rows(3000)
    for index in (faiss.IndexPQ(12, 3, 4), faiss.IndexResidualQuantizer(12, 3, 4)):
        index.train(x.numpy())
        index.add(x.numpy())
        quantizer = from_faiss(index, freeze=True).eval()
        assert quantizer.freeze_codebook
        decoded = quantizer.decode(indices_from_faiss(index))
        torch.testing.assert_close(decoded, torch.from_numpy(index.reconstruct_n(0, 3000)), rtol=1e-6, atol=1e-6)
        greedy = quantizer.decode(quantizer.encode(x))  # faiss encodes residuals by beam search
        assert (x - greedy).square().mean() < 1.2 * (x - decoded).square().mean()


def test_norms_that_faiss_stores_beside_the_indices_are_skipped() -> None:
    index = faiss.IndexResidualQuantizer(12, 3, 5, faiss.METRIC_L2, faiss.AdditiveQuantizer.ST_norm_float)
    index.train(rows(2000).numpy())
    index.add(rows().numpy())
    decoded = from_faiss(index).eval().decode(indices_from_faiss(index))
    torch.testing.assert_close(decoded, torch.from_numpy(index.reconstruct_n(0, 600)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), TypeError, "quantizer must be a VectorQuantizer or .*got Linear"),
        (lambda: product(metric="cosine"), ValueError, "metric='euclidean', got 'cosine'"),
        (lambda: product(100), ValueError, r"num_codes must be a power of two in \[2, 65536\], got 100"),
        (lambda: product(1), ValueError, r"num_codes must be a power of two in \[2, 65536\], got 1"),
        (lambda: residual_quantizer(2, 16, 6, heads=2), ValueError, "must have heads=1, got 2"),
        (lambda: product().double(), TypeError, "float32 holds, got torch.float64"),
        (lambda: product(init="data"), ValueError, "they wait for the first batch"),
    ],
)
def test_what_faiss_cannot_express(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        to_faiss(make())


def test_bad_indices_and_sources() -> None:
    quantizer = product()
    indices = quantizer.encode(rows())
    with pytest.raises(ValueError, match=r"indices must be \[N, 3\], got \(600, 2\)"):
        to_faiss(quantizer, indices[:, :2])
    with pytest.raises(ValueError, match=r"indices must be in \[0, 16\).*got 16"):
        to_faiss(quantizer, torch.where(indices == 0, 16, indices))
    with pytest.raises(ValueError, match="indices must not hold -1"):
        to_faiss(quantizer, torch.where(indices == 0, -1, indices))
    with pytest.raises(TypeError, match="indices must have an integer dtype"):
        to_faiss(quantizer, indices.float())
    with pytest.raises(TypeError, match=r"source must be an IndexPQ.* got IndexFlatL2"):
        from_faiss(faiss.IndexFlatL2(4))
    with pytest.raises(TypeError, match="index must be an IndexPQ or IndexResidualQuantizer, got ProductQuantizer"):
        indices_from_faiss(to_faiss(quantizer).pq)
    with pytest.raises(ValueError, match="source must be trained, got an untrained IndexPQ"):
        from_faiss(faiss.IndexPQ(12, 3, 4))
    bits = faiss.UInt64Vector()
    faiss.copy_array_to_vector(torch.tensor([4, 5]).numpy().astype("uint64"), bits)
    with pytest.raises(ValueError, match=r"stages with equal numbers of bits, got \[4, 5\]"):
        from_faiss(faiss.ResidualQuantizer(12, bits))
