"""linear(x, W1), linear(x, W2), ... -> split(linear(x, cat(W1, W2, ...)))     q, k, v; gate and up

for linears that read the same input and have the same scheme. Plain weights are concatenated before they are
quantized, row by row, so the codes are those that the layers would have had apart. Weights that are packed already are
put into one tensor in place, of which the modules' own buffers become views, so nothing is stored twice.

Layers whose schemes differ stay apart.
"""

from __future__ import annotations

import operator
from dataclasses import replace as changed
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from qcompile import huge_pages
from qcompile.layouts import LAYOUTS
from qcompile.linear_spec import LinearSpec, decode_spec
from qcompile.passes.context import OP, Args, GraphContext, Layer, WeightRef, example
from qcompile.scheme import WHOLE

_RULE = "merge_projections"


def _bias(node: fx.Node) -> Any:
    if node.target is OP:
        return node.args[Args.index("bias")]
    return node.args[2] if len(node.args) > 2 else None


def _reason_apart(context: GraphContext, nodes: list[fx.Node]) -> str | None:
    """Why linears that share their input are not merged."""
    layers = [context.layers[n] for n in nodes]
    first = layers[0]
    if any(layer.scheme != first.scheme for layer in layers):
        return "schemes differ: " + "; ".join(f"{layer.name} {layer.scheme}" for layer in layers)
    if len({_bias(n) is None for n in nodes}) > 1:
        return "some have a bias and some have none"
    if len({n.target for n in nodes}) > 1 or any(
        layer.weight is not None and layer.weight.transposed for layer in layers
    ):
        return "their weights are stored in different ways"
    if len({w for layer in layers if layer.weight for w in layer.weight.parts}) < sum(
        len(layer.weight.parts) for layer in layers if layer.weight
    ):
        return "they share a weight"
    if context.free_weights and nodes[0].target is not OP:
        return "the originals are to be freed, so each is packed alone"
    if any(layer.prepared and (layer.input_scale is not None or layer.pre_quant_scale is not None) for layer in layers):
        return "each scales its input in its own way"
    rows = first.scheme.weight.granularity.rows
    if rows not in (1, WHOLE) and any(example(n).shape[-1] % rows for n in nodes):
        return f"a block of {rows} rows would span two layers"
    if nodes[0].target is OP:
        return _reason_packed_apart(context, nodes)
    return None


def _reason_packed_apart(context: GraphContext, nodes: list[fx.Node]) -> str | None:
    specs = [decode_spec(n.args[-1]) for n in nodes]  # type: ignore[arg-type]
    layout = LAYOUTS[specs[0].layout]
    if any(s.layout != layout.name for s in specs) or not layout.mergeable:
        return f"layout {layout.name} cannot be concatenated"
    if any(s.out_features % layout.tile for s in specs):
        return f"output features are no multiple of {layout.tile}"
    if specs[0].scheme.weight.granularity.rows == WHOLE:
        return "each has one scale for its whole weight"
    sources = [part for n in nodes for part in _weight(n)]
    if not all(isinstance(s, fx.Node) and s.op == "placeholder" for s in sources) or len(set(sources)) < len(sources):
        return "their weights are shared or computed in the graph"
    for what in ("input_scale", "pre_quant_scale"):
        given: list[Any] = [n.args[Args.index(what)] for n in nodes]
        if (given[0] is None) != (given[-1] is None) or (given[0] is not None and not _equal(context, given)):
            return f"{what}s differ"
    if specs[0].scheme.weight.act_order and not _equal(context, [_weight(n)[-1] for n in nodes]):
        return "their columns are in different orders"
    return None


def _weight(node: fx.Node) -> list[fx.Node]:
    """The packed weight's tensors, in the order of its scheme's `fields`."""
    return node.args[Args.index("weight")]  # type: ignore[return-value]


def _equal(context: GraphContext, nodes: list[fx.Node]) -> bool:
    first = context.values[nodes[0]]
    return all(torch.equal(context.values[n], first) for n in nodes)


