"""What passes over attention share: calls, layers' names, repeated keys and values, and how far a mask reaches."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompile import compat
from qcompile.passes.context import GraphContext, example

SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def is_call(node: object, targets: tuple[Any, ...]) -> bool:
    """Whether a node calls one of some functions or methods."""
    return isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.target in targets


def named(node: fx.Node) -> str:
    """The name of what a node calls."""
    return str(getattr(node.target, "__name__", node.target))


def repeated(node: Any) -> Any:
    """What a node is a `repeat_kv` of: every head of [B, H, T, D] n times, one after another."""
    shape = example(node).shape
    if is_call(node, ("repeat_interleave", torch.repeat_interleave)):
        given = dict(zip(("input", "repeats", "dim"), node.args, strict=False)) | node.kwargs
        return given["input"] if isinstance(given.get("repeats"), int) and given.get("dim") in (1, -3) else None
    if not is_call(node, ("reshape", "view", "flatten", torch.reshape, torch.flatten)):
        return None
    expanded = node.args[0]
    if not is_call(expanded, ("expand",)):
        return None
    inner = expanded.args[0]
    source = inner.args[0] if isinstance(inner, fx.Node) and inner.args else None
    whole = slice(None)
    if is_call(inner, (operator.getitem,)):
        index = tuple(inner.args[1]) if isinstance(inner.args[1], (tuple, list)) else ()
        if index[:3] != (whole, whole, None) or any(i not in (whole, Ellipsis) for i in index[3:]):
            return None
    elif not (is_call(inner, ("unsqueeze", torch.unsqueeze)) and inner.args[1:] in ((2,), (-3,))):
        return None
    if example(source) is None or example(source).dim() != 4:
        return None
    batch, heads, length, size = example(source).shape
    repeats = example(expanded).shape[2]
    return source if shape == (batch, heads * repeats, length, size) else None


def between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    """Nodes after one and before another."""
    node = first.next
    while node is not last and node.op != "root":
        yield node
        node = node.next


_IN_PLACE = (
    operator.setitem,
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.iand,
    operator.ior,
    operator.ixor,
)
_KEYWORDS = (operator.and_, operator.or_, operator.not_, operator.is_)
"""Functions whose names end like those of methods that write."""
_VIEWS = (
    operator.getitem,
    *("expand", "view", "unsqueeze", "squeeze", "transpose", "permute", "reshape", "narrow", "select", "t", "view_as"),
    *(torch.unsqueeze, torch.squeeze, torch.transpose, torch.permute, torch.reshape, torch.narrow, torch.select),
)


def writes(node: fx.Node) -> bool:
    """Whether a node may write to a tensor that was there before."""
    by_schema = compat.schema_writes(node.target)
    if by_schema is not None:
        return by_schema
    if node.target in _KEYWORDS:
        return False
    name = named(node)
    return node.target in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or "out" in node.kwargs


def is_written(tensor: fx.Node) -> bool:
    """Whether something may write to a tensor, or to a view of it, after it was made."""
    views = [tensor]
    for view in views:
        for user in view.users:
            if writes(user) and (view in user.args[:1] or user.kwargs.get("out") is view):
                return True
            if is_call(user, _VIEWS):
                views.append(user)
    return False


def layer_of(node: fx.Node) -> str:
    """The module that a node comes from, or its own name."""
    module = compat.module_of(node)
    return (module[0] if module else "") or node.name


def _is_range(node: Any, length: int) -> bool:
    """Whether a node's elements are 0 to length - 1, in order."""
    while isinstance(node, fx.Node):
        if node.target is torch.arange:
            return node.args == (length,) and not set(node.kwargs) - {"device", "dtype"}
        if is_call(node, (operator.add,)) and node.args[1] == 0 and isinstance(node.args[1], int):
            node = node.args[0]
        elif is_call(node, (operator.getitem,)) and isinstance(node.args[1], tuple):
            if any(part not in (None, slice(None)) for part in node.args[1]):
                return False
            node = node.args[0]
        else:
            return False
    return False


