"""Mixtures of experts: from checkpoints whose experts lie apart, and quantized in place."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qcompile
from qcompile.checkpoint.loader import load
from qcompile.errors import CheckpointError, ConfigError, LayerError
from qcompile.experts import GroupedLinear, QuantizedExperts, expert_modules
from qcompile.reference import dequantize
from tests import tolerance
from tests.checkpoint.integer_files import Pack, awq_tensors, gptq_tensors, problem
from tests.checkpoint.layer_files import fp8_tensors
from tests.checkpoint.moe_files import FLOOR, check_same, experts_of, make_moe, parameter_of

EXPERTS_ONLY = {"rules": [{"layers": "*experts", "scheme": "mxfp4"}]}


def write(folder: Path, kind: str, config: dict[str, Any], pack: Pack) -> nn.Module:
    """A checkpoint as transformers saves it, except that `pack` makes the tensors of experts' layers from their names
    and (N, K), and the weights that those stand for; no tensors leave a layer as it is.

    Returns:
        transformers' model with those weights.
    """
    model = make_moe(kind)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    roles = {"w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", 0)}
    roles |= {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", 0)}
    for name in list(tensors):
        layer = name.removesuffix(".weight")
        if ".experts." not in name:
            continue
        packed, weight = pack(layer, tuple(tensors[name].shape))
        if not packed:
            continue
        del tensors[name]
        tensors |= {f"{layer}.{suffix}": tensor.contiguous() for suffix, tensor in packed.items()}
        path, expert, part = layer.rsplit(".", 2)
        projection, half = roles[part]
        rows = getattr(model.get_submodule(path.replace("block_sparse_moe", "mlp")), projection)[int(expert)]
        rows[half * weight.shape[0] : (half + 1) * weight.shape[0]] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "quantization_config": config}))
    return model


def gptq(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
    p = problem(4, *shape, 32)
    return gptq_tensors(p, 4), p.weight


def gptq_act_order(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
    """An order of columns for each layer, so that gate and up projections cannot be one product."""
    p = problem(4, *shape, 32, groups=(torch.arange(shape[1]) // 32)[torch.randperm(shape[1])])
    return gptq_tensors(p, 4), p.weight


def awq(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
    p = problem(4, *shape, 32)
    return awq_tensors(p), p.weight


def fp8(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
    """Tiles of 32 x 32, as DeepSeek's of 128 x 128."""
    return fp8_tensors(shape, (32, 32))


