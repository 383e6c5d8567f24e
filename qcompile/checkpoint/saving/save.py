"""`qcompile.save`: a quantized model in the files that other programs read."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.checkpoint.kv_scales import KVScales
from qcompile.checkpoint.saving import gguf
from qcompile.checkpoint.saving.awq import AWQ
from qcompile.checkpoint.saving.base import (
    Rounding,
    Saved,
    Target,
    Unsavable,
    plain_config,
    refusal,
)
from qcompile.checkpoint.saving.bitsandbytes import BitsAndBytes
from qcompile.checkpoint.saving.compressed_tensors import CompressedTensors, kv_cache_scheme
from qcompile.checkpoint.saving.gguf_pack import block_type, pack_layer
from qcompile.checkpoint.saving.gptq import GPTQ
from qcompile.checkpoint.saving.layers import Layer, quantized_layers
from qcompile.checkpoint.saving.shards import Shards, Staging, parse_size
from qcompile.errors import CheckpointError, ConfigError, shown, suggestion
from qcompile.methods import ROUND
from qcompile.modules import PackedModule, QuantizedLinear
from qcompile.reference import quantize_weight
from qcompile.scheme import FLOAT_SCALES, Scheme

TARGETS: dict[str, type[Target]] = {target.name: target for target in (CompressedTensors, GPTQ, AWQ, BitsAndBytes)}
FORMATS = (*TARGETS, gguf.NAME)
"""What `save` writes."""

_BESIDE = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template.*",
    "*processor_config.json",
)
"""Files of a tokenizer or preprocessor."""


def save(
    model: nn.Module,
    folder: str | Path,
    format: str = "compressed-tensors",
    *,
    max_shard_size: int | str = "5GB",
    allow_rounding: bool = False,
) -> Saved:
    """Write a quantized model so that other programs, and `qcompile.load`, read the same weights.

    Codes are never chosen anew: a layer that the format does not hold exactly is refused. Files appear under their
    names when all are complete. The peak of memory is the model and one shard (for GGUF, one layer).

    Args:
        model: with `QuantizedLinear` layers, as `quantize_` or `load` leave it; on any device.
        folder: new, or without model files. Tokenizer files are copied there from where the model was loaded.
        format: "compressed-tensors" (vLLM, transformers), "gptq", "awq", "bitsandbytes" or "gguf" (llama.cpp; one
            model.gguf).
        max_shard_size: of a safetensors file, in bytes or such as "5GB".
        allow_rounding: round scales to a dtype that the format wants though they are not exact there; what was rounded,
            and by how much, is returned and warned of.

    Raises:
        CheckpointError: a layer that the format does not hold, naming those that do; a folder with model files; a model
            without quantized layers.
        ConfigError: an unknown format or size.
    """
    if format not in FORMATS:
        raise ConfigError(f"format {shown(format)} cannot be written; {suggestion(format, FORMATS)}")
    folder, limit, rounding = Path(folder), parse_size(max_shard_size), Rounding(allow_rounding)
    layers = quantized_layers(model)
    check_writable(folder)
    with Staging(folder) as staging:
        if format == gguf.NAME:
            _refuse_kv_scales(model, format)
            gguf.write(model, layers, staging.path("model.gguf"), rounding, holding)
        else:
            target = checked_target(model, layers, format)
            shards = Shards(staging, limit)
            for name, tensor in _tensors(model, target, rounding):
                shards.add(name, tensor)
            shards.finish()
            _describe(model, target, staging)
        files = staging.publish()
    if rounding.noted:
        worst = max(rounding.noted, key=lambda entry: entry.error)
        warnings.warn(
            f"{len(rounding.noted)} layers were rounded, {worst.layer} most: its {worst.what} to {worst.dtype} with a "
            f"relative error up to {worst.error:.1e}",
            stacklevel=2,
        )
    return Saved(files, tuple(rounding.noted))


def checked_target(model: nn.Module, layers: list[Layer], format: str) -> Target:
    """The format for a model.

    Raises:
        CheckpointError: it does not hold a layer, or the scales of the KV cache.
    """
    target = TARGETS[format](layers)
    for layer in layers:
        if (reason := target.objection(layer)) is not None:
            raise refusal(layer, format, reason, holding(layer))
    if not target.holds_kv_scales:
        _refuse_kv_scales(model, format)
    return target


def _refuse_kv_scales(model: nn.Module, format: str) -> None:
    for name, _ in _kv_scales(model):
        raise CheckpointError(f"{name}: {format} cannot hold scales of the KV cache; compressed-tensors can")


def holding(layer: Layer) -> list[str]:
    """The formats that hold a layer exactly."""
    found = []
    for name in FORMATS:
        try:
            if not fits(layer, name):
                continue
            if name == gguf.NAME:
                pack_layer(layer, Rounding(False))
            else:
                TARGETS[name]([layer]).tensors(layer, Rounding(False))
        except Unsavable:
            continue
        found.append(name)
    return found


def objection(layer: Layer, format: str, layers: Sequence[Layer] = ()) -> str | None:
    """Why a format has no place for a layer of this scheme and shape; None if it has, perhaps with rounded scales.

    Args:
        layers: all that are saved with it.
    """
    if format != gguf.NAME:
        return TARGETS[format](list(layers) or [layer]).objection(layer)
    try:
        block_type(layer)
    except Unsavable as error:
        return str(error)
    return None


def fits(layer: Layer, format: str) -> bool:
    """Whether a format has a place for a layer; see `objection`."""
    return objection(layer, format) is None


_FLOAT16_SCALES = ("gptq", "awq", gguf.NAME)
"""Formats whose scales are float16."""


def with_stored_scales(scheme: Scheme, format: str) -> Scheme:
    """A scheme with scales of the type that a format stores, so that they are exact there."""
    if format not in _FLOAT16_SCALES or scheme.weight.scale_dtype not in FLOAT_SCALES:
        return scheme
    return replace(scheme, weight=replace(scheme.weight, scale_dtype="float16"))


def layer_like(name: str, scheme: Scheme, shape: tuple[int, int]) -> Layer:
    """A layer of a scheme that is fitted to its shape, to ask whether formats have a place for it; its weight is 0."""
    static = scheme.activation is not None and not scheme.activation.dynamic
    return Layer(
        name=name,
        scheme=replace(scheme, method=ROUND),
        shape=shape,
        dtype=torch.float32,
        weight=lambda: quantize_weight(torch.zeros(shape), scheme.weight),
        bias=None,
        input_scale=torch.ones(()) if static else None,
        pre_quant_scale=None,
    )


def formats_for(scheme: Scheme) -> list[str]:
    """The formats that hold large layers of a scheme."""
    shape = (1024, 1024)
    return [name for name in FORMATS if fits(layer_like("layer", scheme.fit("layer", shape), shape), name)]


def plain_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers that are not quantized, routers of experts among them."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(weight := module._parameters.get("weight"), nn.Parameter)
        and weight.dim() == 2
        and not isinstance(module, nn.Embedding)
    ]


def plain_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers outside of quantized layers, each once, where several share it."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, PackedModule):
            continue
        kept = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for name, tensor in {**module._parameters, **kept}.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{prefix}.{name}" if prefix else name, tensor


def _tensors(model: nn.Module, target: Target, rounding: Rounding) -> Iterator[tuple[str, Tensor]]:
    rename = _Names(model)
    yield from rename.plain(dict(plain_tensors(model)))
    for layer in target.layers:
        prefix = rename.layer(layer.name)
        yield from ((f"{prefix}.{suffix}", tensor) for suffix, tensor in _made(layer, target, rounding).items())
    for name, scales in _kv_scales(model):
        yield from _kv_tensors(rename.layer(name), scales)


def _made(layer: Layer, target: Target, rounding: Rounding) -> dict[str, Tensor]:
    """A layer's tensors by suffix."""
    try:
        made = target.tensors(layer, rounding)
    except Unsavable as reason:
        raise refusal(layer, target.name, str(reason), holding(layer)) from None
    return made if layer.bias is None else {**made, "bias": layer.bias}


