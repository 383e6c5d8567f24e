"""Nothing changes: the graph is checked.

It is well formed; each of our operators has the arguments that its spec asks for; no linear that has a scheme was left
behind; and what each node is said to be (shape, dtype) is what its operator makes of its inputs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, fx

from qcompile.errors import QCompileError
from qcompile.linear_spec import decode_spec
from qcompile.passes.context import OP, Args, GraphContext, example


def _kind(node: fx.Node) -> str:
    """The same for nodes whose operator makes the same of inputs that are alike: equal layers' are described once."""
    return repr(fx.node.map_arg(node.args, lambda n: (example(n).shape, example(n).dtype)))


def _check_operator(context: GraphContext, node: fx.Node, name: str, made: dict[str, Tensor]) -> None:
    spec = decode_spec(node.args[Args.index("spec")])  # type: ignore[arg-type]
    given = dict(zip(Args, node.args, strict=True))
    problems = []
    if len(given["operands"]) != spec.operand_count:  # type: ignore[arg-type]
        problems.append(f"{spec.operand_count} operands are needed")
    if ("bias" in spec.epilogue) != (given["bias"] is not None):
        problems.append("a bias and a bias step go together")
    if len(given["weight"]) != len(spec.scheme.weight.fields):  # type: ignore[arg-type]
        problems.append(f"the weight's tensors are {', '.join(spec.scheme.weight.fields)}")
    static = spec.scheme.activation is not None and not spec.scheme.activation.dynamic
    if (static or spec.codes_of != "") != (given["input_scale"] is not None):
        problems.append("an input scale and a static scheme, or activations that come as codes, go together")
    if not problems:
        if (kind := _kind(node)) not in made:
            with context.fake_mode:
                made[kind] = OP(*fx.node.map_arg(node.args, example))
        y, said = made[kind], example(node)
        if isinstance(said, Tensor) and (y.shape != said.shape or y.dtype != said.dtype):
            problems.append(f"it makes {y.dtype} {tuple(y.shape)}, expected {said.dtype} {tuple(said.shape)}")
    if problems:
        raise QCompileError(f"{name}: the rewritten graph is wrong: {'; '.join(problems)}. This is a bug in qcompile")


def verify(context: GraphContext) -> None:
    """See the module.

    Raises:
        QCompileError: a bug in a pass.
    """
    context.graph.lint()
    made: dict[str, Tensor] = {}
    for node in context.graph.nodes:
        if node.target is OP:
            layer = context.layers.get(node)
            _check_operator(context, node, layer.name if layer else node.name, made)
        elif node.target is F.linear and node in context.layers:
            raise QCompileError(
                f"{context.layers[node].name}: has a scheme, but was not quantized. This is a bug in qcompile"
            )
