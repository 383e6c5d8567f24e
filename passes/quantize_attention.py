"""Attention that reads a quantized cache -> qcompile.attention, which never writes the dequantized cache

    scaled_dot_product_attention(q, K, V, mask)    any scale, with enable_gqa or without
    softmax(q @ K^T * scale + mask) @ V            also with cap * tanh(. / cap) before the mask (Gemma), with casts,
                                                   and with masked_fill(mask, -inf) for the mask

where K and V are `dequantize_kv` of one layer's cache, each through an optional `repeat_kv`. Attention to other keys is
left to Inductor. What is not taken is declined with its reason; the cache is then dequantized for it.

Query i of n may attend to positions up to i, by is_causal or by a mask that says so, as in the first prompt of a cache.
Then on GPUs only the first n are dequantized, and torch attends to them, which takes half as long:

    scaled_dot_product_attention(q, K[:, :, :n], V[:, :, :n], is_causal=True)

unless the cache asks for products in FP8, or torch's kernels do not take the shape. Else the operator is told n.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from dataclasses import replace as replace_fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from qcompile import compat
from qcompile.attention import check_compute
from qcompile.kv_cache import MOST_QUERIES, MOST_SIZE, AttentionSpec, decode_kv_spec
from qcompile.passes.context import OP as LINEAR
from qcompile.passes.context import GraphContext, example, replace
from qcompile.passes.heads import (
    SDPA_ARGUMENTS,
    add_call,
    attended_length,
    attended_start,
    between,
    causal,
    is_call,
    is_interval,
    is_prefix,
    is_written,
    layer_of,
    named,
    reach_of,
    repeated,
    writes,
)

ATTENTION = torch.ops.qcompile.attention.default
RULE = "quantize_attention"
_KV_MASKS = (torch.ops.qcompile.kv_mask, torch.ops.qcompile.kv_mask.default)
_READS = (torch.ops.qcompile.dequantize_kv, torch.ops.qcompile.dequantize_kv.default)
_MATMULS = (torch.matmul, operator.matmul, "matmul")
_SOFTMAX = (F.softmax, torch.softmax, "softmax")
_ADD = (operator.add, torch.add, "add", operator.iadd)
_MUL = (operator.mul, torch.mul, "mul", operator.imul)
_DIV = (operator.truediv, torch.div, "div", operator.itruediv)
_CASTS = ("to", "type", "type_as", "float", "bfloat16", "half")


class _No(Exception):
    """Why an attention is not taken."""


@dataclass
class _Match:
    """An attention and the nodes that it is made of, from its result backwards."""

    query: Any
    key: fx.Node
    value: fx.Node
    mask: Any = None
    masked_out: bool = False
    first: bool = False
    scale: float = 1.0
    softcap: float = 0.0
    nodes: list[fx.Node] = field(default_factory=list)


def _read(node: Any, nodes: list[fx.Node]) -> fx.Node | None:
    """The `dequantize_kv` behind keys or values; the nodes on the way are added to `nodes`."""
    passed: list[fx.Node] = []
    while isinstance(node, fx.Node) and example(node) is not None:
        passed.append(node)
        if is_call(node, _READS):
            nodes += passed
            return node
        if is_call(node, ("contiguous",)):
            node = node.args[0]
        elif (source := repeated(node)) is not None:
            expanded: Any = node.args[0]
            passed += [expanded, expanded.args[0]] if is_call(expanded, ("expand",)) else []
            node = source
        else:
            return None
    return None


def _reads(*nodes: object) -> set[fx.Node]:
    """The reads of quantized caches before nodes, up to the next linear."""
    seen: set[fx.Node] = set()
    waiting = [node for node in nodes if isinstance(node, fx.Node)]
    while waiting:
        node = waiting.pop()
        if node not in seen and node.target not in (F.linear, LINEAR):
            seen.add(node)
            waiting += [] if is_call(node, _READS) else node.all_input_nodes
    return {node for node in seen if is_call(node, _READS)}


def _uncut(node: Any, queries: int, nodes: list[fx.Node]) -> Any:
    """What keys or values are the first of, as many as there are queries; the node is added to `nodes`."""
    whole = slice(None)
    index = node.args[1] if is_call(node, (operator.getitem,)) else None
    if not isinstance(index, tuple) or example(node).dim() != 4 or example(node).shape[2] != queries:
        return node
    others, part = (*index[:2], *index[3:]), index[2] if len(index) > 2 else None
    if any(other != whole for other in others) or not isinstance(part, slice):
        return node
    if part.start not in (None, 0) or part.step not in (None, 1):
        return node
    nodes.append(node)
    return node.args[0]


def _pair(key: object, value: object, nodes: list[fx.Node]) -> tuple[fx.Node, fx.Node]:
    keys, values = _read(key, nodes), _read(value, nodes)
    if keys is None or values is None:
        which = "keys" if keys is None else "values"
        raise _No(f"its {which} are not the whole cache as it was read")
    return keys, values


def _number(value: object, what: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise _No(f"its {what} is computed in the graph")
    return float(value)


def _match_sdpa(node: fx.Node) -> _Match:
    given: dict[str, Any] = dict(zip(SDPA_ARGUMENTS, node.args, strict=False)) | node.kwargs
    nodes = [node]
    first = bool(given.get("is_causal"))
    if given.get("dropout_p"):
        raise _No("it has dropout")
    key, value = given["key"], given["value"]
    if first:
        key, value = (_uncut(n, example(given["query"]).shape[2], nodes) for n in (key, value))
    keys, values = _pair(key, value, nodes)
    scale = given.get("scale")
    if scale is None:
        scale = 1 / math.sqrt(example(given["query"]).shape[-1])
    scale = _number(scale, "scale")
    return _Match(given["query"], keys, values, given.get("attn_mask"), first=first, scale=scale, nodes=nodes)


def _only_reader(node: fx.Node, reader: fx.Node) -> None:
    if list(node.users) != [reader]:
        raise _No(f"what {named(node)} gives is also read by others")


def _transposed(node: object) -> Any:
    """What a node swaps the last two dimensions of."""
    if not isinstance(node, fx.Node) or not node.args:
        return None
    given = tuple(node.args[1:])
    if is_call(node, ("transpose", "swapaxes", "swapdims", torch.transpose)) and len(given) == 2:
        return node.args[0] if {d % 4 for d in given if isinstance(d, int)} == {2, 3} else None
    if is_call(node, ("permute", torch.permute)):
        order: Any = given[0] if len(given) == 1 else given
        return node.args[0] if tuple(order) == (0, 1, 3, 2) else None
    if named(node) == "mT" or (node.target is getattr and given == ("mT",)):
        return node.args[0]
    return None


def _split(node: Any, targets: tuple[Any, ...]) -> tuple[Any, Any] | None:
    """(the scores, the other operand) of a binary operation."""
    if not is_call(node, targets) or len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    if isinstance(left, fx.Node) and _scored(left):
        return left, right
    return (right, left) if isinstance(right, fx.Node) and _scored(right) and targets is not _DIV else None


def _scored(node: fx.Node) -> bool:
    """Whether a node's value comes from a product with keys of a cache, through elementwise steps."""
    for _ in range(12):
        if is_call(node, _MATMULS):
            return bool(_reads(node.args[1]))
        inputs = [a for a in node.args if isinstance(a, fx.Node)]
        if not inputs or node.op == "placeholder":
            return False
        scored = [i for i in inputs if i.op != "placeholder" and example(i) is not None]
        ahead = next((i for i in scored if example(i).shape == example(node).shape), None)
        if ahead is None:
            return False
        node = ahead
    return False


