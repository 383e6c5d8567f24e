"""Quantizing a model in place: linear modules become `QuantizedLinear`s, experts `QuantizedExperts`, one at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import qcompile.ops  # noqa: F401  (registers the operators)
from qcompile.config import QuantConfig, parse_config
from qcompile.errors import ConfigError, LayerError
from qcompile.experts import expert_modules, other_experts, quantize_experts
from qcompile.modules import PackedModule, QuantizedLinear
from qcompile.progress import track
from qcompile.reference import quantize_weight
from qcompile.scheme import Scheme
from qcompile.torchao_tensors import is_torchao, read_tensor

Model = TypeVar("Model", bound=nn.Module)


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, GPT-2's linear, whose weight is [K, N]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that `quantize_` can replace, by qualified name; one that has several names by its first."""
    found = {n: m for n, m in model.named_modules() if n and (type(m) is nn.Linear or is_conv1d(m))}
    # Attention modules read the weight of their `out_proj` themselves.
    owned = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    return {n: m for n, m in found.items() if id(m) not in owned}


def quantize_(
    model: Model,
    config: str | Path | Mapping[str, Any] | Scheme | QuantConfig | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    progress: bool = True,
) -> Model:
    """Quantize a model's linear layers and experts in place, layer by layer, freeing each original weight.

    The peak of memory is the result and one layer. Afterwards the model runs eagerly, compiles with
    `torch.compile(model, backend="qcompile")`, has an ordinary `state_dict`, deep-copies and moves between devices.
    A weight that another module reads too (tied embeddings) stays there. A weight that torchao quantized is taken over
    bit for bit, with its own scheme. The experts of a mixture are one layer, which rules match by their module's name
    (`model.layers.0.mlp.experts`).

    Args:
        model: floating point, for inference; on any device.
        config: anything that `torch.compile`'s `options={"config": ...}` takes; None only takes over what torchao
            quantized.
        calibration: batches for static activation scales: each a tensor, a tuple of arguments or a dict of keyword
            arguments of the model. The scale is the largest magnitude seen / the format's largest value.
        progress: show a progress bar on a terminal.

    Returns:
        the model itself.

    Raises:
        ConfigError: a configuration that cannot be understood, or a rule that decides no layer.
        LayerError: a layer that cannot be quantized as its rule asks. Layers before it are quantized then.
    """
    parsed = None if config is None else parse_config(config)
    if type(model) is nn.Linear or is_conv1d(model):
        raise ConfigError("quantize_ replaces modules inside a model; put a bare linear into nn.Sequential first")
    modules, experts = linear_modules(model), expert_modules(model)
    if not modules and not experts and not any(isinstance(m, PackedModule) for m in model.modules()):
        raise ConfigError(f"{type(model).__name__} has no nn.Linear (or Conv1D) modules to quantize")
    if parsed is not None:
        parsed.check_used([*modules, *experts])
    for name in other_experts(model):
        if parsed is not None and parsed.scheme_for(name) is not None:
            warnings.warn(
                f"{name} ({type(model.get_submodule(name)).__name__}) keeps its weights: qcompile does not know how "
                "they are arranged",
                stacklevel=2,
            )
    chosen: dict[str, Scheme | None] = {}  # None: as torchao quantized it
    for name, module in modules.items():
        weight = module.weight
        assert isinstance(weight, Tensor)
        scheme = None if parsed is None else parsed.scheme_for(name)
        if is_torchao(weight):
            chosen[name] = None
        elif scheme is not None:
            n, k = weight.shape[::-1] if is_conv1d(module) else weight.shape
            chosen[name] = scheme.fit(name, (n, k))
    schemes = {name: scheme for name, scheme in chosen.items() if scheme is not None}
    scales = _static_scales(model, {n: modules[n] for n in schemes}, schemes, calibration)
    parents: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for child_name, child in parent._modules.items():
            parents.setdefault(id(child), []).append((parent, child_name))
    names = list(chosen)
    for name in track(names, "quantizing", progress):
        module = modules.pop(name)
        quantized = quantized_linear(name, module, chosen[name], scales.get(name)).train(module.training)
        for parent, child_name in parents.pop(id(module)):
            setattr(parent, child_name, quantized)
        del module
    for name in track(list(experts), "quantizing experts", progress):
        module, scheme = experts.pop(name), None if parsed is None else parsed.scheme_for(name)
        if scheme is not None:
            with torch.no_grad():
                replaced = quantize_experts(name, module, scheme).train(module.training)
            for parent, child_name in parents.pop(id(module)):
                setattr(parent, child_name, replaced)
        del module
    return model


def quantized_linear(
    name: str, module: nn.Module, scheme: Scheme | None, input_scale: Tensor | None
) -> QuantizedLinear:
    """What takes the place of one of `linear_modules`.

    Args:
        name: the layer's, for errors.
        scheme: fitted to its shape; None for a weight that torchao quantized.
        input_scale: float32 scalar, exactly for static activations.

    Raises:
        LayerError: a weight that cannot be quantized so.
    """
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    if scheme is None:
        taken = read_tensor(weight, name)
        return QuantizedLinear(taken.weight, taken.scheme, bias, taken.input_scale, weight.dtype, taken.pre_quant_scale)
    with torch.no_grad():
        packed = quantize_weight(weight.t() if is_conv1d(module) else weight, scheme.weight, name)
        return QuantizedLinear(packed, scheme, bias, input_scale, weight.dtype)


def _static_scales(
    model: nn.Module, modules: dict[str, nn.Module], schemes: dict[str, Scheme], calibration: Iterable[Any] | None
) -> dict[str, Tensor]:
    """Input scales (float32 scalars) of the layers whose activations are static."""
    scales: dict[str, Tensor] = {}
    wanted: dict[str, float] = {}
    for name, scheme in schemes.items():
        activation = scheme.activation
        if activation is None or activation.dynamic:
            continue
        if activation.scale is not None:
            scales[name] = torch.tensor(activation.scale, device=modules[name].weight.device)  # type: ignore[arg-type]
        else:
            wanted[name] = activation.format.absmax
    if not wanted:
        return scales
    if calibration is None:
        raise LayerError(
            f"{next(iter(wanted))}: static activation scales come from calibration; pass calibration=batches, state "
            '"scale" in the configuration, or choose dynamic activations'
        )
    seen: dict[str, Tensor] = {}

    def observe(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            top = args[0].detach().abs().amax().float()
            seen[name] = torch.maximum(seen[name], top) if name in seen else top

        return hook

    handles = [modules[name].register_forward_pre_hook(observe(name)) for name in wanted]
    try:
        with torch.no_grad():
            for batch in calibration:
                if isinstance(batch, Mapping):
                    model(**batch)
                else:
                    model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, largest in wanted.items():
        top = seen.get(name)
        if top is None or not torch.isfinite(top):
            what = "calibration batches never reached it" if top is None else "calibration gave it NaN or infinity"
            raise LayerError(f"{name}: {what}, so its static scale is unknown")
        scales[name] = torch.where(top == 0, torch.ones_like(top), top / largest)
    return scales
