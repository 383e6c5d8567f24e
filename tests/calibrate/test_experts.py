"""Mixtures of experts by methods that look at inputs: each expert by what the router sends to it."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

import qcompile
from qcompile.calibrate import run as run_module
from qcompile.calibrate.experts import ExpertStatistics, watched
from qcompile.errors import CalibrationError, LayerError
from qcompile.experts import QuantizedExperts
from tests import tolerance
from tests.checkpoint.moe_files import experts_of, make_moe

INT3 = {"weight": {"format": "int3", "group_size": 32}}


def batches(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 96, (2, 48), generator=generator) for _ in range(count)]


def quantized(kind: str, method: object, seed: int = 0, **more):
    torch.manual_seed(seed)
    model = make_moe(kind)
    config = {"rules": [{"layers": "*.experts", "scheme": {**INT3, "method": method}}]}
    return qcompile.quantize_(model, config, progress=False, **more)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_moments_are_of_the_tokens_routed_to_each_expert(kind):
    """Against the model's own experts, run one at a time on tokens that all go to one of them."""
    torch.manual_seed(0)
    name, experts = next(iter(experts_of(make_moe(kind)).items()))
    hidden, chosen = torch.randn(60, 64), torch.stack([torch.randperm(3)[:2] for _ in range(60)])  # none to the last
    seen = ExpertStatistics(name, experts)
    with watched({name: experts}, {name: seen}):
        experts(hidden, chosen, torch.full((60, 2), 0.5))
    first, last = seen.of[seen.first], seen.of["down_proj"]
    for index in range(3):
        rows = hidden[(chosen == index).any(1)].double()
        assert first[index].tokens == last[index].tokens == len(rows)
        assert tolerance.sqnr(rows.T @ rows, first[index].gram) > tolerance.rewrite_sqnr_floor(2, 60)
        alone = experts(rows.float(), torch.full((len(rows), 1), index), torch.ones(len(rows), 1))
        down = experts.down_proj[index].double()
        down = down.T if experts.is_transposed else down
        less = alone.double() - (experts.down_proj_bias[index].double() if experts.has_bias else 0)
        expected = less.T @ less
        assert tolerance.sqnr(expected, down @ last[index].gram.double() @ down.T) > tolerance.rewrite_sqnr_floor(
            8, 128
        )
    assert first[3].tokens == 0
    every = sum(one.gram for one in first) / sum(one.tokens for one in first)
    assert torch.equal(seen.hessian(seen.first, 3), every)
    own = seen.hessian("down_proj", 3)
    assert torch.equal(own, own[0, 0] * torch.eye(len(own)))
    assert seen.note(seen.first).startswith("4 of 4 experts saw fewer tokens than their 64 inputs, 0 at least")


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_methods(kind):
    """Each is better than rounding in what it minimizes, and GPTQ for the model; what is told of them."""
    torch.manual_seed(0)
    expected = [make_moe(kind)(ids).logits for ids in batches(1)]
    found, errors = {}, {}
    for method in ("rtn", "importance", "gptq", "awq"):
        results = []
        given = {} if method == "rtn" else {"calibration": batches(), "report": results.append}
        model = quantized(kind, method, **given)
        assert all(isinstance(experts, QuantizedExperts) for experts in experts_of(model).values())
        found[method] = tolerance.sqnr(expected[0], model(batches(1)[0]).logits)
        errors[method] = [result.error for result in results]
        if method != "rtn":
            assert [result.name.rpartition(".")[2] for result in results] == ["gate_up_proj", "down_proj"] * 2
            assert {result.declined for result in results} == {
                "experts take up no scales of their inputs" if method == "awq" else ""
            }
            assert sum(result.tokens for result in results) == 2 * 2 * 2 * 4 * 96
    assert found["gptq"] > found["rtn"] + 1
    assert all(a < b for a, b in zip(errors["gptq"], errors["importance"], strict=True))


def test_without_data():
    model = quantized("mixtral", {"name": "rtn", "clip": "mse"})
    assert isinstance(next(iter(experts_of(model).values())), QuantizedExperts)
    with pytest.raises(LayerError, match=r"experts: method gptq looks at the layer's inputs; pass calibration"):
        quantized("mixtral", "gptq")


def test_an_expert_without_tokens():
    """Nothing is sent to three of four experts: they are quantized, and the report says so."""
    results = []
    torch.manual_seed(0)
    model = make_moe("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.weight.zero_()
    config = {"rules": [{"layers": "*.experts", "scheme": {**INT3, "method": "gptq"}}]}
    qcompile.quantize_(model, config, calibration=[torch.zeros(1, 1, dtype=torch.int64)], report=results.append)
    assert all("of 4 experts saw fewer tokens than their" in result.note for result in results)
    assert model(batches(1)[0]).logits.isfinite().all()


def test_interrupted(tmp_path, monkeypatch):
    """A calibration with experts goes on where it was, to the same result."""
    whole = quantized("mixtral", "gptq", calibration=batches())
    block, count = run_module._Calibration._block, []

    def stop(self, *arguments):
        if count:
            raise KeyboardInterrupt
        count.append(1)
        block(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run_module._Calibration, "_block", stop)
        with pytest.raises(KeyboardInterrupt):
            quantized("mixtral", "gptq", calibration=batches(), resume=tmp_path / "resume")
    results = []
    again = quantized("mixtral", "gptq", calibration=batches(), resume=tmp_path / "resume", report=results.append)
    assert len(results) == 4
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_nan():
    torch.manual_seed(0)
    model = make_moe("mixtral")
    model.model.layers[0].post_attention_layernorm.weight[3] = float("nan")
    config = {"rules": [{"layers": "*.experts", "scheme": {**INT3, "method": "gptq"}}]}
    with pytest.raises(CalibrationError, match=r"layers.0.mlp.experts.gate_up_proj: calibration gave it NaN"):
        qcompile.quantize_(model, config, calibration=batches())