def nvfp4(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
    """As compressed-tensors has it: E2M1 codes, low nibbles first, E4M3 scales, the inverse of a scale of scales."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    codes = torch.randint(0, 16, shape)
    scale = (torch.rand(shape[0], shape[1] // 16) * 400 + 40).to(torch.float8_e4m3fn)
    whole = torch.tensor([2048.0])
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)
    weight = values[codes] * (scale.float() / whole).repeat_interleave(16, 1)
    return {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": whole}, weight


GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FP8_CONFIG = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
FP8_FLOOR = tolerance.float_sqnr_floor(3) - 9.1
"""8 products in a row have inputs in fp8; noises add up."""
NVFP4_CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "float",
                "strategy": "tensor_group",
                "group_size": 16,
                "symmetric": True,
            },
        }
    },
}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    ("config", "pack"),
    [
        (GPTQ_CONFIG, gptq),
        ({**GPTQ_CONFIG, "desc_act": True}, gptq_act_order),
        (AWQ_CONFIG, awq),
        (NVFP4_CONFIG, nvfp4),
    ],
    ids=["gptq", "gptq act-order", "awq", "nvfp4"],
)
def test_experts_apart(kind: str, config: dict[str, Any], pack: Pack, tmp_path: Path) -> None:
    expected = write(tmp_path, kind, config, pack)
    model = load(tmp_path, progress=False)
    check_same(model, expected)
    merged = "gate_up_proj" in dict(next(iter(experts_of(model).values())).named_children())
    assert merged == (pack is not gptq_act_order)


def test_fp8_experts_quantize_their_inputs(tmp_path: Path) -> None:
    expected = write(tmp_path, "qwen3_moe", FP8_CONFIG, fp8)
    model = load(tmp_path, progress=False)
    for experts in experts_of(model).values():
        assert str(experts.down_proj.scheme.activation) == "fp8_e4m3 dynamic per group 32"
    check_same(model, expected, FP8_FLOOR)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_unquantized_checkpoints_are_what_transformers_loads(kind: str, tmp_path: Path) -> None:
    model = make_moe(kind)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, progress=False)
    for (name, given), (_, expected) in zip(
        sorted(loaded.state_dict().items()), sorted(model.state_dict().items()), strict=True
    ):
        assert torch.equal(given, expected), name


def test_experts_that_a_method_left_stay_plain(tmp_path: Path) -> None:
    expected = write(tmp_path, "mixtral", GPTQ_CONFIG, lambda name, shape: ({}, torch.empty(0)))
    model = load(tmp_path, progress=False)
    for name, experts in experts_of(model).items():
        assert type(experts) is type(expected.get_submodule(name))
        assert torch.equal(experts.gate_up_proj, expected.get_submodule(name).gate_up_proj)


def only(*wanted: str) -> Pack:
    return lambda name, shape: gptq(name, shape) if any(part in name for part in wanted) else ({}, torch.empty(0))


def other_group(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
    p = problem(4, *shape, 16 if ".experts.2." in name else 32)
    return gptq_tensors(p, 4), p.weight


@pytest.mark.parametrize(
    ("pack", "message"),
    [
        (only("gate_proj", "up_proj"), r"mlp\.experts: down_proj of its experts is not quantized, but gate_up_proj is"),
        (only(".experts.0."), r"gate_proj is quantized for 1 of 4 experts"),
    ],
)
def test_experts_quantized_in_part_are_refused(pack: Pack, message: str, tmp_path: Path) -> None:
    write(tmp_path, "qwen3_moe", GPTQ_CONFIG, pack)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, progress=False)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    write(tmp_path, "qwen3_moe", GPTQ_CONFIG, gptq)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.experts.3.up_proj" not in name}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts: up_proj of expert 3 is missing"):
        load(tmp_path, progress=False)


@pytest.mark.parametrize("scheme", ["int4", "mxfp4", "fp8_weight_only"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_quantize_reaches_experts(kind: str, scheme: str) -> None:
    """The quantized model computes what the original does with the decoded weights."""
    model = make_moe(kind)
    expected = copy.deepcopy(model)
    config = {"ignore": ["*.self_attn.*", "lm_head"], "rules": [{"layers": "*.experts", "scheme": scheme}]}
    qcompile.quantize_(model, config, progress=False)
    for name, experts in experts_of(expected).items():
        loaded = model.get_submodule(name)
        assert isinstance(loaded, QuantizedExperts)
        for projection in ("gate_up_proj", "down_proj"):
            original = getattr(experts, projection)
            weight = parameter_of(loaded, projection, experts.is_transposed)
            assert 10 < tolerance.sqnr(original, weight) < 60
            original.copy_(weight)
    check_same(model, expected)


def test_from_pretrained_quantizes_experts_alike(tmp_path: Path) -> None:
    model = make_moe("qwen3_moe")
    model.save_pretrained(tmp_path)
    given = qcompile.TransformersConfig(EXPERTS_ONLY)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=given)
    qcompile.quantize_(model, EXPERTS_ONLY, progress=False)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert any(name.endswith("experts.down_proj.codes") for name in expected)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name


def test_saved_and_copied_experts_are_the_same() -> None:
    model, other = make_moe("gpt_oss"), make_moe("gpt_oss")
    for each in (model, other):
        qcompile.quantize_(each, EXPERTS_ONLY, progress=False)
    other.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 96, (1, 7))
    expected = model(tokens).logits
    assert torch.equal(other(tokens).logits, expected)
    assert torch.equal(copy.deepcopy(model)(tokens).logits, expected)
    halved = model.to(torch.bfloat16)(tokens).logits
    assert halved.dtype == torch.bfloat16
    # 60 operators in a row that round to bfloat16
    assert tolerance.sqnr(expected, halved) > -20 * torch.tensor(60 * 2.0**-8).log10().item()


def test_one_expert_can_be_taken_out() -> None:
    model = make_moe("mixtral")
    qcompile.quantize_(model, "int4", progress=False)
    projection = model.model.layers[0].mlp.experts.down_proj
    assert isinstance(projection, GroupedLinear)
    packed = projection.linear(2).weight
    packed.check()
    assert torch.equal(dequantize(packed), projection.weight[2])


def test_no_tokens() -> None:
    model = make_moe("gpt_oss")
    qcompile.quantize_(model, EXPERTS_ONLY, progress=False)
    nothing = torch.empty(0, 2)
    y = model.model.layers[0].mlp.experts(torch.empty(0, 64), nothing.long(), nothing)
    assert y.shape == (0, 64)


def test_static_activations_of_experts_need_a_stated_scale() -> None:
    model = make_moe("mixtral")
    with pytest.raises(LayerError, match=r"experts: static activation scales of experts"):
        qcompile.quantize_(model, {"rules": [{"layers": "*.experts", "scheme": "fp8_static"}]}, progress=False)
    stated = {
        "weight": {"format": "fp8_e4m3", "granularity": "tensor"},
        "activation": {"format": "fp8_e4m3", "dynamic": False, "scale": 0.01},
    }
    qcompile.quantize_(model, {"rules": [{"layers": "*.experts", "scheme": stated}]}, progress=False)
    assert model(torch.randint(0, 96, (1, 7))).logits.isfinite().all()


class StrangeExperts(nn.Module):
    """Experts in an arrangement of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(2, 4, 4))


