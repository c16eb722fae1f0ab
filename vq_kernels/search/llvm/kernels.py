"""The kernels, in LLVM's intermediate representation.

    prepare_codes      the operand of a codebook, as `torch_bounds.prepare` computes it without scaling
    search             the index, the code and the squared distance of each row
    search_as_member   the same, as one of the threads of an OpenMP team
    search_few         the same for a few rows and codes as they are, if the error bounds decide

The search computes the upper bounds U_k of torch_bounds.py. Rows lie in the lanes of vectors and codes are broadcast,
so the two best bounds of a row stay in registers and none is stored. The bounds of several codes are summed at a time,
because a multiply-add takes several clocks. Blocks of codes stay in the cache while the rows of a chunk pass.

A chunk is stored in tiles [D + 4, lanes], the columns of which are rows: (x - mean)·scale, then the norm, the best
bound, the next one and the index of the best. If the next one is below the lower bound of the best, the row is
certified. Otherwise the codes that may reach that bound are compared by float64 sums of (x_j - c_kj)².
"""

from typing import Any

from llvmlite import ir

from vq_kernels.search.llvm.builder import F32, F64, I32, I64, Builder, integer, vector
from vq_kernels.search.torch_bounds import HIDDEN_NORM, ROW_LIMIT

CODES_AT_A_TIME = 4
_FEW_ROWS = 4  # of a chunk, up to which a tile would be mostly empty
STATE_ROWS = 4  # of a tile, below those of x
_AVERAGED_CODES = 64  # for the mean, as any shift is right
_MANY_CANDIDATES = 16  # a row with more of them counts as exhaustive
_CERTIFIED, _RERANKED, _EXHAUSTIVE = map(integer, range(3))
_F32S, _F64S, _I64S = (kind.as_pointer() for kind in (F32, F64, I64))


def build_module(lanes: int, *, openmp: bool) -> ir.Module:
    """Return a module with the kernels, for tiles of `lanes` rows; `search_as_member` only with an OpenMP runtime."""
    module = ir.Module("vq_kernels")
    _build_prepare_codes(module)
    _build_search(module, lanes)
    _build_search_few(module)
    if openmp:
        _build_search_as_member(module)
    return module


def _build_prepare_codes(module: ir.Module) -> None:
    """Write minus_mean [D], matrix [K padded, D + 2] and error_constant [K] of a codebook [K, D].

    Return the length of the longest centred code, or NaN. sums [D] are zeros before.
    """
    arguments = {"codebook": _F32S, "num_codes": I64, "padded_codes": I64, "code_dim": I64}
    arguments |= {"factor": F32, "tiny": F32, "never": F32}
    arguments |= {"sums": _F64S, "minus_mean": _F32S, "matrix": _F32S, "error_constant": _F32S}
    b = Builder(module, "prepare_codes", F32, arguments)
    codebook, num_codes, padded_codes, code_dim, factor, tiny, never = b.function.args[:7]
    sums, minus_mean, matrix, error_constant = b.function.args[7:]
    width = b.add(code_dim, integer(2))
    step = b.add(b.sdiv(num_codes, integer(_AVERAGED_CODES)), integer(1))
    with b.loop(num_codes, step=step) as k, b.loop(code_dim) as d:
        total = b.at(sums, d)
        b.store(b.fadd(b.load(total), b.fpext(b.read(codebook, b.mul(k, code_dim), d), F64)), total)
    averaged = b.sitofp(b.sdiv(b.add(num_codes, b.sub(step, integer(1))), step), F64)
    with b.loop(code_dim) as d:
        b.store(b.fptrunc(b.fdiv(b.fneg(b.read(sums, d)), averaged), F32), b.at(minus_mean, d))
    longest = b.variable(ir.Constant(F32, 0.0))
    with b.loop(num_codes) as k:
        code, target = b.at(codebook, b.mul(k, code_dim)), b.at(matrix, b.mul(k, width))
        square = b.variable(ir.Constant(F32, 0.0))
        with b.loop(code_dim) as d:
            centred = b.fadd(b.read(code, d), b.read(minus_mean, d))
            b.store(centred, b.at(target, d))
            b.update(square, b.multiply_add(centred, centred, b.load(square), any_order=True))
        norm = b.square_root(b.load(square))
        sq_norm = b.fmul(norm, norm)
        error = b.multiply_add(factor, sq_norm, tiny)
        b.store(error, b.at(error_constant, k))
        b.store(b.multiply_add(sq_norm, ir.Constant(F32, -0.5), error), b.at(target, code_dim))
        b.store(b.fmul(factor, b.fadd(norm, ir.Constant(F32, HIDDEN_NORM))), b.at(target, code_dim, 1))
        b.update(longest, b.larger_or_nan(b.load(longest), norm))
    with b.loop(padded_codes, start=num_codes) as k:
        target = b.at(matrix, b.mul(k, width))
        with b.loop(width) as d:
            b.store(ir.Constant(F32, 0.0), b.at(target, d))
        b.store(never, b.at(target, code_dim))
    b.ret(b.load(longest))


