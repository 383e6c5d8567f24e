"""Teach qcompile to read a checkpoint format of your own: ternary weights, five of them in a byte."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import qcompile
from qcompile.checkpoint.method import LayerTensors, Method, register
from qcompile.checkpoint.store import TensorStore
from qcompile.errors import CheckpointError
from qcompile.formats import get_format
from qcompile.methods import CHECKPOINT
from qcompile.packed import PackedLinear, PackedWeight
from qcompile.scheme import Granularity, Scheme, WeightScheme


@register
class Ternary(Method):
    """Weights are -1, 0 or 1 times a scale for each output: digits of base 3, the first the least."""

    name = "ternary"  # `quant_method` in config.json
    activation_dtypes = (torch.bfloat16, torch.float32)  # loading in another dtype is a ConfigError
    min_capability = 80  # and so is an older GPU

    def __init__(self, config: Mapping[str, Any], store: TensorStore) -> None:
        if config.get("version") != 1:
            raise CheckpointError(f"{store.path}: ternary version {config.get('version')!r} is unknown; 1 is")

    def linear(self, tensors: LayerTensors, shape: tuple[int, int]) -> PackedLinear | None:
        if "digits" not in tensors:
            return None  # this layer has a plain weight
        rows, columns = shape
        stored = tensors.take("digits", torch.uint8, shape=(rows, -(-columns // 5)))
        if bool((stored >= 3**5).any()):
            raise tensors.error("digits has bytes above 242, which five digits of base 3 do not make")
        digits = (stored[..., None] // torch.tensor([1, 3, 9, 27, 81])) % 3
        codes = digits.flatten(1)[:, :columns].to(torch.uint8) + 1  # int2 counts from -2: code 1 is -1, 2 is 0
        scheme = WeightScheme(format=get_format("int2"), granularity=Granularity.channel())
        scale = tensors.take("scale", torch.float32, shape=(rows, 1))
        weight = PackedWeight.from_codes(codes, scale, None, scheme, tensors.name)
        return PackedLinear(weight=weight, scheme=Scheme(weight=scheme, method=CHECKPOINT))


def write(folder: Path, model: nn.Sequential) -> None:
    """Round a model's weights to three values and write them as some other program would."""
    tensors: dict[str, Tensor] = {}
    for name, linear in model.named_children():
        weight = linear.weight.detach()
        scale = weight.abs().mean(1, keepdim=True)
        digits = ((weight / scale).round().clamp(-1, 1) + 1).to(torch.uint8)
        digits = nn.functional.pad(digits, (0, -digits.shape[1] % 5)).unflatten(1, (-1, 5))
        tensors |= {
            f"{name}.digits": (digits * torch.tensor([1, 3, 9, 27, 81])).sum(-1).to(torch.uint8),
            f"{name}.scale": scale,
            f"{name}.bias": linear.bias.detach(),
        }
        linear.weight.data = (digits.flatten(1)[:, : weight.shape[1]].float() - 1) * scale
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "ternary", "version": 1}}))


def make() -> nn.Sequential:
    return nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 64)).requires_grad_(False)


def main() -> None:
    torch.manual_seed(0)
    original = make()
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), original)
        model = qcompile.load(folder, model=make(), dtype=torch.float32)
    print(model)
    fast = torch.compile(model, backend="qcompile")
    x = torch.randn(3, 256)
    with torch.no_grad():
        print("largest difference to the ternary weights in float32:", (fast(x) - original(x)).abs().max().item())
    try:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), original)
            qcompile.load(folder, model=make(), dtype=torch.float16)
    except qcompile.errors.ConfigError as error:
        print("in float16:", error)


if __name__ == "__main__":
    main()
