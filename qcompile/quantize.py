"""Quantizing a model in place: linear modules become `QuantizedLinear`s, experts `QuantizedExperts`, one at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import qcompile.ops  # noqa: F401  (registers the operators)
from qcompile import memory
from qcompile.calibrate.assign import choose_schemes
from qcompile.calibrate.codes import check_codes, choose_codes
from qcompile.calibrate.report import LayerResult
from qcompile.calibrate.run import calibrate_, parents_of
from qcompile.calibrate.stream import Waiting
from qcompile.config import QuantConfig, parse_config
from qcompile.errors import CalibrationError, ConfigError, LayerError, shown
from qcompile.experts import check_scale, expert_modules, other_experts, quantize_experts
from qcompile.kv_cache import KVScheme
from qcompile.linears import is_conv1d, linear_modules, matrix_of, quantized_linear
from qcompile.methods import parse_method
from qcompile.modules import PackedModule, QuantizedLinear
from qcompile.packed import PackedWeight
from qcompile.parallel import check_whole
from qcompile.progress import track
from qcompile.scheme import Scheme
from qcompile.torchao_tensors import is_torchao, read_tensor

Model = TypeVar("Model", bound=nn.Module)
_IMPORTANCE = parse_method("importance")


def quantize_(
    model: Model,
    config: str | Path | Mapping[str, Any] | Scheme | QuantConfig | None = None,
    *,
    calibration: Iterable[Any] | None = None,
    importance: Mapping[str, Tensor] | None = None,
    progress: bool = True,
    resume: str | Path | None = None,
    report: Callable[[LayerResult], None] | None = None,
) -> Model:
    """Quantize a model's linear layers and experts in place, layer by layer, freeing each original weight.

    The peak of memory is the result and one layer. Afterwards the model runs eagerly, compiles with
    `torch.compile(model, backend="qcompile")`, has an ordinary `state_dict`, deep-copies and moves between devices.
    A weight that another module reads too (tied embeddings) stays there. A weight that torchao quantized is taken over
    bit for bit, with its own scheme. The experts of a mixture are one layer, which rules match by their module's name
    (`model.layers.0.mlp.experts`).

    Args:
        model: floating point, for inference; on any device.
        config: anything that `torch.compile`'s `options={"config": ...}` takes, and schemes that calibration decides
            (`{"preset": "auto", "bits": 4.5}`, see `choose_schemes`); None only takes over what torchao quantized.
        calibration: batches, for static activation scales, for methods that look at a layer's inputs, and for scales of
            the configuration's `kv_cache`: each a tensor, a tuple of arguments or a dict of keyword arguments of the
            model. They run block by block, so that one block's activations are in memory; between blocks hidden states
            wait on the CPU.
        importance: instead of calibration, for method "importance": mean squares of the inputs of linears, float32 [K],
            by their names (`qcompile.checkpoint.imatrix`).
        progress: show a progress bar on a terminal.
        resume: a folder for finished blocks: a call that was interrupted goes on from there when it is made again with
            the same model, configuration and calibration. It stays, since the model is nowhere else yet: remove it
            when the model is saved. With scheme auto what is measured is kept in `<resume>.sensitivities.json`.
        report: is told of each layer that calibration quantizes.

    Returns:
        the model itself.

    Raises:
        ConfigError: a configuration that cannot be understood, or a rule that decides no layer.
        LayerError: a layer that cannot be quantized as its rule asks. Layers before it are quantized then.
        CalibrationError: batches that do not show what is needed, or hold NaN or infinity.
        CheckpointError: a `resume` folder of another calibration.
    """
    return quantize_waiting(
        model,
        config,
        None,
        calibration=calibration,
        importance=importance,
        progress=progress,
        resume=resume,
        report=report,
    )


def quantize_waiting(
    model: Model,
    config: str | Path | Mapping[str, Any] | Scheme | QuantConfig | None,
    waiting: Waiting | None,
    *,
    calibration: Iterable[Any] | None = None,
    importance: Mapping[str, Tensor] | None = None,
    progress: bool = True,
    resume: str | Path | None = None,
    report: Callable[[LayerResult], None] | None = None,
) -> Model:
    """`quantize_` of a model some of whose blocks are not in memory before their turn.

    Then the peak of memory is the result and one block, with statistics of its inputs.

    Raises:
        ConfigError, LayerError, CalibrationError, CheckpointError: see `quantize_`.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"quantize_ takes a model, an nn.Module, and then its configuration, not {shown(model)}")
    check_whole(model, "quantize_ takes")
    if calibration is not None and (
        isinstance(calibration, (Tensor, Mapping, str)) or not isinstance(calibration, Iterable)
    ):
        raise CalibrationError(
            f"calibration is a list of batches, not {type(calibration).__name__}; put a single batch into a list"
        )
    if calibration is not None and importance is not None:
        raise ConfigError("importance takes the place of calibration: pass one of them")
    parsed = None if config is None else parse_config(config)
    batches = None if calibration is None else list(calibration)
    if parsed is not None and parsed.undecided:
        _fill(waiting)  # the whole model is run
        parsed = _decided(model, parsed, batches, progress, resume)
    if type(model) is nn.Linear or is_conv1d(model):
        raise ConfigError("quantize_ replaces modules inside a model; put a bare linear into nn.Sequential first")
    modules, experts = linear_modules(model), expert_modules(model)
    if not modules and not experts and not any(isinstance(m, PackedModule) for m in model.modules()):
        raise ConfigError(f"{type(model).__name__} has no nn.Linear (or Conv1D) modules to quantize")
    if parsed is not None:
        parsed.check_used([*modules, *experts])
        if calibration is not None:
            _check_kv_cache(model, parsed.kv_cache)
    for name in other_experts(model):
        if parsed is not None and parsed.scheme_for(name) is not None:
            warnings.warn(
                f"{name} ({type(model.get_submodule(name)).__name__}) keeps its weights: qcompile does not know how "
                "they are arranged",
                stacklevel=2,
            )
    schemes = {} if parsed is None else planned(model, parsed)
    if waiting is None and (empty := next((name for name in schemes if modules[name].weight.is_meta), None)):
        raise LayerError(f"{empty}: its weight is on the meta device, without values; load the model first")
    mixtures = {}
    for name in experts:
        if parsed is not None and (scheme := parsed.scheme_for(name)) is not None:
            check_codes(scheme, name)
            check_scale(scheme, name)
            mixtures[name] = scheme
    _take_over(model, modules)
    planned_all = {**schemes, **mixtures}
    known = {n: v for n, v in (importance or {}).items() if n in schemes and schemes[n].method == _IMPORTANCE}
    wanting = next((name for name, scheme in planned_all.items() if scheme.needs_data and name not in known), None)
    if calibration is None and wanting is not None:
        unknown = "no importance is known of its inputs, and " if importance is not None else ""
        raise LayerError(f"{wanting}: {unknown}{_needs(planned_all[wanting])}")
    parents = parents_of(model)
    if wanting is not None:
        assert batches is not None
        modules.clear()
        experts.clear()
        calibrate_(
            model,
            schemes,
            batches,
            mixtures=mixtures,
            waiting=waiting,
            progress=progress,
            resume=resume,
            report=report,
        )
    else:
        for name in track(list(schemes), "quantizing", progress):
            _fill(waiting, name)
            module, chosen = modules.pop(name), schemes[name]
            weight = matrix_of(module)
            seen = _diagonal(known[name], weight, name) if name in known else None
            packed = choose_codes(weight, chosen, seen, name)
            quantized = quantized_linear(name, module, chosen, _stated_scale(module, chosen), packed)
            for parent, child_name in parents.pop(id(module)):
                setattr(parent, child_name, quantized.train(module.training))
            del module, weight
        for name in track(list(mixtures), "quantizing experts", progress):
            _fill(waiting, name)
            module = experts.pop(name)
            with torch.no_grad():
                replaced = quantize_experts(name, module, mixtures[name], _without_data).train(module.training)
            for parent, child_name in parents.pop(id(module)):
                setattr(parent, child_name, replaced)
            del module
    _fill(waiting)
    if parsed is not None and parsed.kv_cache is not None and batches is not None:
        _calibrate_kv_cache(model, parsed.kv_cache, batches)
    _untie_head(model)
    memory.give_back()
    return model


