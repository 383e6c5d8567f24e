"""From a node to the parameters that it reads."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qcompile import compat
from qcompile.passes.context import GraphContext, WeightRef, example


def _transposed_input(node: fx.Node) -> fx.Node | None:
    """What a node is the plain matrix transpose of, if it is one."""
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        return None
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name in ("t", "numpy_T", "mT") and len(node.args) == 1:  # newer Dynamos spell `.mT` as an operator
        return first
    if node.op == "call_function" and node.target is getattr and len(node.args) >= 2 and node.args[1] in ("T", "mT"):
        return first
    value = example(first)
    if name in ("transpose", "swapaxes", "swapdims") and len(node.args) == 3 and value is not None and value.dim() == 2:
        return first if {d % 2 for d in node.args[1:] if isinstance(d, int)} == {0, 1} else None
    return None


def resolve_weight(context: GraphContext, node: object) -> WeightRef | None:
    """The parameters behind a matrix: a floating-point parameter or buffer, its transpose, or several put one below
    another; None for anything that the graph computes."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "placeholder":
        value = context.values.get(node)
        if compat.is_state(node) and isinstance(value, Tensor) and value.is_floating_point():
            return WeightRef((node,))
        return None
    if (source := _transposed_input(node)) is not None:
        inner = resolve_weight(context, source)
        return None if inner is None or len(inner.parts) > 1 else WeightRef(inner.parts, not inner.transposed)
    if node.op == "call_function" and node.target is torch.cat and len(node.args) == 1 and not node.kwargs:
        refs = [resolve_weight(context, part) for part in node.args[0]]  # type: ignore[union-attr]
        found = [r for r in refs if r is not None and not r.transposed]
        if refs and len(found) == len(refs):
            return WeightRef(tuple(part for r in found for part in r.parts))
    return None


def transpose_of(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A node for the transpose of a matrix, or the matrix itself if the node is its transpose already."""
    if node.op != "placeholder" and (source := _transposed_input(node)) is not None:
        return source
    new = graph.call_method("t", (node,))
    new.meta = {**node.meta, "example_value": example(node).t()}
    return new


def _is_pure(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("t", "transpose", "swapaxes", "swapdims", "view", "reshape")
    return node.op == "call_function" and (node.target in (torch.cat, getattr, torch.t, torch.transpose))


def erase_unused(graph: fx.Graph, *nodes: object) -> None:
    """Erase pure expressions (views, transposes, concatenations; never inputs) that nothing reads any more."""
    for node in nodes:
        if isinstance(node, fx.Node) and not node.users and _is_pure(node):
            inputs = node.all_input_nodes
            graph.erase_node(node)
            erase_unused(graph, *inputs)
