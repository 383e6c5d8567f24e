"""linear2(quantize(linear1(x))) -> linear1 stores the codes of linear2's static activations     gate, up and down; MLPs

Where all that reads a linear's output quantizes it with one static scale, the linear's kernel stores the codes, and the
output is never written in 16 bits. It is rounded once, from float32 to codes.

Dynamic scales need the greatest of a whole row, which is known when all its columns are: their quantization stays apart
and is one kernel with what else comes before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qcompile.linear_spec import STORES, decode_spec
from qcompile.passes.context import OP, Args, GraphContext, example

_RULE = "store_codes"
_STEPS = {name: step for step, name in STORES.items()}


def _argument(node: fx.Node, what: str) -> Any:
    return node.args[Args.index(what)]


def _is_static(node: fx.Node, x: fx.Node) -> bool:
    """Whether a node is a linear that quantizes x with a static scale."""
    if node.target is not OP or node.args[0] is not x:
        return False
    activation = decode_spec(_argument(node, "spec")).scheme.activation
    return activation is not None and not activation.dynamic


def _objection(linear: fx.Node) -> str | None:
    """Why a linear whose output a static linear reads cannot store its codes."""
    readers = list(linear.users)
    if not all(_is_static(reader, linear) for reader in readers):
        return "its output is read by what does not quantize it with a static scale"
    if any(linear in _argument(reader, "operands") for reader in readers):
        return "its output is also an operand"
    specs = [decode_spec(_argument(reader, "spec")) for reader in readers]
    scale = _argument(readers[0], "input_scale")
    if len({spec.scheme.activation for spec in specs}) > 1 or any(
        _argument(reader, "input_scale") is not scale for reader in readers
    ):
        return "its readers quantize it in different ways"
    if scale.op != "placeholder":
        return "the scale is computed in the graph"
    if any(_argument(reader, "pre_quant_scale") is not None for reader in readers):
        return "a reader scales its input first"
    if any(spec.scheme.activation.format.name not in _STEPS for spec in specs if spec.scheme.activation):
        return "a reader takes codes that no kernel stores"
    if any(spec.scheme.weight.arranges_inputs for spec in specs):
        return "a reader turns its inputs, or takes them in another order"
    if any(spec.scheme.activation.outlier_threshold is not None for spec in specs if spec.scheme.activation):
        return "a reader takes outlying columns apart"
    return None


def _store(context: GraphContext, linear: fx.Node) -> None:
    readers = list(linear.users)
    spec = decode_spec(_argument(linear, "spec"))
    activation = decode_spec(_argument(readers[0], "spec")).scheme.activation
    assert activation is not None
    step = _STEPS[activation.format.name]
    plain = example(linear).dtype
    for reader in readers:
        changed = decode_spec(_argument(reader, "spec")).reading_codes_of(plain)
        reader.update_arg(Args.index("spec"), changed.encode())
    operands = [*_argument(linear, "operands"), _argument(readers[0], "input_scale")]
    linear.update_arg(Args.index("operands"), operands)
    linear.update_arg(Args.index("spec"), spec.with_epilogue(step).encode())
    with context.fake_mode:
        codes = torch.empty_like(example(linear), dtype=activation.dtype)
    linear.meta["example_value"] = codes
    context.rewrote(_RULE, context.layers[linear].name, step)


def store_codes(context: GraphContext) -> None:
    """See the module."""
    for node in context.layers:
        if node.target is OP and any(_is_static(user, node) for user in node.users):
            reason = _objection(node)
            if reason is None:
                _store(context, node)
            else:
                context.declined(_RULE, context.layers[node].name, reason)
