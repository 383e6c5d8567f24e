"""Mixed precision: sensitivities against models of which one group is quantized, the assignment against all others."""

from __future__ import annotations

import itertools
import json
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy")

import qcompile
from qcompile.calibrate import sensitivity
from qcompile.calibrate.assign import least
from qcompile.config import Auto, QuantConfig, Rule, parse_config
from qcompile.errors import CalibrationError, CheckpointError, ConfigError
from qcompile.layouts import LAYOUTS
from qcompile.modules import QuantizedLinear
from qcompile.packed import stored_bytes
from qcompile.presets import PRESETS
from qcompile.reference import dequantize, quantize_weight
from tests.calibrate.problems import Decoder, batches, decoder

INT4 = {"weight": {"format": "int4", "group_size": 16}}
INT3 = {"weight": {"format": "int3", "group_size": 16}}
CANDIDATES = [INT3, INT4, "int8"]
HEAD = {"layers": "head", "scheme": None}


def auto(**settings):
    return {"rules": [HEAD, {"layers": "*", "scheme": {"preset": "auto", "candidates": CANDIDATES, **settings}}]}


def divergence(model, reference, given):
    """Mean KL(reference || model) over all positions of some batches, float64."""
    total, count = 0.0, 0
    for batch in given:
        p, q = (torch.softmax(m(batch).double(), -1) for m in (reference, model))
        total += (p * (p.log() - q.log())).sum().item()
        count += batch.shape[1]
    return total / count


# ---- the integer program


@st.composite
def tables(draw):
    groups = draw(st.integers(1, 5))
    sizes, costs = [], []
    for _ in range(groups):
        count = draw(st.integers(1, 4))
        sizes.append(draw(st.lists(st.integers(1, 50), min_size=count, max_size=count)))
        costs.append(draw(st.lists(st.integers(0, 1000), min_size=count, max_size=count)))
    scale = draw(st.sampled_from([1, 997, 10**7]))
    return [[c * 1e-5 for c in row] for row in costs], [[s * scale for s in row] for row in sizes]


@settings(max_examples=40, deadline=None)
@given(table=tables(), share=st.floats(0, 1.2))
def test_no_other_assignment_is_better(table, share):
    cost, size = table
    limit = int(share * sum(map(max, size)))
    found = least(cost, size, limit)
    every = list(itertools.product(*(range(len(row)) for row in cost)))
    within = [c for c in every if sum(size[g][i] for g, i in enumerate(c)) <= limit]
    if not within:
        assert found is None
        return
    assert tuple(found) in within
    best = min(sum(cost[g][i] for g, i in enumerate(c)) for c in within)
    assert sum(cost[g][i] for g, i in enumerate(found)) <= best + 1e-9


def test_many_groups_are_solved_exactly_enough_to_fill_the_budget():
    cost = [[4.0**-i * (1 + g % 7) for i in range(5)] for g in range(300)]
    size = [[(i + 2) * (1000 + 13 * (g % 5)) for i in range(5)] for g in range(300)]
    found = least(cost, size, 4 * sum(row[0] for row in size) // 2)
    used = sum(size[g][i] for g, i in enumerate(found))
    assert 0 <= 4 * sum(row[0] for row in size) // 2 - used < max(map(max, size))


# ---- sensitivities


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_sensitivities_are_those_of_models_with_one_group_quantized(method):
    given, model = batches(), decoder()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chosen = qcompile.choose_schemes(model, auto(bits=5.5, method=method, tokens=40), given)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    of = {choice.layers: choice for choice in chosen.choices}
    assert list(of)[:4] == [
        ("layers.0.query", "layers.0.key_value"),
        ("layers.0.out",),
        ("layers.0.gate_up",),
        ("layers.0.down",),
    ]
    measured = given[:2]  # 24 + 21 tokens
    for layers in (("layers.0.query", "layers.0.key_value"), ("layers.1.down",), ("layers.2.gate_up",)):
        assert of[layers].measured == (1, 2)  # of weights alone the larger of two, and the one with activations
        for index, scheme in enumerate(of[layers].schemes):
            alone = decoder()
            rules = tuple(Rule(layers=name, scheme=scheme) for name in layers)
            qcompile.quantize_(alone, QuantConfig(rules), calibration=given)
            expected = divergence(alone, model, measured)
            if index in of[layers].measured:
                # The kernels' order of sums, and float32 sums of the divergence.
                assert of[layers].kl[index] == pytest.approx(expected, rel=0.05, abs=2e-7)
            elif method == "rtn":  # the second order is not all
                assert expected / 2 < of[layers].kl[index] < 2 * expected


def test_what_is_not_measured_follows_from_the_layers_output_errors():
    given, model = batches(), decoder()
    layers = ("layers.1.query", "layers.1.key_value")
    (choice,) = (c for c in qcompile.choose_schemes(model, auto(bits=5.5), given).choices if c.layers == layers)
    inputs = []
    model.layers[1].query.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0].double()))
    for batch in given:
        model(batch)
    error = {}
    for index in (0, 1):
        error[index] = 0.0
        for name in layers:
            weight = model.get_submodule(name).weight
            rounded = dequantize(quantize_weight(weight, choice.schemes[index].weight))
            error[index] += (torch.cat(inputs) @ (rounded - weight).double().T).square().sum().item()
    assert choice.kl[0] / choice.kl[1] == pytest.approx(error[0] / error[1], rel=1e-4)


