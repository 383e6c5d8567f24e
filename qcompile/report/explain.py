"""`qcompile.explain`: a dry run of the backend, told layer by layer."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompile import compat
from qcompile.backend import check_gradients
from qcompile.codegen.spec import GROUPED_TEMPLATES, TEMPLATES
from qcompile.config import QuantConfig, parse_config
from qcompile.experts import GroupedLinear, expert_modules
from qcompile.layouts import LAYOUTS, to_layout
from qcompile.linear_spec import LinearSpec, decode_spec
from qcompile.packed import LOGICAL
from qcompile.passes import Decline, GraphContext, Rewrite
from qcompile.passes.context import Args, Layer, example
from qcompile.passes.quantize_attention import RULE as ATTENTION_RULE
from qcompile.pipeline import rewrite
from qcompile.reference import dequantize
from qcompile.scheme import Scheme


@dataclass(frozen=True)
class LayerReport:
    """One linear, or several merged into one.

    Attributes:
        name: qualified name; merged layers are joined by " + ".
        shape: (N, K), out and in features.
        scheme: None if the layer stays as it is.
        kernel: what runs it.
        bytes_before, bytes_after: of the weight; None where unknown (a layer that came quantized has no original).
        sqnr_db: signal to quantization noise of the weight, 10 log10(sum w^2 / sum (w - q)^2).
        epilogue: steps fused into the kernel.
        origin: where the choice of the kernel comes from, on GPUs (`runtime.tuning`).
        predicted_us, measured_us: microseconds of the kernel, by the cost model and, if it was timed, in truth.
        of_limit: the least time that the GPU's nominal rates allow, over the measured time, or else the predicted one.
        note: why the scheme differs from the rule's, or why the layer was left.
    """

    name: str
    shape: tuple[int, int] | None
    scheme: str | None
    kernel: str | None = None
    bytes_before: int | None = None
    bytes_after: int | None = None
    sqnr_db: float | None = None
    epilogue: tuple[str, ...] = ()
    origin: str = ""
    predicted_us: float | None = None
    measured_us: float | None = None
    of_limit: float | None = None
    note: str = ""

    def _lines(self) -> list[str]:
        """What becomes of the layer."""
        done = [self.scheme or "as it is", self.kernel, ", ".join(self.epilogue)]
        chosen = f" (chosen by {self.origin})" if self.origin else ""
        return [", ".join(part for part in done if part) + chosen, *([self.note] if self.note else [])]

    def _time(self) -> str:
        """The measured time, or else the predicted one, which is marked."""
        if self.measured_us is not None:
            return f"{self.measured_us:.1f}"
        return "" if self.predicted_us is None else f"~{self.predicted_us:.1f}"


def _bytes(layer: LayerReport) -> str:
    """Of one layer's weight in KB, before and after."""
    counts = [count for count in (layer.bytes_before, layer.bytes_after) if count is not None]
    return " > ".join(f"{count / 1024:.0f}" for count in counts)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def _alike(layers: Sequence[LayerReport]) -> list[list[LayerReport]]:
    """Layers of blocks that differ in nothing but the block's number and the weight's error, together."""
    found: dict[LayerReport, list[LayerReport]] = {}
    for layer in layers:
        parts = [_NUMBER.sub("", part, count=1) for part in layer.name.split(" + ")]
        found.setdefault(replace(layer, name=" + ".join(parts), sqnr_db=None), []).append(layer)
    return list(found.values())


def _name_of(layers: Sequence[LayerReport]) -> str:
    """One name for layers alike: `model.layers.0-29.self_attn.q_proj + k_proj`."""
    first, *others = layers[0].name.split(" + ")
    block = first.rpartition(".")[0] + "."
    name = " + ".join([first, *(other.removeprefix(block) for other in others)])
    if len(layers) == 1:
        return name
    runs: list[list[int]] = []
    for number in sorted({int(found[0]) for layer in layers if (found := _NUMBER.search(layer.name))}):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    numbers = ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return _NUMBER.sub(numbers, name, count=1)


def _range(values: Sequence[float | None]) -> str:
    there = [f"{value:.1f}" for value in values if value is not None]
    if not there:
        return ""
    low, high = min(there, key=float), max(there, key=float)
    return low if low == high else f"{low}..{high}"


