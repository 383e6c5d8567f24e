"""Norms in a graph, as torch has them or spelled out, and what takes the place of one: `qcompile::norm_quantize`.

Norms are `F.rms_norm` and `F.layer_norm`, and RMSNorm as transformers spells it out: with the weight applied in the
rows' type (Llama), in float32 (gpt-oss), or one more than it (Gemma). The sum before a norm, of two tensors or over
processes, becomes a part of it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.exchange import ADD_UP
from qcompile.norm_spec import NormSpec
from qcompile.norms import OP
from qcompile.passes.context import Args, GraphContext, example
from qcompile.passes.share_quantization import read_codes

_CASTS = ("to", "float", "type_as", "half", "bfloat16")


@dataclass(frozen=True)
class Norm:
    """A norm in the graph: its input, its parameters, and the nodes that it consists of, the last first."""

    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float
    centered: bool
    nodes: tuple[fx.Node, ...]
    kind: str = "plain"
    early: bool = False


def _name(node: Any) -> str:
    """What a call is named, as a method or a function."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return ""
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", ""))


class _Other(Exception):
    """Something that no norm has."""


class _Reader:
    """Takes a spelled-out norm apart, and notes the nodes that it has seen."""

    def __init__(self) -> None:
        self.nodes: list[fx.Node] = []

    def operands(self, node: Any, *names: str) -> tuple[Any, ...]:
        """Of a call of this name."""
        if _name(node) not in names:
            raise _Other(str(node))
        self.nodes.append(node)
        return tuple(node.args)

    def below_casts(self, node: Any) -> Any:
        """What conversions of the floating type are made from."""
        while _name(node) in _CASTS and example(node).shape == example(node.args[0]).shape:
            (node, *_) = self.operands(node, *_CASTS)
        return node

    def either(self, operands: tuple[Any, ...], wanted: str) -> tuple[Any, Any]:
        """Two operands, first that which is, below conversions, a call of some name."""
        first, second = operands
        if _name(_below(first)) == wanted:
            return first, second
        if _name(_below(second)) == wanted:
            return second, first
        raise _Other(wanted)


def _below(node: Any) -> Any:
    return _Reader().below_casts(node)


def _is_scaled(node: Any) -> bool:
    """Whether a node is rows times the reciprocal root of something."""
    return _name(node) == "mul" and any(_name(operand) == "rsqrt" for operand in node.args)


def _spelled_out(last: fx.Node) -> Norm:
    """
    Raises:
        _Other: another formula.
    """
    read = _Reader()
    weight, kind, early = None, "", False
    node = read.below_casts(last)
    if not _is_scaled(node):
        first, second = read.operands(node, "mul")
        inner, factor = (first, second) if _is_scaled(_below(first)) else (second, first)
        early = _name(inner) in _CASTS
        if early and (read.nodes[:1] != [last] or _name(last) in _CASTS):
            raise _Other("two roundings")
        node = read.below_casts(inner)
        factor, kind = read.below_casts(factor), "plain"
        if _name(factor) == "add":
            one, other = read.operands(factor, "add")
            one, other = (other, one) if isinstance(one, fx.Node) else (one, other)
            if one != 1.0:
                raise _Other("another sum")
            factor, kind = read.below_casts(other), "one more"
        weight = factor
    root, value = read.either(read.operands(node, "mul"), "rsqrt")
    (sum,) = read.operands(root, "rsqrt")
    mean, eps = read.either(read.operands(sum, "add"), "mean")
    if not isinstance(eps, float):
        raise _Other("eps")
    squares, *dim = read.operands(mean, "mean")
    if {**dict(zip(("dim", "keepdim"), dim, strict=False)), **mean.kwargs} != {"dim": -1, "keepdim": True}:
        raise _Other("another mean")
    base, power = read.operands(squares, "pow")
    if base is not value or power != 2 or example(value).dtype != torch.float32:
        raise _Other("another power")
    x = read.below_casts(value)
    return Norm(x, weight, None, eps, False, tuple(dict.fromkeys(read.nodes)), kind, early)


_PARAMETERS = {"rms_norm": ("x", "shape", "weight", "eps"), "layer_norm": ("x", "shape", "weight", "bias", "eps")}


