"""linear(x, W, b) -> qcompile.linear(x, [codes, scale, ...], b, input_scale, None, [], spec)

for every linear that `annotate` gave a scheme. Codes and scales become inputs of the graph, made from the parameter
that Dynamo passes at each call (Dynamo does not guard a parameter's identity, so a weight is never baked in) and kept
beside the parameter between calls. Under autocast the input is first cast as autocast would.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qcompile.errors import LayerError
from qcompile.layouts import Layout, choose_layout
from qcompile.linear_spec import LinearSpec
from qcompile.packing import packed_weight
from qcompile.passes.context import OP, GraphContext, Layer, WeightRef, example, replace
from qcompile.passes.weights import erase_unused
from qcompile.torchao_tensors import read_tensor

_RULE = "quantize_linear"


def _input_scale(layer: Layer, device: torch.device) -> Tensor:
    assert layer.scheme.activation is not None
    if layer.scheme.activation.scale is None:
        raise LayerError(
            f"{layer.name}: its activations have a static scale, which the configuration leaves open; calibrate with "
            'qcompile.quantize_(model, config, calibration=batches), give "scale", or choose dynamic activations'
        )
    return torch.tensor(layer.scheme.activation.scale, dtype=torch.float32, device=device)


def _packed_inputs(context: GraphContext, layer: Layer, layout: Layout) -> tuple[fx.Node, ...]:
    """Graph inputs for the packed weight's tensors; tied layers of one scheme share them, and all calls of a layer."""
    ref, scheme = layer.weight, layer.scheme
    assert ref is not None

    def make(parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        layer.packed = packed_weight(parameters, ref.transposed, scheme, layout, layer.name)
        return layer.packed.tensors

    key = (ref, scheme)
    if key not in context.packed_inputs:
        context.packed_inputs[key] = context.bind(f"{layer.name}_packed", ref.parts, make)
    else:
        layer.packed = packed_weight(
            tuple(context.values[p] for p in ref.parts), ref.transposed, scheme, layout, layer.name
        )
    return context.packed_inputs[key]


def _prepared_scale(context: GraphContext, layer: Layer, ref: WeightRef, what: str) -> tuple[fx.Node, ...]:
    """A scale of the input that comes with the parameter of each call."""
    return context.bind(
        f"{layer.name}_{what}", ref.parts, lambda parameters: (getattr(read_tensor(parameters[0], layer.name), what),)
    )


def _quantize(context: GraphContext, node: fx.Node, layer: Layer) -> None:
    graph = context.graph
    assert layer.weight is not None
    ref, scheme = layer.weight, layer.scheme
    value = context.values[ref.parts[0]]
    matrix = node.args[1]
    out_features, in_features = (int(extent) for extent in example(matrix).shape)
    layout = choose_layout(scheme, (out_features, in_features), value.device.type)

    weight = _packed_inputs(context, layer, layout)
    input_scale: tuple[fx.Node, ...] = ()
    pre_quant_scale: tuple[fx.Node, ...] = ()
    if layer.input_scale is not None:
        input_scale = _prepared_scale(context, layer, ref, "input_scale")
    elif scheme.activation is not None and not scheme.activation.dynamic:
        constant = layer.input_scale = _input_scale(layer, value.device)
        # One input for all layers that the configuration gives the same scale, so that what reads it is seen to agree.
        key = ("input_scale", scheme.activation.scale, value.device)
        if key not in context.packed_inputs:
            context.packed_inputs[key] = context.bind(f"{layer.name}_input_scale", (), lambda _: (constant,))
        input_scale = context.packed_inputs[key]
    if layer.pre_quant_scale is not None:
        pre_quant_scale = _prepared_scale(context, layer, ref, "pre_quant_scale")
    bias = node.args[2] if len(node.args) > 2 else None
    spec = LinearSpec(in_features=in_features, out_features=out_features, scheme=scheme, layout=layout.name)
    if bias is not None:
        spec = spec.with_epilogue("bias")
    x = node.args[0]
    with graph.inserting_before(node):
        if example(x).dtype != example(node).dtype:
            x = graph.call_method("to", (x, example(node).dtype))
            x.meta["example_value"] = example(node.args[0]).to(example(node).dtype)
        static = input_scale[0] if input_scale else None
        first = pre_quant_scale[0] if pre_quant_scale else None
        new = graph.call_function(OP, (x, list(weight), bias, static, first, [], spec.encode()))
    replace(graph, node, new)
    erase_unused(graph, matrix)
    context.layers[new] = context.layers.pop(node)
    context.rewrote(_RULE, layer.name, f"{scheme} in layout {layout.name}")


def quantize_linear(context: GraphContext) -> None:
    """See the module.

    Raises:
        LayerError: a weight with NaN or infinity; a static activation scale that is not known.
    """
    for node, layer in list(context.layers.items()):
        if layer.weight is not None and node.target is not OP:
            _quantize(context, node, layer)
