"""A quantized model beside its reference: on a text, layer by layer and block by block."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qcompile
from qcompile.config import QuantConfig
from qcompile.errors import ConfigError
from qcompile.evaluate.layers import (
    Channels,
    Distance,
    LayerError,
    average_bits,
    distance,
    layer_errors,
    weight_channels,
)
from qcompile.evaluate.quality import Quality
from qcompile.evaluate.recording import Recording, default_window, plain_parameters, read, record
from qcompile.evaluate.speed import weight_bytes
from qcompile.experts import expert_modules
from qcompile.linears import linear_modules
from qcompile.quantize import planned

_SAME_VECTOR, _SAME_EMBEDDING = 2.0**-6, 0.9
"""How far parameters that are not quantized may be from the original's: by storage in 16 bits; by quantization."""


@dataclass(frozen=True)
class BlockError:
    """What a block of a decoder returned in the quantized model, beside what it did in the reference: the sum of all
    errors so far.
    """

    name: str
    hidden: Distance


@dataclass(frozen=True)
class Evaluation:
    """A model on a text, and beside its reference, if it has one.

    Attributes:
        quality: perplexity, and the distance of its predictions.
        weight_bytes: of all parameters and buffers.
        bits: see `average_bits`.
        layers: the quantized ones beside their originals, in the model's order.
        blocks: of the decoder, in the model's order.
        inputs, weights: magnitudes of the model's own channels; empty where the reference has them.
        note: why layers or blocks are not compared.
    """

    quality: Quality
    weight_bytes: int
    bits: float | None = None
    layers: tuple[LayerError, ...] = ()
    blocks: tuple[BlockError, ...] = ()
    inputs: tuple[Channels, ...] = ()
    weights: tuple[Channels, ...] = ()
    note: str = ""


def evaluate(
    model: nn.Module,
    ids: Tensor,
    reference: nn.Module | Recording | None = None,
    *,
    window: int | None = None,
    rows: int = 128,
    call: Callable[[Tensor], Any] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Perplexity of a model on a text and, with a reference, how far its predictions, layers and blocks are from it.

    The text is read a window at a time. Divergences are exact: the reference's logits wait in a file. Layers run on
    some rows of the reference's own inputs, so that each one's error is its own; errors of blocks add up.

    Args:
        model: a causal language model, quantized or not: from token ids [1, T] to an object whose `logits` are
            [1, T, V].
        ids: the text, int64 [T].
        reference: the model before it was quantized, or what `record` made of it, for several models and for memory
            that holds one model alone.
        window, rows: see `record`; a `Recording` has its own.
        call: how the model is called on ids [1, T], such as with a KV cache; as it is by default.
        progress: show progress bars on a terminal.

    Raises:
        ConfigError: too short a text, windows that the model cannot read, or another vocabulary than the reference's.
    """
    device = next(t for t in (*model.parameters(), *model.buffers())).device
    if isinstance(reference, nn.Module):
        with tempfile.TemporaryDirectory() as folder:
            own = next(t for t in (*reference.parameters(), *reference.buffers())).device
            recording = record(reference, ids.to(own), Path(folder), window=window, rows=rows, progress=progress)
            return evaluate(model, ids, recording, call=call, progress=progress)
    if reference is None:
        window = default_window(model) if window is None else window
        reading = read(
            model, ids.to(device), window, rows, _nothing, layers=True, call=call, description="text", progress=progress
        )
        return Evaluation(
            reading.quality, weight_bytes(model), average_bits(model), (), (), reading.inputs, weight_channels(model)
        )
    if not torch.equal(ids.cpu(), reference.ids.cpu()):
        raise ConfigError("the recording is of another text")

    def recorded(first: int, logits: Tensor) -> Tensor:
        if logits.shape[1] != reference.logits.shape[1]:
            raise ConfigError(
                f"vocabularies differ: the reference has {reference.logits.shape[1]} tokens and the model "
                f"{logits.shape[1]}; KL and agreement need the same, so take another reference"
            )
        return reference.logits[first : first + len(logits)]

    reading = read(
        model,
        ids.to(device),
        reference.window,
        reference.rows,
        recorded,
        layers=False,
        call=call,
        description="text",
        progress=progress,
    )
    changed, turned = _changes(plain_parameters(model), reference.vectors)
    blocks, layers = [], []
    for name, hidden in reading.hidden.items():
        known = reference.hidden.get(name)
        if not turned and known is not None and known.shape == hidden.shape:
            blocks.append(BlockError(name, distance(known, hidden)))
    if not changed and not turned:
        layers = layer_errors(model, reference.original, reference.samples, progress)
    return Evaluation(
        reading.quality,
        weight_bytes(model),
        average_bits(model),
        tuple(layers),
        tuple(blocks),
        note=_note(changed, turned),
    )


def _nothing(_first: int, _logits: Tensor) -> None:
    return None


def _changes(own: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> tuple[str, str]:
    """Names of a vector and of an embedding that are not the original's; empty where all are."""
    changed = turned = ""
    for name, vector in own.items():
        other = original.get(name)
        if other is None or other.shape != vector.shape:
            continue
        a, b = other.float(), vector.float()
        if a.dim() == 1 and (a - b).abs().max() > _SAME_VECTOR * a.abs().max():
            changed = changed or name
        elif a.dim() == 2 and F.cosine_similarity(a, b, dim=1).mean() < _SAME_EMBEDDING:
            turned = turned or name
    return changed, turned


def _note(changed: str, turned: str) -> str:
    if turned:
        return f"{turned} is not the reference's: the hidden states are rotated, or the model is another one"
    if changed:
        return (
            f"{changed} is not the reference's: scales of channels were folded into it, or it was trained; layers "
            "cannot be compared one by one, blocks can"
        )
    return ""


def check_scheme(model: nn.Module, config: QuantConfig) -> None:
    """Refuse before the work what `quantized_copy` would.

    Raises:
        ConfigError: a rule that decides no layer; a scheme that looks at activations.
        LayerError: a scheme that does not fit a layer.
    """
    config.check_used([*linear_modules(model), *expert_modules(model)])
    for name, scheme in planned(model, config).items():
        if scheme.needs_data:
            raise ConfigError(
                f"{name}: {scheme}, by {scheme.method}, looks at activations: quantize the model first, `qcompile "
                "quantize MODEL --calibration TEXT --output DIR`, and compare DIR"
            )


def quantized_copy(model: nn.Module, config: QuantConfig) -> nn.Module:
    """A quantized model beside the original, which keeps its weights; what is not quantized is shared between both.

    Raises:
        ConfigError, LayerError: see `check_scheme` and `qcompile.quantize_`.
    """
    check_scheme(model, config)
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return qcompile.quantize_(copy.deepcopy(model, memo), config)