def _build_search(module: ir.Module, lanes: int) -> None:
    """Search the rows of x [N, D] from first_row to last_row. Add to statistics [3] how many each step decides.

    The rows of x are `stride` elements apart. scratch has room for the tiles of chunk_rows rows, a multiple of `lanes`,
    and D elements. padded_codes and block_codes are multiples of CODES_AT_A_TIME.
    """
    arguments = {"first_row": I64, "last_row": I64, "x": _F32S, "stride": I64}
    arguments |= {"codebook": _F32S, "num_codes": I64, "code_dim": I64, "scale": _F32S, "minus_mean": _F32S}
    arguments |= {"matrix": _F32S, "padded_codes": I64, "error_constant": _F32S, "chunk_rows": I64, "block_codes": I64}
    arguments |= {"indices": _I64S, "codes": _F32S, "sq_distances": _F64S, "scratch": _F32S, "statistics": _I64S}
    b = Builder(module, "search", ir.VoidType(), arguments)
    first_row, last_row, x, stride, codebook, num_codes, code_dim, scale, minus_mean = b.function.args[:9]
    matrix, padded_codes, error_constant, chunk_rows, block_codes = b.function.args[9:14]
    indices, codes, sq_distances, scratch, statistics = b.function.args[14:]
    tile_rows = b.add(code_dim, integer(STATE_ROWS))
    column = b.at(scratch, b.mul(chunk_rows, tile_rows))

    def tile_of(row: Any) -> Any:
        return b.at(scratch, b.mul(b.sdiv(row, integer(lanes)), b.mul(tile_rows, integer(lanes))))

    with b.loop(last_row, start=first_row, step=chunk_rows) as first:
        num_rows = b.least(chunk_rows, b.sub(last_row, first))
        with b.loop(num_rows, step=lanes) as r:
            places = [b.least(b.add(r, integer(i)), b.sub(num_rows, integer(1))) for i in range(lanes)]
            rows = [b.at(x, b.mul(b.add(first, place), stride)) for place in places]
            _fill_tile(b, tile_of(r), rows, code_dim, b.load(scale), minus_mean)
        with b.if_else(b.icmp_signed("<=", num_rows, integer(_FEW_ROWS))) as (few, many):
            with few, b.loop(num_rows) as r:
                _scan_row(b, b.at(scratch, r), column, matrix, num_codes, code_dim, lanes)
            with many, b.loop(padded_codes, step=block_codes) as first_code:
                last_code = b.least(b.add(first_code, block_codes), padded_codes)
                with b.loop(num_rows, step=lanes) as r:
                    _scan_tile(b, tile_of(r), matrix, first_code, last_code, code_dim, lanes)
        with b.loop(num_rows) as r:
            row, tile = b.add(first, r), b.at(tile_of(r), b.srem(r, integer(lanes)))
            values, step = b.at(x, b.mul(row, stride)), b.variable(_CERTIFIED)
            state = [b.read(tile, b.mul(code_dim, integer(lanes)), i * lanes) for i in range(STATE_ROWS)]
            norm, best, second, found = state
            found = b.sext(b.bitcast(found, I32), I64)
            index = b.variable(b.least(found, b.sub(num_codes, integer(1))))  # a row out of range may find the padding
            slope = b.read(matrix, b.mul(b.load(index), b.add(code_dim, integer(2))), code_dim, 1)
            error = b.multiply_add(norm, slope, b.read(error_constant, b.load(index)))
            lower = b.fsub(best, b.fmul(error, ir.Constant(F32, 2.0)))
            in_range = b.fcmp_ordered("<=", norm, ir.Constant(F32, ROW_LIMIT))
            threshold = b.select(in_range, lower, ir.Constant(F32, float("nan")))
            with b.if_then(b.not_(b.fcmp_ordered("<", second, threshold))):  # NaN certifies nothing
                _copy_column(b, tile, column, code_dim, lanes)
                _rerank(b, values, column, norm, threshold, codebook, matrix, num_codes, code_dim, index, step)
            _write_row(b, row, b.load(index), values, codebook, code_dim, indices, codes, sq_distances)
            counter = b.at(statistics, b.load(step))
            b.store(b.add(b.load(counter), integer(1)), counter)
    b.ret_void()