def read_norm(node: Any) -> Norm | None:
    """The norm that a node is the result of."""
    name = _name(node)
    if name in _PARAMETERS:
        given: dict[str, Any] = {"weight": None, "bias": None, "eps": 1e-5 if name == "layer_norm" else None}
        given |= dict(zip(_PARAMETERS[name], node.args, strict=False)) | node.kwargs
        x: Any = given.get("input", given.get("x"))
        shape: Any = given.get("normalized_shape", given.get("shape"))
        if given["eps"] is None or tuple(shape) != example(node).shape[-1:]:
            return None
        return Norm(x, given["weight"], given["bias"], given["eps"], name == "layer_norm", (node,))
    try:
        return _spelled_out(node)
    except (_Other, ValueError):
        return None


def objection(norm: Norm, last: fx.Node) -> str | None:
    """Why a norm cannot be one operator with the quantization of what it gives."""
    x, result = example(norm.x), example(last)
    if x.dtype != result.dtype or x.shape != result.shape:
        return "a norm changes dtype"
    for parameter in (norm.weight, norm.bias):
        if parameter is not None and (parameter.op not in ("placeholder", "get_attr") or example(parameter).dim() != 1):
            return "a norm's parameter is computed"
    if any(user not in norm.nodes for node in norm.nodes[1:] for user in node.users if node is not last):
        return "something else reads a part of a norm"
    return None


def _terms(x: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors alike whose sum a node is."""
    if _name(x) != "add" or len(x.args) != 2 or x.kwargs:
        return None
    first, second = x.args
    alike = [isinstance(part, fx.Node) and isinstance(example(part), Tensor) for part in x.args]
    if not all(alike) or any(
        example(p).shape != example(x).shape or example(p).dtype != example(x).dtype for p in x.args
    ):
        return None
    return first, second  # type: ignore[return-value]


def inputs_of(norm: Norm) -> tuple[Any, Any, str]:
    """The rows, what is added to them before the norm or None, and the group over which they are summed first or ""."""
    if norm.x.target is ADD_UP:
        return norm.x.args[0], None, str(norm.x.args[1])
    terms = _terms(norm.x)
    if terms is None:
        return norm.x, None, ""
    for x, residual in (terms, terms[::-1]):
        if x.target is ADD_UP and len(x.users) == 1:
            return x.args[0], residual, str(x.args[1])
    return *terms, ""


def put_norm(context: GraphContext, norm: Norm, last: fx.Node, plain: NormSpec, linears: Sequence[fx.Node]) -> None:
    """Put the operator in the place of a norm, and of the sums before it.

    Args:
        last: the norm's value.
        plain: the spec without a norm: whether what it gives is quantized, and how.
        linears: which then read codes and scales.
    """
    graph = context.graph
    x, residual, group = inputs_of(norm)
    held = norm.x if residual is not None or group else None
    operands: list[Any] = [linear.args[Args.index("operands")] for linear in linears]
    kept = any(user not in linears for user in last.users) or any(last in given for given in operands)
    spec = replace(
        plain,
        group=group,
        norm="layer" if norm.centered else "rms",
        eps=norm.eps,
        weight="" if norm.weight is None else norm.kind,
        early=norm.early,
        bias=norm.bias is not None,
        residual=residual is not None,
        keep_sum=held is not None and any(user not in norm.nodes for user in held.users),
        keep_norm=kept,
    )
    with graph.inserting_before(held or norm.nodes[-1]):
        found = graph.call_function(OP, (x, residual, norm.weight, norm.bias, spec.encode()))
        with context.fake_mode:
            found.meta["example_value"] = OP(*fx.node.map_arg(found.args, example))
        made = [graph.call_function(operator.getitem, (found, i)) for i in range(len(found.meta["example_value"]))]
        for node, value in zip(made, found.meta["example_value"], strict=True):
            node.meta["example_value"] = value
    if plain.number:
        read_codes(linears, made[0], made[1], example(last).dtype)
    if kept:
        last.replace_all_uses_with(made[-1])
    if held is not None and spec.keep_sum:
        held.replace_all_uses_with(made[-1 - kept], delete_user_cb=lambda user: user not in norm.nodes)
    terms = () if held is None else held.all_input_nodes
    for node in (*norm.nodes, *([] if held is None else [held])):
        graph.erase_node(node)
    for node in terms:
        if node.target is ADD_UP and not node.users:
            graph.erase_node(node)
