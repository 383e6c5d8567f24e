"""The only place for symbols of torch that are not public. Each says what it relies on; seen in torch 2.11 to 2.15."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

_MODULE_STEP = re.compile(r"\._modules\['([^']*)'\]|\._(?:parameters|buffers)\['([^']*)'\]|\.([A-Za-z_]\w*)|\[(\d+)\]")
_ROOT = re.compile(r"^([LG])\['([^']+)'\](?:(?<=\['args'\])\[(\d+)\])?")
"""A variable, or one of the `args` of a function that wraps `forward`, as transformers has it from 5.24 on."""


def inductor_options() -> list[str]:
    """Names that Inductor takes in `options`."""
    import torch._inductor

    return list(torch._inductor.list_options())


def inductor_type(name: str) -> type | None:
    """The type that Inductor wants of an option; None where it takes several, or has the option under two names."""
    from torch._inductor import config

    try:
        wanted = config.get_type(name)  # type: ignore[attr-defined]
    except (AttributeError, KeyError):
        return None
    return wanted if isinstance(wanted, type) else None


def inductor_mode(mode: str) -> dict[str, Any]:
    """The Inductor options that a `mode` of `torch.compile` stands for.

    Raises:
        ValueError: an unknown mode; the message lists those there are.
    """
    import torch._inductor

    modes = torch._inductor.list_mode_options()
    if mode not in modes:
        raise ValueError(f"unknown mode {mode!r}; there are {', '.join(modes)}")
    return dict(modes[mode])


def compile_with_inductor(graph: fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any]) -> Callable[..., Any]:
    """Hand a graph in Dynamo's form to Inductor.

    Without checks of every size and stride at every call, which take a tenth of a small model's step on a CPU, unless
    the options ask for them.
    """
    import torch._inductor

    return torch._inductor.compile(graph, list(inputs), options={"size_asserts": False} | options)


def prepare_inductor(on_cpus: bool) -> None:
    """Have Inductor find out what it keeps for a process: in another thread that takes little of its time.

    That is the hash of torch's and of Triton's files, and on CPUs what the processor's vector instructions are, for
    which it builds and runs a library each.
    """
    from torch._inductor import codecache, cpu_vec_isa

    if on_cpus:
        cpu_vec_isa.valid_vec_isa_list()
    codecache.CacheBase.get_system()
    codecache.torch_key()


def clone(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy whose nodes may be changed: Dynamo goes on reading its own graph after the backend returns.

    Keeps what Inductor and AOTAutograd read beside the graph: the sources of placeholders and of attributes. As
    Dynamo's, its code is made when it is read, not after each change.
    """
    from torch.fx._lazy_graph_module import _make_graph_module

    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(graph_module.graph, copies)
    graph.output(output)
    for original, copy in copies.items():
        if original.op == "placeholder" and hasattr(original, "_dynamo_source"):
            copy._dynamo_source = original._dynamo_source
    new = _make_graph_module(graph_module, graph)
    new.meta = dict(graph_module.meta)
    for name in ("_param_name_to_source", "_source_to_user_stacks", "_backend_id"):
        if hasattr(graph_module, name):
            setattr(new, name, getattr(graph_module, name))
    return new


def fake_mode_of(graph_module: fx.GraphModule) -> Any:
    """The FakeTensorMode in which Dynamo recorded the graph's example values (not the one of the compiler)."""
    from torch._guards import TracingContext

    for node in graph_module.graph.nodes:
        mode = getattr(node.meta.get("example_value"), "fake_mode", None)
        if mode is not None:
            return mode
    return TracingContext.get().fake_mode


def add_input(graph: fx.Graph, name: str, tensor: Tensor, after: fx.Node | None, fake_mode: Any) -> fx.Node:
    """A new placeholder for a tensor whose address stays, as a parameter's does, after all others.

    Args:
        after: the last placeholder there is; None where there is none.
        fake_mode: see `fake_mode_of`.
    """
    from torch._dynamo.source import ConstantSource
    from torch._guards import TracingContext
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatefulSymbolicContext

    if after is not None:
        with graph.inserting_after(after):
            node = graph.placeholder(name)
    else:
        with graph.inserting_before(next(iter(graph.nodes))):
            node = graph.placeholder(name)
    node._dynamo_source = None
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    node.meta["example_value"] = fake_mode.from_tensor(tensor, static_shapes=True)
    if (context := TracingContext.try_get()) is not None:  # in which AOTAutograd would make symbols of its sizes
        sizes = [DimDynamic.STATIC] * tensor.dim()
        context.tensor_to_context[tensor] = StatefulSymbolicContext(sizes, tensor_source=ConstantSource(name))
    return node


