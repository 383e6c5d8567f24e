"""Two processes on the CPU against one: layers bit for bit, whole models, and what each process keeps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import qcompile
from qcompile.errors import ConfigError, LayerError
from qcompile.modules import QuantizedLinear
from qcompile.presets import PRESETS
from tests.parallel import work
from tests.parallel.ranks import Ranks
from tests.parallel.test_parts import CPU, ordered, quantized
from tests.tolerance import chain_sqnr_floor, rewrite_sqnr_floor, sqnr, sqnr_floor

pytest.importorskip("transformers")
from tests.checkpoint import integer_files, tiny_models

if not torch.distributed.is_available():
    pytest.skip("torch has no distributed package", allow_module_level=True)

OPERATORS = 2 * 24 + 4
"""Of a tiny model's two layers, embedding, last norm and head, one after the other, at most."""
FLOOR = rewrite_sqnr_floor(OPERATORS, 256)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    found = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield found
    found.close()


def test_sums(ranks):
    x = torch.randn(2, 100)
    for found in ranks.call(work.sums, x):
        assert torch.equal(found, (x[0] + x[1]).expand(20, -1))


@pytest.mark.parametrize("style", ["rowwise", "rowwise_split_input", "colwise_gather_output"])
def test_layers(ranks, style):
    """The sum, or the rows, of two parts that one process computes; for one scheme of each kind of activations."""
    linears = {name: quantized(PRESETS[name], (256, 512)) for name in ("int8", "q4_k")}
    linears["act_order"] = ordered(quantized(PRESETS["int8"], (256, 512)))
    x = torch.randn(3, 512)
    first, second = ranks.call(work.layers, linears, x, style)
    for name, linear in linears.items():
        y = work.Parts(linear, style, 2, CPU)(x)
        assert torch.equal(first[name], y), name
        assert torch.equal(second[name], y), name


@pytest.mark.parametrize("arranged", ["turned", "ordered"])
def test_inputs_that_are_arranged(ranks, arranged):
    """Against the whole layer, which turns all inputs, or orders them."""
    linear = quantized(PRESETS["int8_weight_only"], (256, 512))
    if arranged == "ordered":
        linear = ordered(linear)
    else:
        scheme = replace(linear.weight.scheme, rotated=True)
        linear = replace(linear.with_weight(replace(linear.weight, scheme=scheme)), pre_quant_scale=None)
    x = torch.randn(3, 512)
    y = QuantizedLinear.of(linear)(x)
    for found in ranks.call(work.layers, {"fc": linear}, x, "rowwise"):
        assert sqnr(y, found["fc"]) >= rewrite_sqnr_floor(2, 512)


SCHEMES = {
    "int4": {"weight": {"format": "int4", "group_size": 32}},
    "uint4": {"weight": {"format": "uint4", "symmetric": False, "group_size": 32}},
    "int8": "int8",
    "fp8": "fp8",
}
WIDE = {"hidden_size": 512, "intermediate_size": 512}


MODELS = {
    "llama": {"tie_word_embeddings": True},
    "gpt2": {"n_embd": 128, "n_head": 4, "n_inner": 256},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32},
    "phi3": {"pad_token_id": 0},
}
PLANS = {
    "gpt2": {"*.mlp.c_fc": "colwise", "*.mlp.c_proj": "rowwise"},
    "gpt_oss": {
        "*.[qkv]_proj": "colwise", "*.o_proj": "rowwise", "*.sinks": "colwise", "*.experts": "moe_tp_experts",
    },
}  # fmt: skip


