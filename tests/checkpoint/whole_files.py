"""Whole checkpoints of small models, by name: what writes one, and the model with the weights that it stands for."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.checkpoint import test_awq, test_experts, test_gptq, test_marlin, test_mxfp4
from tests.checkpoint.integer_files import (
    FIXTURES,
    Pack,
    awq_tensors,
    decoded,
    fixture_tensors,
    gptq_tensors,
    problem,
    read_layer,
    write_llama,
)
from tests.checkpoint.layer_files import fp8_tensors

Writer = Callable[[Path], nn.Module]


def gptq(bits: int, *, act_order: bool = False, group: int = 32, **more: Any) -> Writer:
    """Zero points less 1, as version 1 has them."""

    def pack(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
        size = shape[1] if group == -1 else group
        groups = torch.arange(shape[1]) // size
        groups = groups[torch.randperm(shape[1])] if act_order else groups
        p = problem(bits, *shape, size, symmetric=more.get("sym", False), groups=groups)
        return gptq_tensors(p, bits), p.weight

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": False, "desc_act": act_order} | more
    return lambda folder: write_llama(folder, config, pack)


def awq(symmetric: bool) -> Writer:
    def pack(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
        p = problem(4, *shape, 32, symmetric=symmetric)
        return awq_tensors(p), p.weight

    return lambda folder: write_llama(folder, {**test_awq.GEMM, "zero_point": not symmetric}, pack)


def fp8(tile: tuple[int, int] | None, config: dict[str, Any] | None = None, **options: Any) -> Writer:
    """See `fp8_tensors`, also for the options; -1 columns are all. Fixed scales of inputs are 0.05."""
    described = {"quant_method": "fp8", "activation_scheme": "dynamic"} | (config or {})
    inputs = {"input_scale": torch.tensor(0.05)} if described["activation_scheme"] == "static" else {}

    def pack(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
        whole = tile and (tile[0], shape[1] if tile[1] == -1 else tile[1])
        stored, weight = fp8_tensors(shape, whole, **options)
        return stored | inputs, weight

    return lambda folder: write_llama(folder, described, pack)


def compressed(stored_as: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> Writer:
    """As the library compressed-tensors stores it, which has to be installed."""

    def write(folder: Path) -> nn.Module:
        from tests.checkpoint import test_compressed_tensors as library

        return library.write_model(folder, {"layers": (library.scheme_of(weights, inputs), stored_as)}, stored_as)

    return write


def mixed(folder: Path) -> nn.Module:
    from tests.checkpoint import test_compressed_tensors as library

    return library.write_model(folder, library.KINDS, "mixed-precision")


Layer = tuple[dict[str, Any], dict[str, Tensor], Tensor]
"""A configuration, a layer's tensors by suffix, and its weight."""


