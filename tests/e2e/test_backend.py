"""`torch.compile(..., backend="qcompile")` on whole models, through Inductor or counted without it."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcompile
from qcompile import backend, compat
from qcompile.errors import ConfigError, GradientError, WeightReleasedError
from qcompile.flags import flags
from qcompile.linear_spec import decode_spec
from tests import tolerance

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class MLP(nn.Module):
    def __init__(self, width=64, hidden=128):
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """A vision transformer's block."""

    def __init__(self, width=64, heads=4):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(batch, length, width)
        x = x + self.proj(attended)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def compiled(model, config=None, **options):
    return torch.compile(
        model, backend="qcompile", fullgraph=True, options={"config": config, **options} if config else options
    )


FLOORS = {"int8": 30.0, "int4": 12.0, "int4_asym": 12.0, "fp8": 20.0, "int3": 6.0}
"""Least SQNR in dB of a small model's output: its weights' (`tolerance.sqnr_floor`) less 6 dB for two layers deep."""


@pytest.mark.parametrize("preset", ["int8", "int4", "int4_asym", "fp8", "int3"])
def test_mlp_through_inductor(preset):
    model, x = nn.Sequential(MLP(), MLP()).eval(), torch.randn(5, 64)
    with torch.no_grad():
        fast = compiled(model, preset)
        assert tolerance.sqnr(model(x), fast(x)) > FLOORS[preset]
        assert tolerance.sqnr(model(x[:2]), fast(x[:2])) > FLOORS[preset]


def test_cpp_wrapper():
    """Nothing of a call is Python then; operators' lists, strings and tensors that are not there are passed by C++."""
    model, x = Block().eval(), torch.randn(2, 9, 64)
    with torch.no_grad():
        assert torch.equal(compiled(model, "int8", cpp_wrapper=True)(x), compiled(model, "int8")(x))


def test_vit_block_through_inductor():
    model, x = Block().eval(), torch.randn(2, 9, 64)
    with torch.no_grad():
        assert tolerance.sqnr(model(x), compiled(model, "int8")(x)) > 30.0


def test_found_without_an_import():
    code = (
        "import torch; m = torch.nn.Sequential(torch.nn.Linear(32, 32)).requires_grad_(False);"
        "f = torch.compile(m, backend='qcompile', options={'config': 'int8'}); print(f(torch.ones(2, 32)).shape)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "torch.Size([2, 32])" in result.stdout


def without_inductor(monkeypatch):
    """Count compilations, and run the rewritten graphs as they are."""
    count = []

    def run_as_is(graph, inputs, options):
        count.append(options)
        return graph.forward

    monkeypatch.setattr(compat, "compile_with_inductor", run_as_is)
    return count


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"mode": "reduce-overhead"}, {"triton.cudagraphs": True}),
        ({"max_autotune": True}, {"max_autotune": True}),
        ({"mode": "default"}, {}),
    ],
)
def test_modes_and_inductor_options_pass_through(monkeypatch, options, expected):
    count = without_inductor(monkeypatch)
    with torch.no_grad():
        compiled(MLP(), "int8", **options)(torch.randn(2, 64))
    assert count[0] == expected


def test_mode_argument(monkeypatch):
    count = without_inductor(monkeypatch)
    model = qcompile.quantize_(MLP(), "int8")
    with torch.no_grad():
        torch.compile(model, backend="qcompile", mode="max-autotune-no-cudagraphs")(torch.randn(2, 64))
    assert count[0]["max_autotune"] is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confg": "int4"}, "unknown option 'confg'; did you mean config"),
        ({"config": "int44"}, "unknown scheme 'int44'; did you mean int4"),
        ({"mode": "fast"}, "unknown mode 'fast'"),
        ({"free_weights": "yes"}, "free_weights must be true or false"),
        ({"tune": 1}, "tune must be true or false"),
    ],
)
def test_mistakes_in_options(options, message):
    with pytest.raises(ConfigError, match=message):
        backend.parse_options(options, None)


