"""linear1(x), linear2(x) -> codes, scale = quantize(x); linear1(codes, scale), linear2(codes, scale)     q, k, v apart

for linears that read the same activations and quantize them alike, but are not merged (their weights' schemes differ,
or each is packed alone). Compilers do not find that the linears compute the same.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from qcompile.linear_spec import decode_spec
from qcompile.passes.context import OP, QUANTIZE, Args, GraphContext, example

_RULE = "share_quantization"
_X, _STATIC, _SPEC = Args.index("x"), Args.index("input_scale"), Args.index("spec")


def alike(context: GraphContext) -> list[list[fx.Node]]:
    """Linears that quantize the same activations in the same way, in the order of the graph."""
    found: dict[object, list[fx.Node]] = {}
    for node in context.graph.nodes:
        if node.target is not OP or node not in context.layers:
            continue
        spec = decode_spec(node.args[_SPEC])
        activation = spec.scheme.activation
        if activation is None or activation.outlier_threshold is not None or spec.codes_of:
            continue
        if spec.scheme.weight.arranges_inputs or node.args[Args.index("pre_quant_scale")] is not None:
            continue
        found.setdefault((node.args[_X], node.args[_STATIC], activation), []).append(node)
    return list(found.values())


def read_codes(linears: Sequence[fx.Node], codes: fx.Node, scale: fx.Node, dtype: torch.dtype) -> None:
    """Let linears read the codes of activations that were of some type."""
    for node in linears:
        spec = decode_spec(node.args[_SPEC])  # type: ignore[arg-type]
        node.update_arg(_X, codes)
        node.update_arg(_STATIC, scale)
        node.update_arg(_SPEC, spec.reading_codes_of(dtype).encode())


def share_quantization(context: GraphContext) -> None:
    """See the module."""
    for nodes in alike(context):
        if len(nodes) < 2:
            continue
        x, static = nodes[0].args[_X], nodes[0].args[_STATIC]
        with context.graph.inserting_before(nodes[0]):
            both = context.graph.call_function(QUANTIZE, (x, static, nodes[0].args[_SPEC]))
            with context.fake_mode:
                both.meta["example_value"] = QUANTIZE(*fx.node.map_arg(both.args, example))
            parts = [context.graph.call_function(operator.getitem, (both, place)) for place in range(2)]
            for part, value in zip(parts, both.meta["example_value"], strict=True):
                part.meta["example_value"] = value
        read_codes(nodes, parts[0], parts[1], example(x).dtype)
        context.rewrote(_RULE, " + ".join(context.layers[node].name for node in nodes), "one quantization")
