"""The command line: `qcompile demo`, `explain`, `quantize`, `convert`, `inspect` and `schemes`."""

from qcompile.cli.app import app, main

__all__ = ["app", "main"]
