"""GPTQ: never worse than rounding in the Hessian's norm, as good as other libraries, right on degenerate inputs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qcompile.calibrate import gptq as module
from qcompile.calibrate.awq import awq_scales
from qcompile.calibrate.codes import choose_codes
from qcompile.calibrate.gptq import gptq, inverse_factor
from qcompile.errors import CalibrationError, ConfigError, LayerError
from qcompile.methods import AWQ, GPTQ, HQQ, Method
from qcompile.presets import PRESETS
from qcompile.reference import dequantize, leave_two_of_four, quantize_weight
from qcompile.scheme import WeightScheme
from qcompile.scheme_config import parse_scheme
from tests import tolerance
from tests.calibrate.problems import layer, output_error, statistics

FIXTURES = Path(__file__).parents[1] / "fixtures" / "calibrate"
THEIRS = json.loads((FIXTURES / "errors.json").read_text())
NO_WORSE = 1.02


def integer(bits: int, symmetric: bool, group: int = 64) -> WeightScheme:
    weight = {"format": f"int{bits}", "group_size": group, "symmetric": symmetric, "scale_dtype": "float32"}
    return parse_scheme({"weight": weight}).weight


def assert_no_worse(weight: torch.Tensor, hessian: torch.Tensor, scheme: WeightScheme, how: GPTQ) -> None:
    chosen, nearest = dequantize(gptq(weight, hessian, scheme, how)), dequantize(quantize_weight(weight, scheme))
    errors, bounds = [], []
    for q in (chosen, nearest):
        e, h = weight.double() - q.double(), hessian.double()
        errors.append(((e @ h) * e).sum())
        bounds.append(tolerance.quadratic_bound(e, h))
    assert errors[0] <= errors[1] + bounds[0] + bounds[1]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("order", [True, False])
def test_no_worse_than_rounding_in_every_format(name, order):
    weight, x = layer(32, 256)
    scheme = PRESETS[name].weight.fit("layer", (32, 256))
    assert_no_worse(weight, statistics(x).hessian, scheme, GPTQ(act_order=order))


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    group=st.sampled_from([16, 32, -1]),
    rows=st.integers(1, 9),
    blocks=st.integers(1, 3),
    tokens=st.integers(1, 40),
    seed=st.integers(0, 1000),
    how=st.builds(
        GPTQ,
        damping=st.sampled_from([1e-4, 0.01, 0.5]),
        block_size=st.sampled_from([1, 7, 32, 128]),
        act_order=st.booleans(),
        clip=st.sampled_from(["none", "mse", "importance", "output"]),
    ),
    desc_act=st.booleans(),
)
def test_no_worse_than_rounding(bits, symmetric, group, rows, blocks, tokens, seed, how, desc_act):
    weight, x = layer(rows, 32 * blocks, tokens, seed)
    scheme = replace(integer(bits, symmetric, group), act_order=desc_act)
    hessian = statistics(x).hessian
    if not desc_act:
        assert_no_worse(weight, hessian, scheme, how)
        return
    packed = gptq(weight, hessian, scheme, how)
    assert packed.perm is not None
    assert torch.equal(packed.perm.sort().values, torch.arange(32 * blocks, dtype=torch.int32))


@pytest.mark.parametrize("block_size", [7, 128])
@pytest.mark.parametrize("name", ["int4_24", "int8_24"])
def test_sparse_weights(name, block_size):
    """Better than pruning by magnitude; and what is sparse already keeps its pattern."""
    weight, x = layer()
    hessian, scheme = statistics(x).hessian, PRESETS[name].weight.fit("layer", (32, 128))
    how = GPTQ(block_size=block_size)
    nearest = dequantize(quantize_weight(weight, scheme))
    assert output_error(weight, dequantize(gptq(weight, hessian, scheme, how)), x) < 0.7 * output_error(
        weight, nearest, x
    )
    pruned = leave_two_of_four(weight, scheme)
    again = dequantize(gptq(pruned, hessian, scheme, how))
    assert ((again == 0) | (pruned != 0)).all()
    searched = choose_codes(weight, replace(PRESETS[name], weight=scheme, method=parse("mse")), hessian, "layer")
    assert ((dequantize(searched) == 0) | (pruned != 0)).all()


def test_better_than_rounding():
    weight, x = layer()
    hessian = statistics(x).hessian
    for bits in (2, 3, 4, 5, 6, 7, 8):
        scheme = integer(bits, True)
        ours = output_error(weight, dequantize(gptq(weight, hessian, scheme, GPTQ())), x)
        assert ours < 0.7 * output_error(weight, dequantize(quantize_weight(weight, scheme)), x)


@pytest.mark.parametrize("name", [name for name in THEIRS if name.startswith("gptq")])
def test_llm_compressor(name):
    """With its way to choose ranges, its very result; with ours a better one."""
    tensors = load_file(FIXTURES / "layer.safetensors")
    weight, x = tensors["weight"].float(), tensors["x"].float()
    _, bits, order, symmetric = name.split("_")
    hessian, scheme = statistics(x).hessian, integer(int(bits), symmetric == "sym")
    for clip in ("none", "importance"):
        packed = gptq(weight, hessian, scheme, GPTQ(act_order=order == "order", clip=clip))
        assert output_error(weight, dequantize(packed), x) <= NO_WORSE * THEIRS[name]


@pytest.mark.parametrize("name", [name for name in THEIRS if name.startswith("awq")])
def test_autoawq(name):
    tensors = load_file(FIXTURES / "layer.safetensors")
    weight, x = tensors["weight"].float(), tensors["x"].float()
    scheme = parse_scheme({"weight": {"format": "int4", "group_size": 64, "symmetric": "_sym_" in name}})
    seen = statistics(x)
    scale = awq_scales(seen, [weight], [scheme.weight], AWQ().grid, lambda s: s, "layer")
    seen.divide(scale)
    packed = choose_codes(weight * scale, replace(scheme, method=parse("awq")), seen.hessian, "layer")
    assert output_error(weight, dequantize(packed) / scale, x) <= NO_WORSE * THEIRS[name]


def parse(name: str) -> Method:
    if name == "mse":
        return parse_scheme({"preset": "int4", "method": {"name": "rtn", "clip": "mse"}}).method
    return parse_scheme({"preset": "int4", "method": name}).method


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_hqq(bits):
    weight = load_file(FIXTURES / "layer.safetensors")["weight"].float()
    given_ = {"format": f"uint{bits}", "group_size": 64, "offset": True, "scale_dtype": "float32"}
    scheme = parse_scheme({"weight": given_, "method": "hqq"})
    error = weight - dequantize(choose_codes(weight, scheme, None, "layer"))
    assert error.square().mean() / weight.square().mean() <= NO_WORSE * THEIRS[f"hqq_{bits}"]


@pytest.mark.parametrize("name", [n for n, s in PRESETS.items() if n != "nvfp4"])
@pytest.mark.parametrize("method", [HQQ(), "mse", "importance", "output"])
def test_searched_grids_are_no_worse_than_the_whole_range(name, method):
    """In what each minimizes; NVFP4's scales share one above them, so theirs are bound to it in the same way."""
    weight, x = layer(32, 256)
    scheme = PRESETS[name].weight.fit("layer", (32, 256))
    nearest = weight - dequantize(quantize_weight(weight, scheme))
    if isinstance(method, HQQ) and (scheme.symmetric or scheme.has_super_blocks):
        with pytest.raises(ConfigError, match=r"method hqq (moves zero points or offsets, and a symm|does not choose)"):
            replace(PRESETS[name], method=Method(method))
        return
    if isinstance(method, HQQ):
        found = choose_codes(weight, replace(PRESETS[name], weight=scheme, method=Method(method)), None, "layer")
        error = weight - dequantize(found)
        assert (error.abs() ** method.norm).sum() <= (nearest.abs() ** method.norm).sum() * (1 + 2**-15)
        return
    how = parse_scheme({"preset": name, "method": {"name": "rtn", "clip": method}}).method
    hessian = statistics(x).hessian
    error = weight - dequantize(choose_codes(weight, replace(PRESETS[name], weight=scheme, method=how), hessian, "l"))
    if method == "mse":
        measured = [e.square().sum() for e in (error, nearest)]
    elif method == "importance" or scheme.has_super_blocks or scheme.granularity.block_of((32, 256))[1] > 128:
        measured = [(e.square() * hessian.diagonal()).sum() for e in (error, nearest)]
    else:
        size = scheme.granularity.columns
        groups = [slice(first, first + size) for first in range(0, 256, size)]
        measured = [sum(((e[:, g] @ hessian[g, g]) * e[:, g]).sum() for g in groups) for e in (error, nearest)]
    if method != "output" or scheme.granularity.is_group:
        assert measured[0] <= measured[1] * (1 + 2**-10)


