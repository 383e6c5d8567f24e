"""`qcompile explain`: what a configuration makes of each layer of a language model."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console

import qcompile
from qcompile.cli.options import (
    DeviceOption,
    ModelOption,
    RandomOption,
    check_model,
    choose_device,
    errors_told,
    load_model,
)
from qcompile.cli.steps import Steps, quiet_imports
from qcompile.config import parse_config


def explain(
    config: Annotated[str, typer.Option(help="A preset or a configuration file.")] = "int4",
    model: ModelOption = None,
    device: DeviceOption = "auto",
    random: RandomOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say for each layer of a language model what a configuration makes of it, and why."""
    with errors_told():
        parsed = parse_config(config)
        target = choose_device(device)
        check_model(model, random)
        quiet_imports()
        with Steps(2) as steps:
            language_model = load_model(model, random, target, steps)
            steps.next("quantizing for the report")
            ids = torch.zeros((1, 1), dtype=torch.int64, device=target)
            with torch.no_grad():
                report = qcompile.explain(language_model.model, ids, config=parsed, use_cache=False)
        if as_json:
            typer.echo(report.to_json())
        else:
            Console().print(report)
