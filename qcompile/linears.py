"""The linear modules of a model that quantization replaces, and what takes their place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.errors import ConfigError, shown, suggestion
from qcompile.layouts import multiplies_integers
from qcompile.modules import QuantizedLinear
from qcompile.packed import PackedWeight
from qcompile.reference import quantize_weight
from qcompile.scheme import Scheme
from qcompile.scheme_config import parse_activation


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, GPT-2's linear, whose weight is [K, N]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that `quantize_` can replace, by qualified name; one that has several names by its first."""
    found = {n: m for n, m in model.named_modules() if n and (type(m) is nn.Linear or is_conv1d(m))}
    # Attention modules read the weight of their `out_proj` themselves.
    owned = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    return {n: m for n, m in found.items() if id(m) not in owned}


def matrix_of(module: nn.Module) -> Tensor:
    """The weight [N, K] of one of `linear_modules`; a view."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().t() if is_conv1d(module) else weight.detach()


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(N, K) of one of `linear_modules`."""
    n, k = matrix_of(module).shape
    return n, k


def quantized_linear(
    name: str,
    module: nn.Module,
    scheme: Scheme,
    input_scale: Tensor | None,
    packed: PackedWeight | None = None,
) -> QuantizedLinear:
    """What takes the place of one of `linear_modules`.

    Args:
        name: the layer's, for errors.
        scheme: fitted to its shape.
        input_scale: float32 scalar, exactly for static activations.
        packed: the weight as it was quantized already; None rounds it to the nearest codes.

    Raises:
        LayerError: a weight that cannot be quantized so.
    """
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    if packed is None:
        scheme.check_rounded(name)
        with torch.no_grad():
            packed = quantize_weight(matrix_of(module), scheme.weight, name)
    return QuantizedLinear(packed, scheme, bias, input_scale, weight.dtype)


def quantize_inputs(model: nn.Module, given: Mapping[str, Any]) -> None:
    """Quantize the inputs of a model's linears whose weights are quantized already, and whole numbers, to int8.

    Those that quantize their inputs in a way of their own keep it.

    Args:
        given: the `activation` of a scheme, int8 and dynamic, whose "granularity" may also be "group": a scale for each
            of the weight's groups, as llama.cpp has them.

    Raises:
        ConfigError: other activations.
    """
    by_group = isinstance(given, Mapping) and given.get("granularity") == "group"
    if isinstance(given, Mapping) and (name := given.get("granularity")) not in (None, "tensor", "token", "group"):
        hint = suggestion(name, ("tensor", "token", "group"))
        raise ConfigError(f"activation: granularity {shown(name)} is unknown; {hint}")
    activation = parse_activation({**given, "granularity": None} if by_group else given)
    if activation.format.name != "int8" or not activation.dynamic:
        raise ConfigError(f"inputs of weights that are quantized already become dynamic int8, not {activation}")
    for module in model.modules():
        if not isinstance(module, QuantizedLinear) or module.scheme.activation is not None:
            continue
        groups = module.scheme.weight.granularity
        own = replace(activation, granularity=groups) if by_group and groups.is_group else activation
        if multiplies_integers(Scheme(weight=module.scheme.weight, activation=own)):
            module.change_activation(own)