def gptq(folder):
    """Columns of codes in an order of their own in each layer."""

    def pack(name, shape):
        p = integer_files.problem(
            4, *shape, 32, symmetric=False, groups=(torch.arange(shape[1]) // 32)[torch.randperm(shape[1])]
        )
        return integer_files.gptq_tensors(p, 4), p.weight

    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": True}
    integer_files.write_llama(folder, config, pack, num_key_value_heads=2, vocab_size=320)


def checkpoint(kind, folder):
    """The path of a checkpoint of a tiny model: of a family, and a scheme or a format."""
    family, name = kind.split()
    if name == "gptq":
        gptq(folder)
    elif name == "q4_k":
        qcompile.save(tiny_models.quantized("q4_k", kind=family, **WIDE), folder, "gguf")
        return folder / "model.gguf"
    else:
        model = tiny_models.quantized(SCHEMES[name], kind=family, **MODELS.get(family, {}))
        qcompile.save(model, folder / "model", tiny_models.CT)
        return folder / "model"
    return folder


def load(path):
    return qcompile.load(path, dtype=torch.float32, progress=False)


KINDS = ["llama int4", "qwen2 uint4", "llama gptq", "llama q4_k", "mixtral int4"]


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints(ranks, kind, tmp_path):
    path = checkpoint(kind, tmp_path)
    whole = work.outputs(load(path), kv="fp8")
    first, second = ranks.call(work.loaded, path, torch.float32, {"kv": "fp8"})
    assert whole["heads"] == 2
    for found in (first, second):
        assert sqnr(whole["logits"], found["logits"]) >= FLOOR
        assert torch.equal(found["tokens"], whole["tokens"])
        assert found["heads"] == 1
        assert found["bytes"] < 0.52 * whole["bytes"]
    assert torch.equal(first["logits"], second["logits"])


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_checkpoints_that_are_not_quantized(ranks, kind, tmp_path):
    """Of a mixture experts stay whole then."""
    model = tiny_models.llama(kind, **MODELS[kind])
    model.save_pretrained(tmp_path)
    whole = work.outputs(model)
    for found in ranks.call(work.loaded, tmp_path, torch.float32, {}):
        assert sqnr(whole["logits"], found["logits"]) >= FLOOR
        assert torch.equal(found["tokens"], whole["tokens"])


@pytest.mark.parametrize("kind", ["llama int8", "qwen2 fp8"])
def test_inputs_have_scales_of_their_part(ranks, kind, tmp_path):
    path = checkpoint(kind, tmp_path)
    expected = work.outputs(work.in_parts(load(path), 2))
    for found in ranks.call(work.loaded, path, torch.float32, {}):
        assert torch.equal(found["logits"], expected["logits"])
        assert torch.equal(found["tokens"], expected["tokens"])


def test_compiled(ranks, tmp_path):
    path = checkpoint("qwen2 uint4", tmp_path)
    whole = work.outputs(load(path))
    first, second = ranks.call(work.loaded, path, torch.float32, {"compiled": True})
    assert sqnr(whole["logits"], first["logits"]) >= FLOOR
    assert torch.equal(first["logits"], second["logits"])


@pytest.mark.parametrize("scheme", [None, "int4"])
@pytest.mark.parametrize("kind", MODELS)
def test_models(ranks, kind, scheme):
    """Those in memory, quantized or not."""
    torch.manual_seed(0)
    model = tiny_models.llama(kind, **MODELS[kind])
    if scheme is not None:
        rules = [{"layers": "lm_head", "scheme": None}, {"layers": "*", "scheme": SCHEMES["int4"]}]
        qcompile.quantize_(model, {"rules": rules}, progress=False)
    whole = work.outputs(model)
    first, second = ranks.call(work.parallelized, model, PLANS.get(kind), {})
    for found in (first, second):
        assert sqnr(whole["logits"], found["logits"]) >= FLOOR
        assert torch.equal(found["tokens"], whole["tokens"])
    assert torch.equal(first["logits"], second["logits"])
    assert (scheme is None) == ("Quantized" not in first["text"])


def test_what_is_divided_may_be_quantized_by_the_compiler(ranks):
    """With scales of each part's own."""
    model = tiny_models.llama()
    whole = work.outputs(model)
    config = {"rules": [{"layers": "*.layers.*", "scheme": "int8_weight_only"}]}
    first, second = ranks.call(work.parallelized, model, None, {"compiled": True, "config": config})
    assert torch.equal(first["logits"], second["logits"])
    assert chain_sqnr_floor(sqnr_floor("int8", 256), 8) <= sqnr(whole["logits"], first["logits"]) < FLOOR


def test_mistakes_are_those_of_all(ranks, tmp_path):
    """None waits for another."""
    model = tiny_models.quantized("int4")  # groups of 128, of 128 and 256 columns
    qcompile.save(model, tmp_path / "model", tiny_models.CT)
    calls = ((work.loaded, (tmp_path / "model", torch.float32, {})), (work.parallelized, (model, None, {})))
    for function, args in calls:
        with pytest.raises(LayerError, match=r"o_proj: 2 parts of 128 columns divide its groups of 128 columns"):
            ranks.call(function, *args)
    with pytest.raises(ConfigError, match="the model is on meta, and its mesh is of cpu"):
        ranks.call(work.loaded_to, tmp_path / "model", "meta")
