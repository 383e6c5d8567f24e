"""Evaluations on a GPU: against float64, and with the reference on another device."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from qcompile.config import parse_config
from qcompile.evaluate import evaluate, quantized_copy
from tests.checkpoint.tiny_models import llama

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("scheme", ["int4", "int8", "nf4"])
def test_quality_and_layers(scheme):
    original = llama(dtype=torch.bfloat16)
    ids = torch.randint(0, 320, (60,))
    reference = llama(dtype=torch.bfloat16).cuda()
    quantized = quantized_copy(reference, parse_config(scheme))
    found = evaluate(quantized, ids.cuda(), reference, window=60, progress=False)
    with torch.no_grad():
        p, q = (m(ids[None].cuda()).logits[0, :-1].double().softmax(-1) for m in (quantized, reference))
    surprise = -p.cpu().gather(1, ids[1:, None]).log().mean()
    assert found.quality.perplexity == pytest.approx(surprise.exp().item(), rel=1e-9)
    assert found.quality.kl == pytest.approx((q * (q / p).log()).sum(1).mean().item(), rel=1e-6)
    assert len(found.layers) == 15
    assert all(layer.weight.sqnr_db > 15 < layer.output.sqnr_db for layer in found.layers)
    across = evaluate(quantized, ids, original, window=60, progress=False)
    for one, other in zip(found.layers, across.layers, strict=True):  # bfloat16 rounds otherwise on CPUs
        assert one.weight.sqnr_db == pytest.approx(other.weight.sqnr_db, abs=1e-6)
        assert one.output.sqnr_db == pytest.approx(other.output.sqnr_db, abs=1.0)
