"""The graph of a block: what operators it calls on what, from one run on real inputs.

`make_fx` records ATen operators before autograd takes composite ones apart, so a linear is `aten.linear`, attention is
`aten.scaled_dot_product_attention`, and parameters are attributes that keep their identity. No architecture is known by
name: what is not recorded (control flow on values) makes tracing fail, with a reason.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile.calibrate.stream import Call


class Illegal(Exception):
    """Something cannot be folded; the text says why."""


@dataclass(frozen=True)
class LinearNode:
    """A product with a parameter.

    Attributes:
        node: the call.
        x: its input.
        weight, bias: parameters; the weight is [N, K], or [K, N] if `transposed`.
    """

    node: fx.Node
    x: fx.Node
    weight: nn.Parameter
    bias: nn.Parameter | None
    transposed: bool


class Trace:
    """A block's graph.

    Attributes:
        graph: of `aten` operators.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.graph = module.graph
        self._module = module

    def parameter(self, node: Any) -> nn.Parameter | None:
        """The parameter that a node is."""
        found = _attribute(self._module, node) if isinstance(node, fx.Node) and node.op == "get_attr" else None
        return found if isinstance(found, nn.Parameter) else None

    def uses(self, parameter: nn.Parameter) -> list[fx.Node]:
        """The nodes that read a parameter."""
        places = [n for n in self.graph.find_nodes(op="get_attr") if self.parameter(n) is parameter]
        return [user for place in places for user in place.users]

    def linears(self) -> list[LinearNode]:
        """Products with parameters that are matrices, in their order."""
        found = []
        for node in self.graph.nodes:
            if (linear := self.linear(node)) is not None:
                found.append(linear)
        return found

    def linear(self, node: fx.Node) -> LinearNode | None:
        """A node as a product with a parameter."""
        kind = kind_of(node)
        if kind == "linear":
            x, weight = node.args[:2]
            bias = node.args[2] if len(node.args) > 2 else None
        elif kind == "addmm":
            bias, x, weight = node.args[:3]
        elif kind in ("mm", "matmul"):
            (x, weight), bias = node.args[:2], None
        else:
            return None
        matrix, vector = self.parameter(weight), self.parameter(bias)
        if matrix is None or matrix.dim() != 2 or not isinstance(x, fx.Node) or (bias is not None and vector is None):
            return None
        return LinearNode(node, x, matrix, vector, transposed=kind != "linear")


def kind_of(node: fx.Node) -> str:
    """An operator's name without namespace and overload: `linear`, `mul`; "" for what is no ATen operator."""
    if node.op != "call_function":
        return ""
    if node.target is operator.getitem:
        return "getitem"
    name = str(node.target)
    return name.split(".")[1] if name.startswith("aten.") else ""


def shape_of(node: fx.Node) -> torch.Size:
    """The shape of a node's value."""
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value.shape


def _attribute(module: fx.GraphModule, node: fx.Node) -> Any:
    found: Any = module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found


def trace_block(block: nn.Module, call: Call) -> Trace:
    """The graph of a block for one call.

    Raises:
        Illegal: it cannot be traced.
    """

    def run(hidden: Tensor) -> Any:
        given = call.with_hidden(hidden)
        return block(*given.args, **given.kwargs)

    return _traced(run, [call.hidden()], "the block")


def trace_model(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Trace:
    """The graph of a model for one call.

    Raises:
        Illegal: it cannot be traced.
    """
    return _traced(lambda: model(*args, **kwargs), [], "the model")


def _traced(function: Callable[..., Any], inputs: list[Tensor], what: str) -> Trace:
    try:
        with torch.no_grad():
            return Trace(make_fx(lambda *given: _tensors(function(*given)), pre_dispatch=True)(*inputs))
    except Exception as error:  # whatever a model's code does with values that are not there
        first = (str(error).splitlines() or [""])[0]
        raise Illegal(f"{what} cannot be traced ({type(error).__name__}: {first})") from None


def _tensors(output: Any) -> list[Tensor]:
    """All tensors in what a block returned."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return [tensor for part in output for tensor in _tensors(part)]
    return []
