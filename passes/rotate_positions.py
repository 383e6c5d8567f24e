"""What rotary embeddings compute, on CPUs once and without copies

    cos(angles).to(dtype), read by every layer   -> keep(cos(angles).to(dtype)), and sin alike
    cat((-x[..., D/2:], x[..., :D/2]), -1)       -> turn_halves(x)

Inductor computes an elementwise value anew for each of its readers: sines and cosines of all positions for each head of
each layer. And it writes what is concatenated to memory first; `turn_halves` is a formula of each element, for vectors
whose halves are of whole SIMD registers.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from qcompile.passes.context import GraphContext, example, replace
from qcompile.passes.heads import add_call, is_call

KEEP = torch.ops.qcompile.keep.default
TURN_HALVES = torch.ops.qcompile.turn_halves.default
RULE = "rotate_positions"
_ANGLES = ("cos", "sin", torch.cos, torch.sin)
_ELEMENTWISE = ("to", "float", "bfloat16", "half", "mul", operator.mul, torch.mul)
_REGISTER = 32
"""The most numbers of 16 bits in a register."""


def _on_cpu(node: fx.Node) -> bool:
    return example(node).device.type == "cpu"


def _read_by_all(node: fx.Node) -> fx.Node:
    """What is made of a node alone, element by element, and has several readers; or the last that has one."""
    while len(node.users) == 1:
        (user,) = node.users
        if not is_call(user, _ELEMENTWISE) or example(user).shape != example(node).shape:
            break
        node = user
    return node


def _half(node: Any, second: bool) -> Any:
    """What a node is the first or second half of, along the last dimension; None if it is none."""
    if not is_call(node, (operator.getitem,)) or not isinstance(node.args[1], tuple):
        return None
    x, index = node.args
    size = example(x).shape[-1]
    if not isinstance(size, int) or size % 2:
        return None
    part = slice(size // 2, None, None) if second else slice(None, size // 2, None)
    return x if index == (Ellipsis, part) else None


def _turned(node: Any) -> Any:
    """The vectors whose halves a node exchanges, with the second negated; None if it does something else."""
    if not is_call(node, (torch.cat,)) or not _on_cpu(node):
        return None
    given = dict(zip(("tensors", "dim"), node.args, strict=False)) | node.kwargs
    parts = given["tensors"]
    if given.get("dim") not in (-1, example(node).dim() - 1) or len(parts) != 2:
        return None
    negated, first = parts
    if not is_call(negated, (operator.neg, torch.neg, "neg")):
        return None
    x = _half(first, second=False)
    if x is None or x is not _half(negated.args[0], second=True):
        return None
    return x if example(x).shape[-1] % (2 * _REGISTER) == 0 else None


def _compute_once(context: GraphContext, value: fx.Node) -> None:
    readers = list(value.users)
    with context.graph.inserting_after(value):
        kept = add_call(context, KEEP, value)
    for reader in readers:
        reader.replace_input_with(value, kept)
    context.rewrote(RULE, value.name, "computed once")


def _as_formula(context: GraphContext, node: Any, x: fx.Node) -> None:
    negated, first = node.args[0]
    parts = (negated, first, negated.args[0])
    with context.graph.inserting_before(node):
        turned = add_call(context, TURN_HALVES, x)
    replace(context.graph, node, turned)
    for part in parts:
        if not part.users:
            context.graph.erase_node(part)
    context.rewrote(RULE, turned.name, "without copies")


def rotate_positions(context: GraphContext) -> None:
    """See the module."""
    for node in list(context.graph.nodes):
        if is_call(node, _ANGLES) and _on_cpu(node) and len((value := _read_by_all(node)).users) > 1:
            _compute_once(context, value)
        elif (x := _turned(node)) is not None:
            _as_formula(context, node, x)