def test_experts_of_unknown_arrangement_are_named() -> None:
    model = nn.Sequential(nn.Linear(64, 64), StrangeExperts())
    assert not expert_modules(model)
    with pytest.warns(UserWarning, match=r"1 \(StrangeExperts\) keeps its weights"):
        qcompile.quantize_(model, "int8", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qcompile.quantize_(model, {"rules": [{"layers": "0", "scheme": "int8", "optional": True}]}, progress=False)
    with pytest.raises(ConfigError, match="matches no layer"):
        qcompile.quantize_(model, {"rules": [{"layers": "*.experts", "scheme": "int8"}]})


@pytest.mark.usefixtures("fresh_dynamo")
def test_quantized_experts_compile_whole() -> None:
    model = make_moe("gpt_oss")
    qcompile.quantize_(model, EXPERTS_ONLY, progress=False)
    experts = model.model.layers[0].mlp.experts
    compiled = torch.compile(experts, backend="qcompile", fullgraph=True)
    x, weights, chosen = torch.randn(5, 64), torch.rand(5, 2), torch.rand(5, 4).topk(2).indices
    assert tolerance.sqnr(experts(x, chosen, weights), compiled(x, chosen, weights)) >= FLOOR


@pytest.mark.usefixtures("fresh_dynamo")
def test_explain_names_experts() -> None:
    model = make_moe("mixtral").model.layers[0].mlp
    x = torch.randn(1, 7, 64)
    left = qcompile.explain(model, x, config={"rules": [{"layers": "*", "scheme": "int4", "optional": True}]})
    assert [report.name for report in left.layers if "leaves experts" in report.note] == ["experts"]
    qcompile.quantize_(model, EXPERTS_ONLY, progress=False)
    told = {report.name: report for report in qcompile.explain(model, x).layers}
    assert told["experts.down_proj"].note == "4 experts"
    assert told["experts.gate_up_proj"].epilogue == ("silu(a)*b",)
