"""Configurations: every spelling, round trips, ordered rules, and what broken or hostile ones answer."""

from __future__ import annotations

import json
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qcompile import QuantConfig
from qcompile.config import Rule, parse_config
from qcompile.errors import ConfigError, QCompileError
from qcompile.presets import ALIASES, PRESETS
from qcompile.scheme_config import parse_scheme
from tests.strategies import configs, globs, json_values
from tests.test_scheme import HOSTILE

LAYERS = [f"model.layers.{i}.{part}" for i in range(2) for part in ("attn.q_proj", "attn.o_proj", "mlp.up", "mlp.down")]
LAYERS.append("lm_head")

PLAIN = {
    "ignore": ["lm_head"],
    "rules": [
        {"layers": "*.attn.*", "scheme": "int8"},
        {"layers": "*.mlp.*", "scheme": {"weight": {"format": "int4", "group_size": 32}}},
        {"layers": "*", "scheme": None, "optional": True},
    ],
}


@pytest.mark.parametrize("name", [*PRESETS, *ALIASES])
def test_a_name_is_one_rule_for_all(name):
    config = parse_config(name)
    assert config == QuantConfig((Rule(layers="*", scheme=parse_scheme(name)),))
    assert config.scheme_for("any.layer") == parse_scheme(name)
    config.check_used(LAYERS)


def test_all_spellings_of_one_scheme_are_equal():
    scheme = PRESETS["int4"]
    config = parse_config("int4")
    assert parse_config(scheme) == config
    assert parse_config(config) is config
    assert parse_config({"weight": {"format": "int4"}}) == config
    assert parse_config({"rules": [{"layers": "*", "scheme": "int4"}]}) == config
    assert parse_config({"preset": "int4"}) == config
    calibrated = {"preset": "int4", "method": "gptq"}
    assert parse_config(calibrated) == parse_config({"rules": [{"layers": "*", "scheme": calibrated}]})
    with pytest.raises(ConfigError, match=r"unknown key 'methd'.*did you mean method"):
        parse_config({"preset": "int4", "methd": "gptq"})
    assert len({config, parse_config(scheme)}) == 1


@pytest.mark.parametrize(
    ("suffix", "write"),
    [(".json", json.dumps), (".yaml", yaml.safe_dump), (".yml", yaml.safe_dump), (".yaml", json.dumps)],
)
def test_files(tmp_path, suffix, write):
    path = tmp_path / f"quantization{suffix}"
    path.write_text(write(PLAIN))
    config = parse_config(PLAIN)
    assert parse_config(path) == config
    assert parse_config(str(path)) == config
    assert config.scheme_for("model.layers.0.attn.q_proj") == PRESETS["int8"]
    path.write_text(write({"weight": {"format": "int4"}}))
    assert parse_config(path) == parse_config("int4")


@given(config=configs())
def test_round_trip_through_json(config):
    assert QuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


@given(config=configs(), names=st.lists(st.text("abcxyz_.0123", min_size=1, max_size=8), max_size=6))
def test_check_used_accepts_exactly_rules_that_decide(config, names):
    deciding = {next((i for i, rule in enumerate(config.rules) if rule.matches(name)), None) for name in names}
    idle = [rule for i, rule in enumerate(config.rules) if i not in deciding and not rule.optional]
    if not idle:
        config.check_used(names)
        return
    with pytest.raises(ConfigError) as caught:
        config.check_used(names)
    assert repr(idle[0].layers) in str(caught.value)


def test_the_first_rule_that_matches_wins():
    config = parse_config(PLAIN)
    assert config.scheme_for("lm_head") is None
    assert config.scheme_for("model.layers.1.mlp.up") == parse_scheme(PLAIN["rules"][1]["scheme"])
    assert config.scheme_for("model.norm") is None
    assert parse_config({"rules": [{"layers": "a", "scheme": "int4"}]}).scheme_for("b") is None
    config.check_used(LAYERS)