def _decided(
    model: nn.Module, config: QuantConfig, batches: list[Any] | None, progress: bool, resume: str | Path | None
) -> QuantConfig:
    """With schemes in the place of scheme auto.

    Raises:
        ConfigError: no calibration; see `choose_schemes`.
    """
    if batches is None:
        raise ConfigError("scheme auto measures what each layer's quantization changes: pass calibration=batches")
    keep = None if resume is None else sensitivities_beside(resume)
    return choose_schemes(model, config, batches, progress=progress, keep=keep).config


def sensitivities_beside(resume: str | Path) -> Path:
    """The file that keeps what scheme auto measures, beside the folder of finished blocks."""
    folder = Path(resume)
    return folder.with_name(f"{folder.name}.sensitivities.json")


def _untie_head(model: nn.Module) -> None:
    """Let nobody tie a quantized head of transformers' to the embedding again."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    config: Any = getattr(model, "config", None)
    if isinstance(head, QuantizedLinear) and config is not None:
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            if getattr(part, "tie_word_embeddings", False):
                part.tie_word_embeddings = False


def _check_kv_cache(model: nn.Module, kv_cache: KVScheme | None) -> None:
    """Refuse before the work what `_calibrate_kv_cache` could not do after it.

    Raises:
        ConfigError: static scales of another library's model.
    """
    if kv_cache is None or kv_cache.dynamic or kv_cache.plain:
        return
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise ConfigError("scales of a KV cache are calibrated for transformers' models; leave kv_cache out")


def _calibrate_kv_cache(model: nn.Module, kv_cache: KVScheme, batches: list[Any]) -> None:
    """Scales of a cache that are not computed as tokens are stored: on attention modules, see `docs/kv_cache.md`."""
    if kv_cache.dynamic or kv_cache.plain:
        return
    from qcompile.integrations.caches import calibrate_kv_cache

    given = [batch[0] if isinstance(batch, (tuple, list)) else batch for batch in batches]
    calibrate_kv_cache(model, given, per_head=kv_cache.scales == "head")


def planned(model: nn.Module, config: QuantConfig) -> dict[str, Scheme]:
    """The schemes of linear layers that `quantize_` would quantize, by name, fitted to their shapes.

    Raises:
        LayerError: a group size that does not divide a layer's input features; a method that cannot choose its codes.
    """
    schemes = {}
    for name, module in linear_modules(model).items():
        scheme = config.scheme_for(name)
        assert isinstance(module.weight, Tensor)
        if scheme is not None and not is_torchao(module.weight):
            check_codes(scheme, name)
            weight = matrix_of(module)
            schemes[name] = scheme.fit(name, (weight.shape[0], weight.shape[1]))
    return schemes


def _needs(scheme: Scheme) -> str:
    """Why a layer needs calibration, and the ways out."""
    if scheme.needs_scale:
        return (
            'static activation scales come from calibration; pass calibration=batches, state "scale" in the '
            "configuration, or choose dynamic activations"
        )
    return f"method {scheme.method} looks at the layer's inputs; pass calibration=batches, or choose rtn or hqq"


def _diagonal(means: Tensor, weight: Tensor, layer: str) -> Tensor:
    """The mean of x x^T over inputs whose mean squares alone are known, as though they were independent.

    Raises:
        LayerError: not one number for each input.
    """
    if means.shape != weight.shape[1:]:
        raise LayerError(
            f"{layer}: has {weight.shape[1]} inputs, and importance {tuple(means.shape)}; it is another layer's"
        )
    return torch.diag(means.to(weight.device, torch.float32))


def _fill(waiting: Waiting | None, layer: str | None = None) -> None:
    """Let the block of a layer (None: all blocks) be in memory."""
    if waiting is not None:
        for block in list(waiting.blocks):
            if layer is None or layer.startswith(f"{block}."):
                waiting.fill(block)


def _without_data(_projection: str, _index: int, weight: Tensor, scheme: Scheme, layer: str) -> PackedWeight:
    """An expert's weight by a method that looks at nothing else."""
    return choose_codes(weight, scheme, None, layer)


def _stated_scale(module: nn.Module, scheme: Scheme) -> Tensor | None:
    if scheme.activation is None or scheme.activation.scale is None:
        return None
    assert isinstance(module.weight, Tensor)
    return torch.tensor(scheme.activation.scale, device=module.weight.device)


def _take_over(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Take the layers that torchao quantized from `modules` and into the model, bit for bit."""
    parents = parents_of(model)
    for name in [n for n, m in modules.items() if is_torchao(m.weight)]:
        module = modules.pop(name)
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        found = replace(read_tensor(weight, name), bias=bias, dtype=weight.dtype)
        taken = QuantizedLinear.of(found).train(module.training)
        for parent, child_name in parents.pop(id(module)):
            setattr(parent, child_name, taken)
