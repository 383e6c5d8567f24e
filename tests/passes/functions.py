"""Models for tests of passes: functions of a module and x, and what a rewritten graph is compared with."""

from __future__ import annotations

import torch
from torch import nn

from tests import tolerance

WIDTH = 64
INT8 = "int8_weight_only"


class Function(nn.Module):
    """Parameters of several shapes and a forward given as a function of (module, x)."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.run = forward
        for name, module in modules.items():
            setattr(self, name, module)
        self.matrix = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)
        self.vector = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        return self.run(self, x)


def sqnr_of(model, x, captured):
    with torch.no_grad():
        return tolerance.sqnr(model(x), captured.output)


def assert_close_to_float(model, x, captured):
    """Quantized against unquantized: the weight's noise alone, halved for what follows it (see `sqnr_floor`)."""
    floor = tolerance.product_sqnr_floor(tolerance.sqnr_floor("int8", WIDTH))
    assert sqnr_of(model, x, captured) > floor - 6, "the rewritten graph computes something else"


def linear(**kwargs):
    return nn.Linear(WIDTH, WIDTH, **kwargs)


def gate_and_up(**kwargs):
    return {"gate": nn.Linear(WIDTH, 2 * WIDTH, **kwargs), "up": nn.Linear(WIDTH, 2 * WIDTH, **kwargs)}
