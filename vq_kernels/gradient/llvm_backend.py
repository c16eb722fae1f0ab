"""The gradient of the codebook on the CPU, as one loop in machine code."""

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from torch import Tensor, float32, float64, int64

from vq_kernels.search.llvm.builder import F32, F64, I64, Builder, integer
from vq_kernels.search.llvm.compile import compile_module
from vq_kernels.search.llvm.launch import readable


def codebook_gradient(x: Tensor, codebook: Tensor, indices: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    """Sum (code - row) / divisor over the rows of each code, in their order and in float64, and count the rows.

    Args:
        x: [N, D], float32, float16 or bfloat16, on the CPU.
        codebook: [K, D], likewise.
        indices: [N] int64 in [0, K).
        divisor: at least 1.

    Returns:
        [K, D] float32, and counts [K] int64.
    """
    (num_codes, code_dim), num_rows = codebook.shape, x.shape[0]
    rows, codes, chosen = readable(x).contiguous(), readable(codebook).contiguous(), indices.contiguous()
    sums, means = (codes.new_zeros(codebook.shape, dtype=dtype) for dtype in (float64, float32))
    counts = codes.new_zeros(num_codes, dtype=int64)
    outputs = (output.data_ptr() for output in (sums, means, counts))
    _kernel()(
        rows.data_ptr(), num_rows, codes.data_ptr(), num_codes, code_dim, chosen.data_ptr(), divisor, *outputs
    )  # fmt: skip
    return means, counts


@functools.cache
def _kernel() -> Callable[..., Any]:
    f32s, f64s, i64s = (kind.as_pointer() for kind in (F32, F64, I64))
    arguments = {"x": f32s, "num_rows": I64, "codebook": f32s, "num_codes": I64, "code_dim": I64, "indices": i64s}
    arguments |= {"divisor": F64, "sums": f64s, "means": f32s, "counts": i64s}
    module = ir.Module("vq_kernels")
    b = Builder(module, "codebook_gradient", ir.VoidType(), arguments)
    x, num_rows, codebook, num_codes, code_dim, indices, divisor, sums, means, counts = b.function.args
    with b.loop(num_rows) as r:
        index = b.read(indices, r)
        row, code, total = b.at(x, b.mul(r, code_dim)), *(b.at(p, b.mul(index, code_dim)) for p in (codebook, sums))
        with b.loop(code_dim) as d:
            difference = b.fsub(b.fpext(b.read(code, d), F64), b.fpext(b.read(row, d), F64))
            b.store(b.fadd(b.read(total, d), difference), b.at(total, d))
        b.store(b.add(b.read(counts, index), integer(1)), b.at(counts, index))
    with b.loop(num_codes) as k, b.if_then(b.icmp_signed(">", b.read(counts, k), integer(0))):
        total, mean = (b.at(p, b.mul(k, code_dim)) for p in (sums, means))
        with b.loop(code_dim) as d:
            b.store(b.fptrunc(b.fdiv(b.read(total, d), divisor), F32), b.at(mean, d))
    b.ret_void()
    return compile_module(module)["codebook_gradient"]