def _build_search_few(module: ir.Module) -> None:
    """Search the rows of x [N, D] without an operand, with mean 0 and scale 1.

    Return how many rows the bounds do not decide. Their outputs are not written.
    """
    arguments = {"x": _F32S, "stride": I64, "num_rows": I64, "codebook": _F32S, "num_codes": I64, "code_dim": I64}
    arguments |= {"factor": F32, "tiny": F32, "shortest": F32, "longest": F32}
    arguments |= {"indices": _I64S, "codes": _F32S, "sq_distances": _F64S}
    b = Builder(module, "search_few", I64, arguments)
    x, stride, num_rows, codebook, num_codes, code_dim, factor, tiny, shortest, longest = b.function.args[:10]
    outputs, undecided = b.function.args[10:], b.variable(integer(0))
    zero, lowest = ir.Constant(F32, 0.0), ir.Constant(F32, float("-inf"))
    with b.loop(num_rows) as r:
        row, square = b.at(x, b.mul(r, stride)), b.variable(zero)
        with b.loop(code_dim) as d:
            b.update(square, b.multiply_add(b.read(row, d), b.read(row, d), b.load(square), any_order=True))
        norm = b.fadd(b.square_root(b.load(square)), ir.Constant(F32, HIDDEN_NORM))
        best, second, error, radius = (b.variable(value) for value in (lowest, lowest, zero, zero))
        index = b.variable(integer(0))
        with b.loop(num_codes) as k:
            code, product, sq_length = b.at(codebook, b.mul(k, code_dim)), b.variable(zero), b.variable(zero)
            with b.loop(code_dim) as d:
                entry = b.read(code, d)
                b.update(product, b.multiply_add(b.read(row, d), entry, b.load(product), any_order=True))
                b.update(sq_length, b.multiply_add(entry, entry, b.load(sq_length), any_order=True))
            length = b.square_root(b.load(sq_length))
            sq_norm, slope = b.fmul(length, length), b.fmul(factor, b.fadd(length, ir.Constant(F32, HIDDEN_NORM)))
            own_error = b.multiply_add(norm, slope, b.multiply_add(factor, sq_norm, tiny))
            score = b.multiply_add(sq_norm, ir.Constant(F32, -0.5), b.load(product))
            bound, top = b.fadd(score, own_error), b.load(best)
            higher = b.fcmp_ordered(">", bound, top)
            b.update(index, b.select(higher, k, b.load(index)))
            b.update(error, b.select(higher, own_error, b.load(error)))
            b.update(second, b.larger(b.smaller(bound, top), b.load(second)))
            b.update(best, b.larger(bound, top))
            b.update(radius, b.larger_or_nan(b.load(radius), length))
        lower = b.fsub(b.load(best), b.fmul(b.load(error), ir.Constant(F32, 2.0)))
        decided = b.fcmp_ordered("<", b.load(second), lower)
        for condition in (
            b.fcmp_ordered("<=", norm, ir.Constant(F32, ROW_LIMIT)),
            b.fcmp_ordered(">=", b.load(radius), shortest),
            b.fcmp_ordered("<=", b.load(radius), longest),
        ):
            decided = b.and_(decided, condition)
        with b.if_else(decided) as (certified, other):
            with certified:
                _write_row(b, r, b.load(index), row, codebook, code_dim, *outputs)
            with other:
                b.update(undecided, b.add(b.load(undecided), integer(1)))
    b.ret(b.load(undecided))