def test_layers_outside_of_blocks_are_measured_in_the_whole_model():
    given, model = batches(), decoder()
    config = {"rules": [{"layers": "head", "scheme": {"preset": "auto", "kl": 1.0, "candidates": CANDIDATES}}]}
    (choice,) = qcompile.choose_schemes(model, config, given).choices
    alone = qcompile.quantize_(decoder(), {"rules": [{"layers": "head", "scheme": INT4}]})
    assert choice.kl[1] == pytest.approx(divergence(alone, model, given), rel=0.05)
    assert choice.chosen == 0  # the smallest, since all are within


class Between(Decoder):
    """A decoder whose blocks cannot be run apart, since something happens between them: nothing, in numbers."""

    def forward(self, ids):
        x, mask = self.embed(ids), torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        for layer in self.layers:
            x = layer(x, mask=mask) * 1.0
        return self.head(x)


def test_blocks_that_cannot_be_run_apart():
    model = decoder()
    chosen = qcompile.choose_schemes(model, auto(bits=5.5), batches())
    model.__class__ = Between
    whole = qcompile.choose_schemes(model, auto(bits=5.5), batches())
    assert [c.layers for c in whole.choices] == [c.layers for c in chosen.choices]
    for a, b in zip(whole.choices, chosen.choices, strict=True):
        assert a.kl == pytest.approx(b.kl, rel=1e-3, abs=1e-8)


# ---- budgets


@pytest.mark.parametrize("budget", [{"bits": 5.5}, {"bytes": 13000}, {"kl": 1e-4}])
def test_the_budget_holds_for_the_model_that_is_made(budget):
    model = decoder()
    chosen = qcompile.choose_schemes(model, auto(**budget), batches())
    qcompile.quantize_(model, chosen.config)
    packed = [LAYOUTS[p.layout].unpack(p) for p in (m.packed() for m in model.modules() if hasattr(m, "packed"))]
    assert sum(p.nbytes for p in packed) == chosen.nbytes
    assert sum(math.prod(p.shape) for p in packed) == chosen.weights
    if "bits" in budget:
        assert 5.3 < chosen.bits <= 5.5
    elif "bytes" in budget:
        assert 12500 < chosen.nbytes <= 13000
    else:
        assert chosen.kl <= 1e-4
    schemes = {m.scheme.weight.format.name for m in model.modules() if isinstance(m, QuantizedLinear)}
    assert len(schemes) > 1
    for layer in model.layers:
        assert layer.query.scheme == layer.key_value.scheme


def test_quantize_decides_and_calibrates():
    model, results = decoder(), []
    qcompile.quantize_(model, auto(bits=5.5, method="gptq"), calibration=batches(), report=results.append)
    assert {r.method for r in results} == {"gptq"}
    assert len({r.scheme for r in results}) > 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (auto(bits=3.0), r"3 bits a weight is below 4\.0000, the least"),
        (auto(bits=12.0), r"above .*, the most"),
        (auto(bytes=10), r"10 bytes is below"),
        (auto(kl=1e-12), r"no choice stays within kl 1e-12; the least that its candidates reach is"),
        ("int4", "no rule has scheme auto"),
        ({"rules": [*auto(bits=5.0)["rules"], {"layers": "*", "scheme": "int4"}]}, "decides no layer"),
        (
            {"rules": [{"layers": "head", "scheme": {"preset": "auto", "bits": 6}}, *auto(bits=5)["rules"]]},
            "one budget",
        ),
    ],
)
def test_budgets_and_rules_that_cannot_be(config, message):
    with pytest.raises(ConfigError, match=message):
        qcompile.choose_schemes(decoder(), config, batches())


