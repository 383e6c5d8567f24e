"""Saved models hold the very codes and scales, whoever reads them; what a format cannot hold is refused."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import qcompile
from qcompile.checkpoint.kv_scales import KVScales
from qcompile.checkpoint.saving import FORMATS, shards
from qcompile.checkpoint.saving.shards import parse_size
from qcompile.errors import CheckpointError, ConfigError
from qcompile.methods import CHECKPOINT
from qcompile.modules import QuantizedLinear
from qcompile.packed import PackedWeight
from qcompile.presets import PRESETS
from qcompile.scheme import Scheme
from qcompile.scheme_config import parse_scheme
from tests import oracle, tolerance
from tests.checkpoint.integer_files import FIXTURES, fixture_layers, fixture_tensors, read_layer
from tests.checkpoint.tiny_models import CT, llama, load, quantized, same, weights

transformers = pytest.importorskip("transformers")


class One(nn.Module):
    """A model of one linear, `m.l`."""

    def __init__(self, layer):
        super().__init__()
        self.m = nn.Module()
        self.m.l = layer


def one(weight: PackedWeight, scheme: Scheme | None = None, **more) -> One:
    return One(QuantizedLinear(weight, scheme or Scheme(weight=weight.scheme, method=CHECKPOINT), **more))


def random_layer(scheme: str | Scheme, n=64, k=128, **changes) -> One:
    """A layer of random weights; `changes` are of its weight's scheme."""
    chosen = PRESETS[scheme] if isinstance(scheme, str) else scheme
    chosen = replace(chosen, weight=replace(chosen.weight, **changes)).fit("m.l", (n, k))
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(1))
    return one(qcompile.reference.quantize_weight(weight, replace(chosen.weight, act_order=False)), chosen)


def reloaded(model: One, folder: Path) -> One:
    n, k = model.m.l.out_features, model.m.l.in_features
    return qcompile.load(folder, model=One(nn.Linear(k, n, bias=False)), dtype=torch.float32, progress=False)


INTEGERS = ["int2", "int3", "int4", "int4_asym", "int5", "int6", "int7", "int8_weight_only"]
FLOATS = ["fp8", "fp8_block", "fp8_weight_only", "nvfp4", "mxfp4", "mxfp8"]
MIXED = ["int8", "int4_fp8", "int4_int8", "int4_int4"]
GGUF = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "mxfp4", "int4", "int3"]


@pytest.mark.filterwarnings("ignore:.*NVFP4 global scales")
@pytest.mark.parametrize(
    ("scheme", "format"),
    [
        *((scheme, CT) for scheme in INTEGERS + FLOATS + MIXED),
        *((scheme, CT) for scheme in ("int4_24", "int8_24")),  # with all codes
        *((scheme, "gptq") for scheme in ("int2", "int3", "int4", "int4_asym", "int4_24")),
        *((scheme, "awq") for scheme in ("int4", "int4_asym")),
        *((scheme, "gguf") for scheme in GGUF),
    ],
)
def test_what_is_saved_is_what_is_loaded(scheme, format, tmp_path):
    model = quantized(scheme, num_hidden_layers=1)
    assert qcompile.save(model, tmp_path, format).rounded == ()
    same(model, load(tmp_path, format))


@pytest.mark.filterwarnings("ignore:.*NVFP4 global scales")
@pytest.mark.parametrize("scheme", [*INTEGERS, *FLOATS, *MIXED])
def test_transformers_reads_compressed_tensors(scheme, tmp_path):
    pytest.importorskip("compressed_tensors")
    model = quantized(scheme, num_hidden_layers=1)
    qcompile.save(model, tmp_path)
    config = transformers.CompressedTensorsConfig(dequantize=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=config, dtype=torch.float32
        )
    for name, expected in weights(model).items():
        found = read.get_submodule(name).weight
        # The library multiplies in the dtype of the scales; of NVFP4 in bfloat16, with a quotient of scales.
        dtype = {"float8_e4m3fn": torch.bfloat16}.get(model.get_submodule(name).scheme.weight.scale_dtype)
        scale_dtype = model.get_submodule(name).scale.dtype
        if dtype is None and scale_dtype in (torch.bfloat16, torch.float32):
            assert torch.equal(found, expected.to(scale_dtype).to(found.dtype)), name
        else:
            bound = expected.abs() * tolerance.gamma(3, tolerance.unit(torch.bfloat16))
            tolerance.assert_within(found, expected, bound + tolerance.eta(torch.bfloat16))


