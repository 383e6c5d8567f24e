"""The command line; `qcompile --help` lists the commands."""

from qcompile.cli.app import app, main

__all__ = ["app", "main"]
