"""docs/configuration.md says what configurations may say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from qcompile import backend, config, flags, scheme_config
from qcompile.formats import FORMATS

PAGE = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text()
EXAMPLES = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


def named(heading: str) -> set[str]:
    """What the first column of a section's tables names."""
    (section,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", PAGE, re.DOTALL | re.MULTILINE)
    return {
        name for cell in re.findall(r"^\| ([^|]*) \|", section, re.MULTILINE) for name in re.findall("`(.*?)`", cell)
    }


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples_are_configurations(text: str) -> None:
    assert config.parse_config(yaml.safe_load(text)).rules


def test_every_key_has_a_row() -> None:
    assert named("Rules") == set(config._RULE_KEYS)
    assert named("`weight`") == set(scheme_config._WEIGHT_KEYS)
    assert named("`activation`") == set(scheme_config._ACTIVATION_KEYS)
    options = named("Options beside `config`")
    assert set(backend.OWN_OPTIONS) == {name for name in options if not name.startswith("QCOMPILE")}
    assert all(f"QCOMPILE_{name.upper()}" in options for name in vars(flags.Flags()))


def test_every_format_is_named() -> None:
    (row,) = re.findall(r"^\| `format` \| (`int2`.*)", PAGE, re.MULTILINE)
    integers = {f"{sign}int{bits}" for sign in ("", "u") for bits in range(2, 9)}
    assert set(FORMATS) - integers <= set(re.findall("`(.*?)`", row))