@dataclass(frozen=True)
class Explanation:
    """The layers in the order of the graph, and what passes declined to do, with their reasons.

    `print` shows a table, with one row for layers of blocks that differ in their number; `to_json` gives all of it.

    Attributes:
        attention: the attentions that read a quantized KV cache directly.
    """

    layers: tuple[LayerReport, ...]
    declined: tuple[Decline, ...]
    graphs: int
    attention: tuple[Rewrite, ...] = ()

    def to_json(self) -> str:
        """Everything as JSON."""
        content = {
            "graphs": self.graphs,
            "layers": [asdict(layer) for layer in self.layers],
            "declined": [asdict(decline) for decline in self.declined],
            "attention": [asdict(rewrite) for rewrite in self.attention],
        }
        return json.dumps(content, indent=1)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=160, no_color=True, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def __rich__(self) -> Any:
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        rows = _alike(self.layers)
        several, timed = any(len(row) > 1 for row in rows), any(layer.origin for layer in self.layers)
        title = f"{len(self.layers)} layers in {self.graphs} graph{'s' if self.graphs != 1 else ''}"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("layer, its kernel", overflow="fold")
        for name in (*["layers"] * several, "N x K", "KB", "SQNR dB", *["us", "of limit"] * timed):
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            layer = row[0]
            table.add_row(
                escape("\n".join([_name_of(row), *(f"  {line}" for line in layer._lines())])),
                *[str(len(row))] * several,
                "" if layer.shape is None else f"{layer.shape[0]} x {layer.shape[1]}",
                _bytes(layer),
                _range([layer.sqnr_db for layer in row]),
                *([layer._time(), _percent(layer.of_limit)] if timed else []),
            )
        table.caption = self._attention() or None
        return table

    def _attention(self) -> str:
        """What became of attention over KV caches, in one line for each outcome."""
        outcomes = [event.what for event in self.attention]
        outcomes += [f"declined: {event.reason}" for event in self.declined if event.rule == ATTENTION_RULE]
        return "\n".join(f"attention of {count} layers: {what}" for what, count in Counter(outcomes).items())


def kernel_name(spec: LinearSpec, device_type: str) -> str:
    """The kernel that serves a spec on a kind of device, in words."""
    if device_type == "cuda":
        from qcompile.runtime import gpu

        return gpu.kernel_name(spec)
    from qcompile.runtime import cpu

    return cpu.kernel_name(spec)