def _match_written_out(node: fx.Node) -> _Match:
    """From `weights @ V` back to `q @ K^T`."""
    weights: Any
    weights, value = node.args
    nodes = [node]
    below = node

    def step(following: Any) -> Any:
        """On to the node before, which nothing else may read."""
        nonlocal below
        _only_reader(following, below)
        nodes.append(following)
        below = following
        return following

    while is_call(weights, _CASTS):
        weights = step(weights).args[0]
    if is_call(weights, (F.dropout, torch.dropout, "dropout")):
        raise _No("it has dropout")
    step(weights)
    given: dict[str, Any] = dict(zip(("input", "dim"), weights.args, strict=False)) | weights.kwargs
    if given.get("dim") not in (-1, 3):
        raise _No("its softmax is not over the context")
    scores = given["input"]
    match = _Match(None, node, node, nodes=nodes)

    def casts(scores: Any) -> Any:
        while is_call(scores, _CASTS):
            scores = step(scores).args[0]
        return scores

    scores = casts(scores)
    if is_call(scores, ("masked_fill", torch.masked_fill)):
        if len(scores.args) != 3 or scores.args[2] != -math.inf:
            raise _No("masked_fill puts another value than -inf")
        match.mask, match.masked_out = scores.args[1], True
        scores = casts(step(scores).args[0])
    elif (found := _split(scores, _ADD)) is not None:
        if not isinstance(found[1], fx.Node):
            raise _No("a number is added to its scores")
        step(scores)
        scores, match.mask = casts(found[0]), found[1]
    if (found := _split(scores, _MUL)) is not None and is_call(found[0], (torch.tanh, F.tanh, "tanh")):
        match.softcap = _number(found[1], "soft cap")
        step(scores)
        capped = step(found[0]).args[0]
        found = _split(capped, _DIV) or _split(capped, _MUL)
        if found is None:
            raise _No("its scores are not divided by the soft cap before tanh")
        divisor = _number(found[1], "soft cap")
        divisor = divisor if is_call(capped, _DIV) else 1 / divisor
        if not math.isclose(divisor, match.softcap, rel_tol=1e-6):
            raise _No(f"its scores are divided by {divisor} before tanh and multiplied by {match.softcap} after it")
        step(capped)
        scores = found[0]
    while not is_call(scores, _MATMULS):
        if (found := _split(scores, _MUL)) is not None:
            match.scale *= _number(found[1], "scale")
        elif (found := _split(scores, _DIV)) is not None:
            match.scale /= _number(found[1], "scale")
        else:
            raise _No(f"{named(scores)} stands between the product with the keys and the softmax")
        step(scores)
        scores = casts(found[0])
    step(scores)
    match.query, transposed = scores.args
    key = _transposed(transposed)
    if key is None:
        raise _No("its keys are not transposed in the product with the queries")
    nodes.append(transposed)
    match.key, match.value = _pair(key, value, nodes)
    return match


