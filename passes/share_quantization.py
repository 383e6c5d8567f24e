"""linear1(x), linear2(x) -> codes, scale = quantize(x); linear1(codes, scale), linear2(codes, scale)     q, k, v apart

for linears that read the same activations and quantize them alike, but are not merged (their weights' schemes differ,
or each is packed alone). Compilers do not find that the linears compute the same.

On GPUs also for a linear alone whose activations are in memory already, so that a compiler has nothing to join with
their quantization: results of linears and of attention, and inputs of the graph. One kernel of ours takes the place of
up to three, and begins while the one before ends. Where torch multiplies, compilers see the epilogue, and join that.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from qcompile.linear_spec import decode_spec
from qcompile.norm_spec import NormSpec, quantization
from qcompile.norms import OP as NORM_QUANTIZE
from qcompile.ops import seen_through
from qcompile.passes.context import OP, QUANTIZE, Args, GraphContext, example
from qcompile.passes.heads import is_call, named
from qcompile.passes.quantize_attention import ATTENTION
from qcompile.passes.share_heads import ATTENTION as ATTENTION_PLAIN

_RULE = "share_quantization"
_X, _STATIC, _SPEC = Args.index("x"), Args.index("input_scale"), Args.index("spec")

_WRITES = (OP, ATTENTION, ATTENTION_PLAIN, F.scaled_dot_product_attention)
"""Operators whose results are in memory, whatever reads them."""
_VIEWS = ("view", "reshape", "flatten", "transpose", "permute", "contiguous")
LEFT = ("cpu",)
"""Kinds of devices whose products quantize their inputs themselves, or whose compiler makes one kernel of both."""


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


def has_visible_epilogue(x: Any) -> bool:
    """Whether activations are what a linear's epilogue made of a product of torch's, so that compilers see it."""
    if not is_call(x, (OP,)):
        return False
    spec, rows = decode_spec(x.args[_SPEC]), example(x.args[_X])
    flat = rows if rows.dim() == 2 else rows.flatten(0, -2)
    return bool(spec.epilogue) and seen_through(spec, flat, spec.floating(rows.dtype))


def _is_written(x: Any) -> bool:
    """Whether activations are in memory, whatever reads them, so that a compiler joins no formula with what does."""
    while isinstance(x, fx.Node) and x.op in ("call_function", "call_method") and named(x) in _VIEWS:
        x = x.args[0]
    written = isinstance(x, fx.Node) and (x.op == "placeholder" or is_call(x, _WRITES))
    return written and not has_visible_epilogue(x)


def _by_kernel(x: Any, spec: str) -> NormSpec | None:
    """What one kernel does to activations, instead of a compiler's: None where that is better, or there is none."""
    activation, like = decode_spec(spec).scheme.activation, example(x)
    assert activation is not None
    return quantization(activation, like.shape[-1]) if like.device.type not in LEFT and _is_written(x) else None


def share_quantization(context: GraphContext) -> None:
    """See the module."""
    for nodes in alike(context):
        x, static, text = (nodes[0].args[place] for place in (_X, _STATIC, _SPEC))
        rows = _by_kernel(x, str(text))
        if rows is None and len(nodes) < 2:
            continue
        target: Any = QUANTIZE if rows is None else NORM_QUANTIZE
        arguments = (x, static, text) if rows is None else (x, None, None, None, rows.encode())
        with context.graph.inserting_before(nodes[0]):
            both = context.graph.call_function(target, arguments)
            with context.fake_mode:
                both.meta["example_value"] = target(*fx.node.map_arg(both.args, example))
            parts = [context.graph.call_function(operator.getitem, (both, place)) for place in range(2)]
            for part, value in zip(parts, both.meta["example_value"], strict=True):
                part.meta["example_value"] = value
        read_codes(nodes, parts[0], parts[1], example(x).dtype)
        what = "one quantization" if rows is None else "quantization in one kernel"
        context.rewrote(_RULE, " + ".join(context.layers[node].name for node in nodes), what)