def tensors_of(folder):
    return {n.removeprefix("m.l."): t for n, t in load_file(folder / "model.safetensors").items()}


GPTQMODEL = [
    entry
    for entry in fixture_layers("gptq", "gptqmodel", "autoround")
    if entry[2].get("pack_dtype", "int32") == "int32"
    and entry[2]["bits"] in (2, 3, 4, 8)
    and not any(word in entry[1] for word in ("planar", "awq", "negative"))
]


@pytest.mark.parametrize(("file", "name", "config"), GPTQMODEL, ids=[name for _, name, _ in GPTQMODEL])
def test_gptq_files_are_those_of_the_producers(file, name, config, tmp_path):
    stored = fixture_tensors(file, name)
    layer = read_layer(FIXTURES / file, config, tuple(stored["codes"].shape), name=name)
    qcompile.save(one(layer.weight), tmp_path, "gptq")
    written = tensors_of(tmp_path)
    assert torch.equal(written["qweight"], stored["qweight"])
    assert torch.equal(written["scales"], stored["scales"].half())
    if "g_idx" in stored:
        assert torch.equal(written["g_idx"], stored["g_idx"].to(torch.int32))
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    packing = config.get("packing_format", "")
    original = config.get("checkpoint_format", "gptq" if packing.endswith("auto_gptq") else "gptq_v2")
    if described["checkpoint_format"] == original:
        assert torch.equal(written["qzeros"], stored["qzeros"])
    assert {k: described[k] for k in ("bits", "group_size", "sym")} == {
        "bits": config["bits"],
        "group_size": config["group_size"],
        "sym": config["sym"],
    }
    assert torch.equal(weights(reloaded(one(layer.weight), tmp_path))["m.l"], oracle.dequantize(layer.weight))


def test_gptq_of_version_1_unless_a_zero_point_is_0(tmp_path):
    layer = random_layer("int4_asym", scale_dtype="float16")
    weight = layer.m.l.logical()
    for at, (zero, version) in enumerate([(1, "gptq"), (0, "gptq_v2")]):
        changed = one(replace(weight, zero_point=weight.zero_point.clamp(min=1).index_fill(0, torch.tensor([3]), zero)))
        folder = tmp_path / str(at)
        qcompile.save(changed, folder, "gptq")
        assert json.loads((folder / "config.json").read_text())["quantization_config"]["checkpoint_format"] == version
        assert torch.equal(weights(reloaded(changed, folder))["m.l"], weights(changed)["m.l"])


AUTOAWQ = [entry for entry in fixture_layers("awq", "autoawq") if entry[2]["version"] == "gemm"]


@pytest.mark.parametrize(("file", "name", "config"), AUTOAWQ, ids=[name for _, name, _ in AUTOAWQ])
def test_awq_files_are_those_of_autoawq(file, name, config, tmp_path):
    stored = fixture_tensors(file, name)
    shape = (stored["qweight"].shape[1] * 8, stored["qweight"].shape[0])
    layer = read_layer(FIXTURES / file, config, shape, name=name)
    qcompile.save(one(layer.weight), tmp_path, "awq")
    written = tensors_of(tmp_path)
    for suffix in ("qweight", "qzeros", "scales"):
        assert torch.equal(written[suffix], stored[suffix]), suffix


@pytest.mark.parametrize("format", [CT, "gptq"])
def test_columns_sorted_by_group(format, tmp_path):
    perm = torch.randperm(128, generator=torch.Generator().manual_seed(2)).to(torch.int32)
    # Within a group columns stay in order: files say which group a column has, not its place there.
    perm = torch.cat([part.sort().values for part in perm.split(64)])
    for asymmetric in (False, True):
        model = random_layer("int4_asym" if asymmetric else "int4", flexible_group=False, scale_dtype="float16")
        own = model.m.l.logical()
        own = replace(own, scheme=replace(own.scheme, act_order=True), perm=perm)
        folder = tmp_path / str(asymmetric)
        qcompile.save(one(own), folder, format)
        assert torch.equal(weights(reloaded(model, folder))["m.l"], oracle.dequantize(own))