def _plan(spec: LinearSpec, rows: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What `LayerReport` says of the kernel that a GPU runs for so many rows."""
    from qcompile.runtime import gpu

    plan = gpu.plan(spec, rows, dtype, device)
    if plan is None:
        return {}
    return {
        "kernel": plan.kernel,
        "origin": plan.origin,
        "predicted_us": plan.predicted_us,
        "measured_us": plan.measured_us,
        "of_limit": plan.limit_us / (plan.measured_us or plan.predicted_us),
    }


def _sqnr(weights: Sequence[Tensor], transposed: bool, layer: Layer) -> float:
    assert layer.packed is not None
    original = torch.cat([w.t() if transposed else w for w in weights]).float()
    error = original - dequantize(to_layout(layer.packed, LAYOUTS[LOGICAL]))
    return float(10 * torch.log10(original.square().sum() / error.square().sum()))


def _report(context: GraphContext, node: fx.Node, layer: Layer) -> LayerReport:
    spec = decode_spec(node.args[Args.index("spec")])  # type: ignore[arg-type]
    codes = context.values[node.args[Args.index("weight")][0]]  # type: ignore[index]
    before = sqnr = None
    if layer.weight is not None and not layer.prepared:
        originals = [context.values[p] for p in layer.weight.parts]
        before = sum(w.numel() * w.element_size() for w in originals)
        sqnr = _sqnr(originals, layer.weight.transposed, layer)
    times: dict[str, Any] = {"kernel": kernel_name(spec, codes.device.type)}
    x = example(node.args[Args.index("x")])
    rows = math.prod(x.shape[:-1])
    if codes.device.type == "cuda" and isinstance(rows, int):
        times |= _plan(spec, rows, spec.floating(x.dtype), codes.device)
    return LayerReport(
        name=layer.name,
        shape=spec.shape,
        scheme=str(layer.scheme),
        **times,
        bytes_before=before,
        bytes_after=None if layer.packed is None else layer.packed.nbytes,
        sqnr_db=sqnr,
        epilogue=spec.epilogue,
        note=layer.note,
    )


def _experts(model: nn.Module, config: QuantConfig | None) -> Iterator[LayerReport]:
    """Experts of mixtures, which no pass touches: those that came quantized, and those that a rule means in vain."""
    from qcompile.runtime.gpu_grouped import gate_objection

    for name, module in model.named_modules():
        if isinstance(module, GroupedLinear):
            template, spec = TEMPLATES.get(module.layout), decode_spec(module.spec)
            apart = gate_objection(spec) if template is not None else None
            kernel = "a product for each expert that is hit" if template is None else GROUPED_TEMPLATES[template]
            yield LayerReport(
                name=name,
                shape=(module.out_features, module.in_features),
                scheme=str(module.scheme),
                kernel=kernel,
                bytes_after=module.packed().nbytes,
                epilogue=spec.epilogue,
                note=f"{module.experts} experts" + (f"; the gate follows the product: {apart}" if apart else ""),
            )
    for name in expert_modules(model):
        if config is not None and config.scheme_for(name) is not None:
            yield LayerReport(name, None, None, note="torch.compile leaves experts; qcompile.quantize_ quantizes them")


def _rewritten(
    model: Callable[..., Any], inputs: Sequence[Any], keyword_inputs: Mapping[str, Any], config: QuantConfig | None
) -> list[GraphContext]:
    """The graphs of a model as the backend rewrites them; the model runs once, as it is."""
    contexts: list[GraphContext] = []

    def dry_run(graph_module: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        check_gradients(example_inputs)
        contexts.append(rewrite(graph_module, example_inputs, config))
        return graph_module.forward

    compat.reset_compiler()
    with compat.plain_backend_errors():
        torch.compile(model, backend=dry_run)(*inputs, **keyword_inputs)
    compat.reset_compiler()
    return contexts


def _linears(context: GraphContext) -> list[fx.Node]:
    """The quantized linears in the order of the graph."""
    order = {node: position for position, node in enumerate(context.graph.nodes)}
    return sorted(context.layers, key=order.__getitem__)


@torch.no_grad()
def linear_specs(
    model: Callable[..., Any], *inputs: Any, config: QuantConfig | None = None, **keyword_inputs: Any
) -> dict[str, LinearSpec]:
    """The quantized linears that the backend would make of a model, merged and with their epilogues, by name.

    Raises:
        ConfigError, LayerError: as the backend would.
    """
    found = {}
    for context in _rewritten(model, inputs, keyword_inputs, config):
        for node in _linears(context):
            found[context.layers[node].name] = decode_spec(node.args[Args.index("spec")])  # type: ignore[arg-type]
    return found


@torch.no_grad()
def explain(
    model: nn.Module | Callable[..., Any],
    *inputs: Any,
    config: str | Path | Mapping[str, Any] | Scheme | QuantConfig | None = None,
    **keyword_inputs: Any,
) -> Explanation:
    """What `torch.compile(model, backend="qcompile", options={"config": config})` would make of a model, and why.

    Runs the model once on the inputs, unquantized and uncompiled; weights are packed for the report and kept for the
    compilation that may follow.

    Raises:
        ConfigError, LayerError: as the backend would.
    """
    parsed = None if config is None else parse_config(config)
    layers: list[LayerReport] = []
    declined: list[Decline] = []
    attention: list[Rewrite] = []
    graphs = 0
    for context in _rewritten(model, inputs, keyword_inputs, parsed):
        graphs += 1
        layers.extend(_report(context, node, context.layers[node]) for node in _linears(context))
        layers.extend(LayerReport(name, None, None, note=reason) for name, reason in context.left.items())
        declined.extend(e for e in context.events if isinstance(e, Decline))
        attention.extend(e for e in context.events if isinstance(e, Rewrite) and e.rule == ATTENTION_RULE)
    if isinstance(model, nn.Module):
        layers.extend(_experts(model, parsed))
    return Explanation(tuple(layers), tuple(declined), graphs, tuple(attention))
