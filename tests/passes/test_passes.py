"""Each pass: what it rewrites, near misses that it declines with their reason, equality with the unrewritten graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcompile
from qcompile.errors import ConfigError, LayerError, QCompileError
from qcompile.formats import get_format
from qcompile.passes import PASSES, verify
from qcompile.passes.context import OP, QUANTIZE, Args
from qcompile.scheme_config import parse_scheme
from tests import tolerance
from tests.capture import capture
from tests.passes.functions import INT8, WIDTH, Function, assert_close_to_float, gate_and_up, linear

SPELLINGS = {
    "linear": lambda m, x: F.linear(x, m.matrix),
    "linear with bias": lambda m, x: F.linear(x, m.matrix, m.vector),
    "linear by keyword": lambda m, x: F.linear(x, weight=m.matrix, bias=m.vector),
    "matmul": lambda m, x: torch.matmul(x, m.matrix),
    "operator": lambda m, x: x @ m.matrix,
    "method": lambda m, x: x.matmul(m.matrix),
    "transposed": lambda m, x: x @ m.matrix.t(),
    "T": lambda m, x: x @ m.matrix.T,
    "mT": lambda m, x: x @ m.matrix.mT,
    "transpose": lambda m, x: torch.matmul(x, m.matrix.transpose(0, 1)),
    "transpose negative": lambda m, x: torch.matmul(x, torch.transpose(m.matrix, -1, -2)),
    "mm": lambda m, x: torch.mm(x.view(-1, WIDTH), m.matrix).view(x.shape),
    "addmm": lambda m, x: torch.addmm(m.vector, x.view(-1, WIDTH), m.matrix).view(x.shape),
    "einsum": lambda m, x: torch.einsum("bti,oi->bto", x, m.matrix),
    "einsum other way": lambda m, x: torch.einsum("bti,io->bto", x, m.matrix),
    "einsum ellipsis": lambda m, x: torch.einsum("...i,oi->...o", x, m.matrix),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_normalize_knows_every_spelling(spelling):
    model, x = Function(SPELLINGS[spelling]), torch.randn(2, 3, WIDTH)
    captured = capture(model, x, config=INT8)
    assert captured.count(OP) == 1
    assert_close_to_float(model, x, captured)


NO_LINEARS = {
    "two activations": lambda m, x: x @ x.transpose(1, 2),
    "batched einsum": lambda m, x: torch.einsum("bti,bsi->bts", x, x),
    "contracted twice": lambda m, x: torch.einsum("bti,ti->b", x, m.matrix[:3]),
    "computed weight": lambda m, x: F.linear(x, m.matrix * 2),
    "slice of a weight": lambda m, x: F.linear(x, m.matrix[:10]),
}


@pytest.mark.parametrize("spelling", NO_LINEARS)
def test_normalize_leaves_what_is_no_linear_of_a_parameter(spelling):
    model, x = Function(NO_LINEARS[spelling]), torch.randn(2, 3, WIDTH)
    captured = capture(model, x, config={"rules": [{"layers": "*", "scheme": "int8", "optional": True}]})
    assert captured.count(OP) == 0
    with torch.no_grad():
        assert torch.equal(captured.output, model(x))


def test_a_computed_weight_is_declined_with_its_reason():
    captured = capture(Function(NO_LINEARS["computed weight"]), torch.randn(1, 2, WIDTH), config="int8")
    assert captured.declined("annotate") == ["its weight is computed in the graph, or is no parameter"]


def test_scaled_addmm_is_declined():
    model = Function(lambda m, x: torch.addmm(m.vector, x, m.matrix, alpha=2.0))
    captured = capture(
        model, torch.randn(3, WIDTH), config={"rules": [{"layers": "*", "scheme": "int8", "optional": True}]}
    )
    assert captured.declined("normalize") == ["addmm with alpha, beta or a bias that is no vector"]


def test_names_and_first_matching_rule():
    model = nn.Sequential()
    model.up, model.act, model.down = linear(), nn.ReLU(), linear()
    rules = [
        {"layers": "down", "scheme": None},
        {"layers": "*", "scheme": "int4"},
    ]
    captured = capture(model, torch.randn(3, WIDTH), config={"rules": rules})
    (context,) = captured.contexts
    assert context.names == ["up", "down"]
    assert context.left == {"down": "no rule gives it a scheme"}
    assert [layer.name for layer in context.layers.values()] == ["up"]


class Wrapped(nn.Module):
    """A model whose `forward` is wrapped by a function of any arguments, as transformers does it from 5.24 on."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.spare = linear(), linear()

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x)

    def forward(*args: object, **kwargs: object) -> torch.Tensor:
        return Wrapped.plain(*args, **kwargs)


