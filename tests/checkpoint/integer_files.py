"""Layers of integer checkpoints, packed here from the formats' descriptions, and what they must decode to."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qcompile
from qcompile.checkpoint.method import LayerTensors, method_for
from qcompile.checkpoint.store import open_store
from qcompile.modules import QuantizedLinear
from qcompile.packed import PackedLinear
from qcompile.reference import dequantize
from tests.tolerance import sqnr

LLAMA_FLOOR = -20 * math.log10(15 * 2 * 2.0**-8)
"""Least SQNR in dB between two evaluations of a model with 15 linears of which one may compute in bfloat16, as kernels
of CPUs do: 2**-8 relative for either operand of each linear, whose errors add up at most."""
FIXTURES = Path(__file__).parents[1] / "fixtures"


def fixture_layers(folder: str, *names: str) -> list[tuple[str, str, dict[str, Any]]]:
    """(file, layer, configuration) of the layers of some fixture files, each with its json beside it."""
    found = []
    for name in names:
        layers = json.loads((FIXTURES / folder / f"{name}.json").read_text())
        found += [(f"{folder}/{name}.safetensors", layer, config) for layer, config in layers.items()]
    return found


def fixture_tensors(file: str, layer: str) -> dict[str, Tensor]:
    """A layer's tensors in a fixture file, by their suffixes."""
    tensors = load_file(FIXTURES / file)
    return {name.removeprefix(f"{layer}."): tensor for name, tensor in tensors.items() if name.startswith(f"{layer}.")}


def read_layer(
    path: Path,
    config: dict[str, Any],
    shape: tuple[int, int],
    tensors: dict[str, Tensor] | None = None,
    name: str = "m.l",
) -> PackedLinear | None:
    """The layer `name` of the file `path`, which is written first if tensors are given."""
    if tensors is not None:
        save_file({f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}, path)
    store = open_store(path)
    return method_for(config, store).linear(LayerTensors(store, name), shape)


def decoded(layer: PackedLinear | None) -> Tensor:
    """The weight, float32 [N, K]."""
    assert layer is not None
    return dequantize(layer.weight)


def stream(codes: Tensor, bits: int, word: torch.dtype = torch.int32) -> Tensor:
    """Each row as one number in base 2**bits, the first code least, cut into little-endian words."""
    words = math.ceil(codes.shape[1] * bits / (8 * word.itemsize))
    rows = [sum(code << (bits * k) for k, code in enumerate(row)) for row in codes.tolist()]
    data = b"".join(row.to_bytes(words * word.itemsize, "little") for row in rows)
    return torch.frombuffer(bytearray(data), dtype=word).view(len(rows), words)


@dataclass
class Problem:
    """A random layer of integers.

    Attributes:
        codes: uint8 [N, K]; zeros: uint8 [N, groups]; scales: float16 [N, groups]; groups: int64 [K].
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    groups: Tensor

    @property
    def weight(self) -> Tensor:
        """float32 [N, K]; the difference is exact, so there is one rounding."""
        difference = self.codes.float() - self.zeros.float()[:, self.groups]
        return difference * self.scales.float()[:, self.groups]


def problem(
    bits: int, rows: int, columns: int, group: int, *, symmetric: bool = False, groups: Tensor | None = None
) -> Problem:
    """Drawn from torch's generator; groups of `group` columns in order, unless given."""
    index = torch.arange(columns) // group if groups is None else groups
    count = math.ceil(columns / group)
    zeros = torch.randint(1, 2**bits, (rows, count)).to(torch.uint8)
    return Problem(
        codes=torch.randint(0, 2**bits, (rows, columns)).to(torch.uint8),
        zeros=torch.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros,
        scales=(torch.rand(rows, count) * 0.02 + 0.001).half(),
        groups=index,
    )


def gptq_tensors(p: Problem, bits: int, *, minus: int = 1, word: torch.dtype = torch.int32) -> dict[str, Tensor]:
    """GPTQ's bit streams; zero points less `minus`."""
    return {
        "qweight": stream(p.codes, bits, word).t(),
        "qzeros": stream((p.zeros.t().int() - minus) % 2**bits, bits, word),
        "scales": p.scales.t(),
        "g_idx": p.groups.to(torch.int32),
    }


def awq_tensors(p: Problem) -> dict[str, Tensor]:
    """AWQ's version gemm: runs of 8 output features in the order 0 2 4 6 1 3 5 7."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def interleaved(codes: Tensor) -> Tensor:
        return stream(codes.unflatten(1, (-1, 8))[..., order].flatten(1), 4)

    return {"qweight": interleaved(p.codes.t()), "qzeros": interleaved(p.zeros.t()), "scales": p.scales.t()}


Pack = Callable[[str, tuple[int, int]], tuple[dict[str, Tensor], Tensor]]
"""From a linear's name and (N, K) to its tensors and the weight [N, K] that they stand for; no tensors leave the linear
as it is."""


def write_llama(folder: Path, config: dict[str, Any], pack: Pack, **sizes: int) -> nn.Module:
    """A checkpoint of a Llama with 2 layers, whose linears in layers are quantized.

    Args:
        config: its `quantization_config`.
        sizes: of the model, as transformers calls them, other than those below.

    Returns:
        transformers' model with those weights, float32.
    """
    import transformers

    chosen: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "dtype": "float32",
    } | sizes  # fmt: skip
    description = transformers.LlamaConfig(**chosen)
    model = transformers.LlamaForCausalLM(description).eval().requires_grad_(False)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, module in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, nn.Linear):
            packed, weight = pack(name, tuple(module.weight.shape))
            if packed:
                module.weight.data = weight
                del tensors[f"{name}.weight"]
                copies = {s: t.clone(memory_format=torch.contiguous_format) for s, t in packed.items()}
                tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in copies.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    described = {**description.to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": config}
    (folder / "config.json").write_text(json.dumps(described))
    return model


def check_llama(folder: Path, expected: nn.Module) -> None:
    """`qcompile.load` makes a model with those very weights, which computes the same but for `LLAMA_FLOOR`."""
    model = qcompile.load(folder, progress=False)
    quantized = 0
    for name, module in expected.named_modules():
        if isinstance(module, nn.Linear):
            loaded = model.get_submodule(name)
            quantized += isinstance(loaded, QuantizedLinear)
            assert torch.equal(loaded.weight, module.weight), name
    assert quantized >= 7
    tokens = torch.randint(0, 64, (1, 12))
    assert sqnr(expected(tokens).logits, model(tokens).logits) >= LLAMA_FLOOR