def test_tiles_of_fp8_with_scales_that_are_powers_of_two(tmp_path):
    model = random_layer(
        Scheme(weight=replace(PRESETS["fp8_block"].weight, scale_dtype="float8_e8m0fnu"), method=CHECKPOINT), 200, 300
    )
    qcompile.save(model, tmp_path)
    assert torch.equal(weights(reloaded(model, tmp_path))["m.l"], weights(model)["m.l"])


def test_layers_of_several_schemes(tmp_path):
    rules = [
        {"layers": "*.0.mlp.*", "scheme": "int8_weight_only"},
        {"layers": "*.o_proj", "scheme": None},
        {"layers": "lm_head", "scheme": "fp8"},
        {"layers": "*", "scheme": "int4_asym"},
    ]
    model = qcompile.quantize_(llama(), {"rules": rules}, progress=False)
    qcompile.save(model, tmp_path / "ct")
    same(model, load(tmp_path / "ct"))
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert config["ignore"] == [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]

    integers = {"weight": {"format": "int8", "group_size": 64, "scale_dtype": "float16"}}
    rules = [rules[1], {"layers": "*.0.mlp.*", "scheme": integers}, {"layers": "*", "scheme": "int4"}]
    model = qcompile.quantize_(llama(), {"rules": rules}, progress=False)
    qcompile.save(model, tmp_path / "gptq", "gptq")
    same(model, load(tmp_path / "gptq"))
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert config["lm_head"] is True
    for name, settings in config["dynamic"].items():
        assert name.startswith("-:") == (settings == {})
    with pytest.raises(CheckpointError, match="no integer of 4 bits"):
        qcompile.save(model, tmp_path / "awq", "awq")


def test_rules_also_name_what_vllm_fuses(tmp_path):
    """vLLM reads gate_proj and up_proj as gate_up_proj, and looks for the settings of that."""
    eight = {"weight": {"format": "int8", "group_size": 64, "scale_dtype": "float16"}}
    rules = [{"layers": "lm_head", "scheme": None}, {"layers": "*.0.mlp.*", "scheme": eight}]
    four = {"weight": {"format": "int4", "group_size": 64, "scale_dtype": "float16"}}
    model = qcompile.quantize_(llama(), {"rules": [*rules, {"layers": "*", "scheme": four}]}, progress=False)
    qcompile.save(model, tmp_path, "gptq")
    dynamic = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["dynamic"]
    for name in ("gate_proj", "up_proj", "gate_up_proj", "down_proj"):
        found = [v for k, v in dynamic.items() if re.match(k.removeprefix("+:"), f"model.layers.0.mlp.{name}")]
        assert found == [{"bits": 8, "group_size": 64, "desc_act": False}]
    assert len(dynamic) == 4
    same(model, load(tmp_path))


@pytest.mark.parametrize("head", [None, "int4"])
def test_a_quantized_head_is_a_target_by_name(head, tmp_path):
    """To vLLM it is no Linear."""
    rules = [{"layers": "lm_head", "scheme": head}, {"layers": "*", "scheme": "int4"}]
    model = qcompile.quantize_(llama(num_hidden_layers=1), {"rules": rules}, progress=False)
    qcompile.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["targets"] == (["Linear", "lm_head"] if head else ["Linear"])
    assert config["ignore"] == ([] if head else ["lm_head"])
    same(model, load(tmp_path))


