"""`torch.compile(model, backend="qcompile", options={"config": ...})`."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from qcompile import attention, compat, ops
from qcompile.config import QuantConfig, parse_config
from qcompile.errors import ConfigError, GradientError, nearest, shown
from qcompile.flags import flags, override
from qcompile.linear_spec import decode_spec
from qcompile.memory import give_back
from qcompile.passes import GraphContext
from qcompile.passes.context import OP, Args, example
from qcompile.pipeline import bind_inputs, rewrite
from qcompile.released import release

OWN_OPTIONS = ("config", "mode", "free_weights", "tune")


@dataclass(frozen=True)
class Options:
    """What `torch.compile(..., options={...})` carries.

    Attributes:
        config: None quantizes nothing: for models that are quantized already.
        free_weights: free each original weight once it is packed; reading it afterwards raises.
        tune: time the kernels for each linear on the GPU, as with `flags.tune`.
        inductor: Inductor's own options, those of `mode` included.
    """

    config: QuantConfig | None = None
    free_weights: bool = False
    tune: bool = False
    inductor: dict[str, Any] = field(default_factory=dict)


def parse_options(options: dict[str, Any] | None, mode: str | None) -> Options:
    """Check and split the options.

    Raises:
        ConfigError: no mapping; an option that neither qcompile nor Inductor knows, or of another type; an unknown
            mode; a bad configuration.
    """
    if options is not None and not isinstance(options, Mapping):
        raise ConfigError(
            f'options must be a mapping such as {{"config": "int4"}}, not {type(options).__name__} {shown(options)}'
        )
    given = dict(options or {})
    mode = given.pop("mode", None) or mode
    try:
        inductor = compat.inductor_mode(mode) if mode else {}
    except ValueError as error:
        raise ConfigError(str(error)) from None
    config = given.pop("config", None)
    switches = {name: given.pop(name, False) for name in ("free_weights", "tune")}
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ConfigError(f"option {name} must be true or false, not {value!r}")
    known = compat.inductor_options()
    for key, value in given.items():
        if not isinstance(key, str) or key.replace("-", "_") not in known:
            near = ", ".join(nearest(key, [*OWN_OPTIONS, *known]))
            hint = f"did you mean {near}?" if near else f"qcompile's own are {', '.join(OWN_OPTIONS)}"
            raise ConfigError(f"unknown option {shown(key)}; {hint} (Inductor's options are accepted too)")
        wanted = compat.inductor_type(key.replace("-", "_"))
        if wanted is not None and not isinstance(value, wanted):
            raise ConfigError(f"Inductor's option {key} must be of type {wanted.__name__}, not {shown(value)}")
    return Options(None if config is None else parse_config(config), inductor=inductor | given, **switches)


def check_gradients(inputs: Sequence[Any]) -> None:
    """Refuse a graph through which autograd records: quantized weights have no gradient.

    Raises:
        GradientError: naming the ways out.
    """
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        raise GradientError(
            "qcompile compiles for inference, and autograd is recording: call the model under torch.no_grad() or "
            "torch.inference_mode(), or call model.requires_grad_(False) first"
        )


def backend(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Compile a Dynamo graph: rewrite its linears as the configuration says, and give the rest to Inductor.

    Args:
        mode: as in `torch.compile`; also accepted in `options`, since `torch.compile` refuses both together.
        options: `config` (anything `parse_config` takes), `mode`, `free_weights`, `tune`, and Inductor's options.

    Raises:
        ConfigError, LayerError: what the configuration asks for cannot be.
        GradientError: autograd is recording.
    """
    parsed = parse_options(options, mode)
    check_gradients(example_inputs)
    with ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) - 1)) as threads:
        on_cpus = all(_on_cpus(t) for t in example_inputs if isinstance(t, Tensor))
        threads.submit(compat.prepare_inductor, on_cpus=on_cpus)
        context = rewrite(graph_module, example_inputs, parsed.config, free_weights=parsed.free_weights)
        give_back()  # what tracing and merging weights freed, before Inductor takes more
        if parsed.tune or flags.tune:
            _tune(context)
        for build in _kernels_on_cpus(context):
            threads.submit(build)
        inner: list[Callable[..., Any]] = []
        inputs, call = bind_inputs(context, lambda *args: inner[0](*args))
        inner.append(compat.compile_with_inductor(context.module, inputs, parsed.inductor))
    if parsed.free_weights:
        _free(context)
    return _tuning(call) if parsed.tune else call


def _on_cpus(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _kernels_on_cpus(context: GraphContext) -> Iterable[Callable[[], None]]:
    """What builds the kernels that a graph calls on CPUs: on the other cores, since compiling the graph occupies one.

    What fails there fails again when it is called, which then says so.
    """
    wanted: dict[Any, Callable[[], None]] = {}
    for node in context.graph.find_nodes(op="call_function", target=OP):
        x, spec = example(node.args[0]), node.args[Args.index("spec")]
        if _on_cpus(x):
            wanted[spec, x.dtype] = functools.partial(ops.prepare, spec, x.dtype)
    for target in (torch.ops.qcompile.attention.default, torch.ops.qcompile.attention_plain.default):
        for node in context.graph.find_nodes(op="call_function", target=target):
            query, spec = example(node.args[0]), next((a for a in node.args if isinstance(a, str)), None)
            if _on_cpus(query):
                wanted[spec, query.dtype] = functools.partial(attention.prepare, query.dtype, spec)
    return wanted.values()


def _tune(context: GraphContext) -> None:
    """Time the kernels of linears whose number of rows is known; those of others are timed as they are called."""
    spec = Args.index("spec")
    for node in context.graph.find_nodes(op="call_function", target=OP):
        x = example(node.args[0])
        rows = math.prod(x.shape[:-1])
        if isinstance(rows, int):
            ops.tune(node.args[spec], rows, x.dtype, x.device)
    for node in context.graph.find_nodes(op="call_function", target=OP):
        node.update_arg(spec, decode_spec(node.args[spec]).encode())  # which says what is tuned now


def _tuning(call: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose calls may time kernels."""

    def tuning_call(*args: Any) -> Any:
        with override(tune=True):
            return call(*args)

    return tuning_call


def _free(context: GraphContext) -> None:
    still_read = set(context.placeholders())
    for layer in context.layers.values():
        if layer.weight is None or layer.packed is None or layer.weight.transposed or layer.prepared:
            continue
        (source,) = layer.weight.parts
        if source not in still_read and isinstance(context.values[source], torch.nn.Parameter):
            release(context.values[source], layer.packed, layer.scheme, layer.input_scale)
