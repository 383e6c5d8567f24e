"""`qcompile recommend`: which schemes fit a model on a device, what they take and lose, and the command to run."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qcompile.evaluate.recommend import UNQUANTIZED, Option, Recommendation, command, measured

SHOWN = 8


def show(found: Recommendation, model: str, console: Console) -> None:
    """Print the best options and the command of the first."""
    target = found.target
    title = (
        f"{found.model.name} on {target.name} ({target.capacity / 1e9:.0f} GB), batch {found.batch}, "
        f"context {found.context}, by {found.prefer}"
    )
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("weights", overflow="fold")
    table.add_column("KV cache")
    for name in ("GB: weights", "cache", "activations", "all", "tok/s", "prompt s", "KL", "perplexity x"):
        table.add_column(name, justify="right")
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
