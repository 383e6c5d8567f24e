"""Gates: two columns of a product that make one of the output."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import qcompile
from tests import tolerance
from tests.capture import capture
from tests.passes.functions import INT8, WIDTH, Function, assert_close_to_float, gate_and_up


def halves(m, x):
    return m.gate(x).chunk(2, dim=-1)


GATES = {
    "swiglu": (lambda m, x: F.silu(m.gate(x)) * m.up(x), ("bias", "silu(a)*b")),
    "up first": (lambda m, x: m.up(x) * F.silu(m.gate(x)), ("bias", "a*silu(b)")),
    "geglu": (lambda m, x: F.gelu(m.gate(x), approximate="tanh") * m.up(x), ("bias", "gelu_tanh(a)*b")),
    "bilinear": (lambda m, x: m.gate(x) * m.up(x), ("bias", "a*b")),
    "one weight": (lambda m, x: (lambda a, b: a * F.gelu(b))(*halves(m, x)), ("bias", "a*gelu(b)")),
    "split": (lambda m, x: (lambda a, b: F.relu(a) * b)(*torch.split(m.gate(x), WIDTH, -1)), ("bias", "relu(a)*b")),
    "glu": (lambda m, x: F.glu(m.gate(x)), ("bias", "a*sigmoid(b)")),
    "residual": (lambda m, x: (lambda a, b: F.silu(a) * b)(*halves(m, x)) + x, ("bias", "silu(a)*b", "add")),
}


@pytest.mark.parametrize("case", GATES)
def test_a_gate_is_fused(case):
    forward, steps = GATES[case]
    model, x = Function(forward, **gate_and_up()), torch.randn(2, 3, WIDTH)
    captured = capture(model, x, config=INT8)
    assert captured.epilogues == [steps]
    assert_close_to_float(model, x, captured)


NO_GATES = {
    "one half": (lambda m, x: F.silu(halves(m, x)[0]), None),
    "read twice": (lambda m, x: (lambda a, b: F.silu(a) * b + b)(*halves(m, x)), "a half of its output has 2 readers"),
    "both activated": (lambda m, x: (lambda a, b: F.silu(a) * b.tanh())(*halves(m, x)), "both halves have"),
    "added": (lambda m, x: (lambda a, b: F.silu(a) + b)(*halves(m, x)), "its halves are not multiplied"),
    "in place": (lambda m, x: (lambda a, b: F.silu(a).mul_(b))(*halves(m, x)), "its halves are not multiplied"),
    "another factor": (lambda m, x: (lambda a, b: (F.silu(a) * x, b))(*halves(m, x)), "its halves are not multiplied"),
    "dtype": (lambda m, x: (lambda a, b: F.silu(a) * b.double())(*halves(m, x)), "its halves are not multiplied"),
    "rows": (lambda m, x: (lambda a, b: F.silu(a) * b)(*m.gate(x).chunk(2, 0)), None),
    "four": (lambda m, x: (lambda a, b, *_: F.silu(a) * b)(*m.gate(x).chunk(4, -1)), None),
    "activated": (lambda m, x: (lambda a, b: F.silu(a) * b)(*F.relu(m.gate(x)).chunk(2, -1)), None),
}


@pytest.mark.parametrize("case", NO_GATES)
def test_near_misses_of_gates_are_declined(case):
    forward, reason = NO_GATES[case]
    model, x = Function(forward, **gate_and_up()), torch.randn(2, 3, WIDTH)
    captured = capture(model, x, config=INT8)
    declined = captured.declined("fuse_gate")
    assert declined == [] if reason is None else any(reason in found for found in declined)
    assert not any("*" in step for steps in captured.epilogues for step in steps)
    with torch.no_grad():
        expected = model(x)
    for out, plain in zip(captured.output, expected, strict=True):
        assert tolerance.sqnr(plain, out) > 20.0


def test_a_gate_of_packed_layers_leaves_their_buffers():
    """The layers' own weights are views of the one that is multiplied, in their own order."""
    model, x = Function(GATES["swiglu"][0], **gate_and_up(bias=False)), torch.randn(3, WIDTH)
    qcompile.quantize_(model, "int4")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    captured = capture(model, x)
    assert captured.epilogues == [("silu(a)*b",)]
    storages = {m.codes.untyped_storage().data_ptr() for m in (model.gate, model.up)}
    assert len(storages) == 1
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    with torch.no_grad():
        eager = model(x)
    assert tolerance.sqnr(eager, captured.output) > 100.0


def test_outlying_columns_keep_a_gate_apart():
    scheme = {"weight": {"format": "int8"}, "activation": {"format": "int8", "outlier_threshold": 6.0}}
    model = Function(GATES["swiglu"][0], **gate_and_up())
    captured = capture(model, torch.randn(3, WIDTH), config=scheme)
    assert captured.declined("fuse_gate") == ["outlying columns are added to the whole product"]
    assert captured.epilogues == [("bias",)]
