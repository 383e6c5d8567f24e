"""activation(linear), linear + b, linear * gate, linear + residual -> linear with an epilogue

A step is taken if nothing else reads the linear's output, if the result has its shape and dtype, and if it is one of
relu, gelu (both forms), silu, tanh, sigmoid, a product or a sum with a tensor of the output's shape, or a sum with a
vector that acts as the bias. The steps are computed in float32 before the output is rounded once.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from qcompile.linear_spec import decode_spec
from qcompile.passes.context import OP, Args, GraphContext, example, replace

_RULE = "fuse_epilogue"
_ACTIVATIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.silu: "silu",
    torch.tanh: "tanh",
    F.tanh: "tanh",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    "relu": "relu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
}
BINARY: dict[Any, str] = {
    torch.add: "add",
    operator.add: "add",
    "add": "add",
    torch.mul: "mul",
    operator.mul: "mul",
    torch.multiply: "mul",
    "mul": "mul",
}
_IN_PLACE = (operator.iadd, operator.imul, "add_", "mul_", "relu_", torch.relu_, F.relu_)


def activation_of(node: fx.Node) -> str | None:
    """The step that a call of an activation function is, if it is one."""
    if node.target is F.gelu:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    if node.kwargs.get("inplace") or node.target not in _ACTIVATIONS:
        return None
    return _ACTIVATIONS[node.target]


def _step(linear: fx.Node, user: fx.Node) -> tuple[str, Any] | str:
    """The step that a linear's only user is, with its operand; or why it is none."""
    out, result = example(linear), example(user)
    if user.op == "output":
        return "it is an output"
    if user.target in _IN_PLACE or user.kwargs.get("inplace"):
        return f"{getattr(user.target, '__name__', user.target)} works in place"
    if not isinstance(result, Tensor) or result.shape != out.shape or result.dtype != out.dtype:
        return f"{getattr(user.target, '__name__', user.target)} changes shape or dtype"
    if (name := activation_of(user)) is not None:
        return name, None
    if user.target not in BINARY or len(user.args) != 2 or user.kwargs:
        return f"{getattr(user.target, '__name__', user.target)} is no epilogue step"
    other = user.args[1] if user.args[0] is linear else user.args[0]
    if other is linear:
        return "both operands are the linear"
    value = example(other)
    if not isinstance(value, Tensor):
        return "the other operand is no tensor"
    if value.device != out.device:
        return "the other operand is on another device"
    if value.shape == out.shape and value.is_floating_point():
        return BINARY[user.target], other
    spec = decode_spec(linear.args[-1])  # type: ignore[arg-type]
    if BINARY[user.target] == "add" and value.dim() == 1 and value.shape[0] == spec.out_features and not spec.epilogue:
        return "bias", other
    return "the other operand would be broadcast"


def fuse(
    context: GraphContext,
    rule: str,
    linear: fx.Node,
    result: fx.Node,
    step: str,
    operand: Any = None,
    between: Sequence[fx.Node] = (),
) -> fx.Node:
    """Make `result` the linear's own output by one more step, and return the new linear.

    Args:
        between: nodes from the linear to the result, readers first, which nothing else reads.
    """
    arguments = list(linear.args)
    arguments[-1] = decode_spec(arguments[-1]).with_epilogue(step).encode()  # type: ignore[arg-type]
    if step == "bias":
        arguments[Args.index("bias")] = operand
    elif operand is not None:
        arguments[Args.index("operands")] = [*arguments[Args.index("operands")], operand]  # type: ignore[misc]
    with context.graph.inserting_before(result):  # where every operand is known
        new = context.graph.call_function(OP, tuple(arguments))
    layer = context.layers.pop(linear)
    replace(context.graph, result, new)
    for node in (*between, linear):
        context.graph.erase_node(node)
    context.layers[new] = layer
    context.rewrote(rule, layer.name, step)
    return new


def fuse_epilogue(context: GraphContext) -> None:
    """See the module."""
    for node in list(context.layers):
        while node.target is OP:
            name = context.layers[node].name
            if len(node.users) != 1:
                context.declined(_RULE, name, f"its output has {len(node.users)} readers")
                break
            user = next(iter(node.users))
            found = _step(node, user)
            if isinstance(found, str):
                context.declined(_RULE, name, found)
                break
            if user in context.layers:
                break
            node = fuse(context, _RULE, node, user, *found)
