"""Experts of mixtures in checkpoints: one set of tensors an expert, or stacked tensors of all."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from qcompile.checkpoint.method import LayerTensors, Method
from qcompile.checkpoint.store import TensorInfo, TensorStore
from qcompile.errors import CheckpointError, LayerError
from qcompile.experts import GroupedLinear, QuantizedExperts, projection_shapes
from qcompile.gating import Gating
from qcompile.packed import PackedLinear, concatenate
from qcompile.parallel import Sharding

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_NAMES = {"gate_proj": ("gate_proj", "w1"), "up_proj": ("up_proj", "w3"), "down_proj": ("down_proj", "w2")}
"""What checkpoints call an expert's layers."""
_EXPERT = re.compile(r"(0|[1-9][0-9]{0,5})\.([^.]+)\..+")

_Layer = PackedLinear | Tensor
"""One layer of one expert; a plain weight [N, K] if it is not quantized."""


class _Part(TensorStore):
    """Some tensors of a store."""

    def __init__(self, store: TensorStore, names: Sequence[str]) -> None:
        self._store, self._names = store, tuple(names)
        self.path, self.metadata = store.path, store.metadata

    def names(self) -> tuple[str, ...]:
        return self._names

    def info(self, name: str) -> TensorInfo:
        return self._store.info(name)

    def read(self, name: str) -> Tensor:
        return self._store.read(name)


def tensors_under(store: TensorStore, modules: Iterable[str]) -> dict[str, list[str]]:
    """Which tensors lie under the name of each module."""
    found: dict[str, list[str]] = {module: [] for module in modules}
    for name in store.names():
        owner = name
        while "." in owner:
            owner = owner.rpartition(".")[0]
            if owner in found:
                found[owner].append(name)
                break
    return found