def _weights_before(node: fx.Node) -> bool:
    """Whether the first factor of a product is a softmax, cast or dropped out."""
    weights: Any = node.args[0] if len(node.args) == 2 else None
    while is_call(weights, (*_CASTS, F.dropout, torch.dropout, "dropout")):
        weights = weights.args[0]
    return is_call(weights, _SOFTMAX)


@dataclass(kw_only=True)
class _Places:
    """What a query attends to: nodes of the arguments of `qcompile.attention`."""

    mask: Any
    length: Any
    start: Any = None
    block_table: Any = None
    causal: bool = False
    window: int = 0
    first: bool = False


@dataclass
class _Known:
    """Lengths and starts of masks that the graph has already."""

    lengths: dict[fx.Node, fx.Node] = field(default_factory=dict)
    starts: dict[fx.Node, fx.Node] = field(default_factory=dict)


def _check(
    context: GraphContext, node: fx.Node, match: _Match, layer: str
) -> tuple[list[fx.Node], _Places, AttentionSpec]:
    """The cache's tensors, what is attended to, and the spec."""
    key_codes, key_scale, length, key_text = match.key.args[:4]
    value_codes, value_scale, value_length, value_text = match.value.args[:4]
    cache: list[Any] = [key_codes, key_scale, value_codes, value_scale]
    keys, values = decode_kv_spec(str(key_text)), decode_kv_spec(str(value_text))
    table = match.key.kwargs.get("block_table")
    if keys.scheme != values.scheme or length is not value_length or table is not match.value.kwargs.get("block_table"):
        raise _No("its keys and values are of different caches")
    query = example(match.query)
    batch = example(key_codes if table is None else table).shape[0]
    if query is None or query.dim() != 4 or query.shape[0] != batch:
        raise _No("its query has another batch than the cache, or other dimensions than batch, heads, tokens, size")
    mask = example(match.mask) if match.mask is not None else None
    if match.mask is not None and (mask is None or not (mask.dtype == torch.bool or mask.is_floating_point())):
        raise _No("its mask is neither boolean nor floating point")
    if match.masked_out and mask is not None and mask.dtype != torch.bool:
        raise _No("its mask is not boolean")
    if match.mask is None and table is not None:
        raise _No("it has no mask, and sequences in a paged cache have lengths of their own; give it pages.mask(...)")
    if match.first and query.shape[2] > example(key_codes).shape[2]:
        raise _No("is_causal is of more queries than its cache has positions")
    read = {n for n in (*cache, length, table) if isinstance(n, fx.Node)}
    first = min((match.key, match.value), key=list(context.graph.nodes).index)
    for other in between(first, node):
        if writes(other) and read & set(other.all_input_nodes[:2]):
            raise _No("its cache changes between being read and being attended to")
    spec = AttentionSpec(key=keys, value=values, scale=match.scale, softcap=match.softcap)
    check_compute(spec.scheme, query.device, f"attention of {layer or 'the model'}")
    places = _Places(mask=match.mask, length=None if mask is None else length, block_table=table, first=match.first)
    return cache, places, spec


