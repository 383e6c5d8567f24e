"""Layers and models for the tests of calibration."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qcompile.calibrate.statistics import InputStatistics


def layer(rows: int = 32, columns: int = 128, tokens: int = 256, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [N, K], and correlated inputs [tokens, K] of which some channels are large."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    factors = torch.randn(tokens, columns // 4, generator=generator)
    x = factors @ torch.randn(columns // 4, columns, generator=generator) * 0.2
    x = x + torch.randn(tokens, columns, generator=generator) * 0.3
    x[:, :: columns // 4] *= 10
    return weight, x


def statistics(x: Tensor) -> InputStatistics:
    """Of inputs [tokens, K]."""
    found = InputStatistics.empty("layer", x.shape[-1], x.device)
    found.add(x)
    return found


def output_error(weight: Tensor, quantized: Tensor, x: Tensor) -> float:
    """Mean square of the output's error over that of the output, float64."""
    x = x.double()
    y = x @ weight.double().T
    return float(((x @ quantized.double().T - y).square().mean() / y.square().mean()).item())


class Block(nn.Module):
    """A decoder's block of an architecture that no library has: attention over grouped heads with an RMS norm whose
    weight is an offset from 1, a gated MLP whose gate and up projections are one linear, residuals."""

    def __init__(self, width: int = 32, heads: int = 4, kv_heads: int = 2, inner: int = 48) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.scale_a = nn.Parameter(torch.randn(width) * 0.1)
        self.scale_b = nn.Parameter(1 + torch.randn(width) * 0.1)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * kv_heads * self.size)
        self.out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * inner)
        self.down = nn.Linear(inner, width)

    def norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, tokens, width = x.shape
        normed = self.norm(x) * (1 + self.scale_a)
        q = self.query(normed).view(batch, tokens, self.heads, self.size).transpose(1, 2)
        k, v = (
            part.view(batch, tokens, self.kv_heads, self.size).transpose(1, 2)
            for part in self.key_value(normed).chunk(2, -1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        gate, up = self.gate_up(self.norm(x) * self.scale_b).chunk(2, -1)
        return x + self.down(nn.functional.silu(gate) * up)


class Decoder(nn.Module):
    """Token ids [B, T] to logits, through blocks in a list."""

    def __init__(self, blocks: int = 3, width: int = 32, vocabulary: int = 50) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        tokens = ids.shape[1]
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        for layer in self.layers:
            x = layer(x, mask=mask)
        return self.head(x)


def decoder(seed: int = 0) -> Decoder:
    """With random weights, in evaluation mode."""
    torch.manual_seed(seed)
    return Decoder().eval().requires_grad_(False)


def batches(count: int = 4, tokens: int = 24) -> list[Tensor]:
    """Token ids, of unequal lengths."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 50, (1, tokens - 3 * i), generator=generator) for i in range(count)]
