"""Quantize a model in place, save it, load it into a fresh one, and compile that."""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qcompile


def make() -> nn.Sequential:
    return nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)).eval()


def main() -> None:
    torch.manual_seed(0)
    model = qcompile.quantize_(make(), "int4")  # frees each original weight as it goes
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(model.state_dict(), path)
        print(f"{path.stat().st_size / 1024:.0f} KB on disk")
        restored = qcompile.quantize_(make(), "int4")
        restored.load_state_dict(load_file(path))

    fast = torch.compile(restored, backend="qcompile")
    x = torch.randn(3, 512)
    with torch.no_grad():
        print("largest difference to the model before saving:", (fast(x) - model(x)).abs().max().item())


if __name__ == "__main__":
    main()
