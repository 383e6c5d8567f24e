"""linear(norm(x + residual)) -> codes, scales, ... = norm_quantize(x, residual); linear(codes, scales)      norms

for linears whose activations have a dynamic scale a token, or a group of columns. Norms are `F.rms_norm` and
`F.layer_norm`, and RMSNorm as transformers spells it out: with the weight applied in the rows' type (Llama), in float32
(gpt-oss), or one more than it (Gemma). The sum and the norm are results too where something else reads them.

Compilers make two kernels of a norm and maxima of groups, and slow ones of few rows. Static scales are left to them, as
are scales a token where they join the epilogue before the norm with both.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.linear_spec import decode_spec
from qcompile.norm_spec import NormSpec, quantization
from qcompile.norms import OP as NORM_QUANTIZE
from qcompile.passes.context import Args, GraphContext, example
from qcompile.passes.share_quantization import LEFT, alike, has_visible_epilogue, read_codes

_RULE = "quantize_norms"
_X, _SPEC = Args.index("x"), Args.index("spec")
_CASTS = ("to", "float", "type_as", "half", "bfloat16")


@dataclass(frozen=True)
class _Norm:
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


def _spelled_out(last: fx.Node) -> _Norm:
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
    return _Norm(x, weight, None, eps, False, tuple(dict.fromkeys(read.nodes)), kind, early)


_PARAMETERS = {"rms_norm": ("x", "shape", "weight", "eps"), "layer_norm": ("x", "shape", "weight", "bias", "eps")}


def _norm(node: Any) -> _Norm | None:
    """The norm that a node is the result of."""
    name = _name(node)
    if name in _PARAMETERS:
        given: dict[str, Any] = {"weight": None, "bias": None, "eps": 1e-5 if name == "layer_norm" else None}
        given |= dict(zip(_PARAMETERS[name], node.args, strict=False)) | node.kwargs
        x: Any = given.get("input", given.get("x"))
        shape: Any = given.get("normalized_shape", given.get("shape"))
        if given["eps"] is None or tuple(shape) != example(node).shape[-1:]:
            return None
        return _Norm(x, given["weight"], given["bias"], given["eps"], name == "layer_norm", (node,))
    try:
        return _spelled_out(node)
    except (_Other, ValueError):
        return None


def _objection(norm: _Norm, last: fx.Node) -> str | None:
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


def _sum(norm: _Norm) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors whose sum is normalized, if it is one of two alike."""
    x = norm.x
    if _name(x) != "add" or len(x.args) != 2 or x.kwargs:
        return None
    first, second = x.args
    alike = [isinstance(part, fx.Node) and isinstance(example(part), Tensor) for part in x.args]
    if not all(alike) or any(
        example(p).shape != example(x).shape or example(p).dtype != example(x).dtype for p in x.args
    ):
        return None
    return first, second  # type: ignore[return-value]


def _rewrite(context: GraphContext, norm: _Norm, last: fx.Node, linears: list[fx.Node], plain: NormSpec) -> None:
    parts = _sum(norm)
    operands: list[Any] = [linear.args[Args.index("operands")] for linear in linears]
    kept = any(user not in linears for user in last.users) or any(last in given for given in operands)
    spec = replace(
        plain,
        norm="layer" if norm.centered else "rms",
        eps=norm.eps,
        weight="" if norm.weight is None else norm.kind,
        early=norm.early,
        bias=norm.bias is not None,
        residual=parts is not None,
        keep_sum=parts is not None and any(user not in norm.nodes for user in norm.x.users),
        keep_norm=kept,
    )
    x, residual = parts or (norm.x, None)
    graph = context.graph
    with graph.inserting_before(norm.x if parts else norm.nodes[-1]):
        found = graph.call_function(NORM_QUANTIZE, (x, residual, norm.weight, norm.bias, spec.encode()))
        with context.fake_mode:
            found.meta["example_value"] = NORM_QUANTIZE(*fx.node.map_arg(found.args, example))
        made = [graph.call_function(operator.getitem, (found, i)) for i in range(len(found.meta["example_value"]))]
        for node, value in zip(made, found.meta["example_value"], strict=True):
            node.meta["example_value"] = value
    codes, scales, *more = made
    read_codes(linears, codes, scales, example(last).dtype)
    if kept:
        last.replace_all_uses_with(more[-1])
    if spec.keep_sum:
        norm.x.replace_all_uses_with(more[0], delete_user_cb=lambda user: user not in norm.nodes)
    for node in (*norm.nodes, *([norm.x] if parts else [])):
        graph.erase_node(node)


def quantize_norms(context: GraphContext) -> None:
    """See the module."""
    for linears in alike(context):
        last = linears[0].args[_X]
        activation = decode_spec(linears[0].args[_SPEC]).scheme.activation  # type: ignore[arg-type]
        assert activation is not None
        if not isinstance(last, fx.Node) or example(last).device.type in LEFT:
            continue
        plain, norm = quantization(activation, example(last).shape[-1]), _norm(last)
        if plain is None or norm is None or (plain.columns == plain.k and has_visible_epilogue(norm.x)):
            continue
        names = " + ".join(context.layers[node].name for node in linears)
        reason = _objection(norm, last)
        if reason is not None:
            context.declined(_RULE, names, reason)
            continue
        _rewrite(context, norm, last, linears, plain)
        context.rewrote(_RULE, names, "norm and quantization in one")
