"""`qcompile bench`: quantized products of given shapes beside torch's own, on this device."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qcompile.cli.options import UNQUANTIZED, DeviceOption, check_folder, choose_device, errors_told, parse_schemes
from qcompile.cli.shapes import Shape, parse_shapes, parse_tokens
from qcompile.cli.steps import Steps, quiet_imports
from qcompile.config import parse_config
from qcompile.errors import CheckpointError, ConfigError, LayerError
from qcompile.linears import linear_modules, shape_of
from qcompile.scheme import Scheme

if TYPE_CHECKING:
    from qcompile.evaluate.timing import Row


def bench(
    shape: Annotated[
        list[str], typer.Option(help="Output x input features, such as 4096x14336; repeat, or separate by commas.")
    ] = [],  # noqa: B006  (typer reads the default, nobody changes it)
    model: Annotated[
        Path | None,
        typer.Option(help="A model's folder or config.json, whose linears' shapes are taken.", show_default=False),
    ] = None,
    scheme: Annotated[list[str], typer.Option(help="Presets or configuration files.")] = ["int4,int8,fp8"],  # noqa: B006
    tokens: Annotated[list[str], typer.Option(help="Rows of activations.")] = ["1,16,64"],  # noqa: B006
    device: DeviceOption = "auto",
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write the rows here.", show_default=False)
    ] = None,
) -> None:
    """Time quantized products of some shapes beside torch's own, on weights that come from memory."""
    with errors_told():
        names = parse_schemes(scheme)
        target = choose_device(device)
        check_folder(json_path)
        quiet_imports()
        from qcompile.evaluate.timing import results

        if UNQUANTIZED in names:
            raise ConfigError(f"--scheme {UNQUANTIZED}: the unquantized product is measured always; leave it out")
        if bool(shape) == (model is not None):
            raise ConfigError("give either --shape, such as 4096x14336, or --model, a folder with a config.json")
        layers = {} if model is None else model_shapes(model)
        shapes, rows_of = list(layers) or parse_shapes(shape), parse_tokens(tokens)
        with Steps(1 + len(shapes)) as steps:
            rows, rates = run(shapes, names, rows_of, target, steps)
        show(rows, rates, layers, Console())
        if json_path is not None:
            json_path.write_text(json.dumps(results(target, rows, rates), indent=1) + "\n")


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
        found.setdefault(shape_of(module), []).append(name)
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
    from qcompile.evaluate.linear import measure
    from qcompile.evaluate.timing import ceilings

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
    from qcompile.evaluate.linear import OURS, PLAIN

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
