"""The `quantization_config` of compressed-tensors, checked: how each group of layers is quantized, and which it has."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from qcompile.checkpoint.scaled import is_tile, spellings
from qcompile.errors import CheckpointError, shown
from qcompile.scheme import Granularity

_FORMATS = (
    "dense",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "pack-quantized",
    "marlin-24",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp6-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
)
_LONGEST_PATTERN = 1000


@dataclass(frozen=True, kw_only=True)
class Args:
    """How some numbers are quantized: the `QuantizationArgs` of the library, checked.

    Attributes:
        group: columns that share a scale; of the strategies group and tensor_group alone.
        tile: (rows, columns) that share one; of the strategy block alone.
        dynamic: scales are computed from each input.
        exponents: scales are powers of two.
    """

    bits: int
    floating: bool
    symmetric: bool
    strategy: str
    group: int | None
    tile: tuple[int, int] | None
    dynamic: bool
    exponents: bool

    @property
    def granularity(self) -> Granularity:
        if self.strategy in ("group", "tensor_group"):
            assert self.group is not None
            return Granularity.group(self.group)
        if self.strategy == "block":
            assert self.tile is not None
            return Granularity.block(*self.tile)
        return Granularity.tensor() if self.strategy == "tensor" else Granularity.channel()


@dataclass(frozen=True, kw_only=True)
class Group:
    """One of the `config_groups`."""

    targets: tuple[str, ...]
    weights: Args | None
    inputs: Args | None


def _read_args(where: str, given: object) -> Args | None:
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{where} is {shown(given)}; it is an object with num_bits, type and strategy, or null")

    def get(key: str, default: object, valid: Callable[[Any], bool], meaning: str) -> Any:
        value = default if given.get(key) is None else given[key]
        if not valid(value):
            raise CheckpointError(f"{where}: {key} is {shown(value)}; it is {meaning}")
        return value

    bits = get("num_bits", 8, lambda v: type(v) is int and 1 <= v <= 16, "a number from 1 to 16")
    kind = get("type", "int", lambda v: v in ("int", "float"), "int or float")
    group = get("group_size", None, lambda v: v is None or (type(v) is int and -1 <= v < 2**31), "a positive number")
    inferred = "tensor" if group is None else "channel" if group <= 0 else "group"
    strategies = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
    strategy = get("strategy", inferred, lambda v: v in strategies, f"one of {', '.join(strategies)}")
    if strategy in ("group", "tensor_group") and (group is None or group <= 0):
        raise CheckpointError(f"{where}: strategy {strategy} needs a positive group_size, not {shown(group)}")
    tile = given.get("block_structure")
    if isinstance(tile, str) and re.fullmatch(r"\d{1,9}x\d{1,9}", tile):
        tile = [int(part) for part in tile.split("x")]
    if strategy == "block" and not is_tile(tile):
        raise CheckpointError(f"{where}: block_structure is {shown(tile)}; it is [rows, columns], as [128, 128]")
    return Args(
        bits=bits,
        floating=kind == "float",
        symmetric=get("symmetric", True, lambda v: isinstance(v, bool), "true or false"),
        strategy=strategy,
        group=group if strategy in ("group", "tensor_group") else None,
        tile=(tile[0], tile[1]) if strategy == "block" and is_tile(tile) else None,
        dynamic=get("dynamic", False, lambda v: isinstance(v, bool) or v == "local", 'true, false or "local"')
        is not False,
        exponents=given.get("scale_dtype") in ("torch.uint8", "uint8", "torch.float8_e8m0fnu"),
    )


def _preset_args(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": strategy, **more}


_TOKEN = {"strategy": "token", "dynamic": True}
_MX: dict[str, Any] = {"group_size": 32, "scale_dtype": "torch.uint8"}


def _presets() -> dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]]:
    """The schemes that a group's name may stand for: weights, inputs."""
    presets: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {"UNQUANTIZED": (None, None)}
    for bits in range(2, 9):
        weights = _preset_args(bits, "int", "group", group_size=128)
        presets[f"W{bits}A16"] = (weights, None)
        for inputs in (4, 8):
            if bits <= inputs:
                presets[f"W{bits}A{inputs}"] = (weights, {"num_bits": inputs, "type": "int", **_TOKEN})
    int8 = (_preset_args(8, "int", "channel"), {"num_bits": 8, "type": "int", **_TOKEN})
    fp8_token = {"num_bits": 8, "type": "float", **_TOKEN}
    fp4 = _preset_args(4, "float", "tensor_group", group_size=16)
    mxfp4, mxfp6, mxfp8 = (_preset_args(bits, "float", "group", **_MX) for bits in (4, 6, 8))
    return presets | {
        "W8A8": int8,
        "INT8": int8,
        "INT8_W8A8": int8,
        "W4A16_ASYM": (_preset_args(4, "int", "group", group_size=128, symmetric=False), None),
        "W4AFP8": (_preset_args(4, "int", "group", group_size=128), fp8_token),
        "FP8": (_preset_args(8, "float", "tensor"), _preset_args(8, "float", "tensor")),
        "FP8_DYNAMIC": (_preset_args(8, "float", "channel"), fp8_token),
        "FP8_BLOCK": (
            _preset_args(8, "float", "block", block_structure=[128, 128]),
            _preset_args(8, "float", "group", group_size=128, dynamic=True),
        ),
        "NVFP4A16": (fp4, None),
        "NVFP4": (fp4, {**fp4, "dynamic": "local"}),
        "MXFP4A16": (mxfp4, None),
        "MXFP4XFP8": (mxfp4, _preset_args(8, "float", "group", group_size=128, dynamic=True)),
        "MXFP4": (mxfp4, {**mxfp4, "dynamic": True}),
        "MXFP6A16": (mxfp6, None),
        "MXFP6A8": (mxfp6, {**mxfp8, "dynamic": True}),
        "MXFP8A16": (mxfp8, None),
        "MXFP8": (mxfp8, {**mxfp8, "dynamic": True}),
    }