def _kv_tensors(name: str, scales: KVScales) -> Iterator[tuple[str, Tensor]]:
    for which, scale in (("k_scale", scales.k_scale), ("v_scale", scales.v_scale)):
        yield f"{name}.{which}", scale.reshape(-1, 1, 1) if scale.dim() else scale.reshape(1)


def quantized_state_dict(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a model in compressed-tensors' layout, under the modules' names, and its `quantization_config`.

    Raises:
        CheckpointError: as `save`.
    """
    target = checked_target(model, quantized_layers(model), CompressedTensors.name)
    tensors, rename = dict(plain_tensors(model)), _Names(model)
    for layer in target.layers:
        name = rename.projection(layer.name)
        tensors |= {f"{name}.{suffix}": made for suffix, made in _made(layer, target, Rounding(False)).items()}
    for name, scales in _kv_scales(model):
        tensors |= dict(_kv_tensors(name, scales))
    return tensors, described(model, target)


def described(model: nn.Module, target: Target) -> dict[str, Any]:
    """The `quantization_config` of a saved model."""
    config = target.quantization_config(plain_linears(model))
    scales = next(_kv_scales(model), None)
    if scales is not None:
        config["kv_cache_scheme"] = kv_cache_scheme(scales[1].k_scale.dim() > 0)
    return config


def _kv_scales(model: nn.Module) -> Iterator[tuple[str, KVScales]]:
    for name, module in model.named_modules():
        scales = getattr(module, "kv_scales", None)
        if isinstance(scales, KVScales):
            yield name, scales


_SHORT = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


class _Names:
    """From the names of modules to those of checkpoints, which transformers keeps where it renamed modules."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model if hasattr(model, "get_input_embeddings") and hasattr(model, "config") else None
        self._short = self.model is not None and self._experts_are_short()

    def _experts_are_short(self) -> bool:
        """Whether checkpoints call the projections of experts w1, w2 and w3."""
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        changes = get_checkpoint_conversion_mapping(self.model.config.model_type) or ()  # type: ignore[union-attr]
        return any(".w1." in str(pattern) for change in changes for pattern in change.source_patterns)

    def plain(self, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Tensors as checkpoints have them: also stacks of experts taken apart."""
        if self.model is not None:
            from transformers.core_model_loading import revert_weight_conversion

            tensors = revert_weight_conversion(self.model, tensors)
        yield from tensors.items()

    def projection(self, name: str) -> str:
        """A layer's name, where it is an expert's with the name of its projection in checkpoints."""
        stem, _, last = name.rpartition(".")
        return f"{stem}.{_SHORT[last]}" if self._short and ".experts." in name and last in _SHORT else name

    def layer(self, name: str) -> str:
        """The name of a layer, or of another module."""
        renamed = next(full for full, _ in self.plain({f"{self.projection(name)}.weight": torch.empty(0)}))
        return renamed.removesuffix(".weight")


def check_writable(folder: Path) -> None:
    """Refuse a folder that a checkpoint cannot be written to.

    Raises:
        CheckpointError: it is a file, holds a checkpoint already, or does not take files.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; name a folder")
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written to ({error.strerror}); name another folder") from None
    found = [path.name for pattern in ("*.safetensors", "*.gguf", "*.index.json") for path in folder.glob(pattern)]
    if found:
        raise CheckpointError(f"{folder}: holds {found[0]} already; name another folder, or empty this one")


def source_path(model: nn.Module) -> Path | None:
    """The folder or file that a model was loaded from, if it is known and still there."""
    name = getattr(model, "name_or_path", None)
    path = Path(name) if isinstance(name, str) and name else None
    return path if path is not None and path.exists() else None


def _describe(model: nn.Module, target: Target, staging: Staging) -> None:
    """Everything beside the tensors; config.json last, so that it is there when all else is."""
    source = source_path(model)
    if source is not None and source.is_dir():
        for pattern in _BESIDE:
            for path in sorted(source.glob(pattern)):
                staging.copy(path)
    elif source is not None:
        _tokenizer_of_gguf(source, staging)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        staging.path("generation_config.json").write_text(generation.to_json_string(), encoding="utf-8")
    config: dict[str, Any] = {}
    if hasattr(model, "config") and hasattr(model.config, "to_json_string"):
        config = plain_config(model.config) | {"architectures": [type(model).__name__]}
        if isinstance(getattr(model, "lm_head", None), QuantizedLinear):
            config["tie_word_embeddings"] = False
    config["quantization_config"] = described(model, target)
    staging.json("config.json", config)


def _tokenizer_of_gguf(source: Path, staging: Staging) -> None:
    import tempfile

    from qcompile.checkpoint.gguf_file import open_gguf
    from qcompile.checkpoint.gguf_tokenizer import load_tokenizer

    if open_gguf(source).metadata.get("tokenizer.ggml.model") in (None, "no_vocab", "none"):
        return
    with tempfile.TemporaryDirectory() as folder:
        load_tokenizer(source).save_pretrained(folder)
        for path in sorted(Path(folder).iterdir()):
            staging.copy(path)
