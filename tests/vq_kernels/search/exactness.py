"""Shared by the attacks on the search: the backends that can run here, and a check of the contract."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from benchmarks.verification import wrong_rows
from vq_kernels import NearestCode, nearest_code, select_backend
from vq_kernels.search.reference import brute_force_nearest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether the Triton kernels run in the interpreter: on the CPU, a thousand times slower."""

BACKENDS_HERE = ("triton",) if INTERPRETED else ("llvm", "torch", *(["triton"] if torch.cuda.is_available() else []))
"""The backends that this process tests. test_triton_launch.py starts a process that interprets Triton."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16, *((torch.float64,) if "torch" in BACKENDS_HERE else ()))
"""Dtypes of x and the codebook in this process. Only PyTorch supports float64."""


def device_of(backend: str) -> str:
    """The device on which a backend is tested."""
    return "cuda" if backend == "triton" and not INTERPRETED else "cpu"


def require_backend(backend: str) -> None:
    """Skip the test if the backend cannot run here."""
    sample = torch.zeros(1, 1, device=device_of(backend))
    try:
        select_backend(sample, sample, backend)
    except RuntimeError as obstacle:
        pytest.skip(str(obstacle))


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fill the result of `torch.empty` and `new_empty` with NaN or -1, to detect what a kernel fails to write."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(*arguments: object, **options: object) -> Tensor:
            tensor = make(*arguments, **options)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else -1)

        return allocate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned(torch.empty))
        patch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
        yield


def check_exact(backend: str, x: Tensor, codebook: Tensor) -> NearestCode:
    """Search x [N, D] in codebook [K, D], check every output against float64, and return the outputs on the CPU."""
    if backend != "torch" and torch.float64 in (x.dtype, codebook.dtype):
        pytest.skip(f"backend {backend} does not take float64")
    device = device_of(backend)
    found = NearestCode(*(t.cpu() for t in nearest_code(x.to(device), codebook.to(device), backend=backend)))
    check_outputs(found, x, codebook)
    return found


def check_outputs(found: NearestCode, x: Tensor, codebook: Tensor) -> None:
    """Check the outputs of a search of x [N, D] in codebook [K, D] against float64."""
    indices, codes, sq_distances = found
    assert indices.dtype == torch.int64
    assert indices.shape == x.shape[:-1]
    assert ((indices >= 0) & (indices < codebook.shape[0])).all()
    finite = x.isfinite().all(dim=1)
    if codebook.isfinite().all():
        assert wrong_rows(x[finite], codebook, indices[finite]).sum() == 0
    else:
        assert torch.equal(indices[finite], brute_force_nearest(x[finite], codebook))
    assert (indices[~finite] == 0).all()

    chosen = codebook[indices]
    assert codes.dtype == x.dtype
    assert torch.equal(codes.nan_to_num(nan=7.0), chosen.to(x.dtype).nan_to_num(nan=7.0))
    assert sq_distances.dtype == torch.float32
    assert sq_distances[~finite].isnan().all()
    check_sq_distances(sq_distances[finite], x[finite], chosen[finite])


def check_sq_distances(sq_distances: Tensor, x: Tensor, chosen: Tensor) -> None:
    """Within 1e-5 of float64 relative; inf if float32 overflows; to the last bit if float32 is subnormal."""
    usable = chosen.isfinite().all(dim=1)
    expected = (x[usable].double() - chosen[usable].double()).square().sum(dim=1)
    given = sq_distances[usable].double()
    overflows = expected.float().isinf()
    clearly = expected > 1.00002 * torch.finfo(torch.float32).max
    assert given[clearly].isinf().all()
    assert ((given - expected).abs()[~overflows] <= 1e-5 * expected[~overflows] + 2.0**-149).all()