def test_global_scales_that_vllm_would_fuse_are_told(tmp_path):
    model = quantized("nvfp4", num_hidden_layers=2)
    with pytest.warns(
        UserWarning, match=r"layers\.0\.self_attn\.q_proj, .*v_proj, and layers of 3 more sets, have NVFP4.*vLLM"
    ):
        qcompile.save(model, tmp_path / "apart")
    weight = model.model.layers[0].self_attn.q_proj.weight.clone()
    plain = llama(num_hidden_layers=1)
    for name, linear in plain.named_modules():
        if isinstance(linear, nn.Linear) and name != "lm_head":
            linear.weight.data.fill_(0.5)[0, 0] = weight.abs().max()
    rules = [{"layers": "lm_head", "scheme": None}, {"layers": "*", "scheme": "nvfp4"}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qcompile.save(qcompile.quantize_(plain, {"rules": rules}, progress=False), tmp_path / "alike")


def test_biases_and_a_static_input_scale(tmp_path):
    scheme = {
        "weight": {"format": "fp8_e4m3", "granularity": "tensor"},
        "activation": {"format": "fp8_e4m3", "dynamic": False, "scale": 0.125},
    }
    model = qcompile.quantize_(llama(attention_bias=True), scheme, progress=False)
    qcompile.save(model, tmp_path)
    again = load(tmp_path)
    same(model, again)
    assert again.lm_head.input_scale == 0.125


def test_a_head_that_was_tied_is_not_any_more(tmp_path):
    model = qcompile.quantize_(llama(tie_word_embeddings=True), "int8_weight_only", progress=False)
    qcompile.save(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    same(model, load(tmp_path))


def test_a_tied_head_is_saved_once(tmp_path):
    model = quantized("int4", tie_word_embeddings=True)
    qcompile.save(model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    same(model, load(tmp_path))


@pytest.mark.parametrize("shape", [(), (2,)], ids=["tensor", "heads"])
def test_scales_of_the_kv_cache(shape, tmp_path):
    model = quantized("fp8")
    attention = model.model.layers[1].self_attn
    attention.kv_scales = KVScales(torch.full(shape, 0.5), torch.full(shape, 0.25))
    qcompile.save(model, tmp_path / "ct")
    found = load(tmp_path / "ct").model.layers[1].self_attn.kv_scales
    assert torch.equal(found.k_scale, attention.kv_scales.k_scale)
    assert torch.equal(found.v_scale, attention.kv_scales.v_scale)
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["strategy"] == ("attn_head" if shape else "tensor")
    model = quantized("int4")
    model.model.layers[1].self_attn.kv_scales = attention.kv_scales
    for format in ("gptq", "gguf"):
        with pytest.raises(CheckpointError, match=r"self_attn: .*KV cache"):
            qcompile.save(model, tmp_path / format, format)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("format", [CT, "gptq"])
def test_experts(kind, format, tmp_path):
    moe = {"num_local_experts": 3, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    model = llama(kind, **moe, num_hidden_layers=1, head_dim=32)
    rules = [{"layers": "lm_head", "scheme": None}, {"layers": "*", "scheme": "int4"}]
    model = qcompile.quantize_(model, {"rules": rules}, progress=False)
    qcompile.save(model, tmp_path, format)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert sum(bool(re.search(r"experts\.2\.(w[123]|(gate|up|down)_proj)\.", name)) for name in names) >= 9
    again = load(tmp_path)
    x = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)


REFUSED = [
    ("nf4", {}, "gptq", ["no integer", "bitsandbytes"]),
    ("nf4", {}, CT, ["nf4", "bitsandbytes"]),
    ("int8_weight_only", {}, "gptq", ["not exact in float16", "allow_rounding", CT]),
    ("int4", {"format": qcompile.formats.get_format("int5")}, "gptq", ["no integer of 2 or 3 or 4 or 8", CT]),
    ("int4_asym", {}, "gguf", ["zero point", CT, "gptq", "awq"]),
    ("q4_1", {}, "gptq", ["float offsets", "gguf"]),
    ("fp8", {}, "awq", ["inputs are quantized", CT]),
    ("fp8_block", {}, "gguf", ["fp8_e4m3", CT]),
    ("mxfp4", {}, "gptq", ["fp4_e2m1", CT, "gguf"]),
    ("int4", {"rotated": True}, CT, ["turned", "rotated"]),
    ("q4_0", {"rotated": True}, "gguf", ["turned", "rotated"]),
    ("nf4", {"rotated": True}, "bitsandbytes", ["nf4"]),
]


@pytest.mark.parametrize(("scheme", "changes", "format", "words"), REFUSED)
def test_what_a_format_cannot_hold_is_refused(scheme, changes, format, words, tmp_path):
    rules = [
        {"layers": "*.up_proj", "scheme": replace(PRESETS[scheme], weight=replace(PRESETS[scheme].weight, **changes))}
    ]
    model = qcompile.quantize_(llama(num_hidden_layers=1), {"rules": rules}, progress=False)
    with pytest.raises(CheckpointError) as error:
        qcompile.save(model, tmp_path / "new", format)
    for word in ["model.layers.0.mlp.up_proj", *words]:
        assert word in str(error.value), word
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"group_size": 64}])
def test_activations_of_4_bits(symmetric, sizes, tmp_path):
    activation = {"format": "int4", "symmetric": symmetric, **sizes}
    model = random_layer(parse_scheme({"weight": {"format": "int4", "group_size": 64}, "activation": activation}))
    qcompile.save(model, tmp_path)
    x = torch.randn(3, 128)
    again = reloaded(model, tmp_path)
    assert again.m.l.scheme.activation == model.m.l.scheme.activation
    assert torch.equal(again.m.l(x), model.m.l(x))


