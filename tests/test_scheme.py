"""Schemes: presets and their aliases, dicts, what is refused and with which words, fitting groups to a layer."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.errors import ConfigError, LayerError, QCompileError
from qcompile.formats import get_format
from qcompile.presets import ALIASES, PRESETS, preset
from qcompile.scheme import SCALE_DTYPES, ActivationScheme, Granularity, Scheme, WeightScheme
from qcompile.scheme_config import parse_scheme, scheme_to_dict
from tests.strategies import json_values, schemes

GROUP = {"format": "int4", "group_size": 64}
STATIC = {"format": "fp8_e4m3", "dynamic": False}
HUGE_INTEGER = 16**5000
"""More digits than Python is willing to print."""


def deep_list(depth: int = 100_000) -> list[object]:
    nested: list[object] = []
    for _ in range(depth):
        nested = [nested]
    return nested


def wide_list() -> list[object]:
    """10**30 elements when written out, a few kilobytes in memory."""
    shared: list[object] = ["x"] * 10
    for _ in range(29):
        shared = [shared] * 10
    return shared


@pytest.mark.parametrize("name", PRESETS)
def test_presets_parse_to_themselves(name):
    scheme = parse_scheme(name)
    assert scheme is PRESETS[name]
    assert parse_scheme(scheme) is scheme
    assert scheme_to_dict(scheme) == name
    assert hash(scheme) == hash(replace(scheme))
    assert str(scheme).startswith(scheme.weight.format.name)


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_aliases(alias, name):
    assert preset(alias) is PRESETS[name]
    assert alias not in PRESETS


@pytest.mark.parametrize(
    ("given_", "weight"),
    [
        ({"format": "int4"}, PRESETS["int4"].weight),
        ({"format": "int4", "symmetric": False}, PRESETS["int4_asym"].weight),
        ({"format": "uint4"}, PRESETS["int4_asym"].weight),
        ({"format": "uint4", "symmetric": True}, PRESETS["int4"].weight),
        ({"format": "int4", "group_size": None}, PRESETS["int4"].weight),
        ({"format": "int8"}, PRESETS["int8_weight_only"].weight),
        ({"format": "fp8_e4m3", "block_size": [128, 128]}, PRESETS["fp8_block"].weight),
        ({"format": "fp8_e4m3", "granularity": "tensor"}, PRESETS["fp8_static"].weight),
        ({"format": "int4", "sparsity": "2:4"}, PRESETS["int4_24"].weight),
        ({"format": "int8", "sparsity": "2:4"}, PRESETS["int8_24"].weight),
    ],
)
def test_dicts_that_mean_a_preset(given_, weight):
    if weight.granularity == Granularity.block(128, 128):
        given_ = given_ | {"scale_dtype": "float32"}
    assert parse_scheme({"weight": given_}).weight == weight


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"format": "int4", "sparsity": "1:4"}, "neither"),
        ({"format": "int3", "sparsity": "2:4"}, "int4 or int8, not int3"),
        ({"format": "int4", "symmetric": False, "sparsity": "2:4"}, "not uint4"),
        ({"format": "int4", "symmetric": False, "offset": True, "sparsity": "2:4"}, "not int4 with offsets"),
        ({"format": "int4", "act_order": True, "sparsity": "2:4"}, "act_order"),
    ],
)
def test_sparse_weights_that_are_refused(given_, message):
    with pytest.raises(ConfigError, match=message):
        parse_scheme({"weight": given_})


def test_sizes_of_dicts():
    def weight(**given_):
        return parse_scheme({"weight": {"format": "int4"} | given_}).weight

    assert weight(group_size=64).granularity == Granularity.group(64)
    assert not weight(group_size=64).flexible_group
    assert weight(group_size=-1).granularity == Granularity.channel()
    assert weight(granularity="channel").granularity == Granularity.channel()
    assert weight(granularity="channel").scale_dtype == "float32"
    assert weight(block_size=[3, 5]).granularity == Granularity.block(3, 5)
    assert weight(scale_dtype="float16").scale_dtype == "float16"


def test_activations_of_dicts():
    def activation(weight=GROUP, **given_):
        return parse_scheme({"weight": weight, "activation": given_}).activation

    token = ActivationScheme(format=get_format("int8"), granularity=Granularity.channel())
    assert activation(format="int8") == token == activation(format="int8", granularity="token")
    assert activation(format="int8", granularity="tensor").granularity == Granularity.tensor()
    assert activation(format="int8", group_size=64).granularity == Granularity.group(64)
    assert activation(**STATIC, scale=2) == ActivationScheme(
        format=get_format("fp8_e4m3"), granularity=Granularity.tensor(), dynamic=False, scale=2.0
    )
    assert parse_scheme({"weight": GROUP, "activation": None}).activation is None


@given(scheme=schemes())
def test_round_trip_through_json(scheme):
    assert parse_scheme(json.loads(json.dumps(scheme_to_dict(scheme)))) == scheme


@pytest.mark.parametrize(
    "given_",
    [
        {"preset": "int4_asym", "method": "hqq"},
        {"preset": "q4_1", "method": {"name": "hqq", "iterations": 3}},
        {"weight": {"format": "uint4", "group_size": 32, "symmetric": False, "offset": True}, "method": "hqq"},
        {"preset": "int4", "method": ["awq", "gptq"]},
    ],
)
def test_round_trip_of_methods(given_):
    scheme = parse_scheme(given_)
    written = json.loads(json.dumps(scheme_to_dict(scheme)))
    assert parse_scheme(written) == scheme
    assert "preset" not in given_ or written == given_


@given(scheme=schemes(), k=st.integers(1, 1024))
def test_round_trip_of_fitted_schemes(scheme, k):
    try:
        fitted = scheme.fit("layer", (64, k))
    except LayerError:
        return
    again = parse_scheme(json.loads(json.dumps(scheme_to_dict(fitted))))
    assert again == fitted == fitted.fit("layer", (64, k))


def test_a_flexible_group_that_no_dict_means_is_written_out():
    activation = ActivationScheme(format=get_format("int8"), granularity=Granularity.channel())
    scheme = Scheme(weight=PRESETS["int2"].weight, activation=activation)
    again = parse_scheme(scheme_to_dict(scheme))
    assert again.weight.granularity == Granularity.group(64)
    assert again.activation == activation


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("int44", r"did you mean int4"),
        ("INT4", r"did you mean int4\?"),
        ("w4a16", r"did you mean W4A16\?"),
        ("FP8-BLOCK", "did you mean fp8_block"),
        ("four bits", "there are int2, int3, "),
        ("", "there are int2, int3, "),
    ],
)
def test_unknown_presets_name_the_nearest_or_all(text, near):
    with pytest.raises(ConfigError, match=f"unknown scheme {text!r}; {near}"):
        parse_scheme(text)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"weigth": GROUP}, "unknown key 'weigth' in scheme; did you mean weight"),
        ({"weight": GROUP, "activations": {}}, "unknown key 'activations' in scheme; did you mean activation"),
        ({"weight": GROUP | {"groupsize": 32}}, "unknown key 'groupsize' in weight; did you mean group_size"),
        ({"weight": GROUP | {7: 32}}, "unknown key 7 in weight; there are format, granularity"),
        ({"weight": GROUP, "activation": STATIC | {"dinamic": 1}}, "'dinamic' in activation; did you mean dynamic"),
        ({}, "scheme needs a weight"),
        ({"weight": {}}, "weight needs a format: one of "),
        ({"weight": GROUP, "activation": {}}, "activation needs a format"),
        ({"weight": "int4"}, "weight must be a mapping with keys such as '[a-z]*', not str 'int4'"),
        (
            {"weight": GROUP, "activation": ["int8"]},
            "activation must be a mapping with keys such as '[a-z]*', not list",
        ),
        (["int4"], r"scheme must be a mapping with keys such as '[a-z]*', not list \['int4'\]"),
        (None, "scheme must be a mapping with keys such as '[a-z]*', not NoneType"),
        (4, "scheme must be a mapping with keys such as '[a-z]*', not int 4"),
        ({"weight": GROUP, "method": "gptp"}, "unknown method 'gptp'; did you mean gptq"),
        ({"weight": GROUP, "method": ["gptq", "awq"]}, "comes last, after any of hadamard, smoothquant, awq"),
        ({"weight": GROUP, "method": ["gptq", "awq"]}, "method: one of rtn, hqq, gptq comes last"),
        ({"weight": GROUP, "method": ["smoothquant", "smoothquant"]}, "smoothquant is named twice"),
        ({"weight": GROUP, "method": ["awq", {"name": "awq", "grid": 9}, "gptq"]}, "awq is named twice"),
        (
            {"weight": GROUP, "method": []},
            "holds at least one; there are: rtn, hqq, gptq, hadamard, smoothquant, awq, importance$",
        ),
        ({"weight": GROUP, "method": {"name": "gptq", "damp": 1}}, "gptq has no setting 'damp'; did you mean damping"),
        ({"weight": GROUP, "method": {"name": "gptq", "damping": -1}}, "damping must be a number from 1e-06 to 10"),
        ({"preset": "int4", "group_size": 64}, r"group_size is no key of a scheme, but of its weight: {'weight': {"),
        ({"preset": "int4", "dynamic": True}, "dynamic is no key of a scheme, but of its activation"),
        ({"preset": "int4", "weight": None}, "weight must be a mapping"),
        ({"preset": "int4", "weight": {"group_siz": 64}}, "unknown key 'group_siz' in weight; did you mean group_size"),
        ({"preset": "int4", "activation": {"dynamic": True}}, "activation needs a format"),
        ({"preset": ["int4"]}, r"unknown scheme \['int4'\]"),
        ({"weight": {"format": "int9"}}, "unknown number format 'int9'; did you mean .*int8"),
        ({"weight": {"format": 4}}, "unknown number format 4; there are fp8_e4m3"),
        ({"weight": {"format": ["int4"]}}, r"unknown number format \['int4'\]"),
        ({"weight": {"format": "fp8_e4m3", "symmetric": False}}, "asymmetric weight takes an unsigned integer format"),
        ({"weight": GROUP | {"symmetric": 1}}, "weight: symmetric must be true or false, not 1"),
        (
            {"weight": {"format": "int4", "granularity": "row"}},
            "granularity 'row' is unknown; there are tensor, channel",
        ),
        (
            {"weight": {"format": "int4", "granularity": ["tensor"]}},
            r"granularity \['tensor'\] is unknown; there are tensor",
        ),
        ({"weight": GROUP | {"granularity": "channel"}}, "give one of granularity and group_size, not both"),
    ],
)
def test_what_is_refused(given_, message):
    with pytest.raises(ConfigError, match=message):
        parse_scheme(given_)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_of_which_nothing_is_changed(name):
    scheme = PRESETS[name]
    parts = {"weight": {}} if scheme.activation is None else {"weight": {}, "activation": {}}
    assert parse_scheme({"preset": name, **parts}) == scheme


@pytest.mark.parametrize(
    ("given_", "wanted"),
    [
        ({"preset": "int4", "weight": {"group_size": 64}}, {"weight": {"format": "int4", "group_size": 64}}),
        ({"preset": "int4", "weight": {"symmetric": False}}, "int4_asym"),
        (
            {"preset": "int4", "weight": {"format": "int8", "group_size": 128}},
            {"weight": {"format": "int8", "group_size": 128}},
        ),
        ({"preset": "int4_asym", "weight": {"format": "int4"}}, "int4"),
        ({"preset": "fp8", "activation": None}, {"weight": {"format": "fp8_e4m3"}}),
        (
            {"preset": "fp8_block", "weight": {"granularity": "channel"}, "activation": {"granularity": "token"}},
            "fp8",
        ),
        (
            {"preset": "int8", "activation": {"granularity": "tensor"}, "method": "gptq"},
            {
                "weight": {"format": "int8"},
                "activation": {"format": "int8", "granularity": "tensor"},
                "method": "gptq",
            },
        ),
    ],
)
def test_a_preset_of_which_some_is_changed(given_, wanted):
    assert parse_scheme(given_) == parse_scheme(wanted)


def test_another_format_keeps_the_group_of_a_preset():
    weight = parse_scheme({"preset": "int4", "weight": {"format": "int8"}}).weight
    assert (weight.format, weight.granularity) == (get_format("int8"), Granularity.group(128))
    assert weight.flexible_group


@pytest.mark.parametrize("size", [0, 100, 8, 1, -2, True, False, "64", 64.0, 2**31, 10**400, [64], {}])
def test_bad_groups(size):
    with pytest.raises(ConfigError, match="group_size must be"):
        parse_scheme({"weight": {"format": "int4", "group_size": size}})
    with pytest.raises(ConfigError, match="activation: group_size must be"):
        parse_scheme({"weight": GROUP, "activation": {"format": "int8", "group_size": size}})


@pytest.mark.parametrize("size", [128, [128], [1, 2, 3], "128x128", [0, 128], [True, 128], [128, -1], [10**400, 16]])
def test_bad_blocks(size):
    with pytest.raises(ConfigError, match="block_size must be"):
        parse_scheme({"weight": {"format": "fp8_e4m3", "block_size": size}})


def test_a_block_of_one_row_is_a_group():
    with pytest.raises(ConfigError, match="write group_size 20"):
        parse_scheme({"weight": {"format": "int4", "block_size": [1, 20]}})


@pytest.mark.parametrize("dtype", ["int16", "fp32", "", None, 32, ["float32"], {}])
def test_bad_scale_dtypes(dtype):
    with pytest.raises(
        ConfigError, match="scale_dtype .* is unknown; (there are " + ", ".join(SCALE_DTYPES) + "|did you mean int8)"
    ):
        parse_scheme({"weight": GROUP | {"scale_dtype": dtype}})


@pytest.mark.parametrize("name", ["uint8", "nf4", "fp4_e2m1", "fp6_e2m3", "iq4_nl"])
def test_activations_are_integers_or_floats_of_8_bits(name):
    with pytest.raises(ConfigError, match=f"activations cannot be {name}; they can be .*int8"):
        parse_scheme({"weight": GROUP, "activation": {"format": name}})


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (STATIC | {"granularity": "token"}, "a static activation scale is per tensor"),
        (STATIC | {"group_size": 64}, "a static activation scale is per tensor"),
        ({"format": "int8", "scale": 1.0}, "only with dynamic: false"),
        ({"format": "int8", "dynamic": "no"}, "activation: dynamic must be true or false, not 'no'"),
        ({"format": "int8", "block_size": [1, 64]}, "unknown key 'block_size' in activation"),
        ({"format": "int8", "granularity": "channel"}, "granularity 'channel' is unknown; there are tensor, token"),
        (
            {"format": "int8", "group_size": 32},
            "groups? of 32 need weights with blocks of as many columns, not group 64",
        ),
    ],
)
def test_activation_rules(activation, message):
    with pytest.raises(ConfigError, match=message):
        parse_scheme({"weight": GROUP, "activation": activation})


@pytest.mark.parametrize("scale", [0, -1.0, 1e300, 1e-300, float("inf"), float("nan"), 10**400, True, "1", [1.0]])
def test_bad_static_scales(scale):
    with pytest.raises(ConfigError, match=r"activation: scale must be|activation scale: a positive"):
        parse_scheme({"weight": GROUP, "activation": STATIC | {"scale": scale}})


def test_schemes_made_in_python_are_checked_too():
    with pytest.raises(ConfigError, match="a symmetric weight takes a signed format, not uint4"):
        WeightScheme(format=get_format("uint4"), granularity=Granularity.channel())
    with pytest.raises(ConfigError, match="per tensor, per token, or per group"):
        ActivationScheme(format=get_format("int8"), granularity=Granularity.block(2, 16))
    with pytest.raises(ConfigError, match=r"is a qcompile\.methods\.Method"):
        Scheme(weight=PRESETS["int4"].weight, method="gptq")


HOSTILE = {
    "deep": deep_list(),
    "wide": wide_list(),
    "integer": HUGE_INTEGER,
    "string": "int4" * 100_000,
    "nested": {"weight": {"format": [HUGE_INTEGER]}},
}


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_hostile_values_get_short_messages(value):
    spellings = [
        value,
        {"weight": value},
        {"weight": {"format": value}},
        *({"weight": {"format": "int4", key: value}} for key in ("granularity", "group_size", "block_size")),
        *({"weight": {"format": "int4", key: value}} for key in ("symmetric", "scale_dtype")),
        {"weight": GROUP, "method": value},
        *({"weight": GROUP, "activation": STATIC | {key: value}} for key in ("format", "dynamic", "scale")),
    ]
    if not isinstance(value, (list, dict)):
        spellings += [{value: 1}, {"weight": {value: 1}}]
    for spelling in spellings:
        with pytest.raises(ConfigError) as caught:
            parse_scheme(spelling)
        assert len(str(caught.value)) < 4000


keys = st.sampled_from(
    ["weight", "activation", "method", "format", "granularity", "group_size", "block_size", "symmetric", "scale", "x"]
)
nearly_right = st.recursive(
    json_values | st.sampled_from(["int4", "fp8_e4m3", "tensor", 64, "rtn"]),
    lambda inner: st.dictionaries(keys, inner, max_size=4),
    max_leaves=6,
)


@given(weight=nearly_right, activation=nearly_right)
def test_anything_parses_or_is_refused_in_words(weight, activation):
    for value in (weight, {"weight": weight, "activation": activation}, {"weight": GROUP, "activation": activation}):
        try:
            scheme = parse_scheme(value)
        except QCompileError:
            continue
        assert parse_scheme(scheme_to_dict(scheme)) == scheme


@pytest.mark.parametrize(
    ("k", "granularity"),
    [
        (256, Granularity.group(128)),
        (128, Granularity.group(128)),
        (192, Granularity.group(64)),
        (96, Granularity.group(32)),
        (80, Granularity.group(16)),
        (64, Granularity.group(64)),
        (16, Granularity.group(16)),
        (24, Granularity.channel()),
        (17, Granularity.channel()),
        (1, Granularity.channel()),
    ],
)
def test_groups_of_presets_shrink_to_fit(k, granularity):
    fitted = PRESETS["int4"].fit("model.fc", (8, k)).weight
    assert fitted.granularity == granularity
    assert fitted.format == PRESETS["int4"].weight.format
    assert fitted.scale_dtype == PRESETS["int4"].weight.scale_dtype


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("k", [1, 48, 576, 1000])
def test_every_preset_fits_or_says_why(name, k):
    scheme = PRESETS[name].fit("model.fc", (8, k))
    block, given = scheme.weight.granularity, PRESETS[name]
    assert not block.is_group or k % block.columns == 0
    assert given.weight.granularity.is_group or block == given.weight.granularity
    if given.activation is not None and given.activation.granularity == given.weight.granularity:
        assert scheme.activation == replace(given.activation, granularity=block)
    else:
        assert scheme.activation == given.activation


def test_explicit_groups_must_divide():
    weight = parse_scheme({"weight": GROUP}).weight
    assert weight.fit("model.fc", (8, 192)) is weight
    with pytest.raises(LayerError, match=r"model.fc: group_size 64 does not divide its 96 .*; groups that do: 16, 32$"):
        weight.fit("model.fc", (8, 96))
    with pytest.raises(LayerError, match=r'model.fc: group_size 64 .* 50 .*; use "granularity": "channel"'):
        weight.fit("model.fc", (8, 50))


def test_scale_shapes():
    shape = (130, 300)
    assert Granularity.tensor().scale_shape(shape) == (1, 1)
    assert Granularity.channel().scale_shape(shape) == (130, 1)
    assert Granularity.group(100).scale_shape(shape) == (130, 3)
    assert Granularity.block(128, 128).scale_shape(shape) == (2, 3)
    assert [str(g) for g in (Granularity.tensor(), Granularity.channel(), Granularity.group(16))] == [
        "tensor",
        "channel",
        "group 16",
    ]
    assert str(Granularity.block(128, 64)) == "block 128x64"
