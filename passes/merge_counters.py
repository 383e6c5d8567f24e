"""a.add_(n), later b.add_(n), ... for counters that the graph is given -> torch._foreach_add_([a, b, ...], n)

on GPUs, at the place of the last of them. A static cache of transformers keeps how many tokens it holds in a number of
its own for each layer; each would be a kernel that changes one number. A counter that something reads between its own
addition and the last is left as it is.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.passes.context import GraphContext, example
from qcompile.passes.heads import is_call

RULE = "merge_counters"
DEVICES = ("cuda",)
_FRESH = (operator.add, operator.sub, operator.mul, operator.le, operator.lt, operator.ge, operator.gt, torch.add)
"""What makes new tensors; anything else that is made of a counter may share its memory."""


def _is_count(node: fx.Node) -> bool:
    """Whether a node adds a number to an integer that is an input, and nothing reads its result."""
    if not is_call(node, ("add_",)) or node.users or node.kwargs or len(node.args) != 2:
        return False
    counter, amount = node.args
    if not isinstance(counter, fx.Node) or counter.op != "placeholder" or type(amount) is not int:
        return False
    value = example(counter)
    if not isinstance(value, Tensor) or value.dim() != 0 or value.is_floating_point():
        return False
    return value.device.type in DEVICES


def _readers(counter: fx.Node) -> set[fx.Node]:
    """The nodes that read a counter, or what may share its memory."""
    found: set[fx.Node] = set()
    waiting = [counter]
    while waiting:
        for user in waiting.pop().users:
            if user not in found:
                found.add(user)
                waiting += [] if is_call(user, _FRESH) else [user]
    return found


def merge_counters(context: GraphContext) -> None:
    """See the module."""
    groups: dict[Any, list[fx.Node]] = {}
    order = {node: position for position, node in enumerate(context.graph.nodes)}
    for node in filter(_is_count, list(order)):
        value = example(node.args[0])
        groups.setdefault((node.args[1], value.dtype, value.device), []).append(node)
    for (amount, *_), counts in groups.items():
        last = counts[-1]
        kept = []
        for node in counts:
            counter = node.args[0]
            assert isinstance(counter, fx.Node)
            between = [r for r in _readers(counter) if order[node] < order[r] < order[last]]
            if between:
                context.declined(RULE, counter.name, f"{between[0].name} reads it before the last counter is raised")
            else:
                kept.append(node)
        if len(kept) < 2 or len({node.args[0] for node in kept}) < len(kept):
            continue
        with context.graph.inserting_before(last):
            context.graph.call_function(torch._foreach_add_, ([node.args[0] for node in kept], amount))
        for node in kept:
            context.graph.erase_node(node)
        context.rewrote(RULE, f"{len(kept)} counters", f"raised by {amount} at once")