def _build_search_as_member(module: ir.Module) -> None:
    """Search shares of the rows: those of the numbers that this thread has, counted in steps of the size of its team.

    packed holds the numbers of rows, of rows per share, and of elements of the scratch of a share; then the arguments
    of `search` from x on, with the scratch and the statistics of share 0.
    """
    b = Builder(module, "search_as_member", ir.VoidType(), {"packed": _I64S})
    (packed,) = b.function.args
    search = module.get_global("search")
    member, members = (
        b.sext(b.call(ir.Function(module, ir.FunctionType(I32, []), f"omp_get_{name}"), []), I64)
        for name in ("thread_num", "num_threads")
    )
    num_rows, share, scratch_size = (b.read(packed, i) for i in range(3))
    arguments = []
    for i, kind in enumerate(argument.type for argument in search.args[2:]):
        value = b.read(packed, 3 + i)
        arguments.append(b.inttoptr(value, kind) if isinstance(kind, ir.PointerType) else value)
    *shared, scratch, statistics = arguments
    with b.loop(num_rows, start=b.mul(member, share), step=b.mul(members, share)) as first:
        number = b.sdiv(first, share)
        own = b.at(scratch, b.mul(number, scratch_size)), b.at(statistics, b.mul(number, integer(3)))
        b.call(search, [first, b.least(b.add(first, share), num_rows), *shared, *own])
    b.ret_void()


def _fill_tile(b: Builder, tile: Any, rows: list[Any], code_dim: Any, scale: Any, minus_mean: Any) -> None:
    """Write the tile of the rows at these pointers, with the state before any code."""
    lanes = len(rows)
    scales, square = b.splat(scale, lanes), b.variable(vector(F32, lanes))
    with b.loop(code_dim) as d:
        entries = ir.Constant(ir.VectorType(F32, lanes), ir.Undefined)
        for i, row in enumerate(rows):
            entries = b.insert_element(entries, b.read(row, d), ir.Constant(I32, i))
        shifted = b.multiply_add(entries, scales, b.splat(b.read(minus_mean, d), lanes))
        b.write_vector(shifted, b.at(tile, b.mul(d, integer(lanes))))
        b.update(square, b.multiply_add(shifted, shifted, b.load(square)))
    norm = b.fadd(b.square_root(b.load(square)), vector(F32, lanes, HIDDEN_NORM))
    lowest, first = vector(F32, lanes, float("-inf")), vector(F32, lanes)  # the bits of 0.0 are those of index 0
    for i, value in enumerate((norm, lowest, lowest, first)):
        b.write_vector(value, b.at(tile, b.mul(code_dim, integer(lanes)), i * lanes))


def _scan_tile(b: Builder, tile: Any, matrix: Any, first_code: Any, last_code: Any, code_dim: Any, lanes: int) -> None:
    """Update the state of a tile by the codes from first_code to last_code. Of equal bounds the earlier stays ahead."""
    floats, integers = ir.VectorType(F32, lanes), ir.VectorType(I32, lanes)
    state = b.at(tile, b.mul(code_dim, integer(lanes)))
    norm, *values = (b.read_vector(b.at(state, i * lanes), floats) for i in range(STATE_ROWS))
    best, second, index = (b.variable(value) for value in (*values[:2], b.bitcast(values[2], integers)))
    with b.loop(last_code, start=first_code, step=CODES_AT_A_TIME) as k:
        codes, bounds = [], []
        for i in range(CODES_AT_A_TIME):
            code = b.at(matrix, b.mul(b.add(k, integer(i)), b.add(code_dim, integer(2))))
            constant, slope = (b.splat(b.read(code, code_dim, j), lanes) for j in range(2))
            codes.append(code)
            bounds.append(b.variable(b.multiply_add(norm, slope, constant)))
        with b.loop(code_dim) as d:
            entries = b.read_vector(b.at(tile, b.mul(d, integer(lanes))), floats)
            for code, bound in zip(codes, bounds, strict=True):
                b.update(bound, b.multiply_add(b.splat(b.read(code, d), lanes), entries, b.load(bound)))
        for i, bound in enumerate(bounds):
            value, top = b.load(bound), b.load(best)
            number = b.splat(b.trunc(b.add(k, integer(i)), I32), lanes)
            b.update(index, b.select(b.fcmp_ordered(">", value, top), number, b.load(index)))
            b.update(second, b.larger(b.smaller(value, top), b.load(second)))
            b.update(best, b.larger(value, top))
    for i, value in enumerate((b.load(best), b.load(second), b.bitcast(b.load(index), floats))):
        b.write_vector(value, b.at(state, (1 + i) * lanes))


def _copy_column(b: Builder, tile: Any, column: Any, code_dim: Any, lanes: int) -> None:
    """Write the row in the lane of a tile that `tile` points to to consecutive elements."""
    with b.loop(code_dim) as d:
        b.store(b.read(tile, b.mul(d, integer(lanes))), b.at(column, d))


