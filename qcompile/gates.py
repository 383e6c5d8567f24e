"""Gates: steps of an epilogue that make one column of two, such as "silu(a)*b".

A step is the formula itself, of a and b, in a small part of Python: numbers, `+ - *`, the activation functions of an
epilogue, and `min` and `max` with a number, where NaN stays NaN. The first half of a product's columns are the a, the
second half the b; after the word "pairs" every column with an even number is an a, and the next its b.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor

from qcompile import expr

ACTIVATIONS: dict[str, Any] = {
    "relu": lambda x: expr.maximum(x, 0.0),
    "gelu": lambda x: x * 0.5 * (expr.erf(x * 0.7071067811865476) + 1.0),
    "gelu_tanh": lambda x: x * 0.5 * (expr.tanh((x + x * x * x * 0.044715) * 0.7978845608028654) + 1.0),
    "silu": lambda x: x * expr.sigmoid(x),
    "tanh": expr.tanh,
    "sigmoid": expr.sigmoid,
}
"""Activation functions of an epilogue, as formulas of `qcompile.expr`."""

PAIRS = "pairs "
"""How a step begins whose a and b are neighbouring columns."""

_FUNCTIONS = {**ACTIVATIONS, "min": expr.minimum, "max": expr.maximum}
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


@functools.lru_cache(maxsize=256)
def _parse(step: str) -> ast.expr:
    """
    Raises:
        SyntaxError: no expression of Python.
    """
    return ast.parse(step.removeprefix(PAIRS), mode="eval").body


def _evaluate(node: ast.expr, of: dict[str, Any]) -> Any:
    match node:
        case ast.Name(id=name):
            return of[name]
        case ast.Constant(value=float() | int() as value):
            return float(value)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=float() | int() as value)):
            return -float(value)
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATORS[type(op)](_evaluate(left, of), _evaluate(right, of))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            return _FUNCTIONS[name](*(_evaluate(argument, of) for argument in args))
    raise TypeError(ast.dump(node))


def gate(step: str, a: Any, b: Any) -> Any:
    """A gate's formula of two tensors, or of two symbols of `qcompile.expr`."""
    return _evaluate(_parse(step), {"a": a, "b": b})


@functools.lru_cache(maxsize=256)
def is_gate(step: str) -> bool:
    """Whether a text is such a formula; of numbers alone it is none."""
    try:
        return isinstance(gate(step, expr.var("a"), expr.var("b")), expr.Expr)
    except (SyntaxError, ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError):
        return False


def columns(step: str, y: Tensor) -> tuple[Tensor, Tensor]:
    """The columns a and b of a product [M, N] that a gate joins: [M, N / 2] each."""
    if step.startswith(PAIRS):
        return y[:, ::2], y[:, 1::2]
    a, b = y.chunk(2, -1)
    return a, b