def is_prefix(mask: fx.Node) -> bool:
    """Whether a mask is `positions <= last` for one number `last`: then its length says it all."""
    node: Any = mask
    while is_call(node, ("expand",)):
        node = node.args[0]
    if is_written(node):
        return False
    if not is_call(node, (operator.le,)) or not all(isinstance(a, fx.Node) for a in node.args):
        return False
    positions, last = node.args
    length = example(mask).shape[-1]
    whole = isinstance(length, int) and example(positions).numel() == length == example(positions).shape[-1]
    return whole and example(last).numel() == 1 and _is_range(positions, length)


@dataclass(frozen=True)
class Causal:
    """A mask by which query i attends to positions up to `offset + number + i`, the last `window` of them if not 0."""

    offset: fx.Node | None
    number: int
    window: int


def _is_single(node: fx.Node) -> bool:
    """Whether a node is a tensor of one element."""
    value = example(node)
    return isinstance(value, torch.Tensor) and value.numel() == 1


def _range(node: Any) -> tuple[int, fx.Node | None, int] | None:
    """(n, a, b) if a node's elements are 0 to n - 1, plus a, a tensor of one element or None, plus b, a number."""
    offset, number = None, 0
    while isinstance(node, fx.Node):
        if node.target is torch.arange:
            plain = len(node.args) == 1 and isinstance(node.args[0], int) and not set(node.kwargs) - {"device", "dtype"}
            return (node.args[0], offset, number) if plain else None  # type: ignore[return-value]
        if is_call(node, (operator.add,)):
            added = node.args[1]
            if isinstance(added, int):
                number += added
            elif offset is None and isinstance(added, fx.Node) and _is_single(added):
                offset = added
            else:
                return None
        elif is_call(node, (operator.getitem,)) and isinstance(node.args[1], tuple):
            if any(part not in (None, slice(None)) for part in node.args[1]):
                return None
        else:
            return None
        node = node.args[0]
    return None


def _conditions(node: Any) -> list[Any]:
    """What all must hold for an element of a mask to be true."""
    while is_call(node, ("expand", "to")) and example(node).dtype == torch.bool:
        node = node.args[0]
    if is_call(node, (operator.and_,)):
        return _conditions(node.args[0]) + _conditions(node.args[1])
    return [] if is_call(node, ("new_ones",)) else [node]


def causal(mask: fx.Node) -> Causal | None:
    """What a mask says, if it is made of positions alone: `keys <= queries`, and `keys > queries - window`."""
    if is_written(mask) or example(mask).dim() < 2:
        return None
    queries, length = example(mask).shape[-2:]
    found, window = None, 0
    for node in _conditions(mask):
        if not is_call(node, (operator.le, operator.gt)) or not all(isinstance(a, fx.Node) for a in node.args):
            return None
        keys, asking = node.args
        width = 0
        if node.target is operator.gt:
            if window or not is_call(asking, (operator.sub,)) or not isinstance(asking.args[1], int):
                return None
            asking, width = asking.args[0], asking.args[1]
        along, down = _range(keys), _range(asking)
        shapes = example(keys).shape[-1:], example(asking).shape[-2:]
        if along is None or down is None or along[1] is not None or shapes != ((length,), (queries, 1)):
            return None
        same = Causal(down[1], down[2] - along[2], 0)
        if along[0] != length or down[0] != queries or (found is not None and found != same):
            return None
        found, window = same, window or width
        if node.target is operator.gt and width <= 0:
            return None
    complete = any(is_call(node, (operator.le,)) for node in _conditions(mask))
    return Causal(found.offset, found.number, window) if found is not None and complete else None


def reach_of(context: GraphContext, mask: fx.Node, form: Causal, known: dict[fx.Node, fx.Node]) -> fx.Node:
    """One more than the last query's position: int64 []; `known` as in `attended_length`."""
    if mask not in known:
        last, value = form.number + example(mask).shape[-2], example(mask)
        with context.graph.inserting_before(mask.next):
            if form.offset is None:
                known[mask] = add_call(context, torch.full, (), last, device=value.device, dtype=torch.int64)
            else:
                known[mask] = add_call(context, torch.add, add_call(context, torch.reshape, form.offset, ()), last)
    return known[mask]


