"""Quantize and compile a small transformer block in one line, look at what happened, and compare with the original."""

import torch
import torch.nn.functional as F
from torch import nn

import qcompile


class Block(nn.Module):
    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.up = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).eval().requires_grad_(False)
    x = torch.randn(4, 256)

    for scheme in ("int8", "int4", "fp8"):
        fast = torch.compile(model, backend="qcompile", options={"config": scheme})
        error = (fast(x) - model(x)).norm() / model(x).norm()
        print(f"{scheme}: relative error {error:.4f}")

    rules = [{"layers": "*.down", "scheme": "int8"}, {"layers": "*", "scheme": "int4"}]
    print(qcompile.explain(model, x, config={"rules": rules}))


if __name__ == "__main__":
    main()