def source_name(node: fx.Node) -> str | None:
    """Where Dynamo found a placeholder's value, e.g. `L['self']._modules['up']._parameters['weight']`."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return None
    name = source.name
    return name() if callable(name) else name


def is_state(node: fx.Node) -> bool:
    """Whether a placeholder is a parameter or buffer of a module."""
    name = source_name(node)
    return name is not None and ("._parameters[" in name or "._buffers[" in name)


def qualified_name(source: str) -> str:
    """A source without its root, in dots: `layers.0.up.weight`."""
    rest = _ROOT.sub("", source)
    steps = [next(part for part in match if part is not None and part != "") for match in _MODULE_STEP.findall(rest)]
    return ".".join(step for step in steps if step not in ("_orig_mod",))


def module_of(node: fx.Node) -> tuple[str, type] | None:
    """Qualified name (relative to the compiled root) and class of the innermost module that a node comes from."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path, kind = list(stack.values())[-1]
    # Sources spell indices of containers as `layers.0` or `layers[0]`, and the root as L['self'].
    name = _ROOT.sub("", path).lstrip(".").replace("[", ".").replace("]", "").replace("'", "")
    name = ".".join(part for part in name.split(".") if part not in ("", "_modules", "_orig_mod"))
    return name, kind


def root_module(nodes: Sequence[fx.Node]) -> nn.Module | None:
    """The module whose code is being compiled, if it is one module whose parameters these placeholders are."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    roots = {match.groups() for n in nodes if is_state(n) and (match := _ROOT.match(source_name(n) or ""))}
    if len(roots) != 1:
        return None
    scope, name, place = roots.pop()
    try:
        frame = InstructionTranslator.current_tx().output.root_tx
        found = (frame.f_locals if scope == "L" else frame.f_globals).get(name)
    except AttributeError:  # no trace is going on, or its form changed; rules are then checked against the graph alone
        return None
    if place is not None and isinstance(found, tuple):
        found = found[int(place)]
    return found if isinstance(found, nn.Module) else None


def schema_writes(target: Any) -> bool | None:
    """Whether an operator, or one of its overloads, says that it writes to an argument; None of what is no operator."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        return any(getattr(target, name)._schema.is_mutable for name in target.overloads())
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable)
    return None


def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum of a contiguous tensor over a group's processes. Compilers trace it.

    The operators of `torch.distributed._functional_collectives`, which names groups as a graph can hold them.
    """
    functional = torch.ops._c10d_functional
    return functional.wait_tensor.default(functional.all_reduce.default(x, "sum", group))


def all_gather(x: Tensor, size: int, group: str) -> Tensor:
    """The last dimensions [..., D] of a group's `size` processes side by side, [..., size * D]; see `all_reduce`."""
    functional = torch.ops._c10d_functional
    parts = functional.all_gather_into_tensor.default(x.contiguous().unsqueeze(0), size, group)
    return functional.wait_tensor.default(parts).movedim(0, -2).flatten(-2)


def shared_memory(group: Any, count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """`count` zeros on each GPU of a process group that all of them read and write, which all of them call.

    Returns:
        This GPU's memory, and that of each, in the order of their ranks.

    Raises:
        RuntimeError: they cannot.
        AttributeError: this torch has not that.
    """
    from torch.distributed import _symmetric_memory

    memory = _symmetric_memory.empty(count, dtype=dtype, device=device).zero_()
    torch.cuda.synchronize(device)  # nobody writes before all have met below
    handle = _symmetric_memory.rendezvous(memory, group.group_name)
    return memory, [handle.get_buffer(rank, (count,), dtype) for rank in range(group.size())]


def reset_compiler() -> None:
    """Forget everything that torch.compile compiled in this process."""
    import torch._dynamo

    torch._dynamo.reset()


def allow_recompilations(count: int) -> None:
    """Let a function be compiled for that many shapes before torch gives up."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, count)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, count)


def constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compiler.assume_constant_result`, which imports Dynamo."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def mark_static(*tensors: Tensor) -> None:
    """Promise that these tensors' addresses stay, so that CUDA graphs may change them in place.

    While a graph is traced nothing is promised.
    """
    import torch._dynamo

    if not torch.compiler.is_compiling():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)


def without_torch_function() -> AbstractContextManager[None]:
    """A context in which tensor subclasses are taken as plain tensors."""
    return torch._C.DisableTorchFunctionSubclass()


@contextmanager
def plain_backend_errors() -> Iterator[None]:
    """Raise what a backend raised, instead of Dynamo's wrapping of it."""
    from torch._dynamo.exc import BackendCompilerFailed

    try:
        yield
    except BackendCompilerFailed as error:
        raise error.inner_exception from None
