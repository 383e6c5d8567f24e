"""What passes share: the graph, its real weights, the configuration, and the record of what was done and declined."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx

from qcompile import compat, ops
from qcompile.config import QuantConfig
from qcompile.packed import PackedWeight
from qcompile.scheme import Scheme

OP = ops.OP
"""The operator that linears become; its arguments in order are named by `Args`."""

QUANTIZE = torch.ops.qcompile.quantize.default
"""The operator that quantizes activations for several linears."""

Args = ("x", "weight", "bias", "input_scale", "pre_quant_scale", "operands", "spec")


@dataclass(frozen=True)
class Rewrite:
    """A pass changed something: a layer's name and what was done."""

    rule: str
    layer: str
    what: str


@dataclass(frozen=True)
class Decline:
    """A pass left something alone: a layer's name and the reason."""

    rule: str
    layer: str
    reason: str


Event: TypeAlias = "Rewrite | Decline"


@dataclass(frozen=True)
class WeightRef:
    """A weight [N, K] that the graph takes from parameters: the rows of all `parts`, each transposed first or not."""

    parts: tuple[fx.Node, ...]
    transposed: bool = False


@dataclass
class Binding:
    """Graph inputs that are made from others at each call (and kept between calls that pass the same tensors).

    Attributes:
        sources: placeholders whose tensors they are made from.
        make: from those tensors to the new inputs.
        inputs: the new placeholders.
    """

    sources: tuple[fx.Node, ...]
    make: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
    inputs: tuple[fx.Node, ...]


@dataclass
class Layer:
    """A quantized linear in the graph: its scheme before and its packed weight after `quantize_linear`.

    A `prepared` one reads a parameter that came quantized, so that its scheme and scales are the parameter's.
    """

    name: str
    scheme: Scheme
    weight: WeightRef | None = None
    packed: PackedWeight | None = None
    input_scale: Tensor | None = None
    pre_quant_scale: Tensor | None = None
    prepared: bool = False
    note: str = ""


@dataclass
class GraphContext:
    """Handed from pass to pass.

    Attributes:
        module: the graph being rewritten, in Dynamo's form.
        config: None where the caller gave none: then only what is quantized already is optimized.
        free_weights: originals are freed afterwards, so that each must be packed alone.
        values: the real value of every placeholder; symbolic sizes included.
        layers: linear nodes that are to be quantized, or are.
        left: names of linears that stay as they are, with the reason.
        packed_inputs: graph inputs of a packed weight, by weight and scheme; and of a static scale, by its value.
        events: what was rewritten and declined, in order.
    """

    module: fx.GraphModule
    config: QuantConfig | None
    values: dict[fx.Node, Any]
    free_weights: bool = False
    layers: dict[fx.Node, Layer] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    packed_inputs: dict[Any, tuple[fx.Node, ...]] = field(default_factory=dict)
    bindings: list[Binding] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    @functools.cached_property
    def fake_mode(self) -> Any:
        """The context manager under which operators on example values run."""
        return compat.fake_mode_of(self.module)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def placeholders(self) -> list[fx.Node]:
        """The graph's inputs in order."""
        return self.graph.find_nodes(op="placeholder")

    def rewrote(self, rule: str, layer: str, what: str) -> None:
        self.events.append(Rewrite(rule, layer, what))

    def declined(self, rule: str, layer: str, reason: str) -> None:
        self.events.append(Decline(rule, layer, reason))

    def bind(
        self,
        name: str,
        sources: Sequence[fx.Node],
        make: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]],
    ) -> tuple[fx.Node, ...]:
        """New graph inputs, as many as `make` returns, named after a layer and what they are; see `Binding`."""
        name = f"q{len(self.bindings)}_" + re.sub(r"\W", "_", name)
        tensors = make(tuple(self.values[s] for s in sources))
        nodes = []
        for position, tensor in enumerate(tensors):
            existing = self.placeholders()
            node = compat.add_input(
                self.graph, f"{name}_{position}", tensor, existing[-1] if existing else None, self.fake_mode
            )
            self.values[node] = tensor
            nodes.append(node)
        self.bindings.append(Binding(tuple(sources), make, tuple(nodes)))
        return tuple(nodes)


Pass: TypeAlias = Callable[[GraphContext], None]


def example(node: Any) -> Any:
    """The fake value that Dynamo recorded for a node, or None."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def replace(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    """Put `new` where `old` was and erase it. Nodes that this makes dead are erased by who knows that they are pure.

    (`Graph.eliminate_dead_code` is never used: on Dynamo's graphs it removes in-place methods.)
    """
    new.meta = {**old.meta, **{k: v for k, v in new.meta.items() if k == "example_value"}}
    old.replace_all_uses_with(new)
    graph.erase_node(old)
