"""Counters of caches are raised together, and count the same. The pass is for GPUs; here it is told that CPUs are."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.passes.merge_counters import RULE
from tests.capture import Captured, capture

module = importlib.import_module("qcompile.passes.merge_counters")  # the package has the function of that name
Counters = list[Tensor]


@pytest.fixture(autouse=True)
def on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEVICES", ("cuda", "cpu"))


def counters(dtype: torch.dtype = torch.int64) -> Counters:
    return [torch.tensor(value, dtype=dtype) for value in (3, 5, 8)]


def check(run: Callable[..., Tensor]) -> Captured:
    """Equal results and counters."""
    given, expected = counters(), counters()
    captured = capture(run, *given)
    assert torch.equal(captured.output, run(*expected))
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
    return captured


def count(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """As `StaticLayer.update` does it: a position before, its use after."""
    y = torch.zeros(20)
    for counter in (a, b, c):
        position = torch.arange(1) + counter.to("cpu")
        counter.add_(1)
        y = y.index_add(0, position, torch.ones(1))
    return y


def test_counters_are_raised_at_once() -> None:
    captured = check(count)
    assert captured.rewritten(RULE) == ["raised by 1 at once"]
    assert captured.count(torch._foreach_add_) == 1
    assert captured.count("add_") == 0


def read_between(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    alias = a.view(1)
    a.add_(1)
    y = alias * 2
    b.add_(1)
    c.add_(1)
    return y


def test_a_counter_that_is_read_before_the_last_stays() -> None:
    captured = check(read_between)
    assert captured.declined(RULE) == ["y reads it before the last counter is raised"]
    assert captured.count(torch._foreach_add_) == 1
    assert captured.count("add_") == 1


def twice(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    a.add_(1)
    b.add_(1)
    a.add_(1)
    return c + 1


def by_different_numbers(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    a.add_(1)
    b.add_(2)
    c.add_(a)
    return c + 1


def result_read(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return a.add_(1) + b.add_(1) + c.add_(1)


@pytest.mark.parametrize("run", [twice, by_different_numbers, result_read])
def test_other_additions_stay(run: Any) -> None:
    assert check(run).count(torch._foreach_add_) == 0


def test_cpus_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEVICES", ("cuda",))
    assert check(count).count(torch._foreach_add_) == 0
