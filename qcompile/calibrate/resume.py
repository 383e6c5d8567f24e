"""What an interrupted calibration had done, on disk: a file for each block, and what it was done with.

calibration.json             fingerprint of model, schemes, batches and code; results of layers
<block>.safetensors          the block's state after quantization, folded parameters included
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qcompile.calibrate.codes import choose_codes
from qcompile.calibrate.report import LayerResult
from qcompile.calibrate.stream import Batch, Waiting
from qcompile.errors import CheckpointError, LayerError
from qcompile.experts import QuantizedExperts, quantize_experts
from qcompile.fingerprint import fingerprint
from qcompile.linears import matrix_of, quantized_linear
from qcompile.packed import PackedWeight
from qcompile.scheme import Scheme
from qcompile.scheme_config import scheme_to_dict

_INDEX = "calibration.json"


class Progress:
    """A folder of finished blocks; with no folder, nothing is kept. Whoever saved the model removes it.

    Raises:
        CheckpointError: the folder is of another calibration, or damaged.
    """

    def __init__(
        self,
        folder: str | Path | None,
        model: nn.Module,
        schemes: Mapping[str, Scheme],
        mixtures: Mapping[str, Scheme],
        batches: Sequence[Batch],
        waiting: Waiting | None = None,
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.results: dict[str, LayerResult] = {}
        self.schemes, self.mixtures = schemes, mixtures
        if self.folder is None:
            return
        self.key = calibration_key(model, {**schemes, **mixtures}, batches, waiting)
        index = self.folder / _INDEX
        if not index.is_file():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise CheckpointError(f"{self.folder}: holds other files; name a new folder to resume from")
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_index()
            return
        try:
            kept = json.loads(index.read_text(encoding="utf-8"))
            key, results = kept["key"], [_result(entry) for entry in kept["results"]]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{index}: is damaged ({error}); remove the folder to begin anew") from None
        if key != self.key:
            raise CheckpointError(
                f"{self.folder}: was begun with another model, configuration, calibration or version of qcompile; "
                "remove the folder to begin anew"
            )
        self.results = {result.name: result for result in results}

    def note(self, result: LayerResult) -> None:
        """Remember what became of a layer."""
        self.results[result.name] = result

    def save(self, name: str, block: nn.Module) -> None:
        """Keep a block that is done."""
        if self.folder is None:
            return
        tensors = {key: tensor.detach().contiguous().cpu().clone() for key, tensor in block.state_dict().items()}
        path = self._path(name)
        temporary = path.with_suffix(".part")
        save_file(tensors, temporary)
        self._write_index()  # first the results: a block that is there has them
        temporary.replace(path)

    def restore(
        self,
        name: str,
        block: nn.Module,
        modules: Mapping[str, nn.Module],
        put: Callable[[str, nn.Module], None],
    ) -> list[LayerResult] | None:
        """Make a block what it was when it was kept.

        Args:
            modules: its linears and experts that are quantized, by their names in the model.
            put: puts a module in the place of one of them.

        Returns:
            results of its layers; None if it was not kept, and nothing changed.

        Raises:
            CheckpointError: its file is damaged.
        """
        if self.folder is None or not self._path(name).is_file():
            return None
        path = self._path(name)
        try:
            tensors = load_file(path)
            made = {}
            for layer, module in modules.items():
                local = layer.removeprefix(f"{name}.")
                if layer in self.mixtures:
                    made[layer] = self._experts(layer, module, tensors, local)
                else:
                    made[layer] = self._module(layer, module, tensors, local)
            names = [f"{layer}{part}" for layer in modules for part in _parts(made[layer])]
            results = [self.results[layer] for layer in names]
            replaced = tuple(f"{layer.removeprefix(f'{name}.')}." for layer in modules)
            rest = {key: t for key, t in tensors.items() if not key.startswith(replaced)}
        except (SafetensorError, OSError, KeyError, LayerError) as error:
            raise CheckpointError(f"{path}: is damaged ({error}); remove it to do this block anew") from None
        own = {k: t.shape for k, t in block.state_dict().items() if not k.startswith(replaced)}
        if own != {key: tensor.shape for key, tensor in rest.items()}:
            raise CheckpointError(f"{path}: is of another block; remove it to do this block anew")
        for layer, new in made.items():
            put(layer, new)
        block.load_state_dict(rest, strict=False)
        return results

    def _module(self, layer: str, module: nn.Module, tensors: Mapping[str, Tensor], local: str) -> nn.Module:
        scheme, weight = self.schemes[layer], matrix_of(module)
        kept = [tensors[f"{local}.{field}"].to(weight.device) for field in scheme.weight.fields]
        packed = PackedWeight.from_tensors(kept, (weight.shape[0], weight.shape[1]), scheme.weight)
        packed.check(layer)
        static = scheme.activation is not None and not scheme.activation.dynamic
        scale = tensors[f"{local}.input_scale"].to(weight.device) if static else None
        made = quantized_linear(layer, module, scheme, scale, packed)
        if made.bias is not None:
            made.bias.data.copy_(tensors[f"{local}.bias"])
        return made

    def _experts(self, layer: str, module: nn.Module, tensors: Mapping[str, Tensor], local: str) -> nn.Module:
        """Quantized as if no input were known, for its shapes, and filled with what is kept."""

        def choose(_projection: str, _index: int, weight: Tensor, scheme: Scheme, name: str) -> PackedWeight:
            return choose_codes(weight, scheme, torch.eye(weight.shape[1], device=weight.device), name)

        made = quantize_experts(layer, module, self.mixtures[layer], choose)
        kept = {k.removeprefix(f"{local}."): t for k, t in tensors.items() if k.startswith(f"{local}.")}
        try:
            made.load_state_dict(kept)
        except RuntimeError as error:
            raise LayerError(str(error)) from None
        return made

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"

    def _write_index(self) -> None:
        assert self.folder is not None
        temporary = self.folder / f"{_INDEX}.part"
        content = {"key": self.key, "results": [asdict(result) for result in self.results.values()]}
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        temporary.replace(self.folder / _INDEX)


def _parts(made: nn.Module) -> list[str]:
    """What follows a layer's name in those of its results."""
    return [f".{name}" for name in (*made.first, "down_proj")] if isinstance(made, QuantizedExperts) else [""]


def _result(entry: dict[str, Any]) -> LayerResult:
    return LayerResult(**{**entry, "folded": tuple(entry["folded"])})


def calibration_key(
    model: nn.Module, schemes: Mapping[str, Scheme], batches: Sequence[Batch], waiting: Waiting | None = None
) -> str:
    """What a calibration depends on, hashed: code, schemes, batches, and the shapes and some content of parameters."""
    digest = hashlib.sha256(fingerprint().encode())
    digest.update(json.dumps({name: scheme_to_dict(s) for name, s in schemes.items()}).encode())
    for name, parameter in model.named_parameters():
        content = waiting.peek(name) if parameter.is_meta and waiting is not None else parameter.detach()
        few = content.reshape(-1)[:64].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}{few.tolist()}".encode())
    for batch in batches:
        _update(digest, [*batch.args, *sorted(batch.kwargs.items())])
    return digest.hexdigest()


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous()
        digest.update(f"{raw.dtype}{tuple(raw.shape)}".encode())
        digest.update(raw.reshape(-1).view(torch.uint8).numpy().tobytes() if raw.numel() else b"")
    elif isinstance(value, (list, tuple)):
        for part in value:
            _update(digest, part)
    else:
        digest.update(repr(value).encode())
