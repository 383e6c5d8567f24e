"""The contract of a quantization method: from a layer's tensors in a checkpoint to its packed weight."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from qcompile.checkpoint.store import TensorInfo, TensorStore
from qcompile.errors import CheckpointError, shown, suggestion
from qcompile.packed import PackedLinear


class LayerTensors:
    """The tensors of one layer, `<name>.<suffix>`, read when they are taken.

    Attributes:
        name: the layer's, as in `model.layers.0.mlp.up_proj`.
        store: of all tensors.
        taken: names of the tensors that were taken.
    """

    def __init__(self, store: TensorStore, name: str) -> None:
        self.store, self.name = store, name
        self.taken: set[str] = set()
        prefix = name + "."
        self._suffixes = {full.removeprefix(prefix): full for full in store.under(prefix)}

    def __contains__(self, suffix: str) -> bool:
        return suffix in self._suffixes

    def suffixes(self) -> tuple[str, ...]:
        """What follows the layer's name in the tensors' names."""
        return tuple(self._suffixes)

    def info(self, suffix: str) -> TensorInfo:
        """Dtype and shape of a tensor.

        Raises:
            CheckpointError: the layer has none of this name.
        """
        if suffix not in self._suffixes:
            has = ", ".join(self._suffixes) or "nothing"
            raise self.error(f"its tensor {suffix} is missing; the file has {has} for this layer. Get the file again")
        return self.store.info(self._suffixes[suffix])

    def take(self, suffix: str, *dtypes: torch.dtype, shape: tuple[int | None, ...] | None = None) -> Tensor:
        """A tensor on the CPU, once its header agrees.

        Args:
            dtypes: those that are allowed; none means any.
            shape: expected, None for an extent that may be any; None for any shape.

        Raises:
            CheckpointError: missing, or of another dtype or shape.
        """
        info = self.info(suffix)
        if dtypes and info.dtype not in dtypes:
            raise self.error(f"{suffix} has dtype {info.dtype}, expected {' or '.join(map(str, dtypes))}")
        if shape is not None and (
            len(info.shape) != len(shape)
            or any(wanted not in (None, extent) for extent, wanted in zip(info.shape, shape, strict=True))
        ):
            wanted = ", ".join("any" if extent is None else str(extent) for extent in shape)
            raise self.error(f"{suffix} has shape {info.shape}, expected ({wanted})")
        self.taken.add(self._suffixes[suffix])
        return self.store.read(self._suffixes[suffix])

    def optional(self, suffix: str, *dtypes: torch.dtype, shape: tuple[int | None, ...] | None = None) -> Tensor | None:
        """As `take`, or None if there is no such tensor."""
        return self.take(suffix, *dtypes, shape=shape) if suffix in self else None

    def ignore(self, *suffixes: str) -> None:
        """Tensors that say nothing which is not known: they are not left over."""
        self.taken |= {self._suffixes[suffix] for suffix in suffixes if suffix in self._suffixes}

    def error(self, reason: str) -> CheckpointError:
        """An error that names the file and the layer."""
        files = sorted({str(self.store.info(full).file) for full in self._suffixes.values()})
        return CheckpointError(f"{files[0] if files else self.store.path}: {self.name}: {reason}")


class Method(ABC):
    """A way in which checkpoints are quantized. Subclasses with `@register` are found by their name.

    Attributes:
        name: value of `quant_method` in the checkpoint's `quantization_config`.
        aliases: further values of it.
        activation_dtypes: that the model may compute in.
        min_capability: least compute capability of an NVIDIA GPU, 10 * major + minor.
    """

    name: str
    aliases: tuple[str, ...] = ()
    activation_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)
    min_capability: int = 80

    @abstractmethod
    def __init__(self, config: Mapping[str, Any], store: TensorStore) -> None:
        """Read the checkpoint's `quantization_config`.

        Raises:
            CheckpointError: a variant that is unknown or makes no sense.
        """

    @abstractmethod
    def linear(self, tensors: LayerTensors, shape: tuple[int, int]) -> PackedLinear | Tensor | None:
        """A linear layer with weight [N, K], but for its `bias` and `dtype`, which are the loader's; None if the
        checkpoint holds its weight unquantized; the decoded weight itself, float32 [N, K], if its scales are arranged
        in a way that no `PackedWeight` holds.

        Raises:
            CheckpointError: tensors that are missing, damaged or disagree with the configuration or with `shape`.
        """

    def stacked(
        self, tensors: LayerTensors, projection: str, experts: int, shape: tuple[int, int]
    ) -> list[PackedLinear] | None:
        """One projection of all experts, each [N, K], where the checkpoint keeps them in one tensor; None if it does
        not, as most methods, whose experts are linear layers.

        Args:
            tensors: of the experts' module.
            projection: "gate_up_proj", "gate_proj", "up_proj" or "down_proj"; gate_up_proj is asked for first.

        Raises:
            CheckpointError: as `linear`.
        """
        return None


METHODS: dict[str, type[Method]] = {}
_MethodClass = TypeVar("_MethodClass", bound=type[Method])

_MODULES = (
    "gptq",
    "awq",
    "fp8",
    "compressed_tensors",
    "modelopt",
    "quark",
    "bitsandbytes",
    "torchao",
    "hqq",
    "quanto",
    "mxfp4",
)


def register(method: _MethodClass) -> _MethodClass:
    """Add a method under its name and aliases, which must be new.

    Raises:
        ValueError: a name that is taken.
    """
    if not method.__module__.startswith("qcompile."):
        _load_methods()
    for name in (method.name, *method.aliases):
        if name in METHODS:
            raise ValueError(f"quantization method {name!r} is registered already")
        METHODS[name] = method
    return method


def _load_methods() -> None:
    for module in _MODULES:
        importlib.import_module(f"qcompile.checkpoint.{module}")


_FINGERPRINTS = {
    "g_idx": "gptq",
    "qweight": "awq",
    "B_24": "gptq",
    "B": "gptq",
    "weight_packed": "compressed-tensors",
    "weight_scale_2": "modelopt",
    "weight_scale_inv": "fp8",
    "SCB": "bitsandbytes",
    "weight.absmax": "bitsandbytes",
    "_weight_qdata": "torchao",
    "W_q": "hqq",
    "weight._data": "quanto",
    "weight._data._data": "quanto",
    "gate_up_proj_blocks": "mxfp4",
}
"""Suffixes of tensors that only one method writes."""


def method_for(config: Mapping[str, Any] | None, store: TensorStore) -> Method | None:
    """The method of a checkpoint, from its `quantization_config`, or else from its tensors' names.

    Returns:
        None if nothing says that the checkpoint is quantized.

    Raises:
        CheckpointError: a method that is unknown, or that `quantization_config` gives no name.
    """
    _load_methods()
    if config is None:
        names = store.names()
        for suffix, method in _FINGERPRINTS.items():
            if any(name.endswith("." + suffix) for name in names):
                return METHODS[method]({"quant_method": method}, store)
        return None
    if not isinstance(config, Mapping):
        raise CheckpointError(f"{store.path}: quantization_config is {shown(config)}, not an object")
    name = config.get("quant_method")
    if not isinstance(name, str):
        raise CheckpointError(f"{store.path}: quantization_config has no quant_method; one of {', '.join(METHODS)}")
    if name not in METHODS:
        raise CheckpointError(
            f"{store.path}: quant_method {shown(name)} is unknown (a method of your own is added with "
            f"qcompile.checkpoint.method.register); {suggestion(name, METHODS)}"
        )
    return METHODS[name](config, store)
