"""What is saved, and the contract of a format to save it in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompile.checkpoint.saving.layers import Layer
from qcompile.errors import CheckpointError
from qcompile.formats import IntegerFormat
from qcompile.packed import PackedWeight
from qcompile.reference import expand_blocks
from qcompile.scheme import FLOAT_SCALES, Granularity, WeightScheme


class Unsavable(Exception):
    """A layer does not fit a format; the text says why."""


@dataclass(frozen=True)
class Rounded:
    """Numbers of a layer that a format holds in another dtype, not all of them exactly.

    Attributes:
        layer: its name.
        what: the numbers, as in "scales".
        dtype: they were rounded to.
        error: the greatest relative error.
    """

    layer: str
    what: str
    dtype: str
    error: float


class Rounding:
    """Conversions between dtypes: exact ones, and where it is allowed others, which are noted."""

    def __init__(self, allowed: bool) -> None:
        self.allowed = allowed
        self.noted: list[Rounded] = []

    def cast(self, layer: str, what: str, values: Tensor, dtype: torch.dtype) -> Tensor:
        """The values in `dtype`.

        Raises:
            Unsavable: they are not exact there, and rounding is not allowed; or they overflow, or vanish.
        """
        return self.exact_or_note(layer, what, values, values.to(dtype))

    def exact_or_note(self, layer: str, what: str, values: Tensor, stored: Tensor) -> Tensor:
        """`stored`, which stands for `values`; see `cast`."""
        wanted, held = values.to(torch.float64), stored.to(torch.float64)
        if torch.equal(wanted, held):
            return stored
        name = str(stored.dtype).removeprefix("torch.")
        if not torch.isfinite(held).all() or bool(((held == 0) & (wanted != 0)).any()):
            raise Unsavable(f"its {what} leave the range of {name}")
        error = float(((held - wanted).abs() / wanted.abs()).nan_to_num(0.0).max())
        if not self.allowed:
            raise Unsavable(
                f"its {what} are not exact in {name} (relative error up to {error:.1e}; allow_rounding=True, or "
                "--allow-rounding, rounds)"
            )
        self.noted.append(Rounded(layer, what, name, error))
        return stored


@dataclass(frozen=True)
class Saved:
    """What `save` did.

    Attributes:
        files: that were written.
        rounded: what is not exact; empty unless rounding was allowed.
    """

    files: tuple[Path, ...]
    rounded: tuple[Rounded, ...]


class Target(ABC):
    """A format whose layers are tensors in safetensors files. An instance is for one model.

    Attributes:
        name: what `save` calls it.
        holds_kv_scales: whether scales of a KV cache have a place.
    """

    name: str
    holds_kv_scales: bool = False

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers

    @abstractmethod
    def objection(self, layer: Layer) -> str | None:
        """Why a layer of this scheme and shape cannot be held; None if it can, perhaps with rounding."""

    @abstractmethod
    def tensors(self, layer: Layer, rounding: Rounding) -> dict[str, Tensor]:
        """The layer's tensors by suffix, without its bias.

        Raises:
            Unsavable: numbers that the format does not hold.
        """

    @abstractmethod
    def quantization_config(self, plain: Sequence[str]) -> dict[str, Any]:
        """What says so in config.json.

        Args:
            plain: names of the linear layers that are not quantized.
        """


def common_objection(layer: Layer, *, activations: bool) -> str | None:
    """Why no format of integers or floats with scales holds a layer.

    Args:
        activations: the format holds quantized inputs.
    """
    if layer.scheme.weight.rotated:
        return "its inputs are turned when it runs (rotated)"
    if layer.pre_quant_scale is not None:
        return "it multiplies its inputs by scales per channel (pre_quant_scale)"
    activation = layer.scheme.activation
    if activation is not None and not activations:
        return f"its inputs are quantized ({activation})"
    if activation is not None and activation.outlier_threshold is not None:
        return "it multiplies columns of large inputs unquantized (outlier_threshold)"
    if layer.scheme.weight.offset:
        return "its weight has float offsets"
    return None


def integer_objection(layer: Layer, bits: Sequence[int], *, ragged: bool = False) -> str | None:
    """Why a format of integers, with float scales for groups or channels, does not hold a layer's weight.

    Args:
        ragged: the last group of a row may be shorter.
    """
    weight = layer.scheme.weight
    if not isinstance(weight.format, IntegerFormat) or weight.format.bits not in bits:
        return f"its weight is {weight.format.name}, no integer of {' or '.join(map(str, bits))} bits"
    if weight.super_scale is not None or weight.scale_dtype not in FLOAT_SCALES:
        return f"its scales are {weight.scale_dtype}" + (" under other scales" if weight.super_scale else "")
    block = weight.granularity
    if block.rows != 1 and block != Granularity.tensor():
        return f"its scales are per {block}"
    if block.is_group and layer.shape[1] % block.columns and not ragged:
        return f"its last group is shorter: {block.columns} does not divide {layer.shape[1]}"
    return None


def per_row(values: Tensor, weight: PackedWeight) -> Tensor:
    """Scales or zero points [N, groups], one a row also where the whole weight shares one."""
    if weight.scheme.granularity != Granularity.tensor():
        return values
    return expand_blocks(values, Granularity(-1, 1), (weight.shape[0], 1))


def group_size(scheme: WeightScheme) -> int:
    """Columns that share a scale; -1 is the whole row."""
    return scheme.granularity.columns


def column_groups(weight: PackedWeight) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, K] with the columns in the order of the input features, and the group of each, int32 [K]."""
    columns = weight.shape[1]
    codes = weight.unpack_codes()
    group = torch.arange(columns, dtype=torch.int32) // weight.scheme.granularity.block_of(weight.shape)[1]
    if weight.perm is None:
        return codes, group
    place = weight.perm.long()
    return torch.empty_like(codes).index_copy_(1, place, codes), torch.empty_like(group).index_copy_(0, place, group)


def middle(bits: int) -> int:
    """The code that stands for 0 in a symmetric weight of integers."""
    return 1 << (bits - 1)


_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


def fused_name(name: str) -> str:
    """The linear that vLLM makes of this one and its neighbours, or the name itself."""
    parent, dot, last = name.rpartition(".")
    return f"{parent}{dot}{_FUSED.get(last, last)}"


def most_common(values: Sequence[Any]) -> Any:
    """The value that most layers have, the first of equals."""
    return max(dict.fromkeys(values), key=values.count)


def refusal(layer: Layer, target: str, reason: str, holding: Sequence[str]) -> CheckpointError:
    """The error of a layer that a format does not hold."""
    way = f"formats that hold it: {', '.join(holding)}" if holding else "no format that can be written holds it"
    return CheckpointError(f"{layer.name}: {target} cannot hold this layer exactly: {reason}; {way}")


def plain_config(config: Any) -> dict[str, Any]:
    """A transformers configuration as plain values, without what it says about quantization."""
    import json

    described: Mapping[str, Any] = json.loads(config.to_json_string())
    return {key: value for key, value in described.items() if key not in ("quantization_config", "compression_config")}