def test_inputs_that_are_always_zero():
    weight, x = layer()
    x[:, 5:40] = 0
    packed = gptq(weight, statistics(x).hessian, integer(4, True), GPTQ(clip="none"))
    nearest = dequantize(quantize_weight(weight, integer(4, True)))
    assert torch.equal(dequantize(packed)[:, 5:40], nearest[:, 5:40])
    packed = gptq(weight, torch.zeros(128, 128), integer(4, True), GPTQ(clip="none"))
    assert torch.equal(dequantize(packed), nearest)


@pytest.mark.parametrize("value", [0.0, 0.3, -2.0])
def test_a_weight_of_one_value(value):
    weight = torch.full((8, 64), value)
    _, x = layer(8, 64)
    for symmetric in (True, False):
        packed = gptq(weight, statistics(x).hessian, integer(4, symmetric), GPTQ())
        assert torch.isfinite(dequantize(packed)).all()
        assert_no_worse(weight, statistics(x).hessian, integer(4, symmetric), GPTQ())


def test_one_token():
    """A Hessian of rank 1."""
    weight, x = layer(8, 64, tokens=1)
    assert_no_worse(weight, statistics(x).hessian, integer(4, True), GPTQ())


def test_the_factor():
    _, x = layer(8, 64)
    hessian = statistics(x).hessian
    upper = inverse_factor(hessian, 0.01, "layer").double()
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(64)
    assert torch.equal(upper, upper.triu())
    residual = (upper.T @ upper @ damped - torch.eye(64)).abs().max().item()
    assert residual <= tolerance.inverse_bound(damped)


