"""`qcompile convert`: a checkpoint in another format, and what of it is exact."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

import qcompile
from qcompile.checkpoint.loader import fill, skeleton
from qcompile.checkpoint.saving import FORMATS, Saved
from qcompile.checkpoint.saving.layers import quantized_layers
from qcompile.checkpoint.saving.save import check_writable, fits
from qcompile.checkpoint.saving.shards import parse_size
from qcompile.checkpoint.source import Source, open_checkpoint
from qcompile.cli.options import errors_told, float_dtype
from qcompile.cli.steps import Steps, quiet_imports
from qcompile.config import QuantConfig, parse_config
from qcompile.errors import CheckpointError, ConfigError, suggestion

STEPS = 3
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def convert(
    source: Annotated[Path, typer.Argument(help="A folder with a checkpoint, or a GGUF file.")],
    target: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[str, typer.Option(help="compressed-tensors, gptq, awq, bitsandbytes or gguf.")],
    config: Annotated[
        str | None, typer.Option(help="Quantize first: a preset or a configuration file.", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of what is not quantized; by default one that holds all.", show_default=False)
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Of a safetensors file.")] = "5GB",
    allow_rounding: Annotated[bool, typer.Option("--allow-rounding", help="Round scales, and say how far.")] = False,
) -> None:
    """Write a checkpoint in another format, with the same codes; what would not be exact is refused."""
    with errors_told():
        kept = None if dtype is None else float_dtype(dtype)
        parsed = None if config is None else parse_config(config)
        quiet_imports()
        with Steps(STEPS) as steps, warnings.catch_warnings():
            if allow_rounding:
                warnings.simplefilter("ignore", UserWarning)  # the table says it
            done = run(
                source,
                target,
                to,
                parsed,
                kept,
                max_shard_size=max_shard_size,
                allow_rounding=allow_rounding,
                steps=steps,
            )
        show(done, Console())


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Attributes:
        saved: see `Saved`.
        layers: how many quantized layers there are.
        dtype: of what is not quantized.
        cast: names of tensors that are not quantized and were rounded to it.
    """

    saved: Saved
    layers: int
    dtype: torch.dtype
    cast: tuple[str, ...]


def run(
    source: Path,
    target: Path,
    format: str,
    config: QuantConfig | None,
    dtype: torch.dtype | None,
    *,
    max_shard_size: str,
    allow_rounding: bool,
    steps: Steps,
) -> Converted:
    """Load a checkpoint and save it.

    Args:
        config: quantize, where the checkpoint is not.
        dtype: of what is not quantized; None for the narrowest that holds all of it.

    Raises:
        CheckpointError, ConfigError: see `qcompile.load` and `qcompile.save`; the message counts the layers that the
            format does not hold.
    """
    if format not in FORMATS:
        raise ConfigError(f"--to {format!r} cannot be written; {suggestion(format, FORMATS)}")
    parse_size(max_shard_size)
    check_writable(target)
    steps.next(f"reading {source}")
    opened = open_checkpoint(source)
    if opened.config is None:
        raise CheckpointError(f"{source}: no config.json says what its modules are")
    if opened.method is not None and config is not None:
        raise ConfigError(f"{source} is quantized already; --config is for models that are not")
    if opened.method is None and config is None:
        raise ConfigError(f"{source} is not quantized; say how to with --config, such as --config int4")
    model = skeleton(opened.config, torch.float32)
    stored = dict(_stored(model, opened))
    chosen = _widest(list(stored.values())) if dtype is None else dtype
    fill(model, opened, torch.device("cpu"), chosen, progress=False)
    model.name_or_path = str(source)  # type: ignore[assignment]
    opened.config.dtype = chosen
    model.requires_grad_(False).eval()
    steps.next("quantizing" if config is not None else "checking")
    if config is not None:
        qcompile.quantize_(model, config, progress=False)
    cast = tuple(name for name, kept in stored.items() if torch.promote_types(kept, chosen) != chosen)
    steps.next(f"writing {target}")
    try:
        saved = qcompile.save(model, target, format, max_shard_size=max_shard_size, allow_rounding=allow_rounding)
    except CheckpointError as error:
        layers = quantized_layers(model)
        unfit = sum(not fits(layer, format) for layer in layers)
        if unfit == 0:
            raise
        raise CheckpointError(f"{error}. {unfit} of {len(layers)} layers do not fit; nothing was written") from None
    return Converted(saved, len(quantized_layers(model)), chosen, cast)


def _widest(dtypes: list[torch.dtype]) -> torch.dtype:
    """The narrowest dtype that holds numbers of all."""
    return functools.reduce(torch.promote_types, dtypes) if dtypes else torch.bfloat16


def _stored(model: nn.Module, source: Source) -> Iterator[tuple[str, torch.dtype]]:
    """The dtypes of parameters that the checkpoint holds as they are."""
    names = set(source.store.names())
    for name, parameter in model.named_parameters():
        if name in names:
            info = source.store.info(name)
            if info.dtype in _FLOATS and info.shape == tuple(parameter.shape):
                yield name, info.dtype


def show(done: Converted, console: Console) -> None:
    """Print what is exact and what is not."""
    dtype = str(done.dtype).removeprefix("torch.")
    exact = done.layers - len({entry.layer for entry in done.saved.rounded})
    console.print(f"{exact} of {done.layers} quantized layers are exact; all codes are")
    console.print(
        f"what is not quantized is {dtype}" + (f"; {len(done.cast)} tensors were rounded" if done.cast else "")
    )
    if done.saved.rounded:
        table = Table("layer", "rounded", "to", "relative error", box=box.SIMPLE_HEAD, pad_edge=False)
        for entry in done.saved.rounded:
            table.add_row(escape(entry.layer), entry.what, entry.dtype, f"{entry.error:.1e}")
        console.print(table)
    for file in done.saved.files:
        console.print(f"{escape(str(file))}  {file.stat().st_size / 1e6:,.2f} MB", highlight=False, soft_wrap=True)
