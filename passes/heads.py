"""What passes over attention share: calls, layers' names, and keys or values that are repeated for query heads."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from qcompile import compat
from qcompile.passes.context import example

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


def layer_of(node: fx.Node) -> str:
    """The module that a node comes from, or its own name."""
    module = compat.module_of(node)
    return (module[0] if module else "") or node.name
