"""Running a model one decoder block at a time, so that the activations of one block are all that there is.

A *stack* is a list of modules of one class that a model calls one after the other, each with what the one before
returned: the blocks of a decoder. While the model itself runs, blocks only note what they are called with and hand
their input on; then each block runs by itself on what the one before made of all batches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qcompile.errors import CalibrationError, shown


class Waiting(Protocol):
    """Blocks whose parameters are on the meta device until their turn comes."""

    blocks: list[str]

    def fill(self, block: str) -> None:
        """Give a block its parameters, if it waits."""

    def peek(self, name: str) -> Tensor:
        """A parameter that waits; empty if it is not known as such."""


class NotAStack(Exception):
    """Modules that are not called one after the other; the text says what was seen."""


class _Recorded(Exception):
    """The last block was called: the rest of the model need not run."""


@dataclass(frozen=True)
class Batch:
    """What a model is called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def as_batches(given: Any) -> list[Batch]:
    """Batches as users write them: tensors, tuples of arguments, or mappings of keyword arguments.

    Raises:
        CalibrationError: none at all, or something else.
    """
    batches = []
    for entry in given:
        if isinstance(entry, Mapping):
            off = {"use_cache": False} if "use_cache" in entry else {}
            batches.append(Batch((), {**entry, **off}))
        elif isinstance(entry, (tuple, list)):
            batches.append(Batch(tuple(entry), {}))
        elif isinstance(entry, Tensor):
            batches.append(Batch((entry,), {}))
        else:
            raise CalibrationError(
                f"a calibration batch is a tensor, a tuple of arguments or a mapping, not {shown(entry)}"
            )
    if not batches:
        raise CalibrationError("calibration has no batches, so nothing is known of the layers' inputs")
    return batches


def find_stacks(model: nn.Module, layers: Collection[str]) -> list[list[str]]:
    """Names of blocks, a list for each outermost list of two or more modules of one class that hold any of `layers`."""
    stacks: list[list[str]] = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < 2:
            continue
        prefix = f"{name}." if name else ""
        if any(name.startswith(f"{block}.") for stack in stacks for block in stack):
            continue
        blocks = [f"{prefix}{child}" for child, _ in module.named_children()]
        alike = len({type(child) for child in module}) == 1 and len({id(child) for child in module}) == len(module)
        within = [block for block in blocks if any(layer.startswith(f"{block}.") for layer in layers)]
        if alike and within:
            stacks.append(blocks)
    return stacks


@dataclass
class Call:
    """How a block is called: its arguments, and which of them is the hidden state that the block before returned."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    key: int | str = 0

    def hidden(self) -> Tensor:
        found = self.args[self.key] if isinstance(self.key, int) else self.kwargs[self.key]
        assert isinstance(found, Tensor)
        return found

    def without_hidden(self) -> Call:
        """The same without the tensor."""
        return self.with_hidden(None)

    def with_hidden(self, hidden: Tensor | None) -> Call:
        """The same with another hidden state."""
        if isinstance(self.key, int):
            args = (*self.args[: self.key], hidden, *self.args[self.key + 1 :])
            return Call(args, self.kwargs, self.key)
        return Call(self.args, {**self.kwargs, self.key: hidden}, self.key)


def call_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """With the first tensor of floating point as the hidden state.

    Raises:
        NotAStack: there is none.
    """
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in named:
        if isinstance(value, Tensor) and value.is_floating_point():
            return Call(args, kwargs, key)
    raise NotAStack("a block is called without a hidden state")


def hidden_of(output: Any) -> Tensor:
    """The hidden state that a block returns, alone or first of a tuple.

    Raises:
        NotAStack: it returns something else.
    """
    found = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(found, Tensor):
        raise NotAStack(f"a block returns {type(output).__name__}")
    return found


@dataclass
class Stack:
    """Recorded calls of a stack's blocks, and the hidden states before the next block, a row for each batch.

    Attributes:
        names: of the blocks, in the order of their calls.
        calls: of each block, of each batch, without the hidden state.
        hidden: on the CPU.
        outputs: what the last block returned, once it ran.
    """

    names: list[str]
    calls: list[list[Call]]
    hidden: list[Tensor]
    outputs: list[Any] = field(default_factory=list)

    def run(self, index: int, block: nn.Module, device: torch.device) -> Iterator[tuple[int, Any]]:
        """Run a block on every batch.

        Yields:
            a batch's number, and what the block returned.
        """
        for number, call in enumerate(self.calls[index]):
            given = call.with_hidden(self.hidden[number].to(device))
            yield number, block(*given.args, **given.kwargs)

    def run_from(self, index: int, model: nn.Module, batch: Batch, number: int, device: torch.device) -> Any:
        """What the model returns for a batch, of which it is known what arrives at a block.

        Args:
            number: of the batch.
        """
        hidden, output = self.hidden[number].to(device), None
        for name, calls in zip(self.names[index:], self.calls[index:], strict=True):
            given = calls[number].with_hidden(hidden)
            output = model.get_submodule(name)(*given.args, **given.kwargs)
            hidden = hidden_of(output)
        return run_rest(model, self.names, output, batch)

    def advance(self, index: int, block: nn.Module, device: torch.device) -> None:
        """Replace the hidden states by what a block makes of them."""
        last = index == len(self.names) - 1
        for number, output in self.run(index, block, device):
            self.hidden[number] = hidden_of(output).to("cpu")
            if last:
                self.outputs.append(output)
        self.calls[index] = []


@contextmanager
def _forwards(replaced: Mapping[str, Callable[..., Any]], model: nn.Module) -> Iterator[None]:
    """Give modules another `forward` for a while; one of a module's own, as hooks of accelerate are, comes back."""
    modules = {name: model.get_submodule(name) for name in replaced}
    own = [(module, module.__dict__["forward"]) for module in modules.values() if "forward" in module.__dict__]
    try:
        for name, forward in replaced.items():
            modules[name].forward = forward
        yield
    finally:
        for module in modules.values():
            module.__dict__.pop("forward", None)
        for module, forward in own:
            module.forward = forward