def test_names_do_not_tell_how_forward_is_wrapped():
    """`spare` is in no graph: that its rule is right is known from the module alone."""
    rules = [{"layers": "spare", "scheme": None}, {"layers": "up", "scheme": "int4"}]
    captured = capture(Wrapped(), torch.randn(3, WIDTH), config={"rules": rules})
    assert captured.contexts[0].names == ["up"]
    assert [layer.name for layer in captured.contexts[0].layers.values()] == ["up"]


def test_a_rule_that_matches_nothing_names_the_nearest():
    model = nn.Sequential()
    model.up_proj, model.down_proj = linear(), linear()
    rules = [{"layers": "*.dwn_proj", "scheme": "int8"}, {"layers": "*", "scheme": "int4"}]
    with pytest.raises(ConfigError, match=r"'\*\.dwn_proj' matches no layer; nearest: down_proj"):
        capture(model, torch.randn(3, WIDTH), config={"rules": rules})


def test_a_preset_group_shrinks_and_an_explicit_one_does_not():
    model, x = nn.Sequential(nn.Linear(96, 32)), torch.randn(3, 96)
    captured = capture(model, x, config="int4")
    assert captured.specs[0].scheme.weight.granularity.columns == 32
    assert next(iter(captured.contexts[0].layers.values())).note == "group 128 does not divide 96, so group 32"
    with pytest.raises(
        LayerError, match=r"0: group_size 64 does not divide its 96 input features; groups that do: 16, 32"
    ):
        capture(model, x, config={"weight": {"format": "int4", "group_size": 64}})


def branches(m, x):
    return m.q(x), m.k(x), m.v(x)


def test_projections_merge_into_one_linear_with_the_same_codes():
    model = Function(branches, q=linear(), k=nn.Linear(WIDTH, 32), v=nn.Linear(WIDTH, 32))
    x = torch.randn(2, 3, WIDTH)
    captured = capture(model, x, config="int8")
    assert captured.count(OP) == 1
    assert captured.rewritten("merge_projections") == ["one linear"]
    apart = [capture(getattr(model, n), x, config={"rules": [{"layers": "*", "scheme": "int8"}]}) for n in "qkv"]
    for merged, single in zip(captured.output, apart, strict=True):
        assert torch.equal(merged, single.output)


@pytest.mark.parametrize(
    ("modules", "rules", "reason"),
    [
        ({"k": linear(), "v": linear()}, [{"layers": "q", "scheme": "int4"}], "schemes differ"),
        ({"k": linear(bias=False), "v": linear()}, [], "some have a bias and some have none"),
    ],
)
def test_projections_that_differ_stay_apart(modules, rules, reason):
    model = Function(branches, q=linear(), **modules)
    captured = capture(model, torch.randn(3, WIDTH), config={"rules": [*rules, {"layers": "*", "scheme": "int8"}]})
    assert captured.count(OP) == 3
    assert captured.declined("merge_projections")[0].startswith(reason)


def test_a_layer_called_twice_on_one_input_is_not_merged_with_itself():
    model = Function(lambda m, x: m.q(x) + m.q(x), q=linear())
    captured = capture(model, torch.randn(3, WIDTH), config="int8")
    assert captured.declined("merge_projections") == ["they share a weight"]
    assert len(captured.contexts[0].bindings) == 1


def test_prepared_projections_are_merged_in_place_without_a_copy():
    model = Function(branches, q=linear(bias=False), k=linear(bias=False), v=linear(bias=False))
    x = torch.randn(3, WIDTH)
    qcompile.quantize_(model, INT8)
    with torch.no_grad():
        eager = model(x)
    captured = capture(model, x)
    assert captured.count(OP) == 1
    storages = {m.codes.untyped_storage().data_ptr() for m in (model.q, model.k, model.v)}
    assert len(storages) == 1
    again = capture(model, x)
    for found in (captured, again):
        context = found.contexts[0]
        merged = [context.values[node] for binding in context.bindings for node in binding.inputs]
        assert merged
        assert not any(t._is_view() for t in merged)  # which compilers would describe one by one
    for result in (captured.output, again.output):
        for a, b in zip(result, eager, strict=True):
            assert torch.equal(a, b)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(x), eager, strict=True))


EPILOGUES = {
    "relu": (lambda m, x: F.relu(m.q(x)), ("bias", "relu")),
    "relu method": (lambda m, x: m.q(x).relu(), ("bias", "relu")),
    "gelu": (lambda m, x: F.gelu(m.q(x)), ("bias", "gelu")),
    "gelu tanh": (lambda m, x: F.gelu(m.q(x), approximate="tanh"), ("bias", "gelu_tanh")),
    "silu": (lambda m, x: F.silu(m.q(x)), ("bias", "silu")),
    "tanh": (lambda m, x: torch.tanh(m.q(x)), ("bias", "tanh")),
    "sigmoid": (lambda m, x: torch.sigmoid(m.q(x)), ("bias", "sigmoid")),
    "added vector": (lambda m, x: m.p(x) + m.vector, ("bias",)),
    "residual": (lambda m, x: x + m.q(x), ("bias", "add")),
    "gate": (lambda m, x: F.silu(m.q(x)) * x, ("bias", "silu", "mul")),
    "all": (lambda m, x: torch.tanh(m.q(x)) * x + x, ("bias", "tanh", "mul", "add")),
    "later operand": (lambda m, x: m.q(x) * x.exp(), ("bias", "mul")),
}


