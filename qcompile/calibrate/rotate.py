"""Rotations: a model's hidden states are turned by an orthogonal matrix, so that no channel of them stands out.

QuaRot (Ashkboos et al. 2024, arXiv:2404.00456) and SpinQuant (Liu et al. 2024, arXiv:2405.16406): their R1, which
turns the residual stream (`qcompile.calibrate.rotate_heads` has R2). It is folded into weights beforehand, so nothing
is added to the model. The matrix is a Hadamard matrix of random signs (of a power of two, or blocks of one in other
sizes).

It is legal where every reader of the residual stream is a norm that a rotation passes through, followed by linears, and
every writer is a linear or an embedding:

    h = embedding(ids)               E -> E Q
    n = h * rsqrt(mean(h^2) + eps)   n -> n Q                     since |h Q| = |h|
    y = (n * w) @ W.T                W -> (W * w) Q,  w -> 1
    h' = h + (z @ V.T + b)           V -> Q^T V,  b -> b Q
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompile.calibrate.folds import owners_of
from qcompile.calibrate.stream import Batch, NotAStack, find_stacks, passing_on, record
from qcompile.calibrate.trace import Illegal, LinearNode, Trace, kind_of, shape_of, trace_block, trace_model
from qcompile.linears import linear_modules

_SAME = {"to", "type_as", "float", "_to_copy", "contiguous", "clone", "detach", "alias", "dropout"}
"""What hands its input on; calibration runs models in evaluation, where dropout is among it."""


def hadamard(size: int, seed: int = 0) -> Tensor:
    """An orthogonal float64 [size, size]: Hadamard blocks of the largest power of two that divides it, mixed signs.

    Where that power is less than the size, blocks lie on the diagonal after a random permutation.
    """
    generator = torch.Generator().manual_seed(seed)
    block = size & -size
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    whole = torch.block_diag(*[matrix / block**0.5] * (size // block))
    signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64) * 2 - 1
    if block < size:
        whole = whole[torch.randperm(size, generator=generator)]
    return signs[:, None] * whole


@dataclass(frozen=True)
class Scaled:
    """Linears behind a norm's weight.

    Attributes:
        weight: the norm's, which multiplies as `weight + shift`; None where there is none.
        readers: the linears.
    """

    weight: nn.Parameter | None
    shift: float
    readers: tuple[LinearNode, ...]


@dataclass(frozen=True)
class Stream:
    """What reads and writes the residual stream in a graph."""

    reads: tuple[Scaled, ...]
    writes: tuple[LinearNode, ...]
    embeddings: tuple[nn.Parameter, ...]


def residual_stream(trace: Trace, starts: Iterable[fx.Node], *, returned: bool) -> Stream:
    """Follow the residual stream through a graph.

    Args:
        starts: nodes that are hidden states: a block's input, or what embeddings give.
        returned: the graph is a block's, whose first result is the hidden state.

    Raises:
        Illegal: something reads or writes it that a rotation does not pass through.
    """
    inside: dict[fx.Node, None] = dict.fromkeys(starts)
    reads: list[Scaled] = []
    writes: list[LinearNode] = []
    norms: set[fx.Node] = set()
    ahead = list(inside)
    while ahead:
        node = ahead.pop()
        for user in node.users:
            if user in inside or user in norms or user.op == "output":
                continue
            kind = kind_of(user)
            if kind in _SAME or (kind == "add" and not user.kwargs and _both_tensors(user)):
                inside[user] = None
                ahead.append(user)
            elif kind in ("pow", "square"):
                norms |= _norm_of(trace, node, user, reads)
            elif kind == "rms_norm":
                reads.append(_behind(trace, user, trace.parameter(user.args[2]) if len(user.args) > 2 else None, 0.0))
            elif kind == "mul" and user.args[0] in inside and _is_norm(user):
                continue  # found from its pow
            else:
                raise Illegal(f"operator {kind or user.name} reads the residual stream")
    for node in inside:
        if kind_of(node) == "add":
            for operand in node.args[:2]:
                if operand not in inside:
                    writes.append(_writer(trace, operand))
    if returned and next(iter(trace.graph.output_node().all_input_nodes)) not in inside:
        raise Illegal("the block's output is not its input with something added")
    embeddings = tuple(_embedding(trace, node) for node in inside if kind_of(node) == "embedding")
    return Stream(tuple(reads), tuple(writes), embeddings)


def _embedding(trace: Trace, node: fx.Node) -> nn.Parameter:
    parameter = trace.parameter(node.args[0])
    if parameter is None:
        raise Illegal("an embedding's weight is computed")
    return parameter


def _both_tensors(node: fx.Node) -> bool:
    return all(isinstance(a, fx.Node) and shape_of(a) == shape_of(node) for a in node.args[:2])


def _is_norm(node: fx.Node) -> bool:
    """Whether a product is x * rsqrt(...)."""
    return any(isinstance(a, fx.Node) and kind_of(a) == "rsqrt" for a in node.args[:2])


def _only_user(node: fx.Node, kind: str) -> fx.Node:
    users = list(node.users)
    if len(users) != 1 or kind_of(users[0]) != kind:
        raise Illegal(f"operator {kind_of(node)} of the residual stream belongs to no RMS norm")
    return users[0]


def _norm_of(trace: Trace, x: fx.Node, squared: fx.Node, reads: list[Scaled]) -> set[fx.Node]:
    """x * rsqrt(mean(x^2, -1) + eps), and what reads it: the nodes of the norm."""
    mean = _only_user(squared, "mean")
    added = _only_user(mean, "add")
    root = _only_user(added, "rsqrt")
    product = _only_user(root, "mul")
    if (
        (kind_of(squared) == "pow" and squared.args[1] != 2)
        or mean.args[1] not in ([-1], (-1,))
        or x not in product.args[:2]
    ):
        raise Illegal("a power of the residual stream belongs to no RMS norm")
    reads.append(_behind(trace, product, None, 0.0))
    return {squared, mean, added, root, product}


def _behind(trace: Trace, normed: fx.Node, weight: nn.Parameter | None, shift: float) -> Scaled:
    """The linears that read a normed hidden state, through the norm's weight if it has one.

    Raises:
        Illegal: anything else reads it.
    """
    ahead, readers = [normed], []
    by_product = {linear.node: linear for linear in trace.linears()}
    while ahead:
        node = ahead.pop()
        for user in node.users:
            if user in by_product and by_product[user].x is node:
                readers.append(by_product[user])
            elif kind_of(user) in _SAME | {"view", "reshape"} and shape_of(user)[-1] == shape_of(node)[-1]:
                ahead.append(user)
            elif kind_of(user) == "mul" and weight is None and len(node.users) == 1:
                factor = next(a for a in user.args[:2] if a is not node)
                weight, shift = _affine(trace, factor)
                ahead.append(user)
            else:
                raise Illegal(f"operator {kind_of(user) or user.name} reads a normed hidden state")
    if not readers:
        raise Illegal("no linear reads a normed hidden state")
    return Scaled(weight, shift, tuple(readers))


def _affine(trace: Trace, node: object) -> tuple[nn.Parameter, float]:
    """A parameter, and what is added to it."""
    shift = 0.0
    while isinstance(node, fx.Node):
        if (parameter := trace.parameter(node)) is not None:
            return parameter, shift
        if kind_of(node) == "add" and isinstance(node.args[1], (int, float)):
            shift += node.args[1]
        elif kind_of(node) not in _SAME:
            break
        node = node.args[0]
    raise Illegal("a normed hidden state is multiplied by something other than the norm's weight")


def _writer(trace: Trace, node: object) -> LinearNode:
    while isinstance(node, fx.Node):
        if (linear := trace.linear(node)) is not None:
            return linear
        if kind_of(node) not in _SAME | {"view", "reshape"}:
            break
        node = node.args[0]
    what = kind_of(node) if isinstance(node, fx.Node) else "a constant"
    raise Illegal(f"{what or 'something from outside'} is added to the residual stream, not a linear")


@torch.no_grad()
def rotate_(model: nn.Module, batch: Batch, layers: Collection[str], seed: int) -> set[str]:
    """Turn a model's residual stream (R1), in place. Tied embeddings are untied: the head takes up the last norm.

    Args:
        batch: to trace the model with.
        layers: that are quantized, which say what its blocks are.
        seed: of the rotation.

    Returns:
        names of the linears whose inputs are turned.

    Raises:
        Illegal: it cannot be; the model stays as it was then, but for ties.
    """
    stacks = find_stacks(model, layers)
    if len(stacks) != 1:
        raise Illegal(f"the model has {len(stacks)} lists of blocks, not one")
    try:
        stack = record(model, stacks[0], [batch], [])
    except NotAStack as reason:
        raise Illegal(str(reason)) from None
    _untie(model)
    streams = []
    hidden = stack.hidden[0]
    for name, calls in zip(stack.names, stack.calls, strict=True):
        block = model.get_submodule(name)
        device = next((p.device for p in block.parameters()), hidden.device)
        trace = trace_block(block, calls[0].with_hidden(hidden.to(device)))
        starts = trace.graph.find_nodes(op="placeholder")
        streams.append(residual_stream(trace, starts, returned=True))
    with passing_on(model, stack.names):
        trace = _outside(model, batch, hidden.shape[:2])
    width = hidden.shape[-1]
    starts = [n for n in trace.graph.nodes if kind_of(n) == "embedding" and shape_of(n)[-1] == width]
    streams.append(residual_stream(trace, starts, returned=False))
    turn(streams, hadamard(width, seed), owners_of(model))
    names = {id(p): n.removesuffix(".weight") for n, p in model.named_parameters()}
    return {names[id(reader.weight)] for stream in streams for read in stream.reads for reader in read.readers}


def _outside(model: nn.Module, batch: Batch, shape: torch.Size) -> Trace:
    """The graph of a model whose blocks hand their input on.

    Models that make a mask for attention look at values for it; they are given one of four axes, which nobody reads.

    Raises:
        Illegal: it cannot be traced.
    """
    try:
        return trace_model(model, batch.args, batch.kwargs)
    except Illegal:
        if len(shape) != 2 or "attention_mask" not in inspect.signature(model.forward).parameters:
            raise
        mask = torch.zeros(shape[0], 1, shape[1], shape[1])
        return trace_model(model, batch.args, {**batch.kwargs, "attention_mask": mask})


def _untie(model: nn.Module) -> None:
    """Give linears weights of their own where they share an embedding's."""
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in linear_modules(model).values():
        if id(module.weight) in embedded:
            assert isinstance(module.weight, nn.Parameter)
            module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
            config: Any = getattr(model, "config", None)
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False


