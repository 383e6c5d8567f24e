"""Attention to keys that heads share -> qcompile.attention_plain, which reads each key once

    scaled_dot_product_attention(q, repeat_kv(K), repeat_kv(V), mask)     -> attention_plain(q, K, V, mask, length)
    scaled_dot_product_attention(q, K, V, mask, enable_gqa=True)          -> the same

for up to 8 tokens. Models write keys and values out once more for each query head that shares them, which on GPUs even
torch's attention with `enable_gqa` does where there is a mask. `length` is made of a boolean mask, once a graph: one
more than the last position that any query attends to, so that the empty part of a static cache is not read. A mask of
one token that says no more than that (`positions <= last`) is left out.

On CPUs with a matrix unit, causal attention from any number of tokens is taken, of heads that share keys or not:

    scaled_dot_product_attention(q, K, V, positions <= own positions)     -> attention_plain(q, K, V, None, length,
    scaled_dot_product_attention(q, K, V, is_causal=True)                                    causal=True, window)

where the mask is never written, and what it hides is not computed.

Without a mask and with `enable_gqa` torch's own kernels share heads, and such attention is left to them. What is not
taken is declined with its reason. Attention that reads a quantized cache was taken before, by `quantize_attention`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from qcompile.attention import attends_from_many
from qcompile.kv_cache import MOST_QUERIES, MOST_ROWS, MOST_SIZE
from qcompile.passes.context import GraphContext, example, replace
from qcompile.passes.heads import (
    SDPA_ARGUMENTS,
    Causal,
    add_call,
    attended_length,
    between,
    causal,
    is_call,
    is_prefix,
    is_written,
    layer_of,
    reach_of,
    repeated,
    writes,
)

ATTENTION = torch.ops.qcompile.attention_plain.default
RULE = "share_heads"
DTYPES = {
    "cuda": (torch.bfloat16, torch.float16),
    "cpu": (torch.bfloat16, torch.float16, torch.float32),
}
"""Of queries, keys and values, by the kinds of devices that have kernels."""


def _source(node: fx.Node, nodes: list[fx.Node]) -> fx.Node:
    """What keys or values are repeated of, or they themselves; nodes on the way are added to `nodes`."""
    source = repeated(node)
    if source is None:
        return node
    nodes.append(node)
    expanded = node.args[0]
    if is_call(expanded, ("expand",)):
        assert isinstance(expanded, fx.Node)
        nodes.append(expanded)
        assert isinstance(expanded.args[0], fx.Node)
        nodes.append(expanded.args[0])
    return source


def _reason(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, given: dict[str, Any], *, causal: bool
) -> str | None:
    """Why an attention over these sources is left alone; None if it is taken.

    Args:
        causal: what its mask says can be said by numbers, and there is a kernel for many queries.
    """
    sizes = (*query.shape, *key.shape, *value.shape)
    if not all(isinstance(size, int) for size in sizes):
        return "its shape is not fixed"
    if query.dim() != 4 or key.dim() != 4 or key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0]:
        return "its query, keys and values are not of one batch, or have other dimensions than four"
    if query.shape[1] % key.shape[1] != 0 or (query.shape[1] == key.shape[1] and not causal):
        return "no query heads share its keys"
    few = query.shape[2] <= MOST_QUERIES and query.shape[2] * query.shape[1] // key.shape[1] <= MOST_ROWS
    if not (few or causal):
        return f"it is from {query.shape[2]} tokens, which torch's own kernels are for"
    kinds = DTYPES[query.device.type]
    if not query.dtype == key.dtype == value.dtype or query.dtype not in kinds:
        names = " or ".join(f"all {str(kind).removeprefix('torch.')}" for kind in kinds)
        return f"its query, keys and values are not {names}"
    if max(key.shape[3], value.shape[3]) > MOST_SIZE:
        return f"its heads have more than {MOST_SIZE} elements"
    on_cpu = query.device.type == "cpu"
    if not all(t.stride(-1) == 1 if on_cpu else t.is_contiguous() for t in (key, value)):
        return "its keys or values do not lie one after another in memory"
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        return "its mask is neither boolean nor of the query's type"
    if given.get("dropout_p") or (given.get("is_causal") and not causal):
        return "it has dropout, or is_causal aligns its queries with the first keys"
    if given.get("scale") is not None and not isinstance(given["scale"], (int, float)):
        return "its scale is computed in the graph"
    return None


def _causal(query: Tensor, key: Tensor, mask: Any, given: dict[str, Any]) -> Causal | None:
    """What a mask, or `is_causal` for as many queries as keys, says by numbers; None if it does not."""
    if mask is not None:
        return causal(mask)
    return Causal(None, 0, 0) if given.get("is_causal") and query.shape[2] == key.shape[2] else None


def _rewrite(context: GraphContext, node: fx.Node, lengths: dict[fx.Node, fx.Node]) -> str | None:
    """Take an attention; or the reason why not, or None where torch has a kernel for it."""
    given: dict[str, Any] = dict(zip(SDPA_ARGUMENTS, node.args, strict=False)) | node.kwargs
    passed: list[fx.Node] = []
    key, value = (_source(given[name], passed) for name in ("key", "value"))
    mask, query = given.get("attn_mask"), example(given["query"])
    by_numbers = _causal(query, example(key), mask, given) if attends_from_many(query) else None
    if not passed and by_numbers is None and (mask is None or not given.get("enable_gqa")):
        return None
    reason = _reason(query, example(key), example(value), example(mask), given, causal=by_numbers is not None)
    if reason is not None:
        return reason
    order = list(context.graph.nodes)
    if passed and any(map(writes, between(min(passed, key=order.index), node))):
        return "something is written between its keys and itself"
    length, window = None, 0
    if by_numbers is not None:
        length = None if mask is None else reach_of(context, mask, by_numbers, lengths)
        mask, window = None, by_numbers.window
    elif mask is not None and example(mask).dtype == torch.bool and not is_written(mask):
        length = attended_length(context, mask, lengths)
        mask = None if is_prefix(mask) else mask
    scale = given.get("scale")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    arguments = (given["query"], key, value, mask, length, scale)
    with context.graph.inserting_before(node):
        new = add_call(context, ATTENTION, *arguments, *(() if by_numbers is None else (True, window)))
    replace(context.graph, node, new)
    while gone := [n for n in dict.fromkeys(passed) if not n.users]:
        for n in gone:
            context.graph.erase_node(n)
            passed = [p for p in passed if p is not n]
    return ""


def share_heads(context: GraphContext) -> None:
    """See the module."""
    lengths: dict[fx.Node, fx.Node] = {}
    for node in list(context.graph.nodes):
        if node.target is not F.scaled_dot_product_attention or example(node) is None:
            continue
        if example(node).device.type not in DTYPES:
            continue
        layer = layer_of(node)
        reason = _rewrite(context, node, lengths)
        if reason == "":
            context.rewrote(RULE, layer, "reads each key once for all query heads that share it")
        elif reason is not None:
            context.declined(RULE, layer, reason)
