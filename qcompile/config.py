"""Which layer gets which scheme: ordered rules on qualified module names, the first match wins."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.errors import ConfigError, shown
from qcompile.kv_cache import KVScheme, parse_kv_cache
from qcompile.scheme import Scheme, check_keys, parse_scheme, scheme_to_dict

_RULE_KEYS = ("layers", "scheme", "optional")
_CONFIG_KEYS = ("rules", "ignore", "kv_cache")


@functools.lru_cache(maxsize=1024)
def _pattern(glob: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(glob))


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A glob on qualified module names (`*.mlp.*`; `*` also crosses dots) and what its layers become.

    Attributes:
        layers: the glob.
        scheme: None keeps the layers as they are.
        optional: it is no error if no layer matches.
    """

    layers: str
    scheme: Scheme | None
    optional: bool = False

    def matches(self, name: str) -> bool:
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
        """The scheme of the first rule that matches a layer's name; None where none does or it says so."""
        rule = self.rule_for(name)
        return None if rule is None else rule.scheme

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
        names = list(names)
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
            near = ", ".join(_nearest(rule.layers, names)) or "(there are none)"
            raise ConfigError(
                f'rule {rule.layers!r} matches no layer; nearest: {near} (a rule with "optional": true may match none)'
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `from_dict` takes them."""
        rules: list[dict[str, Any]] = []
        for rule in self.rules:
            scheme = None if rule.scheme is None else scheme_to_dict(rule.scheme)
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
                scheme = None if entry["scheme"] is None else parse_scheme(entry["scheme"])
            except ConfigError as error:
                raise ConfigError(f"{what} ({entry['layers']}): {error}") from None
            rules.append(Rule(layers=entry["layers"], scheme=scheme, optional=optional))
        return cls(tuple(rules), kv_cache)


def _nearest(glob: str, names: list[str]) -> list[str]:
    """Layer names most like a glob that matched none: by the whole name, then by the last part."""
    plain = glob.replace("*", "")
    by_tail = {n.rsplit(".", 1)[-1]: n for n in reversed(names)}
    tails = difflib.get_close_matches(plain.rsplit(".", 1)[-1], by_tail, n=3, cutoff=0.5)
    return list(
        dict.fromkeys([*(by_tail[t] for t in tails), *difflib.get_close_matches(plain, names, n=3, cutoff=0.3)])
    )[:3]


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
    if isinstance(given, (str, Mapping, Scheme)):
        return QuantConfig((Rule(layers="*", scheme=parse_scheme(given)),))
    raise ConfigError(
        f"a configuration is a preset's name, a dict, a file or a QuantConfig, not {type(given).__name__}"
    )
