"""Static scales: each observer finds the range that its definition says, however its histogram grew."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qcompile
from qcompile.calibrate.observers import Observed
from qcompile.errors import CalibrationError, ConfigError
from qcompile.formats import get_format
from qcompile.methods import OBSERVED, OBSERVERS, Observer
from qcompile.scheme_config import parse_scheme, scheme_to_dict
from tests import tolerance
from tests.calibrate.problems import batches, decoder

INT8, FP8 = get_format("int8"), get_format("fp8_e4m3")
BINS = 2048


def shown(observer: Observer, *tensors: torch.Tensor) -> Observed:
    observed = Observed(observer, "layer")
    for tensor in tensors:
        observed.add(tensor)
    return observed


def test_absmax():
    x = torch.randn(7, 5)
    assert shown(Observer(), x[:3], x[3:]).scale(FP8) == x.abs().max() / 448
    assert shown(Observer(per="token"), x).scale(FP8) == x.abs().max() / 448


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=4),
    magnitudes=st.lists(st.sampled_from([0.0, 1e-6, 0.1, 1.0, 30.0, 1e5]), min_size=4, max_size=4),
    percentile=st.sampled_from([50.0, 90.0, 99.9]),
    seed=st.integers(0, 99),
)
def test_percentile(sizes, magnitudes, percentile, seed):
    """Within two bins of the final histogram of the exact one: one for the bin's width, one for halved bins' edges."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, 3, generator=generator) * m for n, m in zip(sizes, magnitudes, strict=False)]
    observed = shown(Observer(name="percentile", percentile=percentile), *parts)
    magnitude = torch.cat(parts).abs().flatten().sort().values
    if magnitude[-1] == 0:
        assert observed.scale(INT8) == 1
        return
    assert observed.counts.sum() == magnitude.numel()
    needed = -(-magnitude.numel() * percentile // 100)
    exact = magnitude[min(int(needed), magnitude.numel()) - 1]
    width = observed.width.item() / BINS
    found = observed.scale(INT8).item() * INT8.absmax
    assert exact - 2 * width <= found * (1 + 2**-20)
    assert found <= min(exact + 2 * width, magnitude[-1].item()) * (1 + 2**-20)


def test_percentile_of_tokens():
    """9 of 10 tokens do not saturate, though nearly all numbers are small."""
    x = torch.full((100, 64), 0.01)
    x[:, 0] = torch.arange(1, 101) / 100
    limit = shown(Observer(name="percentile", percentile=90.0, per="token"), x).scale(INT8) * INT8.absmax
    assert 0.9 <= limit.item() <= 0.9 + 2 / BINS
    assert shown(Observer(name="percentile", percentile=90.0), x).scale(INT8) * INT8.absmax < 0.02


@pytest.mark.parametrize("fmt", [INT8, get_format("int4")])
@pytest.mark.parametrize("name", ["mse", "kl"])
def test_outliers_are_clipped_and_bulk_is_kept(fmt, name):
    x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 60.0
    limit = (shown(Observer(name=name), x[:1000], x[1000:]).scale(fmt) * fmt.absmax).item()
    assert limit < 60.0 if fmt.bits == 4 or name == "kl" else limit <= 60.0
    assert limit > 1.0


def test_mse_is_the_best_of_its_candidates():
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(0)) ** 3
    fmt = get_format("int4")
    scale = shown(Observer(name="mse"), x).scale(fmt)

    def error(s: torch.Tensor) -> float:
        return (x - fmt.decode(fmt.encode(x / s).int()) * s).square().mean().item()

    best = min(error(x.abs().max() * step / 96 / fmt.absmax) for step in range(1, 97))
    # The histogram moves each number by half a bin at most: in root mean square, sqrt(error) by as much.
    assert error(scale) ** 0.5 <= best**0.5 + 2 * x.abs().max().item() / BINS


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("per", OBSERVED)
def test_degenerate_inputs(name, per):
    observer = Observer(name=name, per=per)
    for x in (torch.zeros(4, 3), torch.full((1, 3), 2.0), torch.full((2, 3), 1e-38), torch.full((2, 3), 3e38)):
        scale = shown(observer, torch.zeros(1, 3), x, torch.empty(0, 3)).scale(INT8)
        assert scale.shape == ()
        assert torch.isfinite(scale).all()
        assert (scale > 0).all()
    with pytest.raises(CalibrationError, match="layer: calibration batches never reached it"):
        Observed(observer, "layer").scale(INT8)
    with pytest.raises(CalibrationError, match="layer: calibration gave it NaN or infinity"):
        shown(observer, torch.tensor([[1.0, float("nan"), 0.0]]))


@pytest.mark.parametrize("name", OBSERVERS)
def test_in_a_model(name):
    given_ = {
        "weight": {"format": "int8", "granularity": "channel"},
        "activation": {"format": "int8", "dynamic": False, "observer": {"name": name, "per": "token"}},
    }
    assert scheme_to_dict(parse_scheme(given_))["activation"]["observer"]["per"] == "token"
    model, expected = decoder(), [decoder()(b) for b in batches()]
    qcompile.quantize_(model, {"rules": [{"layers": "layers.*", "scheme": given_}]}, calibration=batches())
    assert model.layers[0].query.input_scale.shape == ()
    for batch, y in zip(batches(), expected, strict=True):
        assert tolerance.sqnr(y, model(batch)) > 20.0


def test_smoothed_inputs_are_observed_after_folding():
    scheme = {
        "weight": {"format": "int8", "granularity": "channel"},
        "activation": {"format": "int8", "dynamic": False},
    }
    scales, expected = [], decoder()(batches()[0])
    for method in ("rtn", "smoothquant"):
        model, results = decoder(), []
        config = {"rules": [{"layers": "layers.*", "scheme": {**scheme, "method": method}}]}
        qcompile.quantize_(model, config, calibration=batches(), report=results.append)
        scales.append(model.layers[0].down.input_scale.item())
        assert all(result.folded for result in results) == (method == "smoothquant")
        assert tolerance.sqnr(expected, model(batches()[0])) > 20.0
    assert scales[0] != scales[1]


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        ({"dynamic": True, "observer": "mse"}, "an observer finds static scales"),
        ({"dynamic": False, "scale": 0.1, "observer": "mse"}, "an observer finds static scales"),
        ({"dynamic": False, "observer": "max"}, "observer 'max' is unknown; did you mean absmax"),
        (
            {"dynamic": False, "observer": {"name": "kl", "per": "channel"}},
            "per 'channel' is unknown; there are tensor, token",
        ),
        ({"dynamic": False, "observer": {"name": "percentile", "percentile": 0}}, "percentile must be a number"),
        ({"dynamic": False, "observer": {"bins": 7}}, "an observer has no setting 'bins'"),
    ],
)
def test_what_is_refused(activation, message):
    with pytest.raises(ConfigError, match=message):
        parse_scheme({"weight": {"format": "int8"}, "activation": {"format": "int8", **activation}})
