"""linear(norm(x + residual)) -> codes, scales, ... = norm_quantize(x, residual); linear(codes, scales)      norms

for linears whose activations have a dynamic scale a token, or a group of columns. The sum and the norm are results too
where something else reads them.

Compilers make two kernels of a norm and maxima of groups, and slow ones of few rows. Static scales are left to them, as
are scales a token where they join the epilogue before the norm with both.
"""

from __future__ import annotations

from torch import fx

from qcompile.linear_spec import decode_spec
from qcompile.norm_spec import quantization
from qcompile.passes.context import Args, GraphContext, example
from qcompile.passes.norms import objection, put_norm, read_norm
from qcompile.passes.share_quantization import LEFT, alike, has_visible_epilogue

_RULE = "quantize_norms"
_X, _SPEC = Args.index("x"), Args.index("spec")


def quantize_norms(context: GraphContext) -> None:
    """See the module."""
    for linears in alike(context):
        last = linears[0].args[_X]
        activation = decode_spec(linears[0].args[_SPEC]).scheme.activation  # type: ignore[arg-type]
        assert activation is not None
        if not isinstance(last, fx.Node) or example(last).device.type in LEFT:
            continue
        plain, norm = quantization(activation, example(last).shape[-1]), read_norm(last)
        if plain is None or norm is None or (plain.columns == plain.k and has_visible_epilogue(norm.x)):
            continue
        names = " + ".join(context.layers[node].name for node in linears)
        reason = objection(norm, last)
        if reason is not None:
            context.declined(_RULE, names, reason)
            continue
        put_norm(context, norm, last, plain, linears)
        context.rewrote(_RULE, names, "norm and quantization in one")
