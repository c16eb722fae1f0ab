"""What the kernels are built from: loops, variables and vectors in LLVM's intermediate representation."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

F32, F64, I32, I64 = ir.FloatType(), ir.DoubleType(), ir.IntType(32), ir.IntType(64)
_FUSED = ("contract",)  # a product and a sum may become one multiply-add
_ANY_ORDER = ("contract", "reassoc", "nsz")  # and a sum may be divided among the lanes of a vector


class Builder(ir.IRBuilder):  # type: ignore[misc]
    """Builds one function of a module.

    Args:
        module: receives the function.
        name: of the function.
        result: its type.
        arguments: the types by name. Memory that the function writes must not overlap what other arguments point to.
    """

    def __init__(self, module: ir.Module, name: str, result: ir.Type, arguments: dict[str, ir.Type]) -> None:
        function = ir.Function(module, ir.FunctionType(result, arguments.values()), name)
        for argument in function.args:
            if isinstance(argument.type, ir.PointerType):
                argument.add_attribute("noalias")
        super().__init__(function.append_basic_block())

    @contextmanager
    def loop(self, stop: Any, *, start: Any = 0, step: Any = 1) -> Iterator[Any]:
        """Repeat what is built in the context for start, start + step, ... below stop."""
        before, body, after = self.block, self.append_basic_block(), self.append_basic_block()
        start = integer(start)
        self.cbranch(self.icmp_signed("<", start, stop), body, after)
        self.position_at_end(body)
        counter = self.phi(I64)
        counter.add_incoming(start, before)
        yield counter
        following = self.add(counter, integer(step))
        counter.add_incoming(following, self.block)
        self.cbranch(self.icmp_signed("<", following, stop), body, after)
        self.position_at_end(after)

    def variable(self, value: Any) -> Any:
        """Return a pointer to a variable with this value. The optimiser turns it into a register."""
        with self.goto_entry_block():
            pointer = self.alloca(value.type)
        self.store(value, pointer)
        return pointer

    def update(self, variable: Any, value: Any) -> None:
        """Set the variable."""
        self.store(value, variable)

    def at(self, pointer: Any, *offsets: Any) -> Any:
        """Return the pointer moved by the sum of the offsets, in elements."""
        for offset in offsets:
            pointer = self.gep(pointer, [integer(offset)])
        return pointer

    def read(self, pointer: Any, *offsets: Any) -> Any:
        """Load an element."""
        return self.load(self.at(pointer, *offsets))

    def read_vector(self, pointer: Any, kind: ir.VectorType) -> Any:
        """Load consecutive elements."""
        found = self.load(self.bitcast(pointer, kind.as_pointer()))
        found.align = 4
        return found

    def write_vector(self, value: Any, pointer: Any) -> None:
        """Store consecutive elements."""
        self.store(value, self.bitcast(pointer, value.type.as_pointer())).align = 4

    def splat(self, scalar: Any, lanes: int) -> Any:
        """Return a vector with this scalar in every lane."""
        kind = ir.VectorType(scalar.type, lanes)
        first = self.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
        return self.shuffle_vector(first, first, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))

    def multiply_add(self, a: Any, b: Any, c: Any, *, any_order: bool = False) -> Any:
        """Return a·b + c."""
        flags = _ANY_ORDER if any_order else _FUSED
        return self.fadd(self.fmul(a, b, flags=flags), c, flags=flags)

    def larger(self, a: Any, b: Any) -> Any:
        """Return the larger; b if one is NaN."""
        return self.select(self.fcmp_ordered(">", a, b), a, b)

    def larger_or_nan(self, a: Any, b: Any) -> Any:
        """Return the larger; NaN if one is NaN."""
        return self.select(self.or_(self.fcmp_ordered(">", a, b), self.fcmp_unordered("uno", a, a)), a, b)

    def smaller(self, a: Any, b: Any) -> Any:
        """Return the smaller; b if one is NaN."""
        return self.select(self.fcmp_ordered("<", a, b), a, b)

    def least(self, a: Any, b: Any) -> Any:
        """Return the smaller of two integers."""
        return self.select(self.icmp_signed("<", a, b), a, b)

    def square_root(self, value: Any) -> Any:
        """Return the square root of floats, correctly rounded."""
        kind = value.type
        name = f"llvm.sqrt.v{kind.count}f32" if isinstance(kind, ir.VectorType) else "llvm.sqrt.f32"
        function = self.module.globals.get(name) or ir.Function(self.module, ir.FunctionType(kind, [kind]), name)
        return self.call(function, [value])


def integer(value: Any) -> Any:
    """Return a Python number as a 64-bit constant."""
    return ir.Constant(I64, value) if isinstance(value, int) else value


def vector(kind: ir.Type, lanes: int, value: float = 0) -> Any:
    """Return a constant vector with the value in every lane."""
    return ir.Constant(ir.VectorType(kind, lanes), [ir.Constant(kind, value)] * lanes)
