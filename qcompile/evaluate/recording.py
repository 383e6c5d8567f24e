"""What a model does with a text, kept so that quantized models are compared with it after it has left memory.

A reference reads the text once. Its logits go to a file, as they are, so that divergences from them are exact; of each
layer's calls some rows stay in memory, and of each block's hidden states.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.calibrate.stream import find_stacks, hidden_of, without_cache
from qcompile.errors import ConfigError
from qcompile.evaluate.layers import Channels, Original, Samples, measured_layers, module_weights, weight_channels
from qcompile.evaluate.quality import Quality, Tally, logits_of, windows
from qcompile.progress import Bar

WINDOW = 512
"""Tokens that a model sees at once, unless it cannot."""
EMBEDDING_ROWS = 64
"""Rows of an embedding by which a rotated model is known."""


@dataclass(frozen=True)
class Recording:
    """A reference's reading of a text.

    Attributes:
        ids: int64 [T], the text.
        window: tokens that the model saw at once.
        rows: see `record`.
        quality: of the reference itself.
        logits: [predicted tokens, V], in a file, in the model's dtype.
        samples: rows of the calls of linears and of experts, by their names, on the CPU.
        hidden: rows of what each block returned, on the CPU.
        inputs: magnitudes of the layers' inputs, on all of the text.
        weights: magnitudes of the layers' weights.
        vectors: parameters of one dimension, and the beginnings of embeddings: what is not quantized.
        original: the layers' weights.
    """

    ids: Tensor
    window: int
    rows: int
    quality: Quality
    logits: Tensor
    samples: Mapping[str, Samples]
    hidden: Mapping[str, Tensor]
    inputs: tuple[Channels, ...]
    weights: tuple[Channels, ...]
    vectors: Mapping[str, Tensor]
    original: Original


def predicted(total: int, window: int) -> int:
    """How many tokens of a text are predicted: all but the first of each window that does not reach back."""
    return total - max(1, total // window)


def plain_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters of one dimension and the beginnings of embeddings, by name, on the CPU."""
    found = {name: p.detach().cpu() for name, p in model.named_parameters() if p.dim() == 1 and p.is_floating_point()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            found[f"{name}.weight"] = module.weight.detach()[:EMBEDDING_ROWS].cpu()
    return found


def blocks_of(model: nn.Module) -> list[str]:
    """Names of the blocks of a decoder."""
    return [name for stack in find_stacks(model, measured_layers(model)) for name in stack]


@contextmanager
def _hooked(modules: Mapping[str, nn.Module], see: Callable[[str, tuple[Any, ...], Any], None]) -> Iterator[None]:
    """Call `see(name, arguments, result)` after each call of the modules."""

    def hook_of(name: str) -> Callable[..., None]:
        return lambda _module, args, output: see(name, args, output)

    handles = [module.register_forward_hook(hook_of(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(x: Tensor, stride: int) -> Tensor:
    """Every stride-th of a tensor's rows, but the first: what models make of a first token is unlike the rest."""
    return x.detach().reshape(-1, x.shape[-1])[stride // 2 :: stride]


@dataclass
class _Seen:
    """Gathers what layers are given and return."""

    stride: int
    samples: dict[str, list[tuple[tuple[Tensor, ...], Tensor]]] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    readers: dict[str, list[str]] = field(default_factory=dict)
    _leader: dict[str, str] = field(default_factory=dict)
    _last: tuple[str, Tensor | None, tuple[Tensor, ...]] = ("", None, ())

    def see(self, name: str, args: tuple[Any, ...], output: Any) -> None:
        """Take in a call."""
        if not args or not all(isinstance(t, Tensor) for t in (*args, output)):
            return
        before, tensor, kept = self._last
        if tensor is not args[0]:  # layers that read the same input are called one after the other
            before, kept = name, tuple(_rows(arg, self.stride).cpu() for arg in args)
            self._last = (name, args[0], kept)
        if self._leader.setdefault(name, before) == name:
            self._measure(name, args[0].detach())
        elif name not in self.readers[before]:
            self.readers[before].append(name)
        self.samples.setdefault(name, []).append((kept, _rows(output, self.stride).cpu()))

    def _measure(self, name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        if len(rows) == 0:
            return
        top, square = rows.abs().amax(0), rows.square().sum(dtype=torch.float64)
        known = name in self.maxima
        self.readers.setdefault(name, [name])
        self.maxima[name] = torch.maximum(self.maxima[name], top) if known else top
        before, count = self.squares.get(name, (torch.zeros_like(square), 0))
        self.squares[name] = (before + square, count + rows.numel())

    def next_window(self) -> None:
        """Forget which tensor was seen last."""
        self._last = ("", None, ())

    def joined(self) -> dict[str, Samples]:
        """The samples of each layer."""
        found = {}
        for name, calls in self.samples.items():
            inputs = zip(*(inputs for inputs, _ in calls), strict=True)
            found[name] = Samples(tuple(map(torch.cat, inputs)), torch.cat([output for _, output in calls]))
        return found

    def channels(self) -> tuple[Channels, ...]:
        """Of the inputs of all layers."""
        return tuple(
            Channels(
                tuple(self.readers[name]), top.cpu(), (self.squares[name][0].item() / self.squares[name][1]) ** 0.5
            )
            for name, top in self.maxima.items()
        )


@dataclass(frozen=True)
class Reading:
    """What `read` saw.

    Attributes:
        quality: on the text.
        samples, hidden, inputs: see `Recording`.
    """

    quality: Quality
    samples: Mapping[str, Samples]
    hidden: Mapping[str, Tensor]
    inputs: tuple[Channels, ...]


@torch.inference_mode()
def read(
    model: nn.Module,
    ids: Tensor,
    window: int,
    rows: int,
    logits: Callable[[int, Tensor], Tensor | None],
    *,
    layers: bool,
    call: Callable[[Tensor], Any] | None = None,
    description: str,
    progress: bool,
) -> Reading:
    """Let a model read a text, a window at a time.

    Args:
        ids: int64 [T] on the model's device.
        rows: of each layer's calls to keep, about.
        logits: is told of each window's logits [P, V] and the number of their first; returns the reference's, or None.
        layers: look into layers, not only at blocks.
        call: how the model is called; as it is by default.
        description: of the progress bar.

    Raises:
        ConfigError: too short a text, or windows that the model cannot read.
    """
    check_text(model, ids, window)
    stride = max(1, ids.numel() // rows)
    seen, hidden, tally, done = _Seen(stride), {}, Tally(), 0  # type: ignore[var-annotated]
    blocks = {name: model.get_submodule(name) for name in blocks_of(model)}

    def see_block(name: str, _args: tuple[Any, ...], output: Any) -> None:
        hidden.setdefault(name, []).append(_rows(hidden_of(output), stride).cpu())

    inner = measured_layers(model) if layers else {}
    total = -(-ids.numel() // window)
    with ExitStack() as stack:
        bar = stack.enter_context(Bar(total, description, progress))
        stack.enter_context(_hooked(inner, seen.see))
        stack.enter_context(_hooked(blocks, see_block))
        if call is None:
            stack.enter_context(without_cache(model))
        for tokens, first in windows(ids, window):
            made = logits_of(call or model, tokens)[0, first - 1 : -1]
            tally.add(made, tokens[0, first:], logits(done, made))
            done += len(made)
            seen.next_window()
            bar.advance(f"{done} tokens")
    return Reading(
        tally.quality(), seen.joined(), {name: torch.cat(parts) for name, parts in hidden.items()}, seen.channels()
    )


def _limit(model: nn.Module, name: str) -> int | None:
    """What a model's configuration says of text, if it does."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    value = getattr(config, name, None)
    return value if isinstance(value, int) else None


def default_window(model: nn.Module) -> int:
    """`WINDOW`, or as many tokens as the model reads at once."""
    return min(WINDOW, _limit(model, "max_position_embeddings") or WINDOW)


def check_text(model: nn.Module, ids: Tensor, window: int) -> None:
    """Refuse before the work what a model cannot read.

    Raises:
        ConfigError: naming the reason.
    """
    if ids.numel() < 2:
        raise ConfigError(
            f"the text has {ids.numel()} tokens; perplexity needs two, and some thousand to mean something"
        )
    most, known = _limit(model, "max_position_embeddings"), _limit(model, "vocab_size")
    if window < 2 or (most is not None and min(window, ids.numel()) > most):
        raise ConfigError(f"a window of {window} tokens: this model reads 2 to {most or 'any number of'} at once")
    if known is not None and int(ids.max()) >= known:
        raise ConfigError(
            f"the tokenizer makes token {int(ids.max())} of the text, but the model knows {known} tokens; they do not "
            "belong together"
        )


def record(
    model: nn.Module,
    ids: Tensor,
    folder: Path,
    *,
    window: int | None = None,
    rows: int = 128,
    call: Callable[[Tensor], Any] | None = None,
    progress: bool = True,
) -> Recording:
    """Let a reference read a text, and keep what it made of it.

    Args:
        model: not quantized; from token ids [1, T] to an object whose `logits` are [1, T, V].
        ids: int64 [T] on the model's device.
        folder: for the logits, T times V numbers, in a file that lives as long as the folder does.
        window: tokens that it sees at once; None for `default_window`.
        rows: of each layer's calls and each block's hidden states, about, to keep in memory.
        progress: show a progress bar on a terminal.

    Raises:
        ConfigError: too short a text, windows that the model cannot read, or no room in the folder.
    """
    window = default_window(model) if window is None else window
    count = predicted(ids.numel(), window)
    kept: list[Tensor] = []

    def keep(first: int, logits: Tensor) -> None:
        if not kept:
            kept.append(_file(folder, count, logits))
        kept[0][first : first + len(logits)] = logits.cpu()

    reading = read(model, ids, window, rows, keep, layers=True, call=call, description="reference", progress=progress)
    return Recording(
        ids=ids,
        window=window,
        rows=rows,
        quality=reading.quality,
        logits=kept[0],
        samples=reading.samples,
        hidden=reading.hidden,
        inputs=reading.inputs,
        weights=weight_channels(model),
        vectors=plain_parameters(model),
        original=module_weights(model),
    )


def _file(folder: Path, count: int, logits: Tensor) -> Tensor:
    """A tensor [count, V] of a file.

    Raises:
        ConfigError: it does not fit on the disk.
    """
    shape = (count, logits.shape[1])
    needed, free = math.prod(shape) * logits.element_size(), shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"the reference's logits, {needed / 1e9:.1f} GB, do not fit in {folder} ({free / 1e9:.1f} GB free); take "
            "fewer tokens of the text, or let TMPDIR name a folder on a larger disk"
        )
    path = folder / "logits"
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):  # a disk that fills up later would end the process
            os.posix_fallocate(file.fileno(), 0, needed)
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=logits.dtype).view(shape)