@pytest.mark.parametrize("case", EPILOGUES)
def test_epilogue_is_fused(case):
    forward, steps = EPILOGUES[case]
    model, x = Function(forward, q=linear(), p=linear(bias=False)), torch.randn(2, 3, WIDTH)
    captured = capture(model, x, config=INT8)
    assert captured.epilogues == [steps]
    assert_close_to_float(model, x, captured)


NEAR_MISSES = {
    "two readers": (lambda m, x: (lambda y: F.relu(y) + y)(m.q(x)), "its output has 2 readers"),
    "broadcast": (lambda m, x: m.q(x) + x[:, :1], "the other operand would be broadcast"),
    "square": (lambda m, x: (lambda y: y * y)(m.q(x)), "both operands are the linear"),
    "number": (lambda m, x: m.q(x) * 2.0, "the other operand is no tensor"),
    "in place": (lambda m, x: m.q(x).add_(x), "add_ works in place"),
    "other function": (lambda m, x: F.softplus(m.q(x)), "is no epilogue step"),
    "alpha": (lambda m, x: torch.add(m.q(x), x, alpha=2), "is no epilogue step"),
    "view": (lambda m, x: m.q(x).view(-1), "view changes shape or dtype"),
    "dtype": (lambda m, x: m.q(x).double() * 1.0, "changes shape or dtype"),
    "returned": (lambda m, x: m.q(x), "it is an output"),
}


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_epilogue_near_misses_are_declined(case):
    forward, reason = NEAR_MISSES[case]
    model, x = Function(forward, q=linear()), torch.randn(3, WIDTH)
    captured = capture(model, x, config=INT8)
    assert captured.epilogues == [("bias",)]
    assert any(reason in r for r in captured.declined("fuse_epilogue"))
    assert_close_to_float(model, x, captured)


def test_gate_and_up_with_other_schemes_fuse_the_product():
    model = Function(lambda m, x: F.silu(m.gate(x)) * m.up(x), gate=linear(bias=False), up=linear(bias=False))
    rules = [{"layers": "gate", "scheme": INT8}, {"layers": "up", "scheme": "int8"}]
    captured = capture(model, torch.randn(3, WIDTH), config={"rules": rules})
    assert sorted(captured.epilogues) == [(), ("silu", "mul")]


def static(name, scale=0.05, **weight):
    """A scheme with one scale for the activations, known beforehand."""
    activation = {"format": name, "granularity": "tensor", "dynamic": False, "scale": scale}
    return {"weight": {"format": "int8", **weight}, "activation": activation}


def mlp(**kwargs):
    return {**gate_and_up(bias=False), "down": nn.Linear(2 * WIDTH, WIDTH, **kwargs)}


HIDDEN = {
    "swiglu": lambda m, x: F.silu(m.gate(x)) * m.up(x),
    "mlp": lambda m, x: F.gelu(m.gate(x)),
}