class Experts:
    """The experts of a mixture, as a checkpoint holds them.

    Args:
        name: of the module.
        module: one of `qcompile.experts.expert_modules`; its parameters may be on the meta device.
        store: of all tensors.
        names: of those under the module's name.
        method: None if nothing is quantized.

    Attributes:
        whole: the tensors of all experts together.
        layers: the tensors of each expert's layers that were looked at.
    """

    def __init__(
        self, name: str, module: nn.Module, store: TensorStore, names: Sequence[str], method: Method | None
    ) -> None:
        self.name, self.module, self.method = name, module, method
        self.whole = LayerTensors(_Part(store, names), name)
        self.layers: list[LayerTensors] = []
        self._store = store
        self._apart: dict[tuple[int, str], list[str]] = defaultdict(list)
        for tensor in names:
            if match := _EXPERT.fullmatch(tensor.removeprefix(name + ".")):
                self._apart[int(match[1]), match[2]].append(tensor)

    def load(
        self, device: torch.device, dtype: torch.dtype, sharding: Sharding | None = None
    ) -> QuantizedExperts | dict[str, Tensor]:
        """The module for quantized experts, or else values for parameters of the module that there is, if the
        checkpoint does not have them under their own names.

        Args:
            sharding: what this process keeps of quantized ones; None for all.

        Raises:
            LayerError: experts that the processes cannot divide.
            CheckpointError: tensors that are missing or damaged, experts of which only some are quantized, or in
                different ways.
        """
        plain: dict[str, Tensor | None] = {}
        projections: dict[str, GroupedLinear] = {}
        for projection, (count, n, k) in projection_shapes(self.module).items():
            with self._naming_the_file():
                parts = self._read(projection, count, (n, k))
            if parts is None:
                plain[projection] = None
            elif any(isinstance(layer, Tensor) for layers in parts.values() for layer in layers):
                plain[projection] = self._plain(projection, parts)
            else:
                for part, layers in parts.items():
                    own = [layer for layer in layers if isinstance(layer, PackedLinear)]
                    if sharding is not None:
                        own = sharding.experts(self.name, part, own, bool(self.module.is_concatenated))
                    with self._naming_the_file():
                        stack = GroupedLinear.of([one.to(device) for one in own], f"{self.name}.{part}")
                    projections[part] = stack.to(dtype)
        if not projections:
            return {name: value.to(device, dtype) for name, value in plain.items() if value is not None}
        if plain:
            raise self.whole.error(
                f"{next(iter(plain))} of its experts is not quantized, but {next(iter(projections))} is; qcompile runs "
                "experts whose projections are all quantized, or none"
            )
        gating = Gating(self.module)
        if sharding is not None:
            return sharding.joined(self.name, projections, gating)
        return QuantizedExperts(projections, gating)

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except LayerError as error:
            raise CheckpointError(f"{self._store.path}: {error}") from None

    def _read(self, projection: str, count: int, shape: tuple[int, int]) -> dict[str, list[_Layer]] | None:
        """The layers that a projection consists of, by name; None if the checkpoint has none apart from it."""
        half = (shape[0] // 2, shape[1])
        parts = {"gate_proj": half, "up_proj": half} if projection == "gate_up_proj" else {projection: shape}
        for names in ({projection: shape}, parts):
            stacked = {name: self._stacked(name, count, extent) for name, extent in names.items()}
            found = {name: layers for name, layers in stacked.items() if layers is not None}
            if len(found) == len(names):
                biases = self._biases(projection, count, shape[0], len(names))
                layers: dict[str, list[_Layer]] = {
                    name: [replace(layer, bias=own) for layer, own in zip(found[name], bias, strict=True)]
                    for name, bias in zip(names, biases, strict=True)
                }
                return self._joined(projection, layers)
        if projection in self.whole or not self._apart:
            return None
        layers = {name: [self._expert(i, name, extent) for i in range(count)] for name, extent in parts.items()}
        return self._joined(projection, layers)

    def _joined(self, projection: str, layers: dict[str, list[_Layer]]) -> dict[str, list[_Layer]]:
        """Gate and up as the one layer that the model has, if one product can serve both."""
        merged = _merged(*layers.values(), alternate=not self.module.is_concatenated) if len(layers) == 2 else None
        return layers if merged is None else {projection: merged}

    def _stacked(self, part: str, count: int, shape: tuple[int, int]) -> list[PackedLinear] | None:
        return None if self.method is None else self.method.stacked(self.whole, part, count, shape)

    def _biases(self, projection: str, count: int, n: int, parts: int) -> list[Sequence[Tensor | None]]:
        """The experts' biases [N] of each part of a projection whose experts are stacked."""
        if not self.module.has_bias:
            return [(None,) * count] * parts
        bias = self.whole.take(f"{projection}_bias", *_FLOATS, shape=(count, n))
        if parts == 1 or self.module.is_concatenated:
            return [part.unbind() for part in bias.chunk(parts, 1)]
        return [bias[:, index::parts].unbind() for index in range(parts)]

    def _expert(self, index: int, part: str, shape: tuple[int, int]) -> _Layer:
        name = next((name for name in _NAMES[part] if (index, name) in self._apart), None)
        if name is None:
            raise self.whole.error(f"{part} of expert {index} is missing; get the file again")
        tensors = LayerTensors(_Part(self._store, self._apart[index, name]), f"{self.name}.{index}.{name}")
        self.layers.append(tensors)
        found = None if self.method is None else self.method.linear(tensors, shape)
        if found is None:
            return tensors.take("weight", *_FLOATS, shape=shape)
        if isinstance(found, Tensor):
            return found
        found.weight.check(tensors.name)
        return replace(found, bias=tensors.optional("bias", *_FLOATS, shape=(shape[0],)))

    def _plain(self, projection: str, parts: Mapping[str, Sequence[_Layer]]) -> Tensor:
        """The parameter that layers of experts stand for: [experts, N, K], or [experts, K, N] if it is transposed."""
        stacks = []
        for part, layers in parts.items():
            weights = [layer for layer in layers if isinstance(layer, Tensor)]
            if len(weights) != len(layers):
                raise self.whole.error(
                    f"{part} is quantized for {len(layers) - len(weights)} of {len(layers)} experts; qcompile runs "
                    "experts that are all quantized, or none"
                )
            stacks.append(torch.stack(weights))
        if len(stacks) == 1 or self.module.is_concatenated:
            joined = torch.cat(stacks, 1)
        else:
            joined = torch.stack(stacks, 2).flatten(1, 2)
        return joined.transpose(1, 2).contiguous() if self.module.is_transposed else joined


def _merged(gate: Sequence[_Layer], up: Sequence[_Layer], *, alternate: bool) -> list[_Layer] | None:
    """Experts whose rows are the gate's and then the up projection's, or every other, if one product can serve both."""
    merged: list[_Layer] = []
    for first, second in zip(gate, up, strict=True):
        if isinstance(first, Tensor) or isinstance(second, Tensor) or (first.bias is None) != (second.bias is None):
            return None
        if first.scheme != second.scheme or not (
            _equal(first.input_scale, second.input_scale) and _equal(first.pre_quant_scale, second.pre_quant_scale)
        ):
            return None
        try:
            weight = concatenate([first.weight, second.weight], alternate=alternate)
        except ValueError:
            return None
        bias = None
        if first.bias is not None and second.bias is not None:
            bias = torch.stack([first.bias, second.bias], 1 if alternate else 0).flatten()
        merged.append(replace(first.with_weight(weight), bias=bias))
    return merged


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
