"""A captured graph through all passes."""

from __future__ import annotations

import itertools
import json
import operator
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from qcompile import compat
from qcompile.config import QuantConfig
from qcompile.errors import ConfigError
from qcompile.flags import flags
from qcompile.linear_spec import decode_spec
from qcompile.packed import PackedWeight
from qcompile.passes import PASSES, GraphContext
from qcompile.passes.context import OP, Args, Layer
from qcompile.passes.verify import verify
from qcompile.tensors import version


def _recognize(context: GraphContext) -> None:
    """Note the linears that are quantized already (of `QuantizedLinear` modules)."""
    for node in context.graph.nodes:
        if node.target is torch.ops.qcompile.linear:
            node.target = OP
        if node.target is not OP:
            continue
        spec = decode_spec(node.args[Args.index("spec")])
        module = compat.module_of(node)
        parts: list[Any] = [context.values.get(part) for part in node.args[Args.index("weight")]]
        packed = None
        if all(isinstance(part, Tensor) for part in parts):
            packed = PackedWeight.from_tensors(parts, spec.shape, spec.scheme.weight, spec.layout)
        layer = Layer(module[0] if module else node.name, spec.scheme, packed=packed)
        context.layers[node] = layer
        context.names.append(layer.name)


def rewrite(
    graph_module: fx.GraphModule, inputs: Sequence[Any], config: QuantConfig | None, *, free_weights: bool = False
) -> GraphContext:
    """Run every pass on a copy of a Dynamo graph.

    Raises:
        ConfigError, LayerError: what the configuration asks for cannot be.
    """
    module = compat.clone(graph_module)
    values = dict(zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True))
    context = GraphContext(module, config, values, free_weights=free_weights)
    _recognize(context)
    dump = _dump_folder()
    if dump is not None:
        _write(dump / "00_captured.py", module)
    for position, run in enumerate(PASSES, start=1):
        run(context)
        if flags.verify and run is not verify:
            context.graph.lint()
        if dump is not None:
            _write(dump / f"{position:02d}_{run.__name__}.py", module)
    if dump is not None:
        events = [{"event": type(e).__name__.lower(), **e.__dict__} for e in context.events]
        record = {"config": None if config is None else config.to_dict(), "events": events, "left": context.left}
        (dump / "report.json").write_text(json.dumps(record, indent=1))
    module.recompile()
    return context


def bind_inputs(context: GraphContext, compiled: Callable[..., Any]) -> tuple[list[Any], Callable[..., Any]]:
    """Drop the inputs that the rewritten graph no longer reads and add those that bindings make.

    Call before the graph is compiled: `compiled` is then called with the inputs that are returned.

    Returns:
        the inputs to compile with, and a function of the original inputs.
    """
    bound = {node for binding in context.bindings for node in binding.inputs}
    original = [p for p in context.placeholders() if p not in bound]
    index = {node: position for position, node in enumerate(original)}
    sources = {s for b in context.bindings for s in b.sources}
    for node in original:
        if not node.users and node in sources:
            context.graph.erase_node(node)
    kept = _picker([index[p] for p in context.placeholders() if p in index])
    made = _AllBound([_Bound([index[s] for s in b.sources], b.make) for b in context.bindings])
    # A binding's inputs were added one after another behind all earlier ones, so they follow in the order of bindings.
    context.module.recompile()

    def call(*args: Any) -> Any:
        return compiled(*kept(args), *made(args))

    return [context.values[p] for p in context.placeholders()], call


class _Bound:
    """A binding at run time: makes its tensors again only if other tensors come in, or changed ones."""

    def __init__(self, sources: list[int], make: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]) -> None:
        self.sources, self.make = sources, make
        self.last: tuple[Tensor, ...] | None = None
        self.versions: list[tuple[int, int]] = []
        self.made: tuple[Tensor, ...] = ()

    def __call__(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        tensors = tuple(args[i] for i in self.sources)
        same = self.last is not None and all(a is b for a, b in zip(tensors, self.last, strict=True))
        if same and [version(t) for t in tensors] == self.versions:
            return self.made
        self.made = self.make(tensors)
        self.last, self.versions = tensors, [version(t) for t in tensors]
        return self.made


class _AllBound:
    """All bindings, of which usually none has anything to do: a model has hundreds, so that is found out quickly."""

    def __init__(self, bound: list[_Bound]) -> None:
        self.bound = bound
        self.pick = _picker([source for one in bound for source in one.sources])
        self.sources: tuple[Tensor, ...] | None = None
        self.counted: list[Tensor] = []
        self.state: tuple[list[int], list[int]] = ([], [])
        self.made: tuple[Tensor, ...] = ()

    def _now(self, sources: tuple[Tensor, ...]) -> tuple[list[int], list[int]]:
        """What `version` says of all: addresses, and counts of edits of those that have them."""
        return list(map(_address, sources)), list(map(_edits, self.counted))

    def __call__(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        sources = self.pick(args)
        same = self.sources is not None and all(map(operator.is_, sources, self.sources))
        if not same or self._now(sources) != self.state:
            self.made = tuple(itertools.chain.from_iterable(one(args) for one in self.bound))
            self.sources = sources
            self.counted = [t for t in sources if not t.is_inference()]
            self.state = self._now(sources)
        return self.made


_address, _edits = operator.methodcaller("data_ptr"), operator.attrgetter("_version")


def _picker(indices: list[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """A function from arguments to those at some places."""
    if len(indices) > 1:
        return operator.itemgetter(*indices)
    return lambda args: tuple(args[i] for i in indices)


def _dump_folder() -> Path | None:
    """A new folder for one graph's dump, or None if the flag is not set.

    Raises:
        ConfigError: it cannot be made.
    """
    if flags.dump is None:
        return None
    for number in range(100_000):
        folder = Path(flags.dump) / f"graph_{number:03d}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"QCOMPILE_DUMP {flags.dump}: {error.strerror}; name a folder to write to") from None
        return folder
    return None


def _write(path: Path, module: fx.GraphModule) -> None:
    module.recompile()
    path.write_text(module.code)
