"""A scheme as configurations state it: a preset's name, or a mapping of plain values."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qcompile.errors import ConfigError, shown, suggestion
from qcompile.formats import FORMATS, Format, IntegerFormat, get_format
from qcompile.methods import ABSMAX, ROUND, Method, method_to_config, observer_to_config, parse_method, parse_observer
from qcompile.presets import PRESETS, preset
from qcompile.scheme import WHOLE, ActivationScheme, Granularity, Scheme, SuperScale, WeightScheme

_WEIGHT_KEYS = (
    "format",
    "granularity",
    "group_size",
    "block_size",
    "symmetric",
    "offset",
    "scale_dtype",
    "super_scale",
    "act_order",
    "sparsity",
    "rotated",
)
_ACTIVATION_KEYS = (
    "format",
    "symmetric",
    "granularity",
    "group_size",
    "dynamic",
    "scale",
    "scale_dtype",
    "outlier_threshold",
    "observer",
)
_SCHEME_KEYS = ("preset", "weight", "activation", "method")
_PARTS = {"weight": _WEIGHT_KEYS, "activation": _ACTIVATION_KEYS}
_SIZES = frozenset({"granularity", "group_size", "block_size"})


def check_keys(what: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Refuse keys that are not among `known`, naming the nearest.

    Raises:
        ConfigError: an unknown key, or something that is no mapping.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"{what} must be a mapping with keys such as {known[0]!r}, not {type(given).__name__} {shown(given)}"
        )
    for key in given:
        if key not in known:
            raise ConfigError(f"unknown key {shown(key)} in {what}; {suggestion(key, known)}")


def _size(what: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ConfigError(f"{what} must be an integer from 1 to 2**31 - 1, not {shown(value)}")
    return value


def _boolean(what: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{what} must be true or false, not {shown(value)}")
    return value


def _granularity(
    what: str, given: Mapping[str, Any], default: Granularity, names: dict[str, Granularity]
) -> Granularity:
    sized = sorted(key for key in _SIZES if given.get(key) is not None)
    if len(sized) > 1:
        raise ConfigError(f"{what}: give one of {' and '.join(sized)}, not both")
    if not sized:
        return default
    value = given[sized[0]]
    if sized[0] == "group_size":
        if value == WHOLE:
            return Granularity.channel()
        size = _size(f"{what}: group_size", value)
        if size < 16 or size & (size - 1):
            raise ConfigError(f"{what}: group_size must be -1 (per channel) or a power of two from 16 up, not {size}")
        return Granularity.group(size)
    if sized[0] == "block_size":
        if not isinstance(value, (list, tuple)) or len(value) != 2:
            raise ConfigError(f"{what}: block_size must be [rows, columns], not {shown(value)}")
        rows, columns = (_size(f"{what}: block_size", v) for v in value)
        if rows == 1:
            raise ConfigError(f"{what}: block_size of one row is a group; write group_size {columns}")
        return Granularity.block(rows, columns)
    if value not in tuple(names):
        raise ConfigError(f"{what}: granularity {shown(value)} is unknown; {suggestion(value, names)}")
    return names[value]


def _default_granularity(fmt: Format) -> Granularity:
    return Granularity.group(128) if fmt.bits < 8 else Granularity.channel()


def _parse_weight(given: Mapping[str, Any]) -> WeightScheme:
    check_keys("weight", given, _WEIGHT_KEYS)
    if "format" not in given:
        raise ConfigError(f"weight needs a format: one of {', '.join(FORMATS)}")
    fmt = get_format(given["format"])
    offset = _boolean("weight: offset", given.get("offset", False))
    symmetric = _boolean("weight: symmetric", given.get("symmetric", not fmt.name.startswith("uint") and not offset))
    if isinstance(fmt, IntegerFormat) and not offset:  # "int4" with symmetric: false is what people write
        fmt = get_format(f"{'int' if symmetric else 'uint'}{fmt.bits}")
    names = {"tensor": Granularity.tensor(), "channel": Granularity.channel()}
    granularity = _granularity("weight", given, _default_granularity(fmt), names)
    sized = any(given.get(key) is not None for key in _SIZES)
    default_dtype = "bfloat16" if granularity.is_group else "float32"
    return WeightScheme(
        format=fmt,
        granularity=granularity,
        symmetric=symmetric,
        offset=offset,
        scale_dtype=given.get("scale_dtype", default_dtype),
        super_scale=_parse_super_scale(given.get("super_scale")),
        act_order=_boolean("weight: act_order", given.get("act_order", False)),
        flexible_group=granularity.is_group and not sized,
        sparsity=given.get("sparsity"),
        rotated=_boolean("weight: rotated", given.get("rotated", False)),
    )


def _parse_super_scale(given: Mapping[str, Any] | None) -> SuperScale | None:
    if given is None:
        return None
    check_keys("super_scale", given, ("group_size", "dtype", "bits"))
    columns = given.get("group_size", WHOLE)
    if columns != WHOLE:
        columns = _size("super_scale: group_size", columns)
    bits = _size("super_scale: bits", given.get("bits", 8))
    return SuperScale(columns=columns, dtype=given.get("dtype", "float32"), bits=bits)


def _positive(what: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > sys.float_info.max:
        raise ConfigError(f"{what} must be a finite number, not {shown(value)}")
    return float(value)


def parse_activation(given: Mapping[str, Any]) -> ActivationScheme:
    """The `activation` of a scheme.

    Raises:
        ConfigError: an unknown format or key, or values that do not go together.
    """
    check_keys("activation", given, _ACTIVATION_KEYS)
    if "format" not in given:
        raise ConfigError("activation needs a format: int8, int4, fp8_e4m3, ...")
    fmt = get_format(given["format"])
    if isinstance(fmt, IntegerFormat) and "symmetric" in given:  # as weights have it
        symmetric = _boolean("activation: symmetric", given["symmetric"])
        fmt = get_format(f"{'int' if symmetric else 'uint'}{fmt.bits}")
    dynamic = _boolean("activation: dynamic", given.get("dynamic", True))
    names = {"tensor": Granularity.tensor(), "token": Granularity.channel()}
    default = Granularity.channel() if dynamic else Granularity.tensor()
    return ActivationScheme(
        format=fmt,
        granularity=_granularity("activation", given, default, names),
        dynamic=dynamic,
        scale=_positive("activation: scale", given.get("scale")),
        scale_dtype=given.get("scale_dtype", "float32"),
        outlier_threshold=_positive("activation: outlier_threshold", given.get("outlier_threshold")),
        observer=parse_observer(given.get("observer", ABSMAX)),
    )


def parse_scheme(given: str | Mapping[str, Any] | Scheme) -> Scheme:
    """A scheme from a preset's name, or from a dict with `weight` and `activation`, or `preset`, and `method`.

    Beside a preset, what `weight` and `activation` state takes the place of the preset's; `activation: None` leaves
    activations as they are.

    Raises:
        ConfigError: an unknown name or key, or values that do not go together.
    """
    if isinstance(given, Scheme):
        return given
    if isinstance(given, str):
        return preset(given)
    _check_scheme_keys(given)
    method = parse_method(given["method"]) if "method" in given else ROUND
    if "preset" not in given:
        if "weight" not in given:
            raise ConfigError("scheme needs a weight")
        return _parse_parts(given, method)
    known = preset(given["preset"])
    if "weight" not in given and "activation" not in given:
        return replace(known, method=method)
    changed = _parse_parts(_changed(known, given), method)
    if not _SIZES.isdisjoint(given.get("weight", ())):
        return changed
    return replace(changed, weight=replace(changed.weight, flexible_group=known.weight.flexible_group))


def _check_scheme_keys(given: Mapping[str, Any]) -> None:
    """`check_keys`, which says of keys of a part where they belong."""
    for part, keys in _PARTS.items() if isinstance(given, Mapping) else ():
        if key := next((key for key in given if key in keys), None):
            raise ConfigError(f"{key} is no key of a scheme, but of its {part}: {{{part!r}: {{{key!r}: ...}}}}")
    check_keys("scheme", given, _SCHEME_KEYS)


def _parse_parts(given: Mapping[str, Any], method: Method) -> Scheme:
    activation = given.get("activation")
    return Scheme(
        weight=_parse_weight(given["weight"]),
        activation=None if activation is None else parse_activation(activation),
        method=method,
    )


def _changed(known: Scheme, given: Mapping[str, Any]) -> dict[str, Any]:
    """`weight` and `activation` of a scheme, where what is given takes the place of what it has."""
    changed = _parts_to_dict(known)
    changed["weight"] |= _granularity_dict(known.weight.granularity, "channel")
    for part, keys in _PARTS.items():
        if part not in given:
            continue
        new = given[part]
        if new is None and part == "activation":
            changed[part] = None
            continue
        check_keys(part, new, keys)
        replaced = set() if _SIZES.isdisjoint(new) else set(_SIZES)
        replaced |= {"symmetric"} if "format" in new else set()
        changed[part] = {k: v for k, v in changed.get(part, {}).items() if k not in replaced} | dict(new)
    return changed


def _granularity_dict(granularity: Granularity, row_name: str) -> dict[str, Any]:
    if granularity == Granularity.tensor():
        return {"granularity": "tensor"}
    if granularity == Granularity.channel():
        return {"granularity": row_name}
    if granularity.is_group:
        return {"group_size": granularity.columns}
    return {"block_size": [granularity.rows, granularity.columns]}


def scheme_to_dict(scheme: Scheme) -> str | dict[str, Any]:
    """The inverse of `parse_scheme`: a preset's name where it is one, else a dict of plain values."""
    for name, known in PRESETS.items():
        if known == scheme:
            return name
        if (known.weight, known.activation) == (scheme.weight, scheme.activation):
            return {"preset": name, "method": method_to_config(scheme.method)}
    given = _parts_to_dict(scheme)
    if scheme.method != ROUND:
        given["method"] = method_to_config(scheme.method)
    return given