@pytest.mark.parametrize("dynamic", [False, True])
def test_tuning_times_each_linear_before_it_is_compiled(monkeypatch, dynamic):
    """Those of a known number of rows at once, others when they are called, while the flag is set."""
    timed, tuning = [], []

    def compile_with_inductor(graph, inputs, options):
        def call(*args):
            tuning.append(flags.tune)
            return graph.forward(*args)

        return call

    monkeypatch.setattr(compat, "compile_with_inductor", compile_with_inductor)
    monkeypatch.setattr(backend.ops, "tune", lambda spec, *rest: timed.append((decode_spec(spec).shape, *rest)))
    x = torch.randn(2, 5, 64)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 1)
    with torch.no_grad():
        fast = compiled(MLP(), "int8", tune=True)
        fast(x)
        fast(x)
    rest = (10, torch.float32, torch.device("cpu"))
    assert timed == ([] if dynamic else [((256, 64), *rest), ((64, 128), *rest)])
    assert tuning == [True, True]
    assert not flags.tune


def test_new_lengths_recompile_no_more_than_without_qcompile(monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    count = without_inductor(monkeypatch)

    def plain(graph, inputs, **_):
        count.append(None)
        return graph.forward

    @torch.no_grad()
    def calls(function, static):
        torch.compiler.reset()
        count.clear()
        outputs = []
        for length in (8, 13, 15, 8):
            cache = (
                transformers.StaticCache(config=config, max_cache_len=32)
                if static
                else transformers.DynamicCache(config=config)
            )
            torch.manual_seed(length)
            ids = torch.randint(0, 128, (2, length))
            outputs.append(function(input_ids=ids, past_key_values=cache).logits)
            for step in range(3):
                position = torch.full((2, 1), length + step)
                outputs.append(function(input_ids=ids[:, :1], past_key_values=cache, position_ids=position).logits)
        return len(count), outputs

    for static in (True, False):
        reference, expected = calls(torch.compile(model, backend=plain, fullgraph=True), static)
        ours, outputs = calls(compiled(model, "int8"), static)
        assert ours <= reference
        for out, ref in zip(outputs, expected, strict=True):
            assert tolerance.sqnr(ref, out) > 25.0


def test_gpt2_through_conv1d(monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    without_inductor(monkeypatch)
    ids = torch.randint(0, 128, (2, 7))
    explanation = qcompile.explain(model, input_ids=ids, config="int8")
    assert [layer.name for layer in explanation.layers][:4] == [
        f"transformer.h.0.{n}" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert explanation.layers[3].epilogue == ("bias", "add")
    with torch.no_grad():
        assert tolerance.sqnr(model(ids).logits, compiled(model, "int8")(ids).logits) > 25.0
        quantized = qcompile.quantize_(copy.deepcopy(model), "int8")
        assert tolerance.sqnr(model(ids).logits, quantized(ids).logits) > 25.0


def test_two_instances_and_a_replaced_weight_are_never_confused(monkeypatch):
    """Dynamo does not guard a parameter's identity, so one graph serves several modules."""
    count = without_inductor(monkeypatch)
    models, x = [MLP().eval() for _ in range(6)], torch.randn(3, 64)
    for model in models:
        model.compile(backend="qcompile", options={"config": "int8"})
    with torch.no_grad():
        for model in models:
            assert tolerance.sqnr(MLP.forward(model, x), model(x)) > 30.0
        assert len(count) == 1
        models[0].down.weight = nn.Parameter(torch.randn(64, 128))
        assert tolerance.sqnr(MLP.forward(models[0], x), models[0](x)) > 30.0
        models[1].up.weight.mul_(3.0)
        assert tolerance.sqnr(MLP.forward(models[1], x), models[1](x)) > 30.0
        models[2].up.weight.data = torch.randn(128, 64)
        assert tolerance.sqnr(MLP.forward(models[2], x), models[2](x)) > 30.0


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.inner = nn.Embedding(96, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 96, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.inner(self.inner(self.embed(ids))))


@pytest.mark.parametrize("prepare", [False, True])
def test_tied_weights_and_a_layer_called_twice(monkeypatch, prepare):
    without_inductor(monkeypatch)
    model, ids = Tied().eval(), torch.randint(0, 96, (2, 5))
    with torch.no_grad():
        expected = model(ids)
        before = model.embed.weight.clone()
        fast = compiled(qcompile.quantize_(model, "int8")) if prepare else compiled(model, "int8")
        assert tolerance.sqnr(expected, fast(ids)) > 30.0
        assert torch.equal(model.embed.weight, before)


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (2, 1, 3, 64), (0, 64), (2, 0, 64)])
def test_inputs_of_every_rank(monkeypatch, shape):
    without_inductor(monkeypatch)
    model, x = MLP().eval(), torch.randn(shape)
    with torch.no_grad():
        out = compiled(model, "int8")(x)
        assert out.shape == x.shape
        if x.numel():
            assert tolerance.sqnr(model(x), out) > 30.0


def test_strided_inputs_and_weights(monkeypatch):
    without_inductor(monkeypatch)
    model = MLP().eval()
    model.up.weight = nn.Parameter(torch.randn(64, 256).t()[::2] / 8)
    x = torch.randn(64, 6).t()[::2]
    with torch.no_grad():
        assert tolerance.sqnr(model(x), compiled(model, "int8")(x)) > 30.0


def test_autocast_and_half_precision(monkeypatch):
    without_inductor(monkeypatch)
    model, x = MLP().eval(), torch.randn(3, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, out = model(x), compiled(model, "int8")(x)
    assert out.dtype == expected.dtype
    assert tolerance.sqnr(expected, out) > 30.0
    half = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        assert tolerance.sqnr(half(x.bfloat16()), compiled(half, "int8")(x.bfloat16())) > 30.0


def test_gradients_are_refused():
    model = MLP()
    with pytest.raises(Exception, match=r"torch\.no_grad\(\)") as caught:
        compiled(model, "int8")(torch.randn(2, 64))
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), GradientError)


