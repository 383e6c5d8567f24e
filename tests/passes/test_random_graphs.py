"""Random programs of linears, activations, sums, products and views: the rewritten graph computes the same.

The weights are integers of -8 to 7 times a power of two with both ends in every group, which `uint4` with a zero point
holds without loss. So nothing but float32 rounding may differ, whatever is merged and fused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qcompile.passes.context import OP
from tests import tolerance
from tests.capture import capture

WIDTH = 32
GROUP = 16
LOSSLESS = {"weight": {"format": "int4", "symmetric": False, "group_size": GROUP, "scale_dtype": "float32"}}

ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [F.relu, F.silu, F.gelu, torch.tanh, torch.sigmoid, torch.cos]


def lossless_weight(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """[rows, columns] that int4 with a zero point holds exactly."""
    codes = torch.randint(-8, 8, (rows, columns), generator=generator).float()
    codes[:, ::GROUP], codes[:, 1::GROUP] = -8, 7
    return codes / 64


@dataclass(frozen=True)
class Step:
    """One value of the program, computed from earlier ones (by index, wrapping around)."""

    kind: str
    first: int
    second: int
    which: int


STEPS = st.builds(
    Step,
    kind=st.sampled_from(["linear", "linear", "linear", "activation", "add", "mul", "view", "norm"]),
    first=st.integers(0, 9),
    second=st.integers(0, 9),
    which=st.integers(0, 5),
)


class Program(nn.Module):
    """Runs the steps; linears may repeat, share an input, or lack a bias."""

    def __init__(self, steps: list[Step], seed: int) -> None:
        super().__init__()
        self.steps = steps
        generator = torch.Generator().manual_seed(seed)
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=i % 2 == 0) for i in range(4))
        for layer in self.linears:
            layer.weight = nn.Parameter(lossless_weight(WIDTH, WIDTH, generator))

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for step in self.steps:
            a, b = values[step.first % len(values)], values[step.second % len(values)]
            if step.kind == "linear":
                values.append(self.linears[step.which % len(self.linears)](a))
            elif step.kind == "activation":
                values.append(ACTIVATIONS[step.which](a))
            elif step.kind == "add":
                values.append(a + b)
            elif step.kind == "mul":
                values.append(torch.tanh(a) * b)
            elif step.kind == "view":
                values.append(a.view(-1, WIDTH).view(a.shape))
            else:
                values.append(F.layer_norm(a, (WIDTH,)))
        return torch.cat(values[1:], -1)


@given(steps=st.lists(STEPS, min_size=1, max_size=9), seed=st.integers(0, 2**31))
def test_rewritten_programs_compute_the_same(steps, seed):
    program = Program(steps, seed).eval()
    x = torch.randn(3, 2, WIDTH, generator=torch.Generator().manual_seed(seed))
    rules = [{"layers": "*", "scheme": LOSSLESS, "optional": True}]
    captured = capture(program, x, config={"rules": rules})
    linears = sum(step.kind == "linear" for step in steps)
    assert captured.count(F.linear) == 0
    assert captured.count(OP) <= linears
    assert (captured.count(OP) > 0) == (linears > 0)
    with torch.no_grad():
        expected = program(x)
    assert captured.output.shape == expected.shape
    assert tolerance.sqnr(expected, captured.output) > tolerance.rewrite_sqnr_floor(len(steps), WIDTH)