def repeated(make: Callable[[], Layer]) -> Writer:
    """A layer that a producer packed, as every linear that can have its shape: all but o_proj and down_proj."""

    def write(folder: Path) -> nn.Module:
        config, tensors, weight = make()
        rows, columns = weight.shape

        def pack(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
            return ({}, weight) if name.endswith(("o_proj", "down_proj")) else (tensors, weight)

        sizes = {"hidden_size": columns, "intermediate_size": rows, "head_dim": rows, "num_attention_heads": 1}
        return write_llama(folder, config, pack, **sizes)

    return write


def fixture(file: str, name: str, config: dict[str, Any]) -> Layer:
    """Its weight is what qcompile decodes, which the tests of the format compare with the producer's."""
    tensors = fixture_tensors(file, name)
    known = {key: tensors.pop(key) for key in ("codes", "zeros", "zero_points", "dense") if key in tensors}
    shape = known["codes" if "codes" in known else "dense"].shape
    return config, tensors, decoded(read_layer(FIXTURES / file, config, (shape[0], shape[1]), name=name))


def marlin(name: str) -> Layer:
    return test_marlin.CONFIGS[name], *test_marlin.packed(name)


OLD = json.loads((FIXTURES / "compressed_tensors" / "old.json").read_text())


def old(name: str) -> Layer:
    """Of compressed-tensors 0.12."""
    config = {**OLD, "config_groups": {"group_0": {**OLD["config_groups"][name], "targets": ["Linear"]}}}
    stored = load_file(FIXTURES / "compressed_tensors" / "old.safetensors")
    tensors = {key.removeprefix(f"{name}."): t for key, t in stored.items() if key.startswith(f"{name}.")}
    return {"quant_method": "compressed-tensors", **config}, tensors, tensors.pop("expected")


_FLOAT8 = {"num_bits": 8, "type": "float"}
_INT = {"type": "int", "strategy": "group", "group_size": 32}
_MX = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
_TOKEN = {"strategy": "token", "dynamic": True}
_DENSE = ("sparse24", "bitmask")
"""They are not quantized."""
_PRODUCED = ("planar_5bit_asym", "ragged_act_order", "gemv_group_32", "gemv_fast_group_64", "awq marlin_group_128")
_PRODUCED += ("qqq", "marlin dense_group_128", "sparse_4bit_group_128", "sparse_8bit_group_whole", "auto_awq_6bit")
_PRODUCED += ("old g_idx", "old uint6", "old marlin8", "old sparse24", "floats fp8_block", "floats nvfp4")

LAYERS: dict[str, Writer] = {
    **{
        f"{Path(file).stem} {name}": repeated(partial(fixture, file, name, config))
        for file, name, config in test_gptq.LAYERS + test_gptq.FLOAT_LAYERS + test_awq.LAYERS + test_marlin.QQQ_LAYERS
    },
    **{f"marlin {name}": repeated(partial(marlin, name)) for name in test_marlin.CONFIGS},
    **{f"old {name}": repeated(partial(old, name)) for name in OLD["config_groups"] if name not in _DENSE},
}
"""Each layer of the fixtures, as most of a Llama."""

LLAMAS: dict[str, Writer] = {
    **{f"gptq {bits} bits": gptq(bits) for bits in (2, 3, 4, 8)},
    "gptq symmetric": gptq(4, sym=True),
    "gptq act-order": gptq(4, act_order=True),
    "gptq act-order, 8 bits": gptq(8, act_order=True, group=64),
    "gptq per channel": gptq(4, group=-1),
    "gptq groups of 8": gptq(4, group=8),
    "awq gemm": awq(False),
    "awq gemm without zero points": awq(True),
    "fp8 tensor": fp8(None),
    "fp8 tensor e5m2": fp8(None, dtype=torch.float8_e5m2),
    "fp8 tensor, fixed scales of inputs": fp8(None, {"activation_scheme": "static"}),
    "fp8 channel": fp8((1, -1), suffix="weight_scale"),
    "fp8 channel, fbgemm": fp8((1, -1), {"quant_method": "fbgemm_fp8"}, suffix="weight_scale"),
    "fp8 tiles": fp8((128, 128), {"weight_block_size": [128, 128]}),
    "fp8 tiles, powers of two": fp8(
        (32, 32), {"weight_block_size": [32, 32], "scale_fmt": "ue8m0"}, scale_dtype=torch.float8_e8m0fnu
    ),
    "compressed-tensors int4 group": compressed("pack-quantized", {"num_bits": 4, **_INT}),
    "compressed-tensors uint4 group": compressed("pack-quantized", {"num_bits": 4, **_INT, "symmetric": False}),
    "compressed-tensors int3 channel": compressed("pack-quantized", {"num_bits": 3, "strategy": "channel"}),
    "compressed-tensors int8 channel": compressed("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "compressed-tensors w8a8": compressed(
        "int-quantized", {"num_bits": 8, "strategy": "channel"}, {"num_bits": 8, **_TOKEN}
    ),
    "compressed-tensors w4a8": compressed("int-quantized", {"num_bits": 4, **_INT}, {"num_bits": 8, **_TOKEN}),
    "compressed-tensors fp8 tensor": compressed(
        "float-quantized", {**_FLOAT8, "strategy": "tensor"}, {**_FLOAT8, "strategy": "tensor"}
    ),
    "compressed-tensors fp8 channel": compressed(
        "float-quantized", {**_FLOAT8, "strategy": "channel"}, {**_FLOAT8, **_TOKEN}
    ),
    "compressed-tensors fp8 tiles": compressed(
        "float-quantized",
        {**_FLOAT8, "strategy": "block", "block_structure": [128, 128]},
        {**_FLOAT8, "strategy": "group", "group_size": 128, "dynamic": True},
    ),
    "compressed-tensors nvfp4": compressed(
        "nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    ),
    "compressed-tensors mxfp4": compressed("mxfp4-pack-quantized", {"num_bits": 4, **_MX}),
    "compressed-tensors mxfp6": compressed("mxfp6-pack-quantized", {"num_bits": 6, **_MX}),
    "compressed-tensors mxfp8": compressed(
        "mxfp8-quantized", {"num_bits": 8, **_MX}, {"num_bits": 8, **_MX, "dynamic": True}
    ),
    "compressed-tensors, three formats": mixed,
    **{name: LAYERS.pop(name) for name in list(LAYERS) if any(part in name for part in _PRODUCED)},
}


def experts(kind: str, config: dict[str, Any], pack: Pack) -> Writer:
    return lambda folder: test_experts.write(folder, kind, config, pack)


MIXTURES: dict[str, Writer] = {
    "mixtral gptq": experts("mixtral", test_experts.GPTQ_CONFIG, test_experts.gptq),
    "mixtral gptq act-order": experts(
        "mixtral", {**test_experts.GPTQ_CONFIG, "desc_act": True}, test_experts.gptq_act_order
    ),
    "mixtral awq": experts("mixtral", test_experts.AWQ_CONFIG, test_experts.awq),
    "mixtral nvfp4": experts("mixtral", test_experts.NVFP4_CONFIG, test_experts.nvfp4),
    "qwen3-moe fp8": experts("qwen3_moe", test_experts.FP8_CONFIG, test_experts.fp8),
    "gpt-oss mxfp4": test_mxfp4.write,
}
