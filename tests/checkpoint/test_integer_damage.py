"""Any damage to a layer's tensors or settings ends in a CheckpointError, or in a weight of the right shape."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.checkpoint.method import LayerTensors, method_for
from qcompile.checkpoint.store import TensorInfo, TensorStore
from qcompile.errors import CheckpointError
from qcompile.reference import dequantize
from tests.checkpoint.integer_files import FIXTURES, fixture_layers, fixture_tensors

DTYPES = (
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.bool, torch.float16,
    torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, -2, -1, 0, 1, 3, 4, 5, 8, 32, 2**31, 2**70, 1.5, True, False, "", "4", "gptq_p", "gemv", "marlin", "(", [],
    [16], {}, {"-:": {}}, {"": 1}, {"+:.*": {"bits": 5}}, {".*": {"sym": 0}},
    {"+:m": {"group_size": -1, "desc_act": True}},
)  # fmt: skip
KEYS = (
    "bits", "w_bit", "group_size", "sym", "zero_point", "desc_act", "static_groups", "checkpoint_format", "format",
    "version", "dynamic", "extra_config", "meta", "packing_format", "data_type", "act_bits",
)  # fmt: skip


class Memory(TensorStore):
    """Tensors in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.path, self.metadata = tensors, FIXTURES, {}

    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(self.tensors[name].dtype, tuple(self.tensors[name].shape), FIXTURES)

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def damaged(tensor: Tensor, rng: random.Random) -> Tensor:
    kind = rng.randrange(5)
    if kind == 0:
        return tensor.to(rng.choice(DTYPES))
    if kind == 1:
        shape = [max(0, extent + rng.choice((-1, 0, 1, -extent, extent))) for extent in tensor.shape]
        return torch.zeros(shape, dtype=tensor.dtype)
    if kind == 2:
        return tensor.flatten() if rng.random() < 0.5 else tensor[None]
    if kind == 3:
        return tensor.t().contiguous() if tensor.dim() == 2 else tensor.flip(0)
    noise = torch.randint(0, 256, (tensor.numel() * tensor.element_size(),), dtype=torch.uint8)
    return noise.view(tensor.dtype).view(tensor.shape)


LAYERS = [
    *fixture_layers("gptq", "gptqmodel", "autoround", "autoround_floats"),
    *fixture_layers("awq", "autoawq"),
    *fixture_layers("marlin", "qqq"),
]
CHOSEN = [
    layer
    for layer in LAYERS
    if layer[1]
    in (
        "v1_4bit_asym", "planar_5bit_asym", "act_order_3bit_asym", "ragged_act_order_4bit", "auto_round_5bit_asym",
        "auto_round-auto_awq_6bit_asym", "nvfp4", "fp8_block", "gemm_group_32", "gemv_group_64", "gemv_fast_group_64",
        "group_128", "group_whole",
    )
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:the checkpoint quantizes float inputs")
@pytest.mark.parametrize(("file", "name", "config"), CHOSEN, ids=[name for _, name, _ in CHOSEN])
def test_damage(file, name, config):
    rng = random.Random(name)
    sound = fixture_tensors(file, name)
    known = next(sound[key] for key in ("codes", "dense") if key in sound).shape
    sound = {key: tensor for key, tensor in sound.items() if key not in ("codes", "zeros", "zero_points", "dense")}
    refused = 0
    for _ in range(60):
        tensors, settings, shape = dict(sound), dict(config), (known[0], known[1])
        for _ in range(rng.choice((1, 1, 2))):
            what = rng.randrange(4)
            suffix = rng.choice(sorted(sound))
            if what == 0:
                settings[rng.choice(KEYS)] = rng.choice(VALUES)
            elif what == 1:
                tensors.pop(suffix, None)
            elif what == 2 and suffix in tensors:
                tensors[suffix] = damaged(tensors[suffix], rng)
            else:
                shape = (rng.choice((1, 7, known[0], known[1])), rng.choice((1, 7, 33, known[0], known[1])))
        store = Memory({f"m.l.{key}": tensor for key, tensor in tensors.items()})
        try:
            layer = method_for(settings, store).linear(LayerTensors(store, "m.l"), shape)
        except CheckpointError:
            refused += 1
            continue
        if layer is not None:
            assert dequantize(layer.weight).shape == shape
    assert refused > 10
