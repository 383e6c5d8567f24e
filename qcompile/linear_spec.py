"""Everything about a quantized linear that is known when the graph is built, as one hashable value and one string."""

from __future__ import annotations

import dataclasses
import functools
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qcompile import spec_text
from qcompile.errors import ConfigError
from qcompile.fingerprint import fingerprint
from qcompile.flags import flags
from qcompile.formats import FORMATS, Format, get_format
from qcompile.gates import ACTIVATIONS, is_gate
from qcompile.methods import ABSMAX, ROUND
from qcompile.scheme import ActivationScheme, Granularity, Scheme, SuperScale, WeightScheme
from qcompile.scheme_config import check_keys

OPERAND_STEPS = ("mul", "add")
"""Epilogue steps that take a tensor of the output's shape: a gating multiply, a residual."""

EPILOGUE_STEPS = ("bias", *ACTIVATIONS, *OPERAND_STEPS)
"""Steps that keep the product's shape and stay in float32."""

STORES = {f"to_{name}": name for name, fmt in FORMATS.items() if fmt.native_dtype is not None}
"""Last steps, which quantize with the static scale that is the last operand, float32 []: the format of the codes."""

_ONE_COLUMN = {*EPILOGUE_STEPS, *STORES}


def gate_of(epilogue: tuple[str, ...]) -> str | None:
    """The step among an epilogue's that multiplies columns of the product with others: [M, N] becomes [M, N / 2]."""
    return next((step for step in epilogue if step not in _ONE_COLUMN and is_gate(step)), None)


def stored_by(epilogue: tuple[str, ...]) -> Format | None:
    """The format of the codes in which an epilogue stores the output; None if it stays floating point."""
    return get_format(STORES[epilogue[-1]]) if epilogue and epilogue[-1] in STORES else None


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
            "mul" and "add" each consume the next operand. One step of `qcompile.gates` may stand first or after the
            bias, and one of `STORES` last.
        codes_of: name of the type that the activations had before they were quantized as the scheme says, which is the
            output's type; they come as codes then, with their scale. "" if they come as they are.

    Raises:
        ConfigError: steps that do not stand where they may.
    """

    in_features: int
    out_features: int
    scheme: Scheme
    layout: str
    epilogue: tuple[str, ...] = ()
    codes_of: str = ""

    def __post_init__(self) -> None:
        gate = gate_of(self.epilogue)
        if unknown := set(self.epilogue) - {*_ONE_COLUMN, gate}:
            known = ", ".join((*EPILOGUE_STEPS, *STORES))
            raise ConfigError(f"unknown epilogue steps {sorted(unknown)}; there are {known}, and one gate: silu(a)*b")
        after = self.epilogue[self.epilogue[:1] == ("bias",) :]
        if gate is not None and (after[0] != gate or {"bias", gate} & set(after[1:]) or self.out_features % 2):
            raise ConfigError(
                f"{gate} takes two halves of a product, to which at most a bias was added: {self.epilogue}"
            )
        if set(self.epilogue[:-1]) & set(STORES):
            raise ConfigError(f"what stores codes is the last step: {self.epilogue}")
        if self.codes_of not in ("", "float32", "bfloat16", "float16"):
            raise ConfigError(f"activations that come as codes were of a floating type, not {self.codes_of!r}")
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
    def width(self) -> int:
        """Columns of the output: N, or N / 2 if there is a gate."""
        return self.out_features // (1 if gate_of(self.epilogue) is None else 2)

    @property
    def stored(self) -> Format | None:
        """The format in which the output is stored as codes; None if it stays floating point."""
        return stored_by(self.epilogue)

    def output_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The type of an output that is of `dtype` unless it is stored as codes."""
        stored = None if self.stored is None else self.stored.native_dtype
        return stored or dtype

    @property
    def operand_count(self) -> int:
        """How many tensors the epilogue's steps consume: "mul", "add", and the scale of what is stored as codes."""
        return sum(step in OPERAND_STEPS or step in STORES for step in self.epilogue)

    def floating(self, x_dtype: torch.dtype) -> torch.dtype:
        """The type of the activations before they were quantized, and of an output that is not stored as codes.

        Args:
            x_dtype: of the activations as the operator receives them.
        """
        found: torch.dtype = getattr(torch, self.codes_of) if self.codes_of else x_dtype
        return found

    def reading_codes_of(self, dtype: torch.dtype) -> LinearSpec:
        """The same linear of activations that were of a floating type and come as codes."""
        return replace(self, codes_of=str(dtype).removeprefix("torch."))

    def of_turned_inputs(self) -> LinearSpec:
        """The same linear once its inputs are turned, which is what kernels know."""
        if not self.scheme.weight.rotated:
            return self
        return replace(self, scheme=replace(self.scheme, weight=replace(self.scheme.weight, rotated=False)))

    def with_epilogue(self, *steps: str) -> LinearSpec:
        """The same linear with more steps at the end."""
        return replace(self, epilogue=(*self.epilogue, *steps))

    def encode(self) -> str:
        """The string that stands for this spec in a graph; `decode_spec` is its inverse.

        It carries the package's fingerprint, and which kernels are tuned: torch caches compiled graphs on disk by what
        they call, and knows an operator that is traced through by its arguments alone.
        """
        return f"{self._encoded[:-1]},'code':'{fingerprint()}{generation(flags.cache_dir)}'}}"

    @functools.cached_property
    def _encoded(self) -> str:
        scheme = _plain(self.scheme)
        given: dict[str, Any] = {"k": self.in_features, "n": self.out_features, "scheme": scheme, "layout": self.layout}
        if self.epilogue:
            given["epilogue"] = list(self.epilogue)
        if self.codes_of:
            given["codes_of"] = self.codes_of
        return spec_text.write(given)


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
        given = spec_text.read(text)
    except ValueError:
        raise ConfigError(f"not a linear spec: {text!r}") from None
    check_keys("linear spec", given, ("k", "n", "scheme", "layout", "epilogue", "codes_of", "code"))
    return LinearSpec(
        in_features=given["k"],
        out_features=given["n"],
        scheme=_scheme(given["scheme"]),
        layout=given["layout"],
        epilogue=tuple(given.get("epilogue", ())),
        codes_of=given.get("codes_of", ""),
    )