def test_a_factorization_that_fails_is_damped_more(monkeypatch):
    _, x = layer(8, 64, tokens=1)
    seen = []
    original = torch.linalg.cholesky_ex

    def fails_at_first(matrix, **more):
        factor, info = original(matrix, **more)
        seen.append(matrix[0, 0].item())
        return factor, info + int(len(seen) < 3)

    monkeypatch.setattr(module.torch.linalg, "cholesky_ex", fails_at_first)
    upper = inverse_factor(statistics(x).hessian, 0.01, "layer")
    assert torch.isfinite(upper).all()
    assert seen[0] < seen[1] < seen[2]
    monkeypatch.setattr(module.torch.linalg, "cholesky_ex", lambda m, **_: (m, torch.tensor(1)))
    with pytest.raises(CalibrationError, match="layer: the Hessian of its inputs cannot be factored"):
        inverse_factor(statistics(x).hessian, 0.01, "layer")


def test_what_is_refused():
    weight, x = layer(8, 64)
    hessian = statistics(x).hessian
    with pytest.raises(LayerError, match="layer: the weight holds NaN"):
        gptq(weight.masked_fill(weight > 0, float("nan")), hessian, integer(4, True), GPTQ(), "layer")
    with pytest.raises(CalibrationError, match="layer: its inputs overflow when they are squared"):
        gptq(weight, hessian.masked_fill(hessian > 0, float("inf")), integer(4, True), GPTQ(), "layer")
    sorted_ = parse_scheme({"weight": {"format": "uint4", "act_order": True, "group_size": 64}, "method": "hqq"})
    with pytest.raises(LayerError, match="act_order"):
        choose_codes(weight, sorted_, None, "layer")
