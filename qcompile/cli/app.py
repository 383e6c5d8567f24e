"""The commands. What is slow to import is imported where a command runs, so that `--help` is quick."""

from __future__ import annotations

import typer

from qcompile.cli.bench import bench
from qcompile.cli.convert import convert
from qcompile.cli.demo import demo
from qcompile.cli.eval import evaluate_models
from qcompile.cli.explain import explain
from qcompile.cli.inspect import inspect
from qcompile.cli.quantize import quantize
from qcompile.cli.recommend import recommend
from qcompile.cli.schemes import schemes
from qcompile.cli.tune import tune

app = typer.Typer(
    help="Quantize models and run them on generated kernels.", no_args_is_help=True, pretty_exceptions_enable=False
)
app.command("demo")(demo)
app.command("explain")(explain)
app.command("bench")(bench)
app.command("convert")(convert)
app.command("quantize")(quantize)
app.command("eval")(evaluate_models)
app.command("recommend")(recommend)
app.command("inspect")(inspect)
app.command("tune")(tune)
app.command("schemes")(schemes)


def main() -> None:
    """The console script."""
    app()
