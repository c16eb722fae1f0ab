"""Product and residual codebooks to faiss and back, with the stored codes.

faiss searches in millions of compressed vectors; this library fits the codebooks and finds the codes exactly.
"""

from typing import Any

import torch
from torch import Tensor

from vq_kernels.modules.base import QuantizerBase
from vq_kernels.modules.indices import checked_indices
from vq_kernels.modules.residual_vector_quantizer import ResidualVectorQuantizer
from vq_kernels.modules.vector_quantizer import VectorQuantizer
from vq_kernels.search.validation import check_tensor

_MOST_BITS = 16  # faiss computes the tables of all 2^bits codes in each search


def to_faiss(quantizer: VectorQuantizer | ResidualVectorQuantizer, indices: Tensor | None = None) -> Any:
    """Returns a trained faiss index with the codes of a quantizer.

    A `VectorQuantizer` becomes an `IndexPQ` with one sub-quantizer for each head; if the heads share a codebook, it is
    repeated. A `ResidualVectorQuantizer` becomes an `IndexResidualQuantizer` that encodes greedily, as the module does.

    Args:
        quantizer: with metric "euclidean", 2^b codes, b in [1, 16], and codes that float32 holds.
        indices: [N, heads] or [N, Q], any integer dtype ([N] for one head), of the vectors to add to the index, as
            `encode` returns them. None: the index is empty, and its `add` encodes vectors by faiss.

    Returns:
        faiss.IndexPQ or faiss.IndexResidualQuantizer.

    Raises:
        ImportError: faiss is not installed.
        TypeError: another class; float64 codes; indices are not integers.
        ValueError: a configuration that faiss cannot express; the codes still wait for data; indices do not fit.
    """
    import faiss

    codebook, bits = _checked_codebook(quantizer)
    num_books, num_codes, code_dim = codebook.shape
    index: Any
    if isinstance(quantizer, VectorQuantizer):
        index = faiss.IndexPQ(num_books * code_dim, num_books, bits)
        faiss.copy_array_to_vector(codebook.numpy().ravel(), index.pq.centroids)
    else:
        index = faiss.IndexResidualQuantizer(code_dim, num_books, bits)
        faiss.copy_array_to_vector(codebook.numpy().ravel(), index.rq.codebooks)
        index.rq.is_trained, index.rq.max_beam_size = True, 1
    index.is_trained = True
    if indices is not None:
        check_tensor("indices", indices)
        if num_books == 1 and indices.dim() == 1:
            indices = indices[:, None]
        if indices.dim() != 2 or indices.shape[1] != num_books:
            raise ValueError(f"indices must be [N, {num_books}], got {tuple(indices.shape)}")
        wide = checked_indices(indices.cpu(), num_codes)
        if bool((wide < 0).any()):
            raise ValueError("indices must not hold -1, which marks padding")
        index.add_sa_codes(faiss.pack_bitstrings(wide.numpy(), bits))
    return index


def from_faiss(source: Any, **options: Any) -> VectorQuantizer | ResidualVectorQuantizer:
    """Returns a quantizer with the codes of a trained faiss index or quantizer.

    Args:
        source: an `IndexPQ` or `ProductQuantizer`, which become a `VectorQuantizer` with separate codebooks; or an
            `IndexResidualQuantizer` or `ResidualQuantizer`, which become a `ResidualVectorQuantizer`.
        options: arguments of `from_codebook`, such as `freeze=True`.

    Raises:
        ImportError: faiss is not installed.
        TypeError: another class.
        ValueError: source is not trained, or its stages differ in their number of codes.
    """
    import faiss

    kind, bits, num_books = _kind_and_bits(source)
    if not getattr(source, "is_trained", True):
        raise ValueError(f"source must be trained, got an untrained {type(source).__name__}")
    stored = kind.centroids if isinstance(kind, faiss.ProductQuantizer) else kind.codebooks
    codes = torch.from_numpy(faiss.vector_to_array(stored))
    codebook = codes.view(num_books, 2**bits, -1)
    if isinstance(kind, faiss.ProductQuantizer):
        return VectorQuantizer.from_codebook(codebook, **options)
    return ResidualVectorQuantizer.from_codebook(codebook, **options)


def indices_from_faiss(index: Any) -> Tensor:
    """Returns the indices of the vectors stored in an `IndexPQ` or `IndexResidualQuantizer`, for `decode`.

    Returns:
        [N, M] int64, for M sub-quantizers or stages; [N] for an `IndexPQ` with one.

    Raises:
        ImportError, TypeError, ValueError: as for `from_faiss`.
    """
    import faiss

    kind, bits, num_books = _kind_and_bits(index)
    if kind is index:
        raise TypeError(f"index must be an IndexPQ or IndexResidualQuantizer, got {type(index).__name__}")
    packed = faiss.vector_to_array(index.codes).reshape(index.ntotal, index.code_size)
    indices = torch.from_numpy(faiss.unpack_bitstrings(packed, num_books, bits)).long()
    return indices[:, 0] if isinstance(index, faiss.IndexPQ) and num_books == 1 else indices


def _checked_codebook(quantizer: QuantizerBase) -> tuple[Tensor, int]:
    """The codes [M, K, D] as faiss stores them, float32 on the CPU, and the bits of an index."""
    if not isinstance(quantizer, VectorQuantizer | ResidualVectorQuantizer):
        name = type(quantizer).__name__
        raise TypeError(f"quantizer must be a VectorQuantizer or ResidualVectorQuantizer, got {name}")
    if quantizer.metric != "euclidean":
        raise ValueError(f"quantizer must have metric='euclidean', got {quantizer.metric!r}")
    bits = quantizer.num_codes.bit_length() - 1
    if quantizer.num_codes != 2**bits or not 1 <= bits <= _MOST_BITS:
        raise ValueError(f"num_codes must be a power of two in [2, {2**_MOST_BITS}], got {quantizer.num_codes}")
    if isinstance(quantizer, ResidualVectorQuantizer) and quantizer.heads > 1:
        raise ValueError(f"a ResidualVectorQuantizer must have heads=1, got {quantizer.heads}")
    if quantizer.codebook.dtype == torch.float64:
        raise TypeError("quantizer must have codes that float32 holds, got torch.float64")
    if bool((quantizer.needs_data >= 1).any()):
        raise ValueError("quantizer must have its codes, but they wait for the first batch: train it or call fit")
    codes = quantizer.codebook.detach().float().cpu()
    codes = codes.view(-1, *codes.shape[-2:])
    if isinstance(quantizer, VectorQuantizer):
        codes = codes.expand(quantizer.heads, -1, -1)
    return codes.contiguous(), bits


def _kind_and_bits(source: Any) -> tuple[Any, int, int]:
    """The faiss quantizer of an index (or source itself), the bits of each index, and the number of codebooks."""
    import faiss

    kind = getattr(source, "pq", None) or getattr(source, "rq", source)
    if isinstance(source, faiss.IndexPQ | faiss.ProductQuantizer):
        return kind, int(kind.nbits), int(kind.M)
    if not isinstance(source, faiss.IndexResidualQuantizer | faiss.ResidualQuantizer):
        expected = "an IndexPQ, ProductQuantizer, IndexResidualQuantizer or ResidualQuantizer"
        raise TypeError(f"source must be {expected} of faiss, got {type(source).__name__}")
    bits = set(faiss.vector_to_array(kind.nbits).tolist())
    if len(bits) > 1:
        raise ValueError(f"source must have stages with equal numbers of bits, got {sorted(bits)}")
    return kind, bits.pop(), int(kind.M)
