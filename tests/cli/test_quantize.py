"""`qcompile quantize`: from a checkpoint and a text to a checkpoint, by every kind of method."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from typer.testing import CliRunner

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

import qcompile
from qcompile.calibrate import run as run_module
from qcompile.cli import app
from qcompile.cli import quantize as module
from qcompile.config import parse_config
from qcompile.modules import QuantizedLinear
from qcompile.presets import PRESETS
from qcompile.reference import dequantize, quantize_weight
from tests.checkpoint.test_imatrix import entry, write
from tests.checkpoint.tiny_models import llama

WORDS = "a quantized model multiplies its inputs by codes and scales until the answer comes out of the last layer"


def saved(folder, **changes):
    """A folder with a small Llama and a tokenizer of words."""
    llama(**changes).save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(["?", *WORDS.split()]))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def source(tmp_path):
    return saved(tmp_path / "model", num_hidden_layers=2)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join([WORDS] * 20))
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant,gptq", "hqq"])
def test_methods(method, source, text, tmp_path):
    out = tmp_path / "out"
    scheme = "int4_asym" if method == "hqq" else "int4"
    options = ["--scheme", scheme, "--method", method, "--calibration", text, "--length", 16, "--dtype", "float32"]
    result = run(source, "--output", out, *options)
    assert result.exit_code == 0, result.output
    plain = re.sub(r"\s+", " ", result.output)
    assert "model.safetensors" in plain
    assert (" error " in plain) == (method != "hqq")
    assert (out / "tokenizer.json").is_file()
    assert not (tmp_path / "out.resume").exists()
    loaded = qcompile.load(out, dtype=torch.float32, progress=False)
    assert isinstance(loaded.lm_head, QuantizedLinear)
    assert loaded.lm_head.scheme.weight.format.name == "int8"
    assert loaded.model.layers[1].mlp.down_proj.scheme.weight.format.bits == 4
    original = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = torch.randint(0, 15, (1, 12))
    with torch.no_grad():
        agree = (loaded(ids).logits - original(ids).logits).norm() / original(ids).logits.norm()
    assert agree < 0.5


@pytest.mark.parametrize(
    ("scheme", "format", "head"),
    [("int4", "gptq", "int8"), ("int4", "awq", None), ("int4", "gguf", "int8"), ("nf4", "bitsandbytes", None)],
)
def test_presets_give_what_a_format_stores(scheme, format, head, source, tmp_path):
    """Scales in its own type, so that nothing is rounded; an output head of 8 bits where it has a place for one."""
    out = tmp_path / "out"
    result = run(source, "--output", out, "--scheme", scheme, "--format", format)
    assert result.exit_code == 0, result.output
    loaded = qcompile.load(out / "model.gguf" if format == "gguf" else out, dtype=torch.float32, progress=False)
    assert loaded.model.layers[1].mlp.down_proj.scheme.weight.format.name == ("nf4" if scheme == "nf4" else "int4")
    found = loaded.lm_head.scheme.weight.format.name if isinstance(loaded.lm_head, QuantizedLinear) else None
    assert found == head


def test_k_types_by_importance(text, tmp_path):
    """To GGUF, and back: super-blocks where they fit, llama.cpp's substitute where they do not."""
    source = saved(tmp_path / "model", num_hidden_layers=1, hidden_size=64, intermediate_size=256)
    options = ["--scheme", "q4_k", "--method", "importance", "--calibration", text, "--format", "gguf"]
    result = run(source, "--output", tmp_path / "out", *options, "--length", 16)
    assert result.exit_code == 0, result.output
    loaded = qcompile.load(tmp_path / "out" / "model.gguf", progress=False)
    weights = [getattr(loaded.model.layers[0].mlp, name).scheme.weight for name in ("down_proj", "up_proj")]
    assert [weight.format.name for weight in weights] == ["uint4", "int5"]
    assert [weight.has_super_blocks for weight in weights] == [True, False]


