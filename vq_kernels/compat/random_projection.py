"""`RandomProjectionQuantizer`, a drop-in replacement for that of vector_quantize_pytorch."""

from typing import Any

import torch
from torch import Tensor, nn

from vq_kernels.compat.arguments import register_in_sequential
from vq_kernels.compat.vector_quantize import VectorQuantize
from vq_kernels.search.validation import check_at_least, check_dtype, check_not_given


class RandomProjectionQuantizer(nn.Module):
    """Labels vectors by the most similar of fixed random codes to random projections of them.

    It has the arguments, results and state dict of vector_quantize_pytorch's `RandomProjectionQuantizer` (1.32.0).

    Example, with dim=512, num_codebooks=16, codebook_dim=256 and codebook_size=1024: x [1, 1024, 512] gives indices
    [1, 1024, 16].

    Args:
        dim: the number of channels of x.
        codebook_size: K, the number of codes of each codebook.
        codebook_dim: the dimension of each projection.
        num_codebooks: H, the number of projections, each with a codebook.
        norm: normalise each vector by LayerNorm, without parameters.
        options: other arguments of `VectorQuantize`. Its dim is num_codebooks·codebook_dim and its `codebook_dim` is
            that too, as in the original, unless it is given.

    Raises:
        NotImplementedError, TypeError, ValueError: as for `VectorQuantize`.

    Source: Chiu et al. 2022, arXiv:2202.01855; names: vector_quantize_pytorch 1.32.0.
    """

    rand_projs: Tensor

    def __init__(
        self,
        *,
        dim: int,
        codebook_size: int,
        codebook_dim: int,
        num_codebooks: int = 1,
        norm: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        check_at_least(1, integer=True, dim=dim, codebook_dim=codebook_dim, num_codebooks=num_codebooks)
        self.num_codebooks = num_codebooks
        self.register_buffer("rand_projs", nn.init.xavier_normal_(torch.empty(num_codebooks, dim, codebook_dim)))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False) if norm else nn.Identity()
        own: dict[str, Any] = {"heads": num_codebooks, "use_cosine_sim": True, "separate_codebook_per_head": True}
        check_not_given(options, "RandomProjectionQuantizer", *own)
        self.vq = VectorQuantize(codebook_dim * num_codebooks, codebook_size, **own, **options)
        register_in_sequential(type(self))

    def forward(self, x: Tensor, indices: Tensor | None = None) -> Tensor:
        """Returns the indices [b, n, H] int64 of x [b, n, dim], or [b, n] if H is 1.

        With `indices` of that shape, it returns their mean cross-entropy [] instead, as `VectorQuantize` does. The
        codes never learn.

        Raises:
            TypeError, ValueError: a tensor's dtype or shape does not fit.
        """
        check_dtype("x", x)
        if x.dim() != 3 or x.shape[-1] != self.rand_projs.shape[1]:
            raise ValueError(f"x must be [b, n, {self.rand_projs.shape[1]}], got {tuple(x.shape)}")
        self.vq.eval()  # in training mode too
        projected = torch.einsum("bnd,hde->bnhe", self.norm(x), self.rand_projs).flatten(2)
        found: Tensor = self.vq(projected, indices=indices)[1]
        return found