def test_free_weights(monkeypatch):
    without_inductor(monkeypatch)
    model, x = MLP().eval(), torch.randn(3, 64)
    with torch.no_grad():
        expected = model(x)
        fast = compiled(model, "int8", free_weights=True)
        for _ in range(2):
            assert tolerance.sqnr(expected, fast(x)) > 30.0
        assert tolerance.sqnr(expected[:2], fast(x[:2])) > 30.0
        assert tolerance.sqnr(expected, model(x)) > 30.0
    assert model.up.weight.untyped_storage().nbytes() == 0
    for read in (lambda w: w.sum(), lambda w: w.clone(), lambda w: w.numpy(), lambda w: w[0], lambda w: w.to("meta")):
        with pytest.raises(WeightReleasedError, match="free_weights"):
            read(model.up.weight)


def test_decorator(monkeypatch):
    without_inductor(monkeypatch)

    @qcompile.quantized("int8")
    class Quantized(MLP):
        pass

    model, x = Quantized().eval(), torch.randn(3, 64)
    with torch.no_grad():
        assert tolerance.sqnr(MLP.forward(model, x), model(x)) > 30.0
        assert not torch.equal(MLP.forward(model, x), model(x))
    with pytest.raises(ConfigError, match="did you mean"):
        qcompile.quantized("int9")
    with pytest.raises(TypeError, match=r"nn\.Module"):
        qcompile.quantized("int8")(lambda x: x)


def test_dump_writes_every_graph(monkeypatch, tmp_path):
    from qcompile.flags import override

    without_inductor(monkeypatch)
    with override(dump=tmp_path), torch.no_grad():
        compiled(MLP(), "int8")(torch.randn(2, 64))
    names = sorted(p.name for p in (tmp_path / "graph_000").iterdir())
    assert names[0] == "00_captured.py"
    assert "04_quantize_linear.py" in names
    assert "report.json" in names
    assert "qcompile.linear" in (tmp_path / "graph_000" / "04_quantize_linear.py").read_text()
