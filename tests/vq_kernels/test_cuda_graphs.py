"""What torch.compile may capture in CUDA graphs: operators that do not wait for the device."""

import pytest
import torch

import vq_kernels  # noqa: F401 (defines the operators)

WAITING = (
    *("nearest_code", "nearest_code_topk", "most_similar_code", "codebook_gradient", "kmeans_if_needed", "draw_start"),
    *("is_original", "copy_to_search"),
)
CAPTURED = (
    *("nearest_code_triton", "codebook_gradient_triton", "copy"),
    *("code_cross_entropy", "code_cross_entropy_backward"),
)


@pytest.mark.parametrize("name", WAITING + CAPTURED)
def test_operators_that_wait_for_the_device_split_cuda_graphs(name: str) -> None:
    tags = getattr(torch.ops.vq_kernels, name).default.tags
    assert (torch.Tag.cudagraph_unsafe in tags) == (name in WAITING)


def test_every_operator_is_listed() -> None:
    names = {
        schema.name.removeprefix("vq_kernels::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("vq_kernels::")
    }
    assert names == {*WAITING, *CAPTURED}
