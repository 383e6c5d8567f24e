"""a, b = split(linear); activation(a) * b -> linear with a gate       gate and up in one product: SwiGLU, GeGLU

of a linear whose output is divided into two halves of its columns that nothing else reads. Either half may go through
one of the activations of `fuse_epilogue`, or neither. The weight stays as it is: a kernel multiplies by rows of both
halves, so a merged weight goes on sharing its memory with the layers that it was merged from. The gate is computed in
float32 and rounded once.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from qcompile.layouts import halves_objection
from qcompile.linear_spec import decode_spec
from qcompile.passes.context import OP, GraphContext, example
from qcompile.passes.fuse_epilogue import BINARY, activation_of, fuse

_RULE = "fuse_gate"
_DIVISIONS = ("split", "chunk", "tensor_split", torch.split, torch.chunk, torch.tensor_split)


def _halves(linear: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two nodes that are the halves of the columns of a linear's output, if that is all it is divided into."""
    (division,) = linear.users
    readers = list(division.users)
    if division.target not in _DIVISIONS or len(readers) != 2:
        return None
    parts, half = example(division), example(linear).shape[-1] / 2
    if len(parts) != 2 or any(part.shape[-1] != half for part in parts):
        return None
    found = {user.args[1]: user for user in readers if user.target is operator.getitem}
    return (found[0], found[1]) if set(found) == {0, 1} else None


def _factor(half: fx.Node) -> tuple[str | None, fx.Node, fx.Node] | str:
    """The activation of a half, what it leaves, and who reads that; or why nothing can be fused."""
    if len(half.users) != 1:
        return f"a half of its output has {len(half.users)} readers"
    (user,) = half.users
    name = activation_of(user)
    if name is None:
        return None, half, user
    if len(user.users) != 1:
        return f"{name} of a half has {len(user.users)} readers"
    return name, user, next(iter(user.users))


def _gate(linear: fx.Node) -> tuple[str, fx.Node, tuple[fx.Node, ...]] | str | None:
    """The step, the product that it replaces, and the nodes between; why there is none; None for other divisions."""
    (user,) = linear.users
    if user.target is F.glu and 2 * example(user).shape[-1] == example(linear).shape[-1]:
        return "a*sigmoid(b)", user, ()
    halves = _halves(linear)
    if halves is None:
        return None
    first, second = map(_factor, halves)
    if isinstance(first, str) or isinstance(second, str):
        return first if isinstance(first, str) else str(second)
    product = first[2]
    if BINARY.get(product.target) != "mul" or product is not second[2] or set(product.args) != {first[1], second[1]}:
        return "its halves are not multiplied with each other"
    if product.kwargs or not isinstance(example(product), Tensor) or example(product).dtype != example(linear).dtype:
        return "the product of its halves changes dtype"
    if first[0] and second[0]:
        return "both halves have an activation"
    step = f"{first[0]}(a)*b" if first[0] else f"a*{second[0]}(b)" if second[0] else "a*b"
    between = (first[1], second[1], *halves, user)
    return step, product, tuple(dict.fromkeys(between))


def _objection(linear: fx.Node) -> str | None:
    """Why a linear that is divided into halves cannot have a gate."""
    spec = decode_spec(linear.args[-1])  # type: ignore[arg-type]
    if spec.epilogue not in ((), ("bias",)):
        return "its epilogue comes before it is divided"
    if spec.scheme.activation is not None and spec.scheme.activation.outlier_threshold is not None:
        return "outlying columns are added to the whole product"
    return halves_objection(spec.layout, spec.out_features // 2, spec.in_features)


def fuse_gate(context: GraphContext) -> None:
    """See the module."""
    for node in list(context.layers):
        if node.target is not OP or len(node.users) != 1:
            continue
        found = _gate(node)
        if isinstance(found, tuple):
            found = _objection(node) or found
        if isinstance(found, tuple):
            step, product, between = found
            fuse(context, _RULE, node, product, step, between=between)
        elif found is not None:
            context.declined(_RULE, context.layers[node].name, found)
