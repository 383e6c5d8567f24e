"""`qcompile bench`: quantized products of given shapes beside torch's own, on this device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qcompile.cli.shapes import Shape
from qcompile.cli.steps import Steps
from qcompile.config import parse_config
from qcompile.errors import CheckpointError, ConfigError, LayerError
from qcompile.evaluate.linear import OURS, PLAIN, measure
from qcompile.evaluate.timing import Row, ceilings
from qcompile.linears import linear_modules
from qcompile.scheme import Scheme


def model_shapes(path: Path) -> dict[Shape, list[str]]:
    """(N, K) of a model's linears, with their names; no weights are read.

    Args:
        path: a folder with a `config.json`, such a file, or a GGUF file.

    Raises:
        CheckpointError: something else, or no configuration that transformers makes a language model of.
    """
    from qcompile.checkpoint.loader import skeleton_of

    model = skeleton_of(path)
    found: dict[Shape, list[str]] = {}
    for name, module in linear_modules(model).items():
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        n, k = weight.shape if isinstance(module, torch.nn.Linear) else weight.shape[::-1]
        found.setdefault((n, k), []).append(name)
    if not found:
        raise CheckpointError(f"{path}: its model has no linears")
    return found


def schemes_for(names: Sequence[str], shape: Shape) -> dict[str, Scheme]:
    """Schemes that fit a shape, by the names that the user gave.

    Raises:
        ConfigError, LayerError: unknown, needing calibration, or not for this shape.
    """
    found = {}
    for name in names:
        scheme = parse_config(name).scheme_for("linear")
        if scheme is None:
            raise ConfigError(f"--scheme {name}: its rules quantize no layer called linear")
        if scheme.activation is not None and not scheme.activation.dynamic:
            raise LayerError(f"--scheme {name}: static activation scales come from calibration, which a shape has not")
        found[name] = scheme.fit(f"{shape[0]}x{shape[1]}", shape)
    return found


def run(
    shapes: Sequence[Shape], names: Sequence[str], tokens: list[int], device: torch.device, steps: Steps
) -> tuple[list[Row], dict[str, float]]:
    """Rows of all shapes, and the device's limits; a step for the limits and one for each shape."""
    schemes = {shape: schemes_for(names, shape) for shape in shapes}
    torch.manual_seed(0)
    rows: list[Row] = []
    with torch.inference_mode():
        steps.next("measuring what the device can do")
        rates = ceilings(device)
        for n, k in shapes:
            steps.next(f"{n} x {k}")
            rows += measure(n, k, tokens, schemes[n, k], rates, device)
    return rows, rates


def show(rows: Sequence[Row], rates: dict[str, float], layers: dict[Shape, list[str]], console: Console) -> None:
    """A table for each shape; `layers` names those that have it."""
    plain = {(r["N"], r["K"], r["M"]): float(str(r["us"])) for r in rows if (r["impl"], r["scheme"]) == PLAIN}
    for n, k in dict.fromkeys((int(str(r["N"])), int(str(r["K"]))) for r in rows):
        names = layers.get((n, k), [])
        which = f": {len(names)} layers, such as {names[0]}" if names else ""
        table = Table(title=escape(f"{n} x {k}{which}"), title_justify="left")
        for column in ("tokens", "scheme", "kernel", "us", "bf16 / it", "of limit", "error"):
            table.add_column(column, justify="left" if column in ("scheme", "kernel") else "right", overflow="fold")
        last = None
        for row in rows:
            if (row["N"], row["K"]) != (n, k):
                continue
            us, m = float(str(row["us"])), row["M"]
            table.add_row(
                str(m) if m != last else "",
                str(row["scheme"]),
                str(row["impl"]),
                f"{us:.1f}",
                f"{plain[n, k, m] / us:.2f}",
                f"{float(str(row['floor_us'])) / us:.0%}",
                f"{row['error']}",
                style="bold" if row["impl"] == OURS else None,
            )
            last = m
        console.print(table)
    told = ", ".join(f"{rates[kind] / 1e12:.3g} T {kind} operations/s" for kind in ("16-bit", "8-bit"))
    console.print(f"limits, measured: {rates['memory'] / 1e9:.0f} GB/s, {told}", highlight=False)
