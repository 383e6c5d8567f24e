"""Scalar expressions: a formula written once, evaluated on tensors or printed as source code.

A formula is an ordinary Python function over the functions of this module and the operators
`+ - * & | << >>`. Called with `torch.Tensor`s it computes; called with `Expr` symbols it builds a tree
that `codegen.printers` turns into Triton (and other languages, one table each).

    >>> def decode(code): return cast(code & 15, "f32") - 8.0
    >>> decode(torch.tensor([0, 15], dtype=torch.int32))
    tensor([-8.,  7.])
    >>> decode(var("code"))
    Expr(...)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

DTYPES: dict[str, torch.dtype] = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i32": torch.int32,
}


@dataclass(frozen=True)
class Expr:
    """A node: an operation, its operands, and a literal (variable name, constant or dtype)."""

    op: str
    args: tuple[Expr, ...] = ()
    literal: str | int | float | None = None

    def __add__(self, other: Operand) -> Expr:
        return _node("add", self, other)

    def __sub__(self, other: Operand) -> Expr:
        return _node("sub", self, other)

    def __mul__(self, other: Operand) -> Expr:
        return _node("mul", self, other)

    def __radd__(self, other: Operand) -> Expr:
        return _node("add", other, self)

    def __rsub__(self, other: Operand) -> Expr:
        return _node("sub", other, self)

    def __rmul__(self, other: Operand) -> Expr:
        return _node("mul", other, self)

    def __and__(self, other: Operand) -> Expr:
        return _node("and", self, other)

    def __or__(self, other: Operand) -> Expr:
        return _node("or", self, other)

    def __lshift__(self, other: Operand) -> Expr:
        return _node("shl", self, other)

    def __rshift__(self, other: Operand) -> Expr:
        return _node("shr", self, other)


Operand: TypeAlias = "Expr | int | float"
Value: TypeAlias = "Expr | torch.Tensor"


def var(name: str) -> Expr:
    """A named input of a formula, which is printed as it is.

    Raises:
        ValueError: a name that is no identifier.
    """
    if not name.isidentifier():
        raise ValueError(f"{name!r} is no identifier")
    return Expr("var", literal=name)


def _node(op: str, *operands: Operand, literal: str | None = None) -> Expr:
    return Expr(op, tuple(x if isinstance(x, Expr) else Expr("const", literal=x) for x in operands), literal)


def cast(x: Value, dtype: str) -> Value:
    """Value conversion to one of `DTYPES`."""
    return _node("cast", x, literal=dtype) if isinstance(x, Expr) else x.to(DTYPES[dtype])


def bitcast(x: Value, dtype: str) -> Value:
    """The same 32 bits read as another type."""
    return _node("bitcast", x, literal=dtype) if isinstance(x, Expr) else x.view(DTYPES[dtype])


def where(condition: Value, a: Value | float, b: Value | float) -> Value:
    """`a` where the condition holds, else `b`."""
    if isinstance(condition, Expr):
        return _node("where", condition, a, b)  # type: ignore[arg-type]
    return torch.where(condition, a, b)  # type: ignore[arg-type]


def lookup(x: Value, values: tuple[float, ...]) -> Value:
    """`values[x]` as float32, for int32 x in their range; their number is a power of two."""
    if isinstance(x, Expr):
        return Expr("lookup", (x, *(Expr("const", literal=v) for v in values)))
    return torch.tensor(values, dtype=torch.float32, device=x.device)[x]


def eq(x: Value, other: int) -> Value:
    """Elementwise equality with an integer."""
    return _node("eq", x, other) if isinstance(x, Expr) else x == other


def _unary(op: str, compute: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Value], Value]:
    def apply(x: Value) -> Value:
        return _node(op, x) if isinstance(x, Expr) else compute(x)

    apply.__name__ = op
    return apply


exp = _unary("exp", torch.exp)
tanh = _unary("tanh", torch.tanh)
erf = _unary("erf", torch.erf)
sigmoid = _unary("sigmoid", torch.sigmoid)


def maximum(x: Value, other: float) -> Value:
    """Elementwise maximum with a constant; NaN stays NaN."""
    return _node("maximum", x, other) if isinstance(x, Expr) else x.clamp(min=other)


def minimum(x: Value, other: float) -> Value:
    """Elementwise minimum with a constant; NaN stays NaN."""
    return _node("minimum", x, other) if isinstance(x, Expr) else x.clamp(max=other)
