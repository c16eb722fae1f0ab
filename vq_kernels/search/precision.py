"""What the machine does with a float32 matrix product, which switches outside this library decide."""

import torch


def float32_products_are_exact_enough(device_type: str) -> bool:
    """Whether float32 matrix products on such a device are float32's own, not TF32's or bfloat16's.

    `torch.set_float32_matmul_precision`, `torch.backends.*.fp32_precision` and their older forms all end up in the
    settings read here. The certificate of the search holds for float32 rounding only, so a lower setting makes the
    search use float64: no switch changes a result.
    """
    backend = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision in ("ieee", "none")
