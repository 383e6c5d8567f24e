"""What `import qcompile` and the command line cost, in a process of its own each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PROGRAM = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import {module}
seconds = time.perf_counter() - start
print(json.dumps({{"seconds": seconds, "new": sorted(set(sys.modules) - before), "file": qcompile.__file__}}))
"""
HEAVY = {"triton", "transformers", "torchao", "gguf", "scipy", "sympy", "yaml", "rich", "typer"}
"""Packages that are imported where they are used."""


def imported(module):
    """Seconds, what is new in `sys.modules`, and where qcompile is; nothing is said meanwhile."""
    program = PROGRAM.format(module=module)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_import_is_light():
    seen = imported("qcompile")
    assert Path(seen["file"]).parent == ROOT / "qcompile"
    assert {name.split(".")[0] for name in seen["new"]} & HEAVY == set()
    assert "qcompile.runtime.gpu" not in seen["new"]
    assert not [name for name in seen["new"] if name.startswith(("torch._inductor", "torch._dynamo"))]
    assert seen["seconds"] < 2


def test_help_is_quick():
    """The modules of all commands are imported for `qcompile --help`."""
    seen = imported("qcompile.cli")
    assert {name.split(".")[0] for name in seen["new"]} & (HEAVY - {"rich", "typer"}) == set()
    assert not [name for name in seen["new"] if name.startswith(("torch._inductor", "torch._dynamo"))]
