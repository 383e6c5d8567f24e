"""norm(add_up(x) + residual) -> sum, norm = norm_quantize(x, residual)      linears divided over GPUs

What GPUs tell each other takes a kernel of its own as long as the norm behind it, which is made one with it here, where
nothing quantizes what the norm gives. `quantize_norms` has done the same for the others.
"""

from __future__ import annotations

from torch import fx

from qcompile.exchange import ADD_UP
from qcompile.norm_spec import NormSpec
from qcompile.passes.context import GraphContext, example
from qcompile.passes.norms import inputs_of, objection, put_norm, read_norm

_RULE = "fuse_sums"


def fuse_sums(context: GraphContext) -> None:
    """See the module."""
    if not any(node.target is ADD_UP for node in context.graph.nodes):
        return
    gone: set[fx.Node] = set()
    for last in reversed(list(context.graph.nodes)):  # a norm before the parts of one
        norm = None if last in gone else read_norm(last)
        if norm is None or not inputs_of(norm)[2]:
            continue
        reason = objection(norm, last)
        if reason is not None:
            context.declined(_RULE, last.name, reason)
            continue
        k = example(last).shape[-1]
        gone |= {*norm.nodes, norm.x, *norm.x.all_input_nodes}
        put_norm(context, norm, last, NormSpec(k=k, number="", columns=k, powers=False), [])
        context.rewrote(_RULE, last.name, "sum over processes and norm in one")
