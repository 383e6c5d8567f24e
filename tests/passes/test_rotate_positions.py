"""Rotary embeddings on CPUs: the same numbers, computed once and without copies."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from qcompile.passes.rotate_positions import KEEP, RULE, TURN_HALVES
from tests.capture import capture

LAYERS = 3


def rotate_half(x: Tensor) -> Tensor:
    """As transformers writes it."""
    x1 = x[..., : x.shape[-1] // 2]
    x2 = x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def model(x: Tensor, frequencies: Tensor) -> Tensor:
    """Layers that rotate what the one before made. x [B, H, T, D], frequencies [D / 2]."""
    angles = torch.arange(x.shape[2])[:, None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = (angles.cos() * 1.0).to(x.dtype), (angles.sin() * 1.0).to(x.dtype)
    for _ in range(LAYERS):
        x = x * cos + rotate_half(x) * sin
    return x


def inputs(size: int = 64, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(1, 2, 5, size).to(dtype), torch.rand(size // 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotations_are_rewritten_and_the_same(dtype: torch.dtype) -> None:
    x, frequencies = inputs(dtype=dtype)
    captured = capture(model, x, frequencies)
    assert torch.equal(captured.output, model(x, frequencies))
    assert sorted(captured.rewritten(RULE)) == ["computed once"] * 2 + ["without copies"] * LAYERS
    assert (captured.count(KEEP), captured.count(TURN_HALVES), captured.count(torch.cat)) == (2, LAYERS, 1)
    assert captured.count("neg") == 0


def test_vectors_of_no_whole_registers_are_concatenated() -> None:
    x, frequencies = inputs(size=48)
    captured = capture(model, x, frequencies)
    assert torch.equal(captured.output, model(x, frequencies))
    assert captured.rewritten(RULE) == ["computed once"] * 2


def other_halves(x: Tensor) -> Tensor:
    return torch.cat((-x[..., :32], x[..., 32:]), dim=-1)


def halves_of_two(x: Tensor) -> Tensor:
    return torch.cat((-x[..., 32:], (x + 1)[..., :32]), dim=-1)


def other_dimension(x: Tensor) -> Tensor:
    return torch.cat((-x[..., 32:], x[..., :32]), dim=1)


def read_elsewhere(x: Tensor) -> Tensor:
    second = -x[..., 32:]
    return torch.cat((second, x[..., :32]), dim=-1) * second.sum()


@pytest.mark.parametrize(
    ("run", "rewrites"), [(other_halves, 0), (halves_of_two, 0), (other_dimension, 0), (read_elsewhere, 1)]
)
def test_only_turned_halves_are_taken(run: Any, rewrites: int) -> None:
    x, _ = inputs()
    captured = capture(run, x)
    assert torch.equal(captured.output, run(x))
    assert len(captured.rewritten(RULE)) == rewrites


@pytest.mark.usefixtures("fresh_dynamo")
def test_inductor_computes_angles_once_and_writes_no_halves() -> None:
    x, frequencies = inputs(dtype=torch.bfloat16)

    def layers(x: Tensor, frequencies: Tensor) -> Tensor:
        cos, sin = (f(torch.arange(5)[:, None] * frequencies.repeat(2)).to(x.dtype) for f in (torch.cos, torch.sin))
        for _ in range(LAYERS):
            x = (x * cos + rotate_half(x) * sin) @ torch.eye(64, dtype=x.dtype)
        return x

    with torch.no_grad():
        _, (code, *_) = run_and_get_code(torch.compile(layers, backend="qcompile", fullgraph=True), x, frequencies)
    assert 0 < len(re.findall(r"\.(?:cos|sin)\(\)|std::(?:cos|sin)\(", code)) <= 4  # of whole registers and of the rest
    assert "# alias" not in code  # as parts of what is concatenated are written
