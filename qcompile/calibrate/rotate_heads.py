"""Rotations of attention's values: each head's are turned by an orthogonal matrix, so that no channel stands out.

R2 of SpinQuant (Liu et al. 2024, arXiv:2405.16406), as QuaRot (Ashkboos et al. 2024, arXiv:2404.00456) folds it into
the value and output projections: cached values and the output projection's inputs lose their outliers, and nothing is
added to the model.

    v = x @ V.T + b         V -> R^T V,  b -> b R        for the rows of each head of keys and values
    o = softmax(q k^T) v    o -> o R                     since tokens are mixed, and channels are not
    y = o @ W.T             W -> W R                     for the columns of each query head

It is legal where operators between the two projections do no more than mix tokens and move elements; they are found as
the folds of scales are (`qcompile.calibrate.folds`), so fused projections and grouped heads need no rules of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, fx, nn

from qcompile.calibrate.folds import IDENTITIES, MOVES, SPLITS, Site, groups, owners_of, site
from qcompile.calibrate.rotate import hadamard
from qcompile.calibrate.stream import Batch, NotAStack, find_stacks, record
from qcompile.calibrate.trace import Illegal, LinearNode, Trace, kind_of, trace_block


def rotate_heads_(model: nn.Module, batch: Batch, layers: Collection[str], seed: int) -> dict[str, str]:
    """Turn the values of all heads (R2), in place.

    Args:
        batch: to trace the blocks with.
        layers: that are quantized, which say what the model's blocks are.
        seed: of the rotation, one for all heads.

    Returns:
        by the names of output projections, "" where their inputs are turned, else why not; or that for all `layers`.
    """
    outcome: dict[str, str] = {}
    owners = owners_of(model)
    names = {id(p): n.removesuffix(".weight") for n, p in model.named_parameters()}
    for blocks in find_stacks(model, layers):
        within = [layer for layer in layers if any(layer.startswith(f"{name}.") for name in blocks)]
        try:
            stack = record(model, blocks, [batch], [])
        except NotAStack as reason:
            outcome |= dict.fromkeys(within, f"blocks cannot be run apart: {reason}")
            continue
        for name, calls in zip(stack.names, stack.calls, strict=True):
            block = model.get_submodule(name)
            device = next((p.device for p in block.parameters()), stack.hidden[0].device)
            try:
                trace = trace_block(block, calls[0].with_hidden(stack.hidden[0].to(device)))
            except Illegal as reason:
                outcome |= dict.fromkeys([n for n in within if n.startswith(f"{name}.")], str(reason))
                continue
            for readers, why in turn_values(trace, owners, seed):
                outcome |= {names.get(id(reader.weight), ""): why for reader in readers}
    return outcome


def turn_values(trace: Trace, owners: Mapping[int, int], seed: int) -> list[tuple[list[LinearNode], str]]:
    """Turn the values in one block's graph.

    Returns:
        the output projections of each attention, and why its values were not turned, or "".
    """
    outcome = []
    for root, readers in groups(trace).items():
        if _mixer(trace, root) is None:
            continue
        try:
            heads = Heads(trace, site(trace, root, readers, dict(owners)))
            heads.turn(hadamard(heads.channels.shape[1], seed))
            outcome.append((readers, ""))
        except Illegal as reason:
            outcome.append((readers, str(reason)))
    return outcome


def _mixer(trace: Trace, node: object) -> fx.Node | None:
    """The attention that a tensor comes from by moving elements alone."""
    while isinstance(node, fx.Node):
        if _mixes_tokens(trace, node):
            return node
        if kind_of(node) not in IDENTITIES | MOVES:
            return None
        node = node.args[0]
    return None


def _mixes_tokens(trace: Trace, node: fx.Node) -> bool:
    product = kind_of(node) in ("matmul", "bmm") and trace.linear(node) is None
    return product or kind_of(node) == "scaled_dot_product_attention"


class Heads:
    """The channels of values, head by head, on both sides of an attention.

    Attributes:
        channels: int64 [query heads, D], inputs of the output projections.
        rows: int64 [heads of values, D], outputs of the value projection.

    Raises:
        Illegal: operators between the projections do more than mix tokens and move elements.
    """

    def __init__(self, trace: Trace, found: Site) -> None:
        mixers = [node for node in found.path if _mixes_tokens(trace, node)]
        if len(mixers) != 1:
            raise Illegal(f"{len(mixers)} products lie between values and the output projection")
        for node in found.path:
            if node in mixers or node.op == "get_attr" or trace.linear(node) is not None:
                continue
            if kind_of(node) not in IDENTITIES | MOVES | SPLITS | {"getitem"}:
                raise Illegal(f"operator {kind_of(node)} lies between values and the output projection")
        writers = [w for w in trace.linears() if any(s.parameter is w.weight for s in found.sources)]
        if len(writers) != 1 or len(found.sources) != 1 + (writers[0].bias is not None):
            raise Illegal("values are not what one linear gives")
        self.site, self.writer = found, writers[0]
        labels = found.path[mixers[0]]
        self.channels = labels[..., 0, :].reshape(-1, labels.shape[-1]).unique(dim=0)
        if self.channels.numel() != len(found.classes):
            raise Illegal("channels of the output projection's input are not those of heads")
        self.rows = self._rows()

    def _rows(self) -> Tensor:
        """The value projection's rows in the order of the channels that they become."""
        weight = next(s for s in self.site.sources if s.parameter is self.writer.weight)
        label = weight.labels[0] if self.writer.transposed else weight.labels[:, 0]
        classes = self.site.classes
        row_of = {int(classes[channel]): row for row, channel in enumerate(label.tolist()) if channel >= 0}
        heads = [[row_of.get(int(classes[channel]), -1) for channel in head] for head in self.channels.tolist()]
        rows = torch.tensor(heads).unique(dim=0)
        if rows.numel() != int((label >= 0).sum()) or sorted(rows.flatten().tolist()) != sorted(row_of.values()):
            raise Illegal("heads do not share values whole")
        return rows

    @torch.no_grad()
    def turn(self, rotation: Tensor) -> None:
        """Fold a rotation of every head into both projections, in place.

        Args:
            rotation: orthogonal float64 [D, D].
        """
        values = [self.writer.weight.t() if self.writer.transposed else self.writer.weight]
        values += [] if self.writer.bias is None else [self.writer.bias]
        for rows in self.rows:
            for value in values:
                value[rows] = _turned(value[rows].t(), rotation).t()
        for reader in self.site.readers:
            weight = reader.weight.t() if reader.transposed else reader.weight
            for channels in self.channels:
                weight[:, channels] = _turned(weight[:, channels], rotation)


def _turned(matrix: Tensor, rotation: Tensor) -> Tensor:
    return (matrix.double() @ rotation.to(matrix.device)).to(matrix.dtype)