def adjoin(tensors: tuple[Tensor, ...]) -> Tensor:
    """One tensor that holds all rows of the given ones; they become views of it (and are found to be so next time)."""
    first = tensors[0]
    shape = (sum(t.shape[0] for t in tensors), *first.shape[1:])
    offset = first.storage_offset()
    for t in tensors:
        if t.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or t.storage_offset() != offset:
            break
        offset += t.numel()
    else:
        return _in_memory_of(first, shape)
    with torch.no_grad():
        # Compiled code is guarded by strides, also those of dimensions of size 1, which `torch.cat` may choose anew.
        merged = huge_pages.empty(shape, first).as_strided(shape, first.stride())
        for t, view in zip(tensors, merged.split([t.shape[0] for t in tensors]), strict=True):
            view.copy_(t)
            t.set_(view)
    return _in_memory_of(first, shape)


def _in_memory_of(first: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor that begins where another does: no view, since compilers describe what a view is of, each anew."""
    memory, strides = first.untyped_storage(), first.stride()
    return first.new_empty(0).set_(memory, first.storage_offset(), shape, strides)


def _merge_packed(context: GraphContext, nodes: list[fx.Node], bias: fx.Node | None, name: str) -> fx.Node:
    specs = [decode_spec(n.args[-1]) for n in nodes]  # type: ignore[arg-type]
    spec: LinearSpec = changed(specs[0], out_features=sum(s.out_features for s in specs))
    weight: list[fx.Node] = []
    for field, sources in zip(spec.scheme.weight.fields, zip(*map(_weight, nodes), strict=True), strict=True):
        if field == "perm":
            weight.append(sources[0])
        else:
            weight += context.bind(f"{name}_{field}", sources, lambda tensors: (adjoin(tensors),))
    given = dict(zip(Args, nodes[0].args, strict=True)) | {"weight": weight, "bias": bias, "spec": spec.encode()}
    return context.graph.call_function(OP, tuple(given.values()))


def _concatenation(context: GraphContext, nodes: list[Any]) -> fx.Node:
    new = context.graph.call_function(torch.cat, (nodes,))
    with context.fake_mode:
        # Not all subclasses of tensors concatenate, and of this one only shape, dtype and device matter.
        parts = [torch.empty(e.shape, dtype=e.dtype, device=e.device) for e in map(example, nodes)]
        new.meta["example_value"] = torch.cat(parts)
    return new


def _merge(context: GraphContext, nodes: list[fx.Node]) -> None:
    graph, layers = context.graph, [context.layers.pop(n) for n in nodes]
    label = " + ".join(layer.name for layer in layers)
    sizes = [int(example(n).shape[-1]) for n in nodes]
    bias = None
    with graph.inserting_before(nodes[0]):
        if _bias(nodes[0]) is not None:
            bias = _concatenation(context, [_bias(n) for n in nodes])
        if nodes[0].target is OP:
            merged = _merge_packed(context, nodes, bias, layers[0].name + "_merged")
            ref = None
        else:
            weight = _concatenation(context, [n.args[1] for n in nodes])
            merged = graph.call_function(F.linear, (nodes[0].args[0], weight, bias))
            ref = WeightRef(tuple(p for layer in layers if layer.weight for p in layer.weight.parts))
        parts = graph.call_method("split", (merged, sizes, -1))
        with context.fake_mode:
            merged.meta = {**nodes[0].meta, "example_value": torch.cat([example(n) for n in nodes], -1)}
            parts.meta["example_value"] = example(merged).split(sizes, -1)
        for position, node in enumerate(nodes):
            part = graph.call_function(operator.getitem, (parts, position))
            part.meta = {**node.meta, "example_value": parts.meta["example_value"][position]}
            node.replace_all_uses_with(part)
    for node in nodes:
        graph.erase_node(node)
    context.layers[merged] = Layer(label, layers[0].scheme, ref, prepared=layers[0].prepared, note=layers[0].note)
    context.rewrote(_RULE, label, "one linear")


def merge_projections(context: GraphContext) -> None:
    """See the module."""
    by_input: dict[fx.Node, list[fx.Node]] = {}
    for node in context.layers:
        if isinstance(node.args[0], fx.Node):
            by_input.setdefault(node.args[0], []).append(node)
    order = {node: position for position, node in enumerate(context.graph.nodes)}
    for nodes in by_input.values():
        nodes.sort(key=order.__getitem__)
        if len(nodes) < 2:
            continue
        reason = _reason_apart(context, nodes)
        if reason is None:
            _merge(context, nodes)
        else:
            context.declined(_RULE, " + ".join(context.layers[n].name for n in nodes), reason)