def read_names(where: str, given: object) -> tuple[str, ...]:
    """Layers and classes, or patterns of either that begin with "re:"; `where` is named in errors.

    Raises:
        CheckpointError: no such list, or no regular expression.
    """
    if given is None:
        return ()
    if not isinstance(given, (list, tuple)) or not all(isinstance(name, str) for name in given):
        raise CheckpointError(f"{where} is {shown(given)}; it is a list of names")
    for name in given:
        if name.startswith("re:"):
            try:
                re.compile(name[3 : 3 + _LONGEST_PATTERN])
            except (re.error, RecursionError, OverflowError) as error:
                raise CheckpointError(f"{where}: {shown(name)} is no regular expression: {error}") from None
            if len(name) > 3 + _LONGEST_PATTERN:
                raise CheckpointError(f"{where}: a pattern is longer than {_LONGEST_PATTERN} characters")
    return tuple(given)


def read_group(name: str, given: object) -> Group:
    """One of the `config_groups`, or the targets of one that is named as a preset.

    Raises:
        CheckpointError: what no version of the library means.
    """
    where = f"quantization_config: config_groups: {name}"
    if isinstance(given, (list, tuple)):
        found = _presets().get(name.upper())
        if found is None:
            raise CheckpointError(f"{where} is a list, so its name is a preset's, and {shown(name)} is none")
        weights, inputs = found
        return Group(
            targets=read_names(where, given),
            weights=_read_args(f"{where}: weights", weights),
            inputs=_read_args(f"{where}: input_activations", inputs),
        )
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{where} is {shown(given)}; it is an object with targets and weights")
    check_format(where, given.get("format"))
    return Group(
        targets=read_names(f"{where}: targets", given.get("targets")),
        weights=_read_args(f"{where}: weights", given.get("weights")),
        inputs=_read_args(f"{where}: input_activations", given.get("input_activations")),
    )


def check_format(where: str, given: object) -> None:
    """
    Raises:
        CheckpointError: a format that is not readable; `where` is named.
    """
    if given is not None and given not in _FORMATS:
        raise CheckpointError(f"{where}: format is {shown(given)}; readable are {', '.join(_FORMATS)}")


KINDS = ("exact", "pattern", "class")
"""What a target may be, the most specific first."""


def matches(kind: str, names: Collection[str], layer: str) -> bool:
    """Whether one of `names` that is of a kind means the layer, which is a linear."""
    if kind == "exact":
        return any(spelled in names for spelled in spellings(layer))
    if kind == "class":
        return not {"Linear", "LinearBase", "Module"}.isdisjoint(names)
    patterns = [name[3:] for name in names if name.startswith("re:")]
    return any(re.match(pattern, spelled) for pattern in patterns for spelled in spellings(layer))


def read_version(given: object) -> tuple[int, int] | None:
    """Major and minor; None if nothing says so."""
    found = re.match(r"(\d{1,4})\.(\d{1,4})", given) if isinstance(given, str) else None
    return None if found is None else (int(found[1]), int(found[2]))