def _is_line(node: Any) -> bool:
    """Whether a node's elements are whole numbers, one after another, along the last dimension alone."""
    while isinstance(node, fx.Node):
        if node.target is torch.arange:
            return len(node.args) == 1 and not set(node.kwargs) - {"device", "dtype"}
        if is_call(node, (operator.add,)) and _is_one(node.args[1]):
            node = node.args[0]
        elif is_call(node, (operator.getitem,)) and isinstance(node.args[1], tuple):
            if any(part not in (None, slice(None)) for part in node.args[1]):
                return False
            node = node.args[0]
        else:
            return False
    return False


def _is_one(value: object) -> bool:
    """Whether something is a single number."""
    found = example(value) if isinstance(value, fx.Node) else value
    return found.numel() == 1 if isinstance(found, torch.Tensor) else found is not None


_COMPARISONS = (operator.le, operator.lt, operator.ge, operator.gt)


def is_interval(mask: fx.Node) -> bool:
    """Whether a mask is made of comparisons of positions with single numbers, all of which must hold.

    What it lets attend to is then an interval of positions, the same for all: its start and its length say it all.
    """
    waiting: list[Any] = [mask]
    compared = 0
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node) or is_written(node):
            return False
        if is_call(node, ("expand",)) or (is_call(node, ("to",)) and example(node).dtype == torch.bool):
            waiting.append(node.args[0])
        elif is_call(node, (operator.and_, torch.logical_and)):
            waiting += node.args
        elif is_call(node, _COMPARISONS) and len(node.args) == 2:
            if not any(_is_line(a) and _is_one(b) for a, b in (node.args, node.args[::-1])):
                return False
            compared += 1
        elif not is_call(node, ("new_ones",)):
            return False
    return compared > 0 and example(mask).shape[-1] > 1


def add_call(context: GraphContext, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """A call at the place of insertion, with its example value."""
    node = context.graph.call_function(target, args, kwargs)
    with context.fake_mode, torch.no_grad():
        node.meta["example_value"] = target(*fx.node.map_arg(args, example), **fx.node.map_arg(kwargs, example))
    return node


def attended_length(context: GraphContext, mask: fx.Node, known: dict[fx.Node, fx.Node]) -> fx.Node:
    """One more than the last position that a boolean mask lets any query attend to: int64 [].

    Args:
        known: what this returned for other masks of the graph. The reduction is written out once, and compilers keep
            its result in memory, from where all layers read it.
    """
    if mask not in known:
        value = example(mask)
        with context.graph.inserting_before(_behind(context, mask)):
            positions = add_call(context, torch.arange, 1, value.shape[-1] + 1, device=value.device, dtype=torch.int64)
            known[mask] = add_call(context, torch.amax, add_call(context, torch.where, mask, positions, 0))
    return known[mask]


def attended_start(context: GraphContext, mask: fx.Node, known: dict[fx.Node, fx.Node], *, alike: bool) -> fx.Node:
    """The first position that a boolean mask lets any query of a sequence attend to, int64 [B]; or of all, [].

    Args:
        known: see `attended_length`.
        alike: the mask is the same for all sequences.
    """
    if mask not in known:
        value = example(mask)
        with context.graph.inserting_before(_behind(context, mask)):
            positions = add_call(context, torch.arange, value.shape[-1], device=value.device, dtype=torch.int64)
            allowed = add_call(context, torch.where, mask, positions, value.shape[-1])
            known[mask] = add_call(context, torch.amin, allowed, [] if alike else [1, 2, 3])
    return known[mask]


def _behind(context: GraphContext, mask: fx.Node) -> fx.Node:
    """Where what is made of a mask can stand first."""
    return (context.placeholders()[-1] if mask.op == "placeholder" else mask).next