def test_ignore_is_leading_rules_without_a_scheme():
    rules = [{"layers": "*", "scheme": "int4"}]
    config = parse_config({"ignore": ["lm_head", "*.down"], "rules": rules})
    assert config.rules[:2] == (Rule(layers="lm_head", scheme=None), Rule(layers="*.down", scheme=None))
    assert [name for name in LAYERS if config.scheme_for(name) is None] == [
        "model.layers.0.mlp.down",
        "model.layers.1.mlp.down",
        "lm_head",
    ]
    assert parse_config({"ignore": [], "rules": rules}) == parse_config("int4")
    assert parse_config(config.to_dict()) == config
    with pytest.raises(ConfigError, match="rule 'head' matches no layer; nearest: lm_head"):
        parse_config({"ignore": ["head"], "rules": rules}).check_used(LAYERS)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("*", "int4"), ("*.attn.*", "int8")], r"rule '\*\.attn\.\*' decides no layer: .*\(model\.layers\.0\.attn"),
        ([("*", "int4"), ("lm_head", None)], r"taken by the earlier rule '\*'; move it up or remove it"),
        ([("*.mlp.*", "int4"), ("*.attn.*", "int8"), ("*layers*", None)], r"rule '\*layers\*' decides no layer"),
        ([("*.q_prj", "int8"), ("*", "int4")], r"rule '\*\.q_prj' matches no layer; nearest: .*q_proj"),
        ([("lmhead", "int8"), ("*", "int4")], "rule 'lmhead' matches no layer; nearest: lm_head"),
        ([("xyz", "int8"), ("*", "int4")], r"rule 'xyz' matches no layer; there are model\.layers\.0\."),
        ([("*.experts.*", "int8")], '"optional": true may match none'),
    ],
)
def test_shadowed_and_unused_rules(rules, message):
    listed = [{"layers": layers, "scheme": scheme} for layers, scheme in rules]
    with pytest.raises(ConfigError, match=message):
        parse_config({"rules": listed}).check_used(LAYERS)
    parse_config({"rules": [rule | {"optional": True} for rule in listed]}).check_used(LAYERS)


def test_unused_rules_of_a_model_without_layers():
    with pytest.raises(ConfigError, match=r"matches no layer; there are none"):
        parse_config("int4").check_used([])


RULE = {"layers": "*", "scheme": "int4"}


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({}, "config needs rules, a list such as"),
        ({"rules": []}, "config needs rules"),
        ({"rules": {"*": "int4"}}, "config needs rules"),
        ({"rules": "int4"}, "config needs rules"),
        ({"ignore": ["*"]}, "config needs rules"),
        ({"rule": [RULE]}, "unknown key 'rule' in config; did you mean rules"),
        ({"rules": [RULE], "ignored": []}, "unknown key 'ignored' in config; did you mean ignore"),
        ({"rules": [RULE], "xyz": 1}, "unknown key 'xyz' in config; there are rules, ignore"),
        ({"rules": [RULE, {"layer": "*", "scheme": "int4"}]}, "'layer' in rule 2; did you mean layers"),
        ({"rules": ["int4"]}, "rule 1 must be a mapping with keys such as '[a-z]*', not str 'int4'"),
        ({"rules": [{"layers": "*"}]}, "rule 1 needs layers .* and a scheme"),
        ({"rules": [{"scheme": "int4"}]}, "rule 1 needs layers"),
        ({"rules": [{"layers": "", "scheme": "int4"}]}, "rule 1 needs layers"),
        ({"rules": [{"layers": 3, "scheme": "int4"}]}, "rule 1 needs layers"),
        ({"rules": [RULE | {"optional": "yes"}]}, "rule 1: optional must be true or false, not 'yes'"),
        ({"rules": [RULE, {"layers": "a.*", "scheme": "int44"}]}, r"rule 2 \(a\.\*\): unknown scheme 'int44'; .*int4"),
        (
            {"rules": [{"layers": "a", "scheme": {"weight": {"format": "int4", "group_size": 100}}}]},
            "from 16 up, not 100",
        ),
        ({"rules": [{"layers": "a", "scheme": 4}]}, r"rule 1 \(a\): scheme must be a mapping"),
        ({"rules": [RULE], "ignore": "lm_head"}, "ignore must be a list of globs, not 'lm_head'"),
        ({"rules": [RULE], "ignore": [3]}, r"ignore must be a list of globs, not \[3\]"),
        ({"rules": [RULE], "ignore": [""]}, "ignore must be a list of globs"),
        ({"rules": [RULE], "ignore": None}, "ignore must be a list of globs, not None"),
        ({"weight": {"format": "int4"}, "rules": [RULE]}, "rules does not stand beside a scheme"),
        ("int44", "unknown scheme 'int44'; did you mean int4"),
        ("", "unknown scheme ''"),
        (None, "a preset's name, a dict, a file or a QuantConfig, not NoneType"),
        (["int4"], "not list"),
        (4, "not int"),
    ],
)
def test_what_is_refused(given_, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(given_)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "a.json is not valid JSON"),
        ("a.json", "", "is not valid JSON"),
        ("a.json", "rules: []", "is not valid JSON"),
        ("a.json", '{"rules": ' + "[" * 100_000, "is not valid JSON: .*recursion"),
        ("a.json", '{"rules": [' + "9" * 5000 + "]}", "is not valid JSON: .*digits"),
        ("a.json", "[1, 2]", "holds no configuration: .* found list"),
        ("a.json", "null", "holds no configuration: .* found NoneType"),
        ("a.yaml", "", "holds no configuration: .* found NoneType"),
        ("a.yaml", "int4", "holds no configuration: .* found str"),
        ("a.yaml", "rules: [", "a.yaml is not valid YAML"),
        ("a.yaml", "\tx: 1", "is not valid YAML"),
        ("a.yaml", "[" * 5000, "is not valid YAML: .*recursion"),
        ("a.yaml", "a: " * 2000, "is not valid YAML"),
        ("a.yaml", "? [1]\n: 2", "is not valid YAML"),
        ("a.yaml", "a: *b", "is not valid YAML"),
        ("a.yaml", "a: 1\n---\nb: 2", "is not valid YAML"),
        ("a.yaml", "a: 2020-99-99", "is not valid YAML"),
        ("a.yaml", '!!int ""', "is not valid YAML"),
        ("a.yaml", "!!bool maybe", "is not valid YAML"),
        ("a.yaml", "!!timestamp now", "is not valid YAML"),
        ("a.yaml", "!!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("a.yaml", "rules: &a [*a]", "rule 1 must be a mapping"),
        ("a.yaml", "&a {rules: [*a]}", "unknown key 'rules' in rule 1"),
        ("a.yaml", "&a {weight: *a}", "unknown key 'weight' in weight"),
        ("a.yaml", "rules: [{layers: '*', scheme: {weight: {format: int4", "is not valid YAML"),
        ("a.yaml", "weight: {format: int4, group_size: 0x" + "f" * 5000 + "}", "not an integer of 20000 bits"),
    ],
)
def test_broken_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        parse_config(tmp_path / name)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*missing\.yaml: .*No such file"):
        parse_config(str(tmp_path / "missing.yaml"))
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        parse_config(tmp_path)
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        parse_config("x" * 5000 + ".json")
    with pytest.raises(ConfigError, match="null byte"):
        parse_config("\0.json")
    (tmp_path / "latin.yaml").write_bytes(b"ignore: [\xe9]")
    with pytest.raises(ConfigError, match=r"is not valid YAML: .*decode"):
        parse_config(tmp_path / "latin.yaml")


