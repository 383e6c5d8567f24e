"""Every spelling of a linear becomes `torch.nn.functional.linear`.

    addmm(b, x, W)                        -> linear(x, W.t(), b)          W a parameter [K, N]: GPT-2's Conv1D
    matmul(x, W), mm(x, W), x @ W         -> linear(x, W.t())             W a parameter [K, N]
    matmul(x, W.t()), x @ W.T, ...        -> linear(x, W)                 W a parameter [N, K]
    matmul(...) + b                       -> stays an add; `fuse_epilogue` takes it
    einsum("...k,nk->...n", x, W)         -> linear(x, W)                 also with W [K, N] and other letters

Products of two activations, scaled `addmm`s and einsums with more than one contracted or batched letter stay.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from qcompile.passes.context import GraphContext, example, replace
from qcompile.passes.weights import resolve_weight, transpose_of

_MATMULS = {torch.matmul, torch.mm, operator.matmul}
_RULE = "normalize"


def _matmul_operands(node: fx.Node) -> tuple[Any, Any] | None:
    if node.op == "call_function" and node.target in _MATMULS and len(node.args) == 2 and not node.kwargs:
        return node.args[0], node.args[1]
    if node.op == "call_method" and node.target in ("matmul", "mm") and len(node.args) == 2 and not node.kwargs:
        return node.args[0], node.args[1]
    return None


def _einsum(node: fx.Node) -> tuple[Any, Any, bool] | None:
    """(x, W, whether W is [K, N]) of an einsum that is a linear."""
    if node.op != "call_function" or node.target is not torch.einsum or node.kwargs or not isinstance(node.args[0], str):
        return None
    operands = list(node.args[1]) if isinstance(node.args[1], (list, tuple)) else list(node.args[1:])
    equation = node.args[0].replace(" ", "")
    if len(operands) != 2 or equation.count("->") != 1 or equation.count(",") != 1:
        return None
    inputs, output = equation.split("->")
    left, right = inputs.split(",")
    if len(right) != 2 or len(set(right)) != 2 or "." in right or len(set(left)) != len(left) - max(left.count(".") - 1, 0):
        return None
    inner = left[-1:]
    outer = right.replace(inner, "")
    if len(outer) != 1 or outer in left or output != left[:-1] + outer:
        return None
    return operands[0], operands[1], right[0] == inner


def normalize(context: GraphContext) -> None:
    """See the module."""
    graph = context.graph
    for node in list(graph.nodes):
        bias = None
        if node.op == "call_function" and node.target is torch.addmm and len(node.args) == 3:
            bias, x, weight = node.args
            transposed = True
            if node.kwargs or example(bias) is None or example(bias).dim() != 1:
                if resolve_weight(context, weight) is not None:
                    context.declined(_RULE, node.name, "addmm with alpha, beta or a bias that is no vector")
                continue
        elif (operands := _matmul_operands(node)) is not None:
            x, weight = operands
            transposed = True
        elif (found := _einsum(node)) is not None:
            x, weight, transposed = found
        else:
            continue
        if not isinstance(x, fx.Node) or resolve_weight(context, weight) is None:
            continue  # a product of two activations is no linear
        if example(weight) is None or example(weight).dim() != 2 or example(x) is None:
            context.declined(_RULE, node.name, "the parameter is no matrix")
            continue
        with graph.inserting_before(node):
            matrix = transpose_of(graph, weight) if transposed else weight
            new = graph.call_function(F.linear, (x, matrix, bias))
        name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", node.target))
        replace(graph, node, new)
        context.rewrote(_RULE, new.name, f"{name} is a linear")
