"""What comes between the projections of a mixture's experts: the model's own function, and as a step of an epilogue."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompile.gates import PAIRS, is_gate


class Gating(nn.Module):
    """From the product [S, 2 I] of an expert's gate and up projections (or [S, I] of one alone) to [S, I].

    It is the model's own function: the module that held the weights is kept without them.
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        memo: dict[int, Any] = {id(parameter): None for parameter in experts.parameters()}
        config = getattr(experts, "config", None)
        self.experts = copy.deepcopy(experts, memo | {id(config): config})

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Products of gate and up that were computed apart, arranged as the model has them."""
        if len(parts) == 1:
            return parts[0]
        if self.experts.is_concatenated:
            return torch.cat(tuple(parts), -1)
        return torch.stack(tuple(parts), -1).flatten(-2)

    def forward(self, product: Tensor) -> Tensor:
        function: Any = self.experts._apply_gate if self.experts.has_gate else self.experts.act_fn
        gated: Tensor = function(product)
        return gated


_aten = torch.ops.aten
_UNARY: dict[Any, str] = {
    _aten.relu.default: "relu",
    _aten.silu.default: "silu",
    _aten.tanh.default: "tanh",
    _aten.sigmoid.default: "sigmoid",
}
_BINARY: dict[Any, str] = {_aten.add.Tensor: "+", _aten.sub.Tensor: "-", _aten.mul.Tensor: "*"}
_SAME = (_aten._to_copy.default, _aten.clone.default, _aten.detach.default)
"""What only changes the floating type, in which an epilogue does not compute, or copies."""


def gate_step(gating: Gating, width: int) -> str | None:
    """The step of `qcompile.gates` that a gating is, of products of `width` columns; None if it is no such formula."""
    from torch.fx.experimental.proxy_tensor import make_fx

    example = torch.empty(2, width, device="meta")
    try:
        with torch.no_grad():
            graph = make_fx(gating)(example).graph
        formula = _formula(graph, width)
    except (_Other, RuntimeError):
        return None
    return formula if is_gate(formula) else None


class _Other(Exception):
    """An operation that no step has."""


def _formula(graph: fx.Graph, width: int) -> str:
    """
    Raises:
        _Other: there is none.
    """
    texts: dict[fx.Node, str] = {}
    pairs: set[bool] = set()

    def text(value: Any) -> str:
        if isinstance(value, fx.Node):
            if value not in texts:
                raise _Other(str(value.target))
            return texts[value]
        return repr(float(value)) if value >= 0 else f"({float(value)!r})"

    for node in graph.nodes:
        column = _column(node, width)
        if node.op == "output":
            return (PAIRS if True in pairs else "") + text(node.args[0])
        if column is not None:
            name, paired = column
            texts[node] = name
            pairs.add(paired)
            if len(pairs) > 1:
                raise _Other("halves and pairs")
        elif node.op == "call_function" and all(n in texts for n in node.all_input_nodes):
            texts[node] = _operation(node, text)
    raise AssertionError("a graph ends with its output")


def _column(node: fx.Node, width: int) -> tuple[str, bool] | None:
    """Which of a product's columns a node is, "a" or "b", and whether these are neighbours."""
    args: Any = node.args
    source: Any = args[0] if args and isinstance(args[0], fx.Node) else None
    if source is None:
        return None
    half = width // 2
    if node.target is operator.getitem and source.target is _aten.split.Tensor and source.args[0].op == "placeholder":
        return ("ab"[args[1]], False) if source.args[1:] in ((half, 1), (half, -1)) else None
    if node.target is _aten.slice.Tensor and source.op == "placeholder" and len(args) >= 4 and args[1] in (1, -1):
        start, end, step = args[2], min(args[3], width), (*args[4:], 1)[0]
        if (step, end) == (2, width) and start in (0, 1):
            return "ab"[start], True
        if (step, end - start) == (1, half) and start in (0, half):
            return "ab"[start > 0], False
    return None


def _operation(node: fx.Node, text: Callable[[Any], str]) -> str:
    """The text of a call whose operands have one.

    Raises:
        _Other: no step has it.
    """
    target: Any = node.target
    args: Any = node.args
    if target in _SAME and node.meta["tensor_meta"].dtype.is_floating_point:
        return text(args[0])
    if target in _UNARY:
        return f"{_UNARY[target]}({text(args[0])})"
    if target is _aten.gelu.default:
        return f"gelu{'_tanh' if node.kwargs.get('approximate') == 'tanh' else ''}({text(args[0])})"
    if target is _aten.pow.Tensor_Scalar and args[1] in (2, 3):
        return f"({'*'.join([text(args[0])] * args[1])})"
    if target is _aten.clamp.default:
        found, least, most = (text(args[0]), *args[1:], None)[:3]
        found = found if least is None else f"max({found},{float(least)!r})"
        return found if most is None else f"min({found},{float(most)!r})"
    if target in _BINARY and not node.kwargs:
        first, second = map(text, args)
        if target is _aten.mul.Tensor:
            nested = isinstance(args[1], fx.Node) and args[1].target is target
            return f"{first}*({second})" if nested else f"{first}*{second}"
        return f"({first}{_BINARY[target]}{second})"
    raise _Other(str(target))
