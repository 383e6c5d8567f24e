"""`quantize_`: in place, lean, and an ordinary model afterwards."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qcompile
from qcompile import compat
from qcompile.errors import CalibrationError, ConfigError, LayerError
from qcompile.modules import QuantizedLinear
from qcompile.presets import PRESETS
from tests import tolerance
from tests.e2e.test_backend import MLP, compiled

SCHEMES = [name for name in PRESETS if name != "fp8_static"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_dict_round_trip(scheme, tmp_path):
    x = torch.randn(3, 64)
    model = qcompile.quantize_(nn.Sequential(MLP(), MLP()), scheme)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = qcompile.quantize_(nn.Sequential(MLP(), MLP()), scheme)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(model(x), other(x))
        assert torch.equal(model(x), copied(x))


def test_a_state_dict_of_another_scheme_is_refused():
    model, other = nn.Sequential(nn.Linear(64, 64)), nn.Sequential(nn.Linear(64, 64))
    state = qcompile.quantize_(model, "int8").state_dict()
    with pytest.raises(LayerError, match=r"0: codes is torch\.uint8"):
        qcompile.quantize_(other, "int4").load_state_dict(state)


def test_moves_dtype_and_device():
    model, x = qcompile.quantize_(nn.Sequential(MLP()), "int4"), torch.randn(3, 64)
    with torch.no_grad():
        before = model(x)
        model.to(torch.bfloat16)
        assert model[0].down.scale.dtype == torch.bfloat16
        assert model[0].down.codes.dtype == torch.int32
        assert tolerance.sqnr(before, model(x.bfloat16())) > 30.0
        assert model.to("meta")[0].down.codes.device.type == "meta"


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_equals_eager():
    x = torch.randn(3, 64)
    model = qcompile.quantize_(MLP().eval(), "int8_weight_only")
    with torch.no_grad():
        eager = model(x)
        assert tolerance.sqnr(eager, compiled(model)(x)) > 40.0


def test_static_activations_need_calibration():
    with pytest.raises(LayerError, match="pass calibration=batches"):
        qcompile.quantize_(MLP(), "fp8_static")
    x = torch.randn(16, 64)
    model = MLP()
    with torch.no_grad():
        expected = model(x)
        batches = [x, (x,), {"x": x}]
        qcompile.quantize_(model, "fp8_static", calibration=batches)
        assert tolerance.sqnr(expected, model(x)) > 20.0
    assert model.up.input_scale is not None
    assert model.up.input_scale.item() == pytest.approx(x.abs().max().item() / 448)
    with pytest.raises(CalibrationError, match="no batches"):
        qcompile.quantize_(MLP(), "fp8_static", calibration=[])


def test_shared_module_stays_shared():
    inner = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": nn.Sequential(inner), "b": nn.Sequential(inner)})
    qcompile.quantize_(model, "int8")
    assert model["a"][0] is model["b"][0]
    assert isinstance(model["a"][0], QuantizedLinear)


def test_attention_modules_that_read_weights_themselves_are_left():
    model = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    qcompile.quantize_(model, "int8")
    assert isinstance(model.linear1, QuantizedLinear)
    assert not isinstance(model.self_attn.out_proj, QuantizedLinear)
    with torch.no_grad():
        assert model(torch.randn(2, 3, 64)).shape == (2, 3, 64)


def test_mistakes():
    with pytest.raises(ConfigError, match=r"nn\.Sequential"):
        qcompile.quantize_(nn.Linear(4, 4), "int8")
    with pytest.raises(ConfigError, match=r"has no nn\.Linear"):
        qcompile.quantize_(nn.Sequential(nn.ReLU()), "int8")
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight[3, 4] = float("nan")
    with pytest.raises(LayerError, match="0: the weight holds NaN"):
        qcompile.quantize_(model, "int8")


PEAK = """
import resource, sys, torch, qcompile
from torch import nn
torch.set_num_threads(1)
width, count = 2048, 12
model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(count)])
warm = nn.Sequential(nn.Linear(width, width, bias=False)); qcompile.quantize_(warm, sys.argv[1]); del warm
def resident():
    with open("/proc/self/statm") as f: return int(f.read().split()[1]) * resource.getpagesize()
with open("/proc/self/clear_refs", "w") as f: f.write("5")
def peak():
    with open("/proc/self/status") as f:
        return next(int(l.split()[1]) * 1024 for l in f if l.startswith("VmHWM"))
before = resident()
qcompile.quantize_(model, sys.argv[1])
print(peak() - before, before - resident(), 4 * width * width)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("scheme", ["int8_weight_only", "int4"])
def test_peak_memory_is_the_result_and_one_layer(scheme, tmp_path):
    """Above the original model only what one layer takes while it is packed: float32 copies of 4M weights at a time
    (five at most: values, scaled, rounded, expanded scales, and one more) and its int32 codes; and at the end most of
    the original is given back. Were all layers quantized before originals are freed, the peak would be 12 results."""
    environment = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [sys.executable, "-c", PEAK, scheme], capture_output=True, text=True, env=environment, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    above, freed, layer = map(int, result.stdout.split())
    assert above < 6 * layer
    assert freed > 12 * layer // 2


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("scheme", ["int8_weight_only", "fp8", "int4"])
def test_saves_copies_and_converts_after_projections_were_merged(scheme, monkeypatch, tmp_path):
    x = torch.randn(3, 64)
    model = qcompile.quantize_(nn.Sequential(MLP()), scheme)
    monkeypatch.setattr(compat, "compile_with_inductor", lambda graph, inputs, options: graph.forward)
    with torch.no_grad():
        before = model(x)
        assert tolerance.sqnr(before, compiled(model)(x)) > 40.0
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        other = qcompile.quantize_(nn.Sequential(MLP()), scheme)
        other.load_state_dict(load_file(tmp_path / "model.safetensors"))
        for same in (model, other, copy.deepcopy(model)):
            assert torch.equal(same(x), before)
        assert tolerance.sqnr(before, copy.deepcopy(model).to(torch.bfloat16)(x.bfloat16())) > 25.0


def test_explanation_as_text_and_json():
    model = nn.Sequential()
    model.up, model.act, model.down = nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32)
    rules = [{"layers": "down", "scheme": None}, {"layers": "*", "scheme": "int4"}]
    explanation = qcompile.explain(model, torch.randn(2, 96), config={"rules": rules})
    told = json.loads(explanation.to_json())
    up, down = told["layers"]
    assert (up["name"], up["shape"], up["epilogue"]) == ("up", [64, 96], ["bias", "relu"])
    assert up["bytes_before"] == 64 * 96 * 4
    assert up["bytes_after"] == 64 * 96 // 2 + 64 * 3 * 2
    assert up["sqnr_db"] > tolerance.sqnr_floor("int4", 32)
    assert up["note"] == "group 128 does not divide 96, so group 32"
    assert down["scheme"] is None
    assert down["note"] == "no rule gives it a scheme"
    text = str(explanation)
    assert all(part in text for part in ("up", "64 x 96", "int4 group 32", "no rule gives it a scheme"))
    with pytest.raises(ConfigError, match="did you mean int4"):
        qcompile.explain(model, torch.randn(2, 96), config="int44")
