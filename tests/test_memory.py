"""Freed memory goes back to the system."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from qcompile import memory


def _resident() -> int:
    found = re.search(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux" or memory._malloc_trim() is None, reason="another C library than glibc")
def test_what_the_c_library_keeps_is_given_back() -> None:
    torch.empty(1 << 24, dtype=torch.uint8).fill_(1)  # raises the size from which memory is mapped by itself
    kept = [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(64)]
    last = torch.ones(1 << 10, dtype=torch.uint8)  # behind them: what is freed does not end the heap
    before = _resident()
    del kept
    memory.give_back()
    assert _resident() < before - (32 << 20)
    assert bool(last.all())


def test_other_c_libraries_have_nothing_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_malloc_trim", lambda: None)
    memory.give_back()