def _hidden_by(mask: Any) -> Any:
    """The mask of a paged cache that a mask to add is made of: 0 where it holds, and else the least number."""
    while is_call(mask, _CASTS):
        mask = mask.args[0]
    if not is_call(mask, (torch.where,)) or len(mask.args) != 3 or not is_call(mask.args[0], _KV_MASKS):
        return None
    hidden = mask.args[2]
    least = isinstance(hidden, (int, float)) and hidden <= torch.finfo(torch.float16).min
    return mask.args[0] if mask.args[1] == 0 and least else None


def _narrow(context: GraphContext, query: Tensor, places: _Places, known: _Known) -> None:
    """Say by numbers what a mask lets attend to, as far as that goes; what they say completely needs no mask.

    Positions behind the cache's own length are not specified, so that the mask's length serves as well.
    """
    value = example(places.mask)
    mask = _hidden_by(places.mask) or places.mask
    few = isinstance(query.shape[2], int) and query.shape[2] <= MOST_QUERIES
    if is_call(mask, _KV_MASKS) and mask.args[1] == query.shape[2]:
        places.length, places.mask, places.causal, places.window = mask.args[0], None, True, mask.args[3]
    elif is_prefix(mask):
        places.length, places.mask = attended_length(context, mask, known.lengths), None
    elif (form := causal(mask)) is not None:
        places.length, places.mask = reach_of(context, mask, form, known.lengths), None
        places.causal, places.window = True, form.window
        places.first = form.offset is None and form.number == 0 and not form.window
    elif few and is_interval(mask):
        places.length = attended_length(context, mask, known.lengths)
        places.start, places.mask = attended_start(context, mask, known.starts, alike=True), None
    elif few and value.dtype == torch.bool and value.dim() == 4 and not is_written(mask):
        places.start = attended_start(context, mask, known.starts, alike=value.shape[0] == 1)


def _by_torch(query: Tensor, read: Any, spec: AttentionSpec) -> bool:
    """Whether torch attends to keys of the first positions faster; on CPUs the operator knows how many there are."""
    fast = query.device.type == "cuda" and query.dtype in (torch.bfloat16, torch.float16)
    sizes = max(spec.key.head_dim, spec.value.head_dim)
    return fast and query.dtype == read.dtype and sizes <= MOST_SIZE and not (spec.softcap or spec.scheme.compute)


def _count(context: GraphContext, query: fx.Node) -> Any:
    """How many queries there are: a number, or a node."""
    count = example(query).shape[2]
    return count if isinstance(count, int) else add_call(context, torch.ops.aten.sym_size.int, query, 2)


def _of_first(context: GraphContext, match: _Match, cache: list[Any], spec: AttentionSpec) -> fx.Node:
    """torch's attention of n queries to the first n positions of a cache, none to positions behind its own."""
    part = (slice(None), slice(None), slice(None, _count(context, match.query)))
    halves = []
    for read, (codes, scale) in ((match.key, cache[:2]), (match.value, cache[2:])):
        first = [add_call(context, operator.getitem, t, part) if example(t).dim() > 2 else t for t in (codes, scale)]
        halves.append(add_call(context, _READS[0], *first, None, *read.args[3:]))
    shared = example(match.query).shape[1] != example(cache[0]).shape[1]
    return add_call(
        context,
        F.scaled_dot_product_attention,
        match.query,
        *halves,
        is_causal=True,
        scale=spec.scale,
        enable_gqa=shared,
    )


