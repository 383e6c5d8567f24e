"""Everything about a quantized linear that is known when the graph is built, as one hashable value and one string."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qcompile import expr
from qcompile.errors import ConfigError
from qcompile.fingerprint import fingerprint
from qcompile.flags import flags
from qcompile.formats import Format, get_format
from qcompile.methods import ABSMAX, ROUND
from qcompile.scheme import ActivationScheme, Granularity, Scheme, SuperScale, WeightScheme, check_keys

ACTIVATIONS: dict[str, Any] = {
    "relu": lambda x: expr.maximum(x, 0.0),
    "gelu": lambda x: x * 0.5 * (expr.erf(x * 0.7071067811865476) + 1.0),
    "gelu_tanh": lambda x: x * 0.5 * (expr.tanh((x + x * x * x * 0.044715) * 0.7978845608028654) + 1.0),
    "silu": lambda x: x * expr.sigmoid(x),
    "tanh": expr.tanh,
    "sigmoid": expr.sigmoid,
}
"""Activation functions of an epilogue, as formulas of `qcompile.expr`."""

OPERAND_STEPS = ("mul", "add")
"""Epilogue steps that take a tensor of the output's shape: a gating multiply, a residual."""

EPILOGUE_STEPS = ("bias", *ACTIVATIONS, *OPERAND_STEPS)


@dataclass(frozen=True, kw_only=True)
class LinearSpec:
    """A quantized linear without its tensors.

    Attributes:
        in_features, out_features: K and N.
        scheme: weight and activation formats; its group fits K. How codes and scales were chosen, and
            from what range, makes no difference to a kernel, so method, observer and `super_scale.bits` are always the
            default ones.
        layout: name of the packed weight's layout.
        epilogue: steps of `EPILOGUE_STEPS` applied to the product in this order, in float32. "bias" adds the bias;
            "mul" and "add" each consume the next operand.
    """

    in_features: int
    out_features: int
    scheme: Scheme
    layout: str
    epilogue: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        activation = self.scheme.activation
        if activation is not None:
            activation = replace(activation, observer=ABSMAX)
        weight = self.scheme.weight
        if weight.super_scale is not None:
            weight = replace(weight, super_scale=replace(weight.super_scale, bits=8))
        object.__setattr__(self, "scheme", replace(self.scheme, weight=weight, activation=activation, method=ROUND))

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight."""
        return self.out_features, self.in_features

    @property
    def operand_count(self) -> int:
        """How many tensors the epilogue's "mul" and "add" steps consume."""
        return sum(step in OPERAND_STEPS for step in self.epilogue)

    def with_epilogue(self, *steps: str) -> LinearSpec:
        """The same linear with more steps at the end."""
        return replace(self, epilogue=(*self.epilogue, *steps))

    def encode(self) -> str:
        """The string that stands for this spec in a graph; `decode_spec` is its inverse.

        It carries the package's fingerprint, and which kernels are tuned: torch caches compiled graphs on disk by what
        they call, and knows an operator that is traced through by its arguments alone.
        """
        return f'{self._encoded[:-1]},"code":"{fingerprint()}{generation(flags.cache_dir)}"}}'

    @functools.cached_property
    def _encoded(self) -> str:
        scheme = _plain(self.scheme)
        given: dict[str, Any] = {"k": self.in_features, "n": self.out_features, "scheme": scheme, "layout": self.layout}
        if self.epilogue:
            given["epilogue"] = list(self.epilogue)
        return json.dumps(given, separators=(",", ":"))


@functools.cache
def generation(cache_dir: Path) -> str:
    """Another 32 hexadecimal digits whenever a kernel was tuned on this machine; "" before any was."""
    try:
        text = (cache_dir / "tuned" / "generation").read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
    return text if re.fullmatch("[0-9a-f]{32}", text) else ""


def _plain(value: Any) -> Any:
    """Dataclasses as dicts of what differs from their defaults, formats as their names."""
    if isinstance(value, Format):
        return value.name
    if not dataclasses.is_dataclass(value):
        return value
    items = ((f.name, getattr(value, f.name), f.default) for f in dataclasses.fields(value))
    return {name: _plain(item) for name, item, default in items if item != default}


def _scheme(given: dict[str, Any]) -> Scheme:
    weight, activation = dict(given["weight"]), given.get("activation")
    if "super_scale" in weight:
        weight["super_scale"] = SuperScale(**weight["super_scale"])
    return Scheme(
        weight=WeightScheme(**_formats(weight)),
        activation=None if activation is None else ActivationScheme(**_formats(activation)),
    )


def _formats(given: dict[str, Any]) -> dict[str, Any]:
    return {**given, "format": get_format(given["format"]), "granularity": Granularity(**given["granularity"])}


@functools.lru_cache(maxsize=4096)
def decode_spec(text: str) -> LinearSpec:
    """The spec that `LinearSpec.encode` wrote.

    Raises:
        ConfigError: a string that is none.
    """
    try:
        given = json.loads(text)
    except ValueError:
        raise ConfigError(f"not a linear spec: {text!r}") from None
    check_keys("linear spec", given, ("k", "n", "scheme", "layout", "epilogue", "code"))
    epilogue = tuple(given.get("epilogue", ()))
    if unknown := set(epilogue) - set(EPILOGUE_STEPS):
        raise ConfigError(f"unknown epilogue steps {sorted(unknown)}; there are {', '.join(EPILOGUE_STEPS)}")
    return LinearSpec(
        in_features=given["k"],
        out_features=given["n"],
        scheme=_scheme(given["scheme"]),
        layout=given["layout"],
        epilogue=epilogue,
    )
