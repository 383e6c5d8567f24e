"""`qcompile recommend`: which schemes fit a model on a device, what they take and lose, and the command to run."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qcompile.cli.options import choose_device, errors_told
from qcompile.cli.steps import quiet_imports

if TYPE_CHECKING:
    from qcompile.evaluate.recommend import Option, Recommendation

SHOWN = 8


def recommend(
    model: Annotated[Path, typer.Argument(help="A folder with a config.json, such a file, or a GGUF file.")],
    device: Annotated[
        str, typer.Option(help="h100, a100, 4090, mi300x, ...; cuda or cpu for this machine's; auto: a GPU if any.")
    ] = "auto",
    prefer: Annotated[str, typer.Option(help="accuracy, speed or memory.")] = "accuracy",
    batch: Annotated[int, typer.Option(min=1, max=1 << 16, help="Sequences at once.")] = 1,
    context: Annotated[int, typer.Option(min=1, max=1 << 24, help="Tokens of a sequence.")] = 4096,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, of every option, instead of a table.")] = False,
) -> None:
    """Say which schemes fit a model on a device, what each takes and loses, and the command for the best."""
    with errors_told():
        quiet_imports()
        from qcompile.evaluate.model_shape import read_model
        from qcompile.evaluate.recommend import check_preference, target_of
        from qcompile.evaluate.recommend import recommend as choose

        check_preference(prefer)
        target = target_of(choose_device(device).type if device == "auto" else device)
        found = choose(read_model(model), target, prefer, batch, context)
        if as_json:
            typer.echo(json.dumps(to_dict(found, str(model)), indent=1))
        else:
            show(found, str(model), Console())


def show(found: Recommendation, model: str, console: Console) -> None:
    """Print the best options and the command of the first."""
    from qcompile.evaluate.recommend import command

    target = found.target
    title = (
        f"{found.model.name} on {target.name} ({target.capacity / 1e9:.0f} GB), batch {found.batch}, "
        f"context {found.context}, by {found.prefer}"
    )
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("weights", overflow="fold", min_width=len("SmoothQuant"))
    table.add_column("KV cache")
    for name in ("GB:\nmodel", "\ncache", "activ-\nations", "\nall", "tok/s", "prompt\ns", "KL", "ppl\nx"):
        table.add_column(name, justify="right", overflow="fold")
    best = [option for option in found.options if option.score is not None][:SHOWN]
    for option in best or sorted(found.options, key=lambda option: option.memory)[:1]:
        table.add_row(*_cells(option, found.batch), style="bold" if option is found.best else None)
    console.print(table)
    if found.best is None:
        least = min(found.options, key=lambda option: option.memory)
        console.print(
            f"nothing fits: the least, {escape(least.name)} with a {least.kv_cache} cache, takes "
            f"{least.memory / 1e9:.2f} GB; take a smaller context or batch, or a device of more memory",
            style="bold red",
            highlight=False,
        )
    else:
        console.print(f"[bold]{escape(command(found.best, model))}[/]", highlight=False, soft_wrap=True)
        if found.best.kv_cache != "bfloat16":
            cache = f'qcompile.TransformersCache(model, "{found.best.kv_cache}", max_cache_len={found.context})'
            console.print(f"[bold]past_key_values={escape(cache)}[/]", highlight=False, soft_wrap=True)
    for text in notes(found):
        console.print(text, style="dim", highlight=False)


def _cells(option: Option, batch: int) -> list[str]:
    sizes = (option.weight_bytes, option.cache_bytes, option.activation_bytes, option.memory)
    return [
        escape(option.name),
        option.kv_cache,
        *(f"{size / 1e9:.2f}" for size in sizes),
        f"{batch / option.step:,.0f}",
        f"{option.prompt:.3g}",
        f"{option.kl:.3f}",
        f"{math.exp(option.loss):.2f}",
    ]


def notes(found: Recommendation) -> list[str]:
    """What the numbers are."""
    from qcompile.evaluate.recommend import measured

    best = found.options[0]
    speed = (
        f"Speed: kernels' times, {best.timed:.0%} of them measured on this card and the rest from the cost model; time "
        "between them as measured on an H100."
        if found.target.card is not None
        else "Speed: bytes and operations at the rates that this CPU reached just now; nothing else is counted."
    )
    table = measured()
    return [
        f"Accuracy: measured on {table.model} (docs/accuracy.md), which is small; larger models lose less.",
        speed + " Of options that another beats in memory, speed and KL, none is shown.",
        *(f"{name}: left out, {reason}" for name, reason in found.left_out.items()),
    ]


def to_dict(found: Recommendation, model: str) -> dict[str, Any]:
    """Plain values, for JSON: all options, the best first; those without a score are beaten, or do not fit."""
    from qcompile.evaluate.recommend import UNQUANTIZED, command, measured

    return {
        "model": found.model.name,
        "device": found.target.name,
        "device_bytes": found.target.capacity,
        "prefer": found.prefer,
        "batch": found.batch,
        "context": found.context,
        "accuracy_of": measured().model,
        "options": [
            asdict(option)
            | {
                "memory_bytes": option.memory,
                "tokens_per_second": found.batch / option.step,
                "command": None if option.name == UNQUANTIZED else command(option, model),
            }
            for option in found.options
        ],
        "left_out": dict(found.left_out),
    }
