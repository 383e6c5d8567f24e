"""`qcompile inspect`: the table of a checkpoint's layers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qcompile.checkpoint.inspection import Inspection, LayerRow
from qcompile.checkpoint.inspection import inspect as look
from qcompile.cli.options import errors_told
from qcompile.cli.steps import quiet_imports

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def inspect(
    path: Annotated[Path, typer.Argument(help="A folder with a checkpoint, a .safetensors or a GGUF file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, of every layer, instead of a table.")] = False,
) -> None:
    """Say what a checkpoint holds: each layer's format, bits, scales, shape and size."""
    with errors_told():
        quiet_imports()
        found = look(path)
        if as_json:
            typer.echo(json.dumps(found.to_dict(), indent=1))
        else:
            show(found, Console())


def show(found: Inspection, console: Console) -> None:
    """Print a checkpoint; layers that differ in their numbers alone share a row."""
    console.print(f"[bold]{escape(found.path)}[/]", highlight=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("layers", overflow="fold")
    table.add_column("count", justify="right", no_wrap=True)
    for title in ("shape", "weights", "scales", "scale\ndtype", "inputs"):
        table.add_column(title)
    table.add_column("MB", justify="right", no_wrap=True)
    for name, rows in _alike(found.layers).items():
        first = rows[0]
        weights = first.format or "not quantized"
        more = [first.zero_points] if first.zero_points else []
        more += ["act_order"] if first.act_order else []
        table.add_row(
            escape(name.removeprefix("model.")),
            str(len(rows)),
            f"{first.shape[0]}x{first.shape[1]}",
            ", ".join([weights, *more]),
            first.scales or "",
            first.scale_dtype or "",
            first.activations or "",
            _megabytes(sum(row.nbytes for row in rows)),
        )
    for dtype, (count, nbytes) in sorted(found.other.items()):
        table.add_row("other tensors", str(count), "", dtype, "", "", "", _megabytes(nbytes))
    table.add_row("all", "", "", "", "", "", "", _megabytes(found.nbytes), style="bold")
    console.print(table)
    console.print(f"model: {escape(found.model or 'unknown')}; quantized by: {escape(found.method or 'nobody')}")
    if found.kv_scales:
        values = [value for pair in found.kv_scales.values() for scales in pair for value in scales]
        console.print(f"KV cache: scales of {len(found.kv_scales)} modules, {min(values):.4g} to {max(values):.4g}")
    for key, value in found.metadata.items():
        console.print(f"{escape(key)}: {escape(str(value))}", highlight=False)


def _alike(layers: tuple[LayerRow, ...]) -> dict[str, list[LayerRow]]:
    groups: dict[tuple[str, LayerRow], list[LayerRow]] = {}
    for row in layers:
        name = _NUMBER.sub("*", row.name)
        groups.setdefault((name, replace(row, name="")), []).append(row)
    titles: dict[str, list[LayerRow]] = {}
    for (name, _), rows in groups.items():
        title = rows[0].name if len(rows) == 1 else name
        if title in titles:  # of another format: told apart by the first of each
            title = f"{title} ({rows[0].name}, ...)"
        titles[title] = rows
    return titles


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.2f}"
