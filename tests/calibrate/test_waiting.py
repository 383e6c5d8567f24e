"""Blocks that are read from a checkpoint when their turn comes: the same result, with one of them in memory."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import qcompile
from qcompile.calibrate.stream import find_stacks
from qcompile.checkpoint.loader import load_pending
from qcompile.errors import CheckpointError
from qcompile.linears import linear_modules
from qcompile.quantize import quantize_waiting
from tests.checkpoint.moe_files import make_moe
from tests.checkpoint.tiny_models import llama

IDS = [torch.randint(0, 50, (1, 24), generator=torch.Generator().manual_seed(i)) for i in range(2)]
GPTQ = {
    "rules": [{"layers": "lm_head", "scheme": None}, {"layers": "*", "scheme": {"preset": "int4", "method": "gptq"}}]
}
PLAIN = {"rules": [{"layers": "lm_head", "scheme": None}, {"layers": "*", "scheme": "int4"}]}
METHODS = {"gptq": GPTQ, "rtn": PLAIN, "hadamard": {"preset": "int4", "method": ["hadamard", "awq"]}}


def blocks(model):
    return [name for names in find_stacks(model, list(linear_modules(model))) for name in names]


def pending(folder):
    return load_pending(folder, blocks, torch.device("cpu"), torch.float32)


def in_memory(model):
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers()) if not t.is_meta}
    return sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_the_same_result(kind, method, tmp_path):
    if kind == "mixtral" and method == "hadamard":
        pytest.skip("no rotation passes through a mixture")
    torch.manual_seed(0)
    original = llama(num_hidden_layers=3) if kind == "llama" else make_moe("mixtral")
    original.save_pretrained(tmp_path)
    calibration = None if method == "rtn" else IDS
    expected = qcompile.load(tmp_path, dtype=torch.float32, progress=False)
    qcompile.quantize_(expected, METHODS[method], calibration=calibration, progress=False)
    model, waiting = pending(tmp_path)
    assert all(parameter.is_meta for parameter in model.model.layers.parameters())
    quantize_waiting(model, METHODS[method], waiting, calibration=calibration, progress=False)
    assert not waiting.blocks
    state = model.state_dict()
    assert list(state) == list(expected.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in expected.state_dict().items())


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_one_block_is_in_memory(method, tmp_path):
    """Whenever a block comes in, there are the quantized ones before it, itself, and what is outside of blocks."""
    llama(num_hidden_layers=6).save_pretrained(tmp_path)
    model, waiting = pending(tmp_path)
    outside, fill, seen = in_memory(model), waiting.fill, []
    block_size = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())

    def noted(block):
        fill(block)
        seen.append(in_memory(model))

    waiting.fill = noted
    calibration = IDS if method == "gptq" else None
    quantize_waiting(model, METHODS[method], waiting, calibration=calibration, progress=False)
    done = (in_memory(model) - outside) / 6
    assert done < block_size / 2
    assert max(seen) <= outside + 6 * done + block_size


def test_resumed(tmp_path, monkeypatch):
    llama(num_hidden_layers=3).save_pretrained(tmp_path / "model")
    model, waiting = pending(tmp_path / "model")
    count = []
    given = {"calibration": IDS, "progress": False, "resume": tmp_path / "resume"}

    def stop(result):
        count.append(result)
        if len(count) == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_waiting(model, GPTQ, waiting, **given, report=stop)
    model, waiting = pending(tmp_path / "model")
    whole = quantize_waiting(model, GPTQ, waiting, **given).state_dict()
    model, waiting = pending(tmp_path / "model")
    again = quantize_waiting(model, GPTQ, waiting, calibration=IDS, progress=False).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    llama(num_hidden_layers=3, rms_norm_eps=0.1).save_pretrained(tmp_path / "other")
    other = llama(num_hidden_layers=3)
    other.model.layers[2].mlp.up_proj.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    model, waiting = pending(tmp_path / "other")
    with pytest.raises(CheckpointError, match="was begun with another model"):
        quantize_waiting(model, GPTQ, waiting, **given)


def test_an_incomplete_file(tmp_path):
    model = llama(num_hidden_layers=2)
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    model, waiting = pending(tmp_path)
    with pytest.raises(CheckpointError, match=r"has nothing for model.layers.1.mlp.up_proj.weight"):
        quantize_waiting(model, "int4", waiting, progress=False)
