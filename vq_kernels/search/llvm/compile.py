"""Compiles modules for the CPU, and finds the OpenMP runtime whose threads run them."""

import ctypes
import functools
import os
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

_C_TYPES: dict[str, Any] = {"void": None, "float": ctypes.c_float, "double": ctypes.c_double, "i64": ctypes.c_int64}
_engines: list[llvm.ExecutionEngine] = []  # they own the code


def compile_module(
    module: ir.Module, cpu: str | None = None, features: str | None = None
) -> dict[str, Callable[..., Any]]:
    """Return the functions of the module by name. Pointers are passed as addresses.

    Args:
        module: what to compile.
        cpu, features: LLVM's names. Default: those of this CPU.
    """
    for function in module.functions:
        if function.is_declaration and not function.name.startswith("llvm."):
            llvm.add_symbol(function.name, address_of(getattr(openmp(), function.name)))
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name() if cpu is None else cpu,
        features=llvm.get_host_cpu_features().flatten() if features is None else features,
        opt=3,
        codemodel="jitdefault",
        jit=True,
    )
    parsed = llvm.parse_assembly(str(module))
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    engine = llvm.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    _engines.append(engine)
    found: dict[str, Callable[..., Any]] = {}
    for function in module.functions:
        if not function.is_declaration:
            signature = (function.return_value.type, *(argument.type for argument in function.args))
            types = (_C_TYPES.get(str(kind), ctypes.c_void_p) for kind in signature)
            found[function.name] = ctypes.CFUNCTYPE(*types)(engine.get_function_address(function.name))
    return found


@functools.cache
def openmp() -> Any:
    """Return the OpenMP runtime of PyTorch if it is GNU's or has its interface; otherwise None.

    Its threads wait for work between two calls of PyTorch, so they begin at once.
    """
    runtime = ctypes.CDLL(None) if os.name == "posix" else None
    return runtime if hasattr(runtime, "GOMP_parallel") else None


def address_of(function: Any) -> Any:
    """Return the address of a ctypes function."""
    return ctypes.cast(function, ctypes.c_void_p).value