def test_what_is_not_decided_is_refused():
    with pytest.raises(ConfigError, match="pass calibration=batches"):
        qcompile.quantize_(decoder(), auto(bits=5.0))
    with pytest.raises(ConfigError, match=r"scheme auto is decided by calibration"):
        parse_config({"preset": "auto", "bits": 5}).scheme_for("head")
    with pytest.raises(CalibrationError, match="no batches"):
        qcompile.choose_schemes(decoder(), auto(bits=5.0), [])


def test_scipy_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ConfigError, match=r'pip install "qcompile\[auto\]"'):
        qcompile.choose_schemes(decoder(), auto(bits=5.0), batches())


# ---- configurations


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_the_file_is_the_configuration(suffix, tmp_path):
    config = {**auto(bits=5.0, method="gptq"), "kv_cache": "fp8"}
    chosen = qcompile.choose_schemes(decoder(), config, batches())
    path = tmp_path / f"chosen.{suffix}"
    chosen.write(path)
    assert parse_config(path) == chosen.config
    assert not chosen.config.undecided
    assert chosen.config.rules[0] == Rule(layers="head", scheme=None)
    if suffix == "yaml":
        (line,) = [line for line in path.read_text().splitlines() if "layers.1.down" in line]
        assert line.startswith("- {layers: layers.1.down, scheme: ")
        assert "# KL int3 group 16 ~" in line
    with pytest.raises(ConfigError, match=r"\.yaml, \.yml or \.json"):
        chosen.write(tmp_path / "chosen.txt")


def test_auto_goes_through_json():
    given = {"preset": "auto", "bits": 4.5, "candidates": ["int3", INT4], "method": ["awq", "gptq"], "tokens": 64}
    parsed = parse_config(given)
    assert parsed.undecided
    assert QuantConfig.from_dict(json.loads(json.dumps(parsed.to_dict()))) == parsed
    assert Auto.from_dict({"preset": "auto", "kl": 0.1}).to_dict() == {"preset": "auto", "kl": 0.1}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("auto", "needs one budget of bits, bytes, kl"),
        ({"preset": "auto", "bits": 4, "kl": 1}, "not bits and kl"),
        ({"preset": "auto", "bits": -1}, "bits must be a positive number"),
        ({"preset": "auto", "bits": float("nan")}, "bits must be a positive number"),
        ({"preset": "auto", "bytes": 1.5}, "bytes must be a positive integer"),
        ({"preset": "auto", "bit": 4}, "did you mean bits"),
        ({"preset": "auto", "bits": 4, "candidates": ["int4"]}, "at least two"),
        ({"preset": "auto", "bits": 4, "candidates": ["int4", "int4"]}, "each once"),
        ({"preset": "auto", "bits": 4, "candidates": ["int4", "int44"]}, "unknown scheme 'int44'"),
        ({"preset": "auto", "bits": 4, "candidates": ["int4", "fp8_static"]}, "static activation scale"),
        ({"preset": "auto", "bits": 4, "tokens": 0}, "tokens must be a positive integer"),
    ],
)
def test_autos_that_cannot_be(given, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(given)


@pytest.mark.parametrize("name", PRESETS)
def test_bytes_are_those_of_packed_weights(name):
    scheme = PRESETS[name].weight.fit("layer", (48, 384))
    assert stored_bytes(scheme, (48, 384)) == quantize_weight(torch.randn(48, 384), scheme).nbytes


# ---- interruptions


def test_an_interrupted_measurement_goes_on(tmp_path, monkeypatch):
    keep, config = tmp_path / "kept.json", auto(bits=5.0)
    original, calls = sensitivity._Measurement._divergence, []

    def counted(self, *given):
        if len(calls) == 10 and not keep.with_suffix(".again").exists():
            raise KeyboardInterrupt
        calls.append(given)
        return original(self, *given)

    monkeypatch.setattr(sensitivity._Measurement, "_divergence", counted)
    with pytest.raises(KeyboardInterrupt):
        qcompile.choose_schemes(decoder(), config, batches(), keep=keep)
    keep.with_suffix(".again").touch()
    again = qcompile.choose_schemes(decoder(), config, batches(), keep=keep)
    assert len(calls) == 24  # two for each of twelve groups, of which five were kept
    calls.clear()
    assert qcompile.choose_schemes(decoder(), config, batches(), keep=keep) == again
    assert not calls
    with pytest.raises(CheckpointError, match="begun with another"):
        qcompile.choose_schemes(decoder(1), config, batches(), keep=keep)
    keep.write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        qcompile.choose_schemes(decoder(), config, batches(), keep=keep)