def _parts_to_dict(scheme: Scheme) -> dict[str, Any]:
    """`weight` and `activation`, of plain values."""
    weight = scheme.weight
    given: dict[str, Any] = {"weight": {"format": weight.format.name, "symmetric": weight.symmetric}}
    if not (weight.flexible_group and weight.granularity == _default_granularity(weight.format)):
        given["weight"] |= _granularity_dict(weight.granularity, "channel")
    given["weight"]["scale_dtype"] = weight.scale_dtype
    if weight.offset:
        given["weight"]["offset"] = True
    if weight.super_scale is not None:
        given["weight"]["super_scale"] = {"group_size": weight.super_scale.columns, "dtype": weight.super_scale.dtype}
        if weight.super_scale.bits != 8:
            given["weight"]["super_scale"]["bits"] = weight.super_scale.bits
    if weight.act_order:
        given["weight"]["act_order"] = True
    if weight.sparsity is not None:
        given["weight"]["sparsity"] = weight.sparsity
    if weight.rotated:
        given["weight"]["rotated"] = True
    if scheme.activation is not None:
        activation = scheme.activation
        given["activation"] = {"format": activation.format.name, "dynamic": activation.dynamic}
        given["activation"] |= _granularity_dict(activation.granularity, "token")
        if activation.scale is not None:
            given["activation"]["scale"] = activation.scale
        if activation.scale_dtype != "float32":
            given["activation"]["scale_dtype"] = activation.scale_dtype
        if activation.outlier_threshold is not None:
            given["activation"]["outlier_threshold"] = activation.outlier_threshold
        if activation.observer != ABSMAX:
            given["activation"]["observer"] = observer_to_config(activation.observer)
    return given
