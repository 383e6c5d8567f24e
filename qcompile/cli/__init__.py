"""The command line: `qcompile demo`, `qcompile explain`, `qcompile schemes`."""

from qcompile.cli.app import app, main

__all__ = ["app", "main"]
