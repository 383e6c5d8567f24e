"""Every spelling of a linear becomes `torch.nn.functional.linear`.

    addmm(b, x, W)                        -> linear(x, W.t(), b)          W a parameter [K, N]
    addmm(b, x.view(-1, K), W).view(...)  -> linear(x, W.t(), b)          GPT-2's Conv1D: x keeps its shape
    matmul(x, W), mm(x, W), x @ W         -> linear(x, W.t())             W a parameter [K, N]
    matmul(x, W.t()), x @ W.T, ...        -> linear(x, W)                 W a parameter [N, K]
    matmul(...) + b                       -> stays an add; `fuse_epilogue` takes it
    einsum("...k,nk->...n", x, W)         -> linear(x, W)                 also with W [K, N] and other letters
    linear(x, weight=W, bias=b)           -> linear(x, W, b)
    dropout(x, training=False)            -> x                            it stands between linears and residuals

Products of two activations, scaled `addmm`s and einsums with more than one contracted or batched letter stay.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from qcompile.passes.context import GraphContext, example, replace
from qcompile.passes.weights import erase_unused, resolve_weight, transpose_of

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
    if (
        node.op != "call_function"
        or node.target is not torch.einsum
        or node.kwargs
        or not isinstance(node.args[0], str)
    ):
        return None
    operands = list(node.args[1]) if isinstance(node.args[1], (list, tuple)) else list(node.args[1:])
    equation = node.args[0].replace(" ", "")
    if len(operands) != 2 or equation.count("->") != 1 or equation.count(",") != 1:
        return None
    inputs, output = equation.split("->")
    left, right = inputs.split(",")
    if (
        len(right) != 2
        or len(set(right)) != 2
        or "." in right
        or len(set(left)) != len(left) - max(left.count(".") - 1, 0)
    ):
        return None
    inner = left[-1:]
    outer = right.replace(inner, "")
    if len(outer) != 1 or outer in left or output != left[:-1] + outer:
        return None
    return operands[0], operands[1], right[0] == inner


def _restored_view(node: fx.Node, x: fx.Node) -> fx.Node | None:
    """The node that gives a flattened product its input's leading dimensions back, if that is its only reader."""
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    if reader is None or not (_is_view(x) and _is_view(reader)) or reader.args[0] is not node:
        return None
    whole, result = example(x.args[0]), example(reader)
    if whole is None or whole.shape[-1] != example(x).shape[-1] or whole.shape[:-1] != result.shape[:-1]:
        return None
    return reader


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target in ("view", "reshape") and isinstance(node.args[0], fx.Node)


def _is_idle_dropout(node: fx.Node) -> bool:
    given = dict(zip(("input", "p", "training"), node.args, strict=False)) | node.kwargs
    return given.get("training", True) is False and len(node.args) > 0


def normalize(context: GraphContext) -> None:
    """See the module."""
    graph = context.graph
    for node in list(graph.nodes):
        bias = None
        if node.target is F.dropout and _is_idle_dropout(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            continue
        if node.target is F.linear and node.kwargs:
            given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
            node.args, node.kwargs = (given["input"], given["weight"], given.get("bias")), {}
            continue
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
        name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", node.target))
        flattened, restored = x, _restored_view(node, x)
        with graph.inserting_before(node if restored is None else restored):
            matrix = transpose_of(graph, weight) if transposed else weight
            new = graph.call_function(F.linear, (x if restored is None else x.args[0], matrix, bias))
        if restored is None:
            replace(graph, node, new)
        else:
            new.meta["example_value"] = example(restored)
            module = node.meta
            replace(graph, restored, new)
            new.meta = {**module, "example_value": new.meta["example_value"]}
            graph.erase_node(node)
            erase_unused(graph, flattened)
        context.rewrote(_RULE, new.name, f"{name} is a linear")