@pytest.mark.parametrize("name", ["int8", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("case", HIDDEN)
def test_a_linear_stores_the_codes_of_the_next(case, name):
    model, x = Function(lambda m, x: m.down(HIDDEN[case](m, x)), **mlp()), torch.randn(2, 3, WIDTH)
    rules = {"rules": [{"layers": "down", "scheme": static(name)}, {"layers": "*", "scheme": INT8}]}
    captured = capture(model, x, config=rules)
    first, second = captured.specs
    assert first.epilogue[-1] == f"to_{name}"
    assert second.codes_of == "float32"
    assert captured.rewritten("store_codes") == [f"to_{name}"]
    model.run = lambda m, x: (lambda y: (m.down(y), y))(HIDDEN[case](m, x))
    apart = capture(model, x, config=rules)
    assert apart.declined("store_codes") == ["its output is read by what does not quantize it with a static scale"]
    assert torch.equal(captured.output, apart.output[0])


def test_readers_that_are_merged_share_the_codes():
    model = Function(lambda m, x: (lambda y: (m.down(y), m.more(y)))(m.gate(x)), **mlp(), more=nn.Linear(2 * WIDTH, 32))
    captured = capture(model, torch.randn(3, WIDTH), config=static("int8"))
    assert [spec.epilogue for spec in captured.specs] == [("to_int8",), ("bias",)]


DIFFERENT = {
    "scales": {"layers": "more", "scheme": static("int8", scale=0.1)},
    "formats": {"layers": "more", "scheme": static("fp8_e4m3")},
    "dynamic": {"layers": "more", "scheme": "int8"},
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_readers_that_quantize_in_different_ways_do_so_themselves(case):
    model = Function(lambda m, x: (lambda y: (m.down(y), m.more(y)))(m.gate(x)), **mlp(), more=nn.Linear(2 * WIDTH, 32))
    rules = {"rules": [DIFFERENT[case], {"layers": "*", "scheme": static("int8")}]}
    captured = capture(model, torch.randn(3, WIDTH), config=rules)
    assert len(captured.declined("store_codes")) == 1
    assert all(spec.codes_of == "" for spec in captured.specs)


@pytest.mark.parametrize("preset", ["int8", "fp8", "fp8_block", "mxfp8", "static"])
def test_linears_that_are_not_merged_share_their_quantization(preset):
    scheme = parse_scheme(static("int8") if preset == "static" else preset)
    other = replace(scheme, weight=replace(scheme.weight, format=get_format("fp8_e5m2")))
    model = Function(branches, q=linear(), k=nn.Linear(WIDTH, 32), v=nn.Linear(WIDTH, 32, bias=False))
    x = torch.randn(2, 3, WIDTH)
    rules = {"rules": [{"layers": "q", "scheme": other}, {"layers": "*", "scheme": scheme}]}
    captured = capture(model, x, config=rules)
    assert captured.count(QUANTIZE) == 1
    assert captured.rewritten("share_quantization") == ["one quantization"]
    for name, out in zip("qkv", captured.output, strict=True):
        alone = capture(
            getattr(model, name), x, config={"rules": [{"layers": "*", "scheme": other if name == "q" else scheme}]}
        )
        assert torch.equal(out, alone.output)


def test_codes_that_no_kernel_stores():
    model = Function(lambda m, x: m.down(F.gelu(m.gate(x))), **mlp())
    captured = capture(model, torch.randn(3, WIDTH), config=static("int4"))
    assert captured.declined("store_codes") == ["a reader takes codes that no kernel stores"]
    assert all(spec.codes_of == "" for spec in captured.specs)


def test_turned_inputs_are_quantized_by_each_linear():
    """k and v share codes; q reads the same tensor, and turns it first."""
    scheme = parse_scheme("int8")
    turned = replace(scheme, weight=replace(scheme.weight, rotated=True))
    model = Function(branches, q=linear(), k=nn.Linear(WIDTH, 32), v=nn.Linear(WIDTH, 32, bias=False))
    x = torch.randn(2, 3, WIDTH)
    rules = {"rules": [{"layers": "q", "scheme": turned}, {"layers": "*", "scheme": scheme}]}
    captured = capture(model, x, config=rules)
    assert [spec.codes_of for spec in captured.specs] == ["", "float32", "float32"]
    alone = capture(model.q, x, config={"rules": [{"layers": "*", "scheme": turned}]})
    assert torch.equal(captured.output[0], alone.output)
    assert tolerance.sqnr(model.q(x), alone.output) > 30


def test_dynamic_scales_are_not_stored():
    model = Function(lambda m, x: m.down(F.gelu(m.gate(x))), **mlp())
    captured = capture(model, torch.randn(3, WIDTH), config="int8")
    assert captured.epilogues == [("gelu",), ("bias",)]
    assert captured.declined("store_codes") == []


def test_verify_finds_a_wrong_graph():
    model, x = Function(lambda m, x: m.q(x), q=linear()), torch.randn(3, WIDTH)
    (context,) = capture(model, x, config=INT8).contexts
    (node,) = context.graph.find_nodes(op="call_function", target=OP)
    arguments = list(node.args)
    arguments[Args.index("bias")] = None
    node.args = tuple(arguments)
    with pytest.raises(QCompileError, match="a bias and a bias step go together"):
        verify(context)


def test_the_list_of_passes_ends_with_the_check():
    assert PASSES[-1] is verify


def test_in_place_methods_survive():
    """Dynamo's graphs hold methods whose results nobody reads."""

    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = linear()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return self.inner(x)

    model = Counter()
    capture(model, torch.randn(2, WIDTH), config="int8")
    assert model.calls == 1


def test_routers_take_a_rule_that_names_them():
    class TopRouter(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, WIDTH))

        def forward(self, x):
            return F.linear(x, self.weight)

    model = Function(lambda m, x: m.router(m.fc(x)), router=TopRouter(), fc=nn.Linear(WIDTH, WIDTH))
    x = torch.randn(3, WIDTH)
    assert "chooses experts" in capture(model, x, config=INT8).declined("annotate")[0]
    named = {"rules": [{"layers": "router", "scheme": INT8}, {"layers": "*", "scheme": INT8}]}
    assert not capture(model, x, config=named).declined("annotate")