def test_importance_of_a_file(tmp_path):
    """llama.cpp's importance matrix instead of a text; a head that it does not know is rounded as its rule says."""
    source = saved(tmp_path / "model", num_hidden_layers=1, hidden_size=64, intermediate_size=256)
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    known = {name: torch.rand(256 if name == "ffn_down" else 64) for name in names}
    tensors = [entry(f"blk.0.{name}.weight", mean) for name, mean in known.items()]
    file = write(tmp_path / "imatrix.gguf", {key: value for one in tensors for key, value in one.items()})
    options = ["--scheme", "q4_k", "--imatrix", file, "--format", "gguf"]
    result = run(source, "--output", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    loaded = qcompile.load(tmp_path / "out" / "model.gguf", dtype=torch.float32, progress=False)
    original = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    error = loaded.model.layers[0].mlp.down_proj.weight - original.model.layers[0].mlp.down_proj.weight
    nearest = dequantize(quantize_weight(original.model.layers[0].mlp.down_proj.weight, PRESETS["q4_k"].weight))
    plain = nearest - original.model.layers[0].mlp.down_proj.weight
    assert (error.square() * known["ffn_down"]).sum() < 0.9 * (plain.square() * known["ffn_down"]).sum()
    refused(run(source, "--output", tmp_path / "b", *options, "--method", "gptq"), "--imatrix is for method importance")


def test_static_activations_without_a_method(source, text, tmp_path):
    result = run(source, "--output", tmp_path / "out", "--scheme", "fp8_static", "--calibration", text)
    assert result.exit_code == 0, result.output
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    group = described["config_groups"]["group_0"]
    assert group["input_activations"]["dynamic"] is False


def test_what_could_not_be_saved_is_not_lost(source, text, tmp_path, monkeypatch):
    out, original = tmp_path / "out", run_module._Calibration._block
    options = ["--scheme", "int4", "--method", "gptq", "--calibration", text, "--length", 16]

    def full(*_args, **_more):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(qcompile, "save", full)
        refused(run(source, "--output", out, *options), "error: No space left on device")
    assert (tmp_path / "out.resume" / "model.layers.1.safetensors").is_file()
    done = []

    def counted(self, *given):
        done.append(given)
        original(self, *given)

    monkeypatch.setattr(run_module._Calibration, "_block", counted)
    assert run(source, "--output", out, *options).exit_code == 0
    assert not done
    assert (out / "model.safetensors").is_file()
    assert not (tmp_path / "out.resume").exists()


def refused(result, *words):
    assert result.exit_code == 1, result.output
    for word in words:
        assert word in result.stderr, result.stderr
    assert "Traceback" not in result.output


def test_mistakes(source, text, tmp_path):
    out = tmp_path / "out"
    refused(run(source, "--output", out, "--method", "gptq"), "gptq, looks at activations: name a text, --calibration")
    refused(run(source, "--output", out, "--method", "gtpq", "--calibration", text), "did you mean gptq?")
    refused(
        run(source, "--output", out, "--method", "gptq", "--calibration", tmp_path / "none"), "cannot be read as text"
    )
    (tmp_path / "empty").write_text("")
    refused(run(source, "--output", out, "--method", "gptq", "--calibration", tmp_path / "empty"), "holds 0 tokens")
    refused(run(source, "--output", out, "--format", "zip"), "cannot be written")
    refused(run(source, "--output", tmp_path, "--scheme", "int4"), "is not empty")
    refused(run(source, "--output", text), "text.txt: is a file; name a folder")
    refused(run(source, "--output", text / "out"), "cannot be written to (Not a directory); name another folder")
    refused(
        run(source, "--output", out, "--scheme", "nf4", "--format", "awq"), "its weight is nf4, no integer of 4 bits"
    )
    config = tmp_path / "config.json"
    config.write_text('{"rules": [{"layers": "*", "scheme": {"preset": "int4_asym", "method": "hqq"}}]}')
    refused(run(source, "--output", out, "--scheme", config, "--method", "awq"), "state the method in")
    groups = tmp_path / "groups.json"
    groups.write_text(
        '{"rules": [{"layers": "*.mlp.*", "scheme": {"preset": "int4", "weight": {"group_size": 16}}}, '
        '{"layers": "*", "scheme": {"preset": "int4", "weight": {"group_size": 32}}}]}'
    )
    refused(
        run(source, "--output", out, "--scheme", groups, "--format", "awq"),
        "its group size 16 is not that of model.layers.0.self_attn.q_proj",
    )
    assert not out.exists()
    assert run(source, "--output", out, "--scheme", config).exit_code == 0
    refused(run(out, "--output", tmp_path / "b"), "is quantized already")


def test_auto_writes_a_configuration_that_can_be_read(source, text, tmp_path):
    pytest.importorskip("scipy")
    written, out = tmp_path / "chosen.yaml", tmp_path / "out"
    options = ["--scheme", "auto", "--bits", 6, "--calibration", text, "--length", 16, "--dtype", "float32"]
    result = run(source, *options, "--write-config", written)
    assert result.exit_code == 0, result.output
    assert "bits a weight" in result.output
    assert not (tmp_path / "chosen.resume.sensitivities.json").exists()
    schemes = {rule.scheme.weight.format.name for rule in parse_config(written).rules}
    assert len(schemes) > 1
    assert "nf4" in written.read_text()  # a candidate, since nothing is saved
    result = run(source, *options, "--method", "gptq", "--output", out)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chosen.yaml", "model", "out", "text.txt"]
    loaded = qcompile.load(out, dtype=torch.float32, progress=False)
    layers = [m for n, m in loaded.named_modules() if isinstance(m, QuantizedLinear) and n != "lm_head"]
    assert len({str(m.scheme.weight) for m in layers}) > 1
    assert "nf4" not in {m.scheme.weight.format.name for m in layers}
    attention = loaded.model.layers[0].self_attn
    assert attention.q_proj.scheme.weight == attention.k_proj.scheme.weight == attention.v_proj.scheme.weight
    result = run(source, "--output", tmp_path / "again", "--scheme", written, "--format", "compressed-tensors")
    assert result.exit_code == (1 if "nf4" in schemes else 0), result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheme", "auto", "--output", "out"], "needs one budget"),
        (["--scheme", "auto", "--bits", "4", "--output", "out"], "name a text, --calibration"),
        (["--scheme", "auto", "--bits", "4", "--write-config", "a.txt", "--calibration", "TEXT"], "is called .yaml"),
        (["--scheme", "auto", "--bits", "1", "--output", "out", "--calibration", "TEXT"], "the least"),
        (["--scheme", "int4", "--bits", "4", "--output", "out"], "go with --scheme auto"),
        (["--scheme", "int4"], "name a folder to write"),
    ],
)
def test_autos_that_cannot_be(options, message, source, text):
    pytest.importorskip("scipy")
    result = run(source, *(str(text) if option == "TEXT" else option for option in options))
    assert result.exit_code == 1
    assert message in re.sub(r"\s+", " ", result.output)


def test_auto_without_scipy_is_told_before_all_else(source, text, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setattr(module, "_load", lambda *_: pytest.fail("the model was read"))
    refused(
        run(source, "--scheme", "auto", "--bits", 6, "--calibration", text, "--write-config", "a.yaml"),
        "qcompile[auto]",
    )
