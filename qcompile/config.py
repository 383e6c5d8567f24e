"""Which layer gets which scheme: ordered rules on qualified module names, the first match wins."""

from __future__ import annotations

import fnmatch
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qcompile.errors import ConfigError, nearest_layers, shown
from qcompile.kv_cache import KVScheme, parse_kv_cache
from qcompile.methods import ROUND, Method, method_to_config, parse_method
from qcompile.scheme import Scheme
from qcompile.scheme_config import check_keys, parse_scheme, scheme_to_dict

_RULE_KEYS = ("layers", "scheme", "optional")
_CONFIG_KEYS = ("rules", "ignore", "kv_cache")
AUTO = "auto"
_BUDGETS = ("bits", "bytes", "kl")
_AUTO_KEYS = ("preset", *_BUDGETS, "candidates", "method", "tokens")


@functools.cache
def _pattern(glob: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(glob))


def _default_candidates() -> tuple[Scheme, ...]:
    """Of 3 to 8 bits; each format but INT8 with a bfloat16 scale for 128 weights, or fewer where K asks for it."""
    given: list[Any] = ["int3", "int4", {"weight": {"format": "nf4"}}, "int5", "int8_weight_only"]
    return tuple(parse_scheme(scheme) for scheme in given)


@dataclass(frozen=True, kw_only=True)
class Auto:
    """Mixed precision: each layer gets one of some schemes, so that the whole stays within a budget and loses least.

    `qcompile.choose_schemes` decides it, with calibration. One of the first three is given; it is of all layers that
    the rule decides, together.

    Attributes:
        bits: stored bits for each weight at most, scales and zero points included.
        bytes: of packed weights, at most.
        kl: sum of the layers' KL divergences at most, in nats; the size is made least.
        candidates: the schemes to choose from.
        method: of the candidates that name none.
        tokens: of the calibration's beginning, in whole batches, on which divergences are measured.
    """

    bits: float | None = None
    bytes: int | None = None
    kl: float | None = None
    candidates: tuple[Scheme, ...] = _default_candidates()
    method: Method = ROUND
    tokens: int = 512

    def __post_init__(self) -> None:
        given = [name for name in _BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            what = f"not {' and '.join(given)}" if given else 'such as {"preset": "auto", "bits": 4.5}'
            raise ConfigError(f"scheme auto needs one budget of {', '.join(_BUDGETS)}, {what}")
        budget = getattr(self, given[0])
        whole = given[0] == "bytes"
        if isinstance(budget, bool) or not isinstance(budget, int if whole else (int, float)) or not 0 < budget < 2**63:
            kind = "a positive integer" if whole else "a positive number"
            raise ConfigError(f"scheme auto: {given[0]} must be {kind}, not {shown(budget)}")
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 1:
            raise ConfigError(f"scheme auto: tokens must be a positive integer, not {shown(self.tokens)}")
        if len(set(self.schemes)) < max(2, len(self.schemes)):
            raise ConfigError("scheme auto: candidates must be at least two schemes, each once")
        if static := next((s for s in self.schemes if s.needs_scale), None):
            raise ConfigError(f"scheme auto: candidate {static} has a static activation scale; take dynamic ones")

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The candidates with their methods."""
        return tuple(replace(s, method=self.method) if s.method == ROUND else s for s in self.candidates)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Auto:
        """From `{"preset": "auto", "bits": 4.5, "candidates": [...], "method": ...}`.

        Raises:
            ConfigError: unknown keys or values.
        """
        check_keys("scheme auto", given, _AUTO_KEYS)
        settings = {key: value for key, value in given.items() if key != "preset"}
        if "candidates" in settings:
            listed = settings["candidates"]
            if not isinstance(listed, (list, tuple)):
                raise ConfigError(f"scheme auto: candidates must be a list of schemes, not {shown(listed)}")
            settings["candidates"] = tuple(parse_scheme(scheme) for scheme in listed)
        if "method" in settings:
            settings["method"] = parse_method(settings["method"])
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`."""
        changed = {name: getattr(self, name) for name in _BUDGETS if getattr(self, name) is not None}
        if self.candidates != _default_candidates():
            changed["candidates"] = [scheme_to_dict(scheme) for scheme in self.candidates]
        if self.method != ROUND:
            changed["method"] = method_to_config(self.method)
        if self.tokens != Auto.tokens:
            changed["tokens"] = self.tokens
        return {"preset": AUTO, **changed}


def _parse_choice(given: Any) -> Scheme | Auto:
    """What a rule's scheme, or a configuration that is one scheme, stands for.

    Raises:
        ConfigError: see `parse_scheme` and `Auto`.
    """
    if given == AUTO:
        return Auto()
    if isinstance(given, Mapping) and given.get("preset") == AUTO:
        return Auto.from_dict(given)
    return parse_scheme(given)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A glob on qualified module names (`*.mlp.*`; `*` also crosses dots) and what its layers become.

    Attributes:
        layers: the glob.
        scheme: None keeps the layers as they are.
        optional: it is no error if no layer matches.
    """

    layers: str
    scheme: Scheme | Auto | None
    optional: bool = False

    def matches(self, name: str) -> bool:
        """Whether it decides a layer of this name, if no rule before it does."""
        return _pattern(self.layers).match(name) is not None


@dataclass(frozen=True)
class QuantConfig:
    """Ordered rules. Frozen and hashable; `to_dict` and `from_dict` round-trip through JSON.

    Attributes:
        rules: the first that matches a layer decides it.
        kv_cache: what keys and values are stored as; None leaves the choice of a cache to the model.
    """

    rules: tuple[Rule, ...]
    kv_cache: KVScheme | None = None

    def scheme_for(self, name: str) -> Scheme | None:
        """The scheme of the first rule that matches a layer's name; None where none does or it says so.

        Raises:
            ConfigError: it is to be chosen yet.
        """
        rule = self.rule_for(name)
        scheme = None if rule is None else rule.scheme
        if isinstance(scheme, Auto):
            raise ConfigError(
                f"{name}: scheme auto is decided by calibration: qcompile.quantize_(model, config, "
                "calibration=batches), or qcompile.choose_schemes, whose configuration can be kept"
            )
        return scheme

    @property
    def undecided(self) -> bool:
        """Whether any rule leaves the choice of schemes to calibration."""
        return any(isinstance(rule.scheme, Auto) for rule in self.rules)

    def rule_for(self, name: str) -> Rule | None:
        """The first rule that matches a layer's name."""
        return next((rule for rule in self.rules if rule.matches(name)), None)

    def check_used(self, names: Iterable[str]) -> None:
        """Refuse rules that decide no layer.

        Args:
            names: every layer that could be quantized.

        Raises:
            ConfigError: naming the rule, and the nearest layer names or the rule that shadows it.
        """
        names = list(dict.fromkeys(names))
        for index, rule in enumerate(self.rules):
            if rule.optional or any(
                rule.matches(n) and not any(earlier.matches(n) for earlier in self.rules[:index]) for n in names
            ):
                continue
            matched = [n for n in names if rule.matches(n)]
            if matched:
                earlier = next(r for r in self.rules if r.matches(matched[0]))
                raise ConfigError(
                    f"rule {rule.layers!r} decides no layer: all that it matches ({matched[0]}, ...) "
                    f"are taken by the earlier rule {earlier.layers!r}; move it up or remove it"
                )
            if near := nearest_layers(rule.layers, names):
                there = f"nearest: {', '.join(near)}"
            elif names:
                there = f"there are {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
            else:
                there = "there are none, or all are quantized"
            raise ConfigError(
                f'rule {rule.layers!r} matches no layer; {there} (a rule with "optional": true may match none)'
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `from_dict` takes them."""
        rules: list[dict[str, Any]] = []
        for rule in self.rules:
            kept = rule.scheme
            scheme = kept.to_dict() if isinstance(kept, Auto) else None if kept is None else scheme_to_dict(kept)
            rules.append({"layers": rule.layers, "scheme": scheme} | ({"optional": True} if rule.optional else {}))
        return {"rules": rules} | ({} if self.kv_cache is None else {"kv_cache": self.kv_cache.to_config()})

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> QuantConfig:
        """From `{"rules": [{"layers": glob, "scheme": ...}, ...], "ignore": [glob, ...], "kv_cache": ...}`.

        `ignore` is short for leading rules whose scheme is None. `kv_cache` is what `parse_kv_cache` takes; with it
        there may be no rules, which leaves all layers as they are.

        Raises:
            ConfigError: unknown keys or values.
        """
        check_keys("config", given, _CONFIG_KEYS)
        kv_cache = parse_kv_cache(given.get("kv_cache"))
        ignore, listed = given.get("ignore", []), given.get("rules", () if kv_cache is not None else None)
        if not isinstance(ignore, (list, tuple)) or not all(isinstance(glob, str) and glob for glob in ignore):
            raise ConfigError(f"config: ignore must be a list of globs, not {shown(ignore)}")
        if not isinstance(listed, (list, tuple)) or (not listed and kv_cache is None):
            raise ConfigError('config needs rules, a list such as [{"layers": "*", "scheme": "int4"}]')
        rules = [Rule(layers=glob, scheme=None) for glob in ignore]
        for position, entry in enumerate(listed):
            what = f"rule {position + 1}"
            check_keys(what, entry, _RULE_KEYS)
            if "scheme" not in entry or not isinstance(entry.get("layers"), str) or not entry["layers"]:
                raise ConfigError(f"{what} needs layers (a glob on module names) and a scheme (null keeps the layers)")
            optional = entry.get("optional", False)
            if not isinstance(optional, bool):
                raise ConfigError(f"{what}: optional must be true or false, not {shown(optional)}")
            try:
                scheme = None if entry["scheme"] is None else _parse_choice(entry["scheme"])
            except ConfigError as error:
                raise ConfigError(f"{what} ({entry['layers']}): {error}") from None
            rules.append(Rule(layers=entry["layers"], scheme=scheme, optional=optional))
        return cls(tuple(rules), kv_cache)


def _read(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        text = path.read_text()
        loaded = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from None
    # PyYAML lets LookupError, AttributeError and TypeError out on malformed tagged scalars such as `!!int ""`.
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not valid {'JSON' if path.suffix == '.json' else 'YAML'}: {error}") from None
    if not isinstance(loaded, Mapping):
        raise ConfigError(
            f"{path} holds no configuration: expected a mapping with rules, found {type(loaded).__name__}"
        )
    return loaded


def parse_config(given: str | Path | Mapping[str, Any] | Scheme | QuantConfig) -> QuantConfig:
    """A configuration from any of its spellings.

    Args:
        given: a preset's name (`"int4"`: every layer), the path of a `.yaml`, `.yml` or `.json` file, a dict with
            `rules`, a dict with `weight` or `preset` (one scheme for every layer), a `Scheme` or a `QuantConfig`.

    Raises:
        ConfigError: anything else, or unknown names in it.
    """
    if isinstance(given, QuantConfig):
        return given
    if isinstance(given, Path) or (isinstance(given, str) and Path(given).suffix in (".yaml", ".yml", ".json")):
        return parse_config(_read(Path(given)))
    if isinstance(given, Mapping) and not {"weight", "preset"} & set(given):
        return QuantConfig.from_dict(given)
    if isinstance(given, Mapping) and (misplaced := next((key for key in _CONFIG_KEYS if key in given), None)):
        raise ConfigError(
            f"config: {misplaced} does not stand beside a scheme; the scheme belongs into a rule: "
            '{"rules": [{"layers": "*", "scheme": ...}], ...}'
        )
    if isinstance(given, str) and (os.sep in given or Path(given).suffix):
        raise ConfigError(f"{given}: the file of a configuration ends in .yaml, .yml or .json")
    if isinstance(given, (str, Mapping, Scheme)):
        return QuantConfig((Rule(layers="*", scheme=_parse_choice(given)),))
    raise ConfigError(
        f"a configuration is a preset's name, a dict, a file or a QuantConfig, not {type(given).__name__}"
    )
