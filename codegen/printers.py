"""Formulas of `qcompile.expr` as source: one table of operations for Triton, one for C++."""

from __future__ import annotations

import math
from collections.abc import Callable

from qcompile.expr import Expr

_DTYPES = {"f32": "tl.float32", "f16": "tl.float16", "bf16": "tl.bfloat16", "i32": "tl.int32"}

_OPERATORS: dict[str, Callable[..., str]] = {
    "add": "({} + {})".format,
    "sub": "({} - {})".format,
    "mul": "({} * {})".format,
    "and": "({} & {})".format,
    "or": "({} | {})".format,
    "shl": "({} << {})".format,
    "shr": "({} >> {})".format,
    "eq": "({} == {})".format,
}
"""What Triton and C++ write alike."""

_TRITON: dict[str, Callable[..., str]] = _OPERATORS | {
    "where": "tl.where({}, {}, {})".format,
    "exp": "tl.exp({})".format,
    "erf": "tl.math.erf({})".format,
    "sigmoid": "tl.sigmoid({})".format,
    "tanh": "tanh({})".format,
    "maximum": "maximum({}, {})".format,
    "minimum": "minimum({}, {})".format,
    "lookup": lambda *operands: f"lookup({', '.join(operands)})",
}

HELPERS = {
    "tanh": '''@triton.jit
def tanh(x):
    """By the series near 0, where the formula cancels; exp never overflows. Relative error below 2e-6."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    decay = tl.exp(-2.0 * tl.abs(x))
    ratio = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.125, series, tl.where(x < 0, -ratio, ratio))
''',
    "maximum": '''@triton.jit
def maximum(x, least):
    """NaN stays NaN."""
    return tl.where(x < least, least, x)
''',
    "minimum": '''@triton.jit
def minimum(x, most):
    """NaN stays NaN."""
    return tl.where(x > most, most, x)
''',
    "lookup": '''@triton.jit
def lookup(code, v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, v10, v11, v12, v13, v14, v15):
    """The value of a 4-bit code, by halving the table bit by bit."""
    odd = (code & 1) != 0
    second = (code & 2) != 0
    low = tl.where(second, tl.where(odd, v3, v2), tl.where(odd, v1, v0))
    low_high = tl.where(second, tl.where(odd, v7, v6), tl.where(odd, v5, v4))
    high = tl.where(second, tl.where(odd, v11, v10), tl.where(odd, v9, v8))
    high_high = tl.where(second, tl.where(odd, v15, v14), tl.where(odd, v13, v12))
    third = (code & 4) != 0
    return tl.where((code & 8) != 0, tl.where(third, high_high, high), tl.where(third, low_high, low))
''',
}
"""Source of the functions that printed formulas call, by operation."""


def _constant(value: str | int | float | None) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"a constant of a formula is a number, not {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value) if value >= 0 else f"({value!r})"


def to_triton(formula: Expr) -> str:
    """One Triton expression; shared parts are printed as often as they occur, and compilers merge them again.

    Raises:
        KeyError: an operation that the table lacks.
    """
    if formula.op == "var":
        return str(formula.literal)
    if formula.op == "const":
        return _constant(formula.literal)
    operands = [to_triton(arg) for arg in formula.args]
    if formula.op in ("cast", "bitcast"):
        dtype = _DTYPES[str(formula.literal)]
        return f"{operands[0]}.to({dtype}{', bitcast=True' if formula.op == 'bitcast' else ''})"
    return _TRITON[formula.op](*operands)


_CPP: dict[str, Callable[..., str]] = _OPERATORS | {
    "where": "where({}, {}, {})".format,
    "cast": "to_f32({})".format,
    "bitcast": "as_f32({})".format,
    "lookup": lambda code, *values: f"lookup({code}, Table{{{', '.join(values)}}})",
}
"""Of vectors of int32 and float32 (`templates/cpp/vector.h`): what number formats decode by."""


def cpp_constant(value: str | int | float | None) -> str:
    """A number as C++ has it: float32 if it is a float, which must hold it exactly."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"a constant of a formula is a number, not {value!r}")
    if isinstance(value, int):
        return str(value) if value >= 0 else f"({value})"
    if math.isnan(value):
        return '__builtin_nanf("")'
    if math.isinf(value):
        return f"({'-' if value < 0 else ''}__builtin_inff())"
    return f"{value.hex()}f" if value >= 0 else f"({value.hex()}f)"


def to_cpp(formula: Expr) -> str:
    """One C++ expression of vectors.

    Raises:
        KeyError: an operation that the table lacks.
    """
    if formula.op == "var":
        return str(formula.literal)
    if formula.op == "const":
        return cpp_constant(formula.literal)
    if formula.op in ("cast", "bitcast") and formula.literal != "f32":
        raise KeyError(f"{formula.op} to {formula.literal}")
    return _CPP[formula.op](*map(to_cpp, formula.args))


def operations(formula: Expr) -> set[str]:
    """The names of all operations in a formula."""
    found = {formula.op}
    for arg in formula.args:
        found |= operations(arg)
    return found