def _rewrite(context: GraphContext, node: fx.Node, match: _Match, layer: str, known: _Known) -> list[Any]:
    """Take an attention; what it gives are reads of the cache that stay."""
    graph = context.graph
    cache, places, spec = _check(context, node, match, layer)
    added = []
    if match.masked_out:
        with graph.inserting_before(node):
            places.mask = graph.call_function(torch.logical_not, (match.mask,))
        places.mask.meta["example_value"] = torch.logical_not(example(match.mask))
        added.append(places.mask)
    elif places.mask is not None:
        _narrow(context, example(match.query), places, known)
        spec = replace_fields(spec, causal=places.causal, window=places.window)
    query = example(match.query)
    by_torch = places.first and _by_torch(query, example(match.key), spec)
    with graph.inserting_before(node):
        if by_torch:
            new = _of_first(context, match, cache, spec)
        else:
            if match.first:
                count = _count(context, match.query)
                places.length = add_call(context, torch.full, (), count, device=query.device, dtype=torch.int64)
                spec = replace_fields(spec, causal=True)
            parts = {name: part for name in ("start", "block_table") if (part := getattr(places, name)) is not None}
            new = add_call(context, ATTENTION, match.query, cache, places.mask, places.length, spec.encode(), **parts)
    made, result = example(new), example(node)
    if isinstance(result, Tensor) and (made.shape != result.shape or made.dtype != result.dtype):
        for extra in (new, *added):
            graph.erase_node(extra)
        raise _No(f"it gives {result.dtype} {tuple(result.shape)}, not {made.dtype} {tuple(made.shape)}")
    replace(graph, node, new)
    dead = [n for n in dict.fromkeys(match.nodes) if n is not node]
    while gone := [n for n in dead if not n.users]:
        for n in gone:
            graph.erase_node(n)
            dead.remove(n)
    if by_torch:
        what = f"reads the first tokens of its {spec.scheme.format.name} cache for torch to attend to"
        context.rewrote(RULE, layer, what)
        return list(new.args[1:3])
    paged = "paged " if places.block_table is not None else ""
    cap = f", soft cap {spec.softcap:g}" if spec.softcap else ""
    context.rewrote(RULE, layer, f"reads its {paged}{spec.scheme.format.name} cache directly{cap}")
    return []


def quantize_attention(context: GraphContext) -> None:
    """See the module."""
    told: set[fx.Node] = set()
    known = _Known()
    wanted = None if context.config is None else context.config.kv_cache
    for node in list(context.graph.nodes):
        layer = layer_of(node)
        sdpa = node.target is F.scaled_dot_product_attention
        flex = "flex_attention" in named(node)
        if not (sdpa or flex or (is_call(node, _MATMULS) and _weights_before(node))):
            continue
        reads = _reads(node)
        if not reads:
            if wanted is not None:
                reason = (
                    f"the configuration asks for a KV cache of {wanted}, but its keys come from no quantized cache: "
                    "give the model one, such as qcompile.TransformersCache"
                )
                context.declined(RULE, layer, reason)
            continue
        try:
            if flex:
                raise _No("flex_attention is compiled to a kernel of its own")
            match = _match_sdpa(node) if sdpa else _match_written_out(node)
            told.update(_rewrite(context, node, match, layer, known))
        except _No as why:
            context.declined(RULE, layer, str(why))
            told |= reads
    unknown: dict[str, set[str]] = {}
    for node in context.graph.nodes:
        if is_call(node, _READS) and node not in told and node.users:
            unknown.setdefault(layer_of(node) if compat.module_of(node) else "", set()).update(map(named, node.users))
    for layer, readers in unknown.items():
        reason = f"its cache is read by {', '.join(sorted(readers))}, no attention that is known"
        context.declined(RULE, layer, reason)