def test_aliases_that_expand_without_end_stay_short(tmp_path):
    levels = ", ".join(f"&a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30))
    (tmp_path / "bomb.yaml").write_text(f"ignore: [&a0 [x], {levels}]")
    with pytest.raises(ConfigError, match="ignore must be a list of globs") as caught:
        parse_config(tmp_path / "bomb.yaml")
    assert len(str(caught.value)) < 4000


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_hostile_values_get_short_messages(value):
    for spelling in (
        value,
        {"rules": value},
        {"rules": [value]},
        {"rules": [RULE], "ignore": value},
        {"rules": [RULE], "ignore": [value, 3]},
        {"rules": [{"layers": "*", "scheme": value}]},
        {"rules": [{"layers": ["*", value], "scheme": "int4"}]},
        {"rules": [RULE | {"optional": value}]},
    ):
        with pytest.raises(ConfigError) as caught:
            parse_config(spelling)
        assert len(str(caught.value)) < 4000


@given(value=json_values, scheme=json_values)
def test_anything_parses_or_is_refused_in_words(value, scheme):
    rule = {"layers": "*", "scheme": scheme}
    for spelling in (
        value,
        {"rules": value},
        {"rules": [value]},
        {"rules": [rule]},
        {"rules": [rule], "ignore": value},
    ):
        try:
            config = parse_config(spelling)
        except QCompileError:
            continue
        assert parse_config(config.to_dict()) == config


@given(glob=globs, name=st.text("abcxyz_.0123[]*?", max_size=12))
def test_globs(glob, name):
    matched = Rule(layers=glob, scheme=None).matches(name)
    if not set(glob) & set("*?["):
        assert matched == (glob == name)
    assert Rule(layers="*", scheme=None).matches(name)


def test_globs_cross_dots_and_match_whole_names():
    assert Rule(layers="*.mlp.*", scheme=None).matches("model.layers.0.mlp.up")
    assert not Rule(layers="mlp", scheme=None).matches("model.mlp")
    assert not Rule(layers="*.Mlp.*", scheme=None).matches("model.mlp.up")
    assert Rule(layers="layers.[01].*", scheme=None).matches("layers.1.fc")


def test_a_glob_of_many_stars_is_fast():
    rule = Rule(layers="*a" * 40 + "b", scheme=None)
    start = time.perf_counter()
    assert not rule.matches("a" * 2000)
    assert time.perf_counter() - start < 2
