"""Run a model through the passes without Inductor: the rewritten graphs are executed as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qcompile import compat
from qcompile.config import parse_config
from qcompile.linear_spec import LinearSpec, decode_spec
from qcompile.passes import Decline, GraphContext, Rewrite
from qcompile.passes.context import OP
from qcompile.pipeline import bind_inputs, rewrite


@dataclass
class Captured:
    """A model's output through the rewritten graph, and the record of every graph."""

    output: Any
    contexts: list[GraphContext]

    @property
    def specs(self) -> list[LinearSpec]:
        """Specs of all quantized linears, in the order of the graph."""
        return [decode_spec(n.args[-1]) for c in self.contexts for n in c.graph.nodes if n.target is OP]

    @property
    def epilogues(self) -> list[tuple[str, ...]]:
        return [spec.epilogue for spec in self.specs]

    def declined(self, rule: str) -> list[str]:
        """Reasons that a pass gave."""
        return [e.reason for c in self.contexts for e in c.events if isinstance(e, Decline) and e.rule == rule]

    def rewritten(self, rule: str) -> list[str]:
        return [e.what for c in self.contexts for e in c.events if isinstance(e, Rewrite) and e.rule == rule]

    def count(self, target: Any) -> int:
        """Nodes with that target."""
        return sum(n.target is target for c in self.contexts for n in c.graph.nodes)


@torch.no_grad()
def capture(model: Callable[..., Any], *inputs: Any, config: Any = None, **keywords: Any) -> Captured:
    """Compile with the passes alone and run once, as one graph."""
    contexts: list[GraphContext] = []

    def backend(graph_module: Any, example_inputs: Any, **_: Any) -> Any:
        context = rewrite(graph_module, example_inputs, None if config is None else parse_config(config))
        contexts.append(context)
        _, call = bind_inputs(context, lambda *args: context.module(*args))
        return call

    torch.compiler.reset()
    with compat.plain_backend_errors():
        output = torch.compile(model, backend=backend, fullgraph=True)(*inputs, **keywords)
    torch.compiler.reset()
    return Captured(output, contexts)
