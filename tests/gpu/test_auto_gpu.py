"""Mixed precision and recommendations where there is a GPU: the same as on the CPU, and about this card."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("scipy")

import qcompile
from qcompile.evaluate import recommend as r
from qcompile.evaluate.model_shape import read_model

pytestmark = pytest.mark.gpu

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
}


def test_sensitivities_are_those_of_the_cpu():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval().requires_grad_(False)
    batches = [torch.randint(0, 320, (1, 48)) for _ in range(3)]
    config = {
        "rules": [
            {"layers": "lm_head", "scheme": "int8_weight_only"},
            {"layers": "*", "scheme": {"preset": "auto", "bits": 4.8, "method": "gptq"}},
        ]
    }
    here = qcompile.choose_schemes(model, config, batches, progress=False)
    there = copy.deepcopy(model).cuda()
    moved = [batch.cuda() for batch in batches]
    found = qcompile.choose_schemes(there, config, moved, progress=False)
    for a, b in zip(here.choices, found.choices, strict=True):
        assert a.layers == b.layers
        # GPTQ's choices at ties follow roundings of float32, and then the codes after them do.
        assert a.kl == pytest.approx(b.kl, rel=0.2, abs=1e-7)
    assert found.bits <= 4.8
    qcompile.quantize_(there, found.config, calibration=moved, progress=False)
    fast = torch.compile(there.to(torch.bfloat16), backend="qcompile")
    with torch.inference_mode():
        y = fast(moved[0]).logits.float().cpu()
        expected = model(batches[0]).logits
    assert ((y - expected).norm() / expected.norm()) < 0.5


def test_this_card(tmp_path):
    transformers.LlamaConfig(architectures=["LlamaForCausalLM"], **SHAPE).save_pretrained(tmp_path)
    target = r.target_of("cuda")
    assert target.capacity == torch.cuda.get_device_properties(0).total_memory
    best = r.recommend(read_model(tmp_path), target, "speed").best
    assert best is not None
    assert 0 < best.step < 1
