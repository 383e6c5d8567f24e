"""Where scales of a linear's input channels can go: into parameters before it, found from the block's graph.

    y = x @ W.T       ->  y = (x / s) @ (W * s).T        and x / s is what parameters before it make if they are divided

The division is pulled back from x, operator by operator, until it meets parameters. Which channel's scale divides each
element of a tensor is a tensor of labels; operators that only move elements (view, transpose, expand, repeat, split)
are run on element numbers, so any chain of them is followed exactly. Elements that meet (heads that share keys and
values) make their channels share one scale.

    norm(h) * w, norm(h) * (1 + w)                 w
    layer_norm(h, w, b), x + b                     w and b
    linear(h, W, b)                                rows of W and b
    f(h) * linear(h), attention(q, k, v), relu(x)  the linear; v; x: on from there

Every other reader of a tensor that changes makes the fold illegal, unless it is a linear whose columns can make up for
it; so does an operator that reads one through two operands, and operators that do not commute with scales.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompile.calibrate.trace import Illegal, LinearNode, Trace, kind_of, shape_of

IDENTITIES = {
    "to",
    "type_as",
    "float",
    "_to_copy",
    "contiguous",
    "clone",
    "detach",
    "alias",
    "dropout",
    "lift_fresh_copy",
}
MOVES = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "transpose", "permute", "t", "expand", "repeat",
    "repeat_interleave", "unsqueeze", "squeeze", "select", "slice",
}  # fmt: skip
SPLITS = {"split", "split_with_sizes", "chunk", "unbind"}
_HOMOGENEOUS = {"relu", "leaky_relu", "neg"}
"""f(a x) = a f(x) for positive a."""


@dataclass(frozen=True)
class Source:
    """A parameter p that becomes (p + shift) / s[labels] - shift.

    Attributes:
        labels: int64 of the parameter's shape (perhaps expanded): the channel whose scale divides an element, or -1.
    """

    parameter: nn.Parameter
    labels: Tensor
    shift: float = 0.0


@dataclass(frozen=True)
class Site:
    """Linears that read one tensor, and what can be divided so that the tensor is.

    Attributes:
        readers: all of them; their columns are multiplied.
        sources: see `Source`.
        classes: int64 [K]; channels of one class share a scale.
        path: the nodes whose values change, each with the channel whose scale divides an element, or -1.
    """

    readers: tuple[LinearNode, ...]
    sources: tuple[Source, ...]
    classes: Tensor
    path: Mapping[fx.Node, Tensor]

    @torch.no_grad()
    def apply(self, scale: Tensor) -> None:
        """Fold scales, float32 [K], positive and equal within classes, into all parameters concerned, in place."""
        for reader in self.readers:
            by = scale[:, None] if reader.transposed else scale
            reader.weight.copy_((reader.weight.float() * by).to(reader.weight.dtype))
        divisors = torch.cat([scale, torch.ones_like(scale[:1])])  # -1 is the last
        for source in self.sources:
            changed = (source.parameter.float() + source.shift) / divisors[
                source.labels.to(scale.device)
            ] - source.shift
            source.parameter.copy_(changed.to(source.parameter.dtype))

    def shared(self, scale: Tensor) -> Tensor:
        """Scales made equal within classes: their geometric mean."""
        logs, classes = scale.log(), self.classes.to(scale.device)
        count = torch.zeros_like(logs).index_add_(0, classes, torch.ones_like(logs))
        sums = torch.zeros_like(logs).index_add_(0, classes, logs)
        return (sums / count.clamp(min=1))[classes].exp()


@dataclass(frozen=True)
class _Pulled:
    """Where a division went.

    Attributes:
        path: nodes whose values change, with their labels.
        merges: pairs of channels that must share a scale, int64 [pairs, 2].
    """

    sources: tuple[Source, ...]
    path: dict[fx.Node, Tensor]
    merges: Tensor

    def __or__(self, other: _Pulled) -> _Pulled:
        merges = torch.cat([self.merges, other.merges])
        return _Pulled(self.sources + other.sources, self.path | other.path, merges)

    def through(self, node: fx.Node, labels: Tensor) -> _Pulled:
        return _Pulled(self.sources, {**self.path, node: labels}, self.merges)


_NO_MERGES = torch.empty(0, 2, dtype=torch.int64)


def owners_of(model: nn.Module) -> dict[int, int]:
    """How many modules have each parameter, by its id."""
    found: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        found[id(parameter)] = found.get(id(parameter), 0) + 1
    return found


def groups(trace: Trace) -> dict[fx.Node, list[LinearNode]]:
    """The linears of a graph by the tensor that they read, views and casts of it included."""
    found: dict[fx.Node, list[LinearNode]] = {}
    for linear in trace.linears():
        found.setdefault(_root(linear), []).append(linear)
    return found


def _root(linear: LinearNode) -> fx.Node:
    node, features = linear.x, shape_of(linear.x)[-1]
    while kind_of(node) in IDENTITIES | {"view", "reshape", "_unsafe_view", "flatten"}:
        before = node.args[0]
        if not isinstance(before, fx.Node) or shape_of(before)[-1:] != (features,) or not _is_float(before):
            break
        node = before
    return node


def _is_float(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, Tensor) and value.is_floating_point()


def site(trace: Trace, root: fx.Node, readers: list[LinearNode], owners: dict[int, int]) -> Site:
    """How scales of a tensor's channels can be folded.

    Args:
        root: of `groups`, with its readers.
        owners: how many modules have a parameter, by its id.

    Raises:
        Illegal: they cannot; says why.
    """
    between = _check_readers(root, readers)
    features = shape_of(root)[-1]
    labels = torch.arange(features).expand(shape_of(root))
    pulled = _pull(trace, root, labels, 0.0)
    allowed = {*pulled.path, *between, *(reader.node for reader in readers)}
    for node, changed in pulled.path.items():
        if _reads_more(trace, node, pulled.path):
            raise Illegal(f"{_words(node)} reads what would change through another operand too")
        for user in node.users:
            if user not in allowed and not _reads_the_rest(user, node, changed):
                raise Illegal(f"{_words(user)} reads what would change too")
    parameters = [source.parameter for source in pulled.sources] + [reader.weight for reader in readers]
    if len({id(parameter) for parameter in parameters}) < len(parameters):
        raise Illegal("a parameter would change twice")
    for parameter in parameters:
        if owners.get(id(parameter), 0) != 1:
            raise Illegal("a parameter belongs to several modules")
        if len(trace.uses(parameter)) != 1:
            raise Illegal("a parameter is used several times")
    classes = _classes(pulled.merges, features)
    if features > 1 and len(classes.unique()) == 1:
        raise Illegal("all channels would share one scale")
    return Site(tuple(readers), pulled.sources, classes, pulled.path)


def _check_readers(root: fx.Node, readers: list[LinearNode]) -> frozenset[fx.Node]:
    """The views and casts between a tensor and its readers.

    Raises:
        Illegal: something else reads it.
    """
    products = {reader.node for reader in readers}
    between: set[fx.Node] = set()
    ahead = [root]
    while ahead:
        node = ahead.pop()
        for user in node.users:
            if user in products:
                continue
            if kind_of(user) not in IDENTITIES | {"view", "reshape", "_unsafe_view", "flatten"}:
                raise Illegal(f"{_words(user)} reads its input too")
            between.add(user)
            ahead.append(user)
    return frozenset(between)


def _reads_the_rest(user: fx.Node, node: fx.Node, labels: Tensor) -> bool:
    """Whether a part of a tensor is taken that does not change."""
    if kind_of(node) in SPLITS:
        return kind_of(user) == "getitem"
    return kind_of(user) == "slice" and bool((user.target(labels, *user.args[1:]) < 0).all())  # type: ignore[operator]


_PASSED = {
    "add": {0, 1},
    "layer_norm": {2, 3},
    "rms_norm": {2},
    "scaled_dot_product_attention": {2},
    "matmul": {1},
    "mm": {1},
    "bmm": {1},
}
"""The operands through which a division is pulled, by their positions; of other operators, the first."""


def _reads_more(trace: Trace, node: fx.Node, path: Mapping[fx.Node, Tensor]) -> bool:
    """Whether an operator on the path reads what changes through an operand that the division did not pass."""
    changed = {place for place, operand in enumerate(node.args) if isinstance(operand, fx.Node) and operand in path}
    if any(operand in path for operand in node.all_input_nodes if operand not in node.args):
        return True
    if kind_of(node) == "mul":
        return len(changed) > 1
    passed: set[int] = set() if trace.linear(node) is not None else _PASSED.get(kind_of(node), {0})
    return not changed <= passed


def _words(node: fx.Node) -> str:
    return "the block's output" if node.op == "output" else f"operator {kind_of(node) or node.name}"


def _move(labels: Tensor, shape: torch.Size, function: Callable[[Tensor], Any]) -> tuple[Tensor, Tensor]:
    """Labels of a tensor from those of what a function made of it by moving elements.

    Args:
        labels: of the result.
        shape: of the tensor.

    Returns:
        labels of `shape`, -1 where no element of the result came from, and merges.
    """
    numbers = function(torch.arange(shape.numel()).reshape(shape)).reshape(-1)
    flat = labels.reshape(-1)
    kept = flat >= 0
    numbers, flat = numbers[kept], flat[kept]
    before = torch.full((shape.numel(),), -1, dtype=torch.int64).scatter_(0, numbers, flat)
    chosen = before[numbers]
    merges = torch.stack([chosen, flat], 1)[chosen != flat].unique(dim=0)
    return before.reshape(shape), merges


def _pull(trace: Trace, node: Any, labels: Tensor, shift: float) -> _Pulled:
    """Divide a node's value by the scales of its labels.

    Args:
        shift: what was added to the value before anything else became of it.

    Raises:
        Illegal: it cannot be.
    """
    if not isinstance(node, fx.Node):
        raise Illegal("a constant would have to change")
    if (parameter := trace.parameter(node)) is not None:
        return _Pulled((Source(parameter, labels, shift),), {node: labels}, _NO_MERGES)
    if node.op == "placeholder":
        raise Illegal("it comes from before the block")
    kind = kind_of(node)
    if kind in IDENTITIES and not (kind == "dropout" and node.args[2]):
        if not _is_float(node):
            raise Illegal("a cast to integers does not commute with scales")
        return _pull(trace, node.args[0], labels, shift).through(node, labels)
    if kind in MOVES:
        return _pull_move(trace, node, node.args[0], labels, shift, lambda t: node.target(t, *node.args[1:]))  # type: ignore[operator]
    if kind == "getitem":
        return _pull_item(trace, node, labels, shift)
    if kind == "add" and isinstance(node.args[1], (int, float)) and not node.kwargs:
        return _pull(trace, node.args[0], labels, shift + node.args[1]).through(node, labels)
    if kind == "div" and node.kwargs:
        raise Illegal("a division that rounds does not commute with scales")
    if shift != 0:
        raise Illegal(f"a number is added to {_words(node)}")
    if kind in _HOMOGENEOUS or (kind in ("mul", "div") and not isinstance(node.args[1], fx.Node)):
        return _pull(trace, node.args[0], labels, 0.0).through(node, labels)
    rule = _RULES.get(kind)
    if rule is None:
        raise Illegal(f"{_words(node)} does not commute with scales")
    return rule(trace, node, labels).through(node, labels)


def _pull_move(
    trace: Trace, node: fx.Node, before: Any, labels: Tensor, shift: float, function: Callable[[Tensor], Any]
) -> _Pulled:
    assert isinstance(before, fx.Node)
    earlier, merges = _move(labels, shape_of(before), function)
    pulled = _pull(trace, before, earlier, shift).through(node, labels)
    return _Pulled(pulled.sources, pulled.path, torch.cat([pulled.merges, merges]))


def _pull_item(trace: Trace, node: fx.Node, labels: Tensor, shift: float) -> _Pulled:
    """A part of what was split: the other parts do not change."""
    split, index = node.args
    if not isinstance(split, fx.Node) or kind_of(split) not in SPLITS:
        raise Illegal("it is one of an operator's several results")

    def part(t: Tensor) -> Any:
        return split.target(t, *split.args[1:])[index]  # type: ignore[operator]

    return _pull_move(trace, node, split.args[0], labels, shift, part).through(split, labels)


def _broadcast(trace: Trace, node: fx.Node, operand: Any, labels: Tensor) -> _Pulled:
    if not isinstance(operand, fx.Node):
        raise Illegal("a constant would have to change")
    return _pull_move(trace, node, operand, labels, 0.0, lambda t: t.expand(shape_of(node)))


def _mul(trace: Trace, node: fx.Node, labels: Tensor) -> _Pulled:
    """One factor takes it all: the one that leaves the most scales free."""
    found, reasons = [], []
    for operand in node.args[:2]:
        try:
            found.append(_broadcast(trace, node, operand, labels))
        except Illegal as reason:
            reasons.append(str(reason))
    if not found:
        raise Illegal(" and ".join(dict.fromkeys(reasons)))
    return min(found, key=lambda pulled: len(pulled.merges))


def _div(trace: Trace, node: fx.Node, labels: Tensor) -> _Pulled:
    return _broadcast(trace, node, node.args[0], labels)


def _add(trace: Trace, node: fx.Node, labels: Tensor) -> _Pulled:
    if node.kwargs:
        raise Illegal("a scaled sum does not commute with scales")
    return _broadcast(trace, node, node.args[0], labels) | _broadcast(trace, node, node.args[1], labels)


def _linear(trace: Trace, node: fx.Node, labels: Tensor) -> _Pulled:
    linear = trace.linear(node)
    if linear is None:
        if kind_of(node) in ("linear", "addmm"):
            raise Illegal("a weight that is computed, or a bias, does not take up scales")
        return _matmul(trace, node, labels)
    rows = _last_axis(labels)
    weight = rows.expand(linear.weight.shape) if linear.transposed else rows[:, None].expand(linear.weight.shape)
    sources = [Source(linear.weight, weight)]
    if linear.bias is not None:
        sources.append(Source(linear.bias, rows.expand(linear.bias.shape)))
    return _Pulled(tuple(sources), {}, _NO_MERGES)


def _last_axis(labels: Tensor) -> Tensor:
    """Labels [N] that all vectors along the last axis have.

    Raises:
        Illegal: they differ.
    """
    rows = labels.reshape(-1, labels.shape[-1])
    if not bool((rows == rows[0]).all()):
        raise Illegal("its channels are mixed with other axes")
    return rows[0]


def _norm(trace: Trace, node: fx.Node, labels: Tensor) -> _Pulled:
    """layer_norm(x, shape, weight, bias) and rms_norm(x, shape, weight): the norm itself stays."""
    affine = node.args[2:4] if kind_of(node) == "layer_norm" else node.args[2:3]
    present = [p for p in affine if p is not None]
    if not present or affine[0] is None:
        raise Illegal("its norm has no weight")
    rows = _last_axis(labels)
    pulled = [_pull(trace, p, rows, 0.0) for p in present]
    return pulled[0] if len(pulled) == 1 else pulled[0] | pulled[1]


def _over_tokens(labels: Tensor, tokens: int) -> Tensor:
    """Labels of v from those of p @ v, which all rows share.

    Raises:
        Illegal: they do not.
    """
    first = labels[..., :1, :]
    if not bool((labels == first).all()):
        raise Illegal("its channels are mixed with tokens")
    return first.expand(*labels.shape[:-2], tokens, labels.shape[-1])


def _matmul(trace: Trace, node: fx.Node, labels: Tensor) -> _Pulled:
    """p @ v, as attention has it: every column of v passes to the same column of the product."""
    v = node.args[1]
    if not isinstance(v, fx.Node) or labels.dim() < 2 or shape_of(v)[:-2] != labels.shape[:-2]:
        raise Illegal("a product that broadcasts does not commute with scales")
    return _pull(trace, v, _over_tokens(labels, shape_of(v)[-2]), 0.0)


def _attention(trace: Trace, node: fx.Node, labels: Tensor) -> _Pulled:
    """scaled_dot_product_attention(q, k, v): as p @ v; groups of query heads may share heads of v."""
    v = node.args[2]
    assert isinstance(v, fx.Node)
    shape = shape_of(v)
    repeats = labels.shape[-3] // shape[-3] if labels.dim() > 3 else 1
    return _pull_move(
        trace, node, v, _over_tokens(labels, shape[-2]), 0.0, lambda t: t.repeat_interleave(repeats, -3)
        if repeats > 1 else t,
    )  # fmt: skip


_RULES: dict[str, Callable[[Trace, fx.Node, Tensor], _Pulled]] = {
    "mul": _mul,
    "div": _div,
    "add": _add,
    "linear": _linear,
    "addmm": _linear,
    "mm": _linear,
    "matmul": _linear,
    "bmm": _matmul,
    "layer_norm": _norm,
    "rms_norm": _norm,
    "scaled_dot_product_attention": _attention,
}


def _classes(merges: Tensor, features: int) -> Tensor:
    """int64 [K]: the least channel that each must share its scale with, directly or through others."""
    classes = torch.arange(features)
    while len(merges):
        ends = classes[merges]
        low = ends.amin(1)
        joined = classes.clone()
        for column in (0, 1):
            joined.scatter_reduce_(0, ends[:, column], low, "amin")
        joined = joined[joined]
        if torch.equal(joined[classes], classes):
            break
        classes = joined[classes]
    return classes