@torch.no_grad()
def turn(streams: Iterable[Stream], rotation: Tensor, owners: dict[int, int]) -> None:
    """Fold a rotation of the residual stream into all that reads and writes it, in place.

    Args:
        rotation: orthogonal float64 [width, width].
        owners: how many modules have a parameter, by its id.

    Raises:
        Illegal: a parameter that would be turned twice; nothing changed then.
    """
    streams = list(streams)
    parameters: list[nn.Parameter] = []
    for stream in streams:
        for read in stream.reads:
            parameters += [reader.weight for reader in read.readers]
            parameters += [read.weight] if read.weight is not None else []
        parameters += [p for write in stream.writes for p in (write.weight, write.bias) if p is not None]
        parameters += stream.embeddings
    for parameter in parameters:
        if owners.get(id(parameter), 0) != 1 or sum(p is parameter for p in parameters) > 1:
            raise Illegal("a parameter belongs to several modules, or is read several times")
    for stream in streams:
        for read in stream.reads:
            for reader in read.readers:
                _turn_reader(reader, read, rotation)
            if read.weight is not None:
                read.weight.fill_(1.0 - read.shift)
        for write in stream.writes:
            _turn_writer(write, rotation)
        for embedding in stream.embeddings:
            embedding.copy_((embedding.double() @ rotation.to(embedding.device)).to(embedding.dtype))


def _matrix(linear: LinearNode) -> Tensor:
    return linear.weight.detach().double()


def _turn_reader(reader: LinearNode, read: Scaled, rotation: Tensor) -> None:
    weight = _matrix(reader).T if reader.transposed else _matrix(reader)  # [N, K]
    if read.weight is not None:
        weight = weight * (read.weight.detach().double() + read.shift)
    turned = (weight @ rotation.to(weight.device)).to(reader.weight.dtype)
    reader.weight.copy_(turned.T if reader.transposed else turned)


def _turn_writer(writer: LinearNode, rotation: Tensor) -> None:
    weight = _matrix(writer) if writer.transposed else _matrix(writer).T  # [K, N]
    turned = (weight @ rotation.to(weight.device)).to(writer.weight.dtype)
    writer.weight.copy_(turned if writer.transposed else turned.T)
    if writer.bias is not None:
        bias = writer.bias.detach().double()
        writer.bias.copy_((bias @ rotation.to(bias.device)).to(writer.bias.dtype))