@contextmanager
def passing_on(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Let blocks that return a hidden state alone return the one that they are given."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return call_of(args, kwargs).hidden()

    with _forwards(dict.fromkeys(names, forward), model):
        yield


def record(model: nn.Module, names: Sequence[str], batches: Sequence[Batch], done: Sequence[Stack]) -> Stack:
    """How a model calls a stack's blocks.

    The model runs up to the last block; blocks hand on their input, except that the first of them runs where a block
    returns more than the hidden state.

    Args:
        done: stacks that ran already; their blocks return what the last of them returned.

    Raises:
        NotAStack: the blocks are not called one after the other, each with what the one before returned.
    """
    first = model.get_submodule(names[0]).forward
    calls: list[list[Call]] = [[] for _ in names]
    start: list[Tensor] = []
    order: list[int] = []
    template: list[Any] = []
    returned: list[Tensor] = []

    def forward_of(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = call_of(args, kwargs)
            hidden = call.hidden()
            if order and hidden is not returned[-1]:
                raise NotAStack(f"{names[index]} is not called with what {names[order[-1]]} returned")
            order.append(index)
            if len(order) == 1:
                start.append(hidden.detach().to("cpu"))
                if not template or not isinstance(template[0], Tensor):
                    template[:] = [first(*args, **kwargs)]
            calls[index].append(call.without_hidden())
            if len(order) == len(names):
                raise _Recorded
            known = template[0]
            handed = hidden.view_as(hidden)  # another tensor, known by its identity
            if handed.shape != hidden_of(known).shape and isinstance(known, (tuple, list)):
                raise NotAStack(f"{names[index]} changes its hidden state's shape")
            returned.append(handed)
            return handed if isinstance(known, Tensor) else type(known)((handed, *known[1:]))

        return forward

    for number, batch in enumerate(batches):
        order.clear()
        returned.clear()
        with _replayed(model, done, number), _forwards({n: forward_of(i) for i, n in enumerate(names)}, model):
            try:
                model(*batch.args, **batch.kwargs)
            except _Recorded:
                pass
            else:
                raise NotAStack(f"{len(order)} of its {len(names)} blocks are called")
        if order != list(range(len(names))):
            raise NotAStack("its blocks are called in another order than they are listed")
    return Stack(list(names), calls, start)


def run_rest(model: nn.Module, names: Sequence[str], output: Any, batch: Batch) -> Any:
    """What the model returns where a stack's last block returns `output`; its blocks do not run."""

    def forward(*_args: Any, **_kwargs: Any) -> Any:
        return output

    with _forwards(dict.fromkeys(names, forward), model):
        return model(*batch.args, **batch.kwargs)


@contextmanager
def _replayed(model: nn.Module, done: Sequence[Stack], number: int) -> Iterator[None]:
    with ExitStack() as stack:
        for ran in done:
            output = ran.outputs[number]

            def forward(*_args: Any, _output: Any = output, **_kwargs: Any) -> Any:
                return _output

            stack.enter_context(_forwards(dict.fromkeys(ran.names, forward), model))
        yield


def run_whole(model: nn.Module, batches: Sequence[Batch], done: Sequence[Stack]) -> Iterator[int]:
    """Run the model on every batch; blocks of stacks that ran return what they did.

    Yields:
        the number of each batch, after it ran.
    """
    for number, batch in enumerate(batches):
        with _replayed(model, done, number):
            model(*batch.args, **batch.kwargs)
        yield number


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Keep transformers' models from making KV caches, which running a block twice would fill twice; in evaluation."""
    config: Any = getattr(model, "config", None)
    configs: list[Any] = [c for c in (config, getattr(config, "text_config", None)) if hasattr(c, "use_cache")]
    before = [c.use_cache for c in configs]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        for c in configs:
            c.use_cache = False
        yield
    finally:
        for c, value in zip(configs, before, strict=True):
            c.use_cache = value
        for module in training:
            module.training = True