def _bound(b: Builder, shifted: Any, norm: Any, code: Any, code_dim: Any) -> Any:
    """Return U of one row and one code, summed in any order."""
    bound = b.variable(b.multiply_add(norm, b.read(code, code_dim, 1), b.read(code, code_dim)))
    with b.loop(code_dim) as d:
        b.update(bound, b.multiply_add(b.read(shifted, d), b.read(code, d), b.load(bound), any_order=True))
    return b.load(bound)


def _scan_row(b: Builder, tile: Any, column: Any, matrix: Any, num_codes: Any, code_dim: Any, lanes: int) -> None:
    """Write the state of the row in one lane of a tile. The entries of codes lie in the lanes of vectors here."""
    _copy_column(b, tile, column, code_dim, lanes)
    state = b.at(tile, b.mul(code_dim, integer(lanes)))
    best, second, index = (b.variable(b.read(state, i * lanes)) for i in range(1, STATE_ROWS))
    with b.loop(num_codes) as k:
        bound = _bound(b, column, b.read(state, 0), b.at(matrix, b.mul(k, b.add(code_dim, integer(2)))), code_dim)
        number, top = b.bitcast(b.trunc(k, I32), F32), b.load(best)
        b.update(index, b.select(b.fcmp_ordered(">", bound, top), number, b.load(index)))
        b.update(second, b.larger(b.smaller(bound, top), b.load(second)))
        b.update(best, b.larger(bound, top))
    for i, variable in enumerate((best, second, index), start=1):
        b.store(b.load(variable), b.at(state, i * lanes))


def _rerank(
    b: Builder, x: Any, shifted: Any, norm: Any, threshold: Any, codebook: Any, matrix: Any, num_codes: Any,
    code_dim: Any, index: Any, step: Any,
) -> None:  # fmt: skip
    """Set index to the nearest of the codes that may reach the threshold, and step to the one that this is.

    x and shifted point to the row and to (x - mean)·scale. If the row is not finite, or none of the codes is, index
    becomes 0 and step remains.
    """
    b.update(index, integer(0))
    least, candidates = b.variable(ir.Constant(F64, float("inf"))), b.variable(integer(0))
    with b.loop(num_codes) as k:
        code = b.at(matrix, b.mul(k, b.add(code_dim, integer(2))))
        bound = _bound(b, shifted, norm, code, code_dim)
        with b.if_then(b.not_(b.fcmp_ordered("<", bound, threshold))):  # NaN rules out no code
            b.update(candidates, b.add(b.load(candidates), integer(1)))
            sq_distance = _sq_distance(b, x, b.at(codebook, b.mul(k, code_dim)), code_dim)
            with b.if_then(b.fcmp_ordered("<", sq_distance, b.load(least))):  # of equal ones the earlier stays
                b.update(least, sq_distance)
                b.update(index, k)
    many = b.icmp_signed(">", b.load(candidates), integer(_MANY_CANDIDATES))
    with b.if_then(b.fcmp_ordered("<", b.load(least), ir.Constant(F64, float("inf")))):
        b.update(step, b.select(many, _EXHAUSTIVE, _RERANKED))


def _write_row(
    b: Builder, row: Any, index: Any, values: Any, codebook: Any, code_dim: Any, indices: Any, codes: Any,
    sq_distances: Any,
) -> None:  # fmt: skip
    """Write index, code and squared distance of the row with these values; NaN if they are not finite."""
    b.store(index, b.at(indices, row))
    code, target = b.at(codebook, b.mul(index, code_dim)), b.at(codes, b.mul(row, code_dim))
    zero = b.variable(ir.Constant(F64, 0.0))  # or NaN, if a value is not finite
    with b.loop(code_dim) as d:
        b.store(b.read(code, d), b.at(target, d))
        value = b.fpext(b.read(values, d), F64)
        b.update(zero, b.multiply_add(value, ir.Constant(F64, 0.0), b.load(zero), any_order=True))
    b.store(b.fadd(_sq_distance(b, values, code, code_dim), b.load(zero)), b.at(sq_distances, row))


def _sq_distance(b: Builder, x: Any, code: Any, code_dim: Any) -> Any:
    """Return the float64 sum of (x_d - c_d)². It is not finite if an entry is not."""
    total = b.variable(ir.Constant(F64, 0.0))
    with b.loop(code_dim) as d:
        difference = b.fsub(b.fpext(b.read(x, d), F64), b.fpext(b.read(code, d), F64))
        b.update(total, b.multiply_add(difference, difference, b.load(total), any_order=True))
    return b.load(total)
