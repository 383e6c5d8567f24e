"""linear(x, W, b) -> its layer's name and the scheme that the configuration gives it.

A layer's name is its module's qualified name, relative to what is compiled; a linear that no linear module makes is
named by its parameter (`proj.weight` is `proj`). Linears whose weight is computed in the graph are declined. A weight
that came quantized (a tensor of torchao's) keeps its own scheme, with a configuration or without. Routers of mixtures
of experts, whose errors change which experts run, take a rule that names them: "*" leaves them.
"""

from __future__ import annotations

import warnings

import torch.nn.functional as F
from torch import fx, nn

from qcompile import compat
from qcompile.errors import LayerError
from qcompile.modules import QuantizedLinear
from qcompile.passes.context import GraphContext, Layer, WeightRef, example
from qcompile.passes.weights import resolve_weight
from qcompile.torchao_tensors import is_torchao, read_tensor

_RULE = "annotate"


def is_linear_module(kind: type) -> bool:
    """Whether a module's class is a linear: `nn.Linear`, transformers' `Conv1D`, and what derives from them."""
    return issubclass(kind, (nn.Linear, QuantizedLinear)) or any(c.__name__ == "Conv1D" for c in kind.__mro__)


def _layer_name(node: fx.Node, weight: fx.Node | None) -> str:
    module = compat.module_of(node)
    if module is not None and (weight is None or is_linear_module(module[1])):
        return module[0] or node.name
    source = compat.source_name(weight) if weight is not None else None
    return compat.qualified_name(source).removesuffix(".weight") if source else node.name


def _is_router(node: fx.Node) -> bool:
    module = compat.module_of(node)
    return module is not None and module[1].__name__.endswith("Router")


def _take_prepared(context: GraphContext, node: fx.Node, name: str, weight: WeightRef) -> None:
    """A linear whose weight came quantized."""
    try:
        if weight.transposed or len(weight.parts) > 1:
            raise LayerError(f"{name}: its weight is computed from tensors of torchao's")
        prepared = read_tensor(context.values[weight.parts[0]], name)
    except LayerError as error:
        context.left[name] = str(error).removeprefix(f"{name}: ")
        context.declined(_RULE, name, context.left[name])
        return
    context.layers[node] = Layer(
        name,
        prepared.scheme,
        weight,
        input_scale=prepared.input_scale,
        pre_quant_scale=prepared.pre_quant_scale,
        prepared=True,
        note="quantized by torchao",
    )


def annotate(context: GraphContext) -> None:
    """See the module.

    Raises:
        ConfigError: a rule that decides no layer.
        LayerError: a group size that does not divide a layer's input features; a method other than rounding.
    """
    for node in context.graph.find_nodes(op="call_function", target=F.linear):
        weight = resolve_weight(context, node.args[1])
        name = _layer_name(node, weight.parts[0] if weight else None)
        if weight is not None and any(is_torchao(context.values[part]) for part in weight.parts):
            context.names.append(name)
            _take_prepared(context, node, name, weight)
            continue
        if context.config is None:
            continue
        context.names.append(name)
        scheme = context.config.scheme_for(name)
        if scheme is None:
            context.left[name] = "no rule gives it a scheme"
        elif _is_router(node) and (rule := context.config.rule_for(name)) is not None and rule.layers == "*":
            context.left[name] = "it chooses experts; a rule that names it quantizes it"
            context.declined(_RULE, name, context.left[name])
        elif weight is None:
            context.left[name] = "its weight is computed in the graph, or is no parameter"
            context.declined(_RULE, name, context.left[name])
        else:
            out_features, in_features = (int(extent) for extent in example(node.args[1]).shape)
            scheme.check_rounded(name)
            fitted = scheme.fit(name, (out_features, in_features))
            note = ""
            if fitted != scheme:
                note = f"{scheme.weight.granularity} does not divide {in_features}, so {fitted.weight.granularity}"
            context.layers[node] = Layer(name, fitted, weight, note=note)
    if context.config is None:
        return
    root = compat.root_module(context.placeholders())
    modules = [] if root is None else [n for n, m in root.named_modules() if n and is_linear_module(type(m))]
    if context.names or modules:
        context.config.check_used([*context.names, *modules])
    elif root is not None:
        warnings.warn(f"{type(root).__name__} has no linear layers: its configuration quantizes nothing", stacklevel=2)