def test_scales_before_the_input_are_refused_everywhere(tmp_path):
    model = random_layer("int4")
    model.m.l = QuantizedLinear(model.m.l.logical(), model.m.l.scheme, pre_quant_scale=torch.ones(128))
    for format in set(FORMATS) - {"gguf"}:
        with pytest.raises(CheckpointError, match=r"m\.l: .*(pre_quant_scale|nf4)"):
            qcompile.save(model, tmp_path, format)


@pytest.mark.parametrize("format", ["gptq", "gguf"])
def test_rounding_is_told(format, tmp_path):
    model = quantized("int8_weight_only")
    with pytest.warns(UserWarning, match="14 layers were rounded"):
        report = qcompile.save(model, tmp_path, format, allow_rounding=True)
    assert len(report.rounded) == 14
    assert 0 < max(entry.error for entry in report.rounded) <= tolerance.unit(torch.float16)
    again = load(tmp_path, format)
    for name, expected in weights(model).items():
        weight = model.get_submodule(name).logical()
        rounded = replace(weight, scale=weight.scale.half().float())
        assert torch.equal(weights(again)[name], oracle.dequantize(rounded)), name
        assert not torch.equal(weights(again)[name], expected)


def test_scales_that_overflow_are_refused_even_so(tmp_path):
    model = random_layer("int4")
    weight = model.m.l.logical()
    large = one(replace(weight, scale=weight.scale * 2.0**40))
    with pytest.raises(CheckpointError, match="leave the range of float16"):
        qcompile.save(large, tmp_path, "gptq", allow_rounding=True)


def test_shards(tmp_path):
    model = quantized("int4")
    report = qcompile.save(model, tmp_path, max_shard_size="100KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert {path.name for path in report.files} == {path.name for path in tmp_path.iterdir()}
    assert report.files[-1].name == "config.json"
    for file in files:
        tensors = load_file(tmp_path / file)
        assert {n for n, f in index["weight_map"].items() if f == file} == set(tensors)
        assert len(tensors) == 1 or sum(t.numel() * t.element_size() for t in tensors.values()) <= 100_000
    assert index["metadata"]["total_size"] == sum(
        t.numel() * t.element_size() for file in files for t in load_file(tmp_path / file).values()
    )
    same(model, load(tmp_path))


def test_nothing_is_left_of_a_failure(tmp_path, monkeypatch):
    written = []

    def fails(tensors, path, metadata):
        if written:
            raise OSError("disk full")
        written.append(path)
        path.write_bytes(b"")

    monkeypatch.setattr(shards, "save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        qcompile.save(quantized("int4"), tmp_path, max_shard_size="100KB")
    assert written
    assert list(tmp_path.iterdir()) == []


def test_folders(tmp_path):
    model = random_layer("int4")
    qcompile.save(model, tmp_path / "a" / "b")
    with pytest.raises(CheckpointError, match=r"b: holds model\.safetensors already"):
        qcompile.save(model, tmp_path / "a" / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        qcompile.save(model, tmp_path / "file")
    with pytest.raises(CheckpointError, match="no quantized layers"):
        qcompile.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "c")
    with pytest.raises(ConfigError, match="gptq"):
        qcompile.save(model, tmp_path / "c", "gtpq")


@pytest.mark.parametrize(("given", "size"), [(7, 7), ("7", 7), ("5GB", 5 * 10**9), ("10 mb", 10**7), ("3K", 3000)])
def test_sizes(given, size):
    assert parse_size(given) == size


@pytest.mark.parametrize("given", [0, -1, True, 1.5, "", "GB", "5XB", "-5GB", "5.5GB", None])
def test_sizes_that_are_none(given):
    with pytest.raises(ConfigError, match="max_shard_size"):
        parse_size(given)
