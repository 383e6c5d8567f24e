"""torchao's tensors of every kind that is read, and a checkpoint of a model that it quantized."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
from torchao.quantization import (
    Float8Tensor,
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    MappingType,
    PerGroup,
    PerRow,
    PerTensor,
)
from torchao.quantization.granularity import PerBlock
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs, QuantizeTensorToInt8Kwargs


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.1).to(dtype)


def int8(shape: tuple[int, int] = (48, 64), **given: Any) -> Int8Tensor:
    return Int8Tensor.from_hp(weight(*shape), given.pop("granularity", PerRow()), **given)


def intx(bits: int, mapping: MappingType, dtype: torch.dtype, block: tuple[int, int] = (1, 32)) -> Tensor:
    target = getattr(torch, f"int{bits}")
    return IntxUnpackedToInt8Tensor.from_hp(weight(24, 64, dtype=dtype), block, target, mapping_type=mapping)


def float8(granularity: Any, activation: Any = None, shape: tuple[int, int] = (48, 64), **given: Any) -> Tensor:
    kwargs = None if activation is None else QuantizeTensorToFloat8Kwargs(granularity=activation, **given)
    return Float8Tensor.from_hp(weight(*shape), granularity=granularity, act_quant_kwargs=kwargs)


def act(**given: Any) -> QuantizeTensorToInt8Kwargs:
    return QuantizeTensorToInt8Kwargs(**({"granularity": PerRow()} | given))


CASES: dict[str, Callable[[], Any]] = {
    "int8 rows": int8,
    "int8 groups": lambda: int8(granularity=PerGroup(32)),
    "int8 tensor": lambda: int8(granularity=PerTensor()),
    "int8 asymmetric": lambda: int8(mapping_type=MappingType.ASYMMETRIC),
    **{
        f"int{bits} {mapping.name} {dtype}": lambda b=bits, m=mapping, d=dtype: intx(b, m, d)
        for bits in range(1, 9)
        for mapping, dtype in ((MappingType.SYMMETRIC, torch.float32), (MappingType.ASYMMETRIC, torch.bfloat16))
    },
    "intx rows": lambda: intx(4, MappingType.ASYMMETRIC, torch.float16, (1, 64)),
    "float8 rows": lambda: float8(PerRow()),
    "float8 tensor": lambda: float8(PerTensor()),
    "float8 rows, inputs too": lambda: float8(PerRow(), PerRow()),
    "int8 rows, inputs too": lambda: int8(act_quant_kwargs=act()),
    "float8 blocks": lambda: float8(PerBlock([128, 128]), PerBlock([1, 128]), (256, 384)),
    "mxfp8": lambda: MXTensor.to_mx(weight(48, 96), torch.float8_e4m3fn, 32),
    "mxfp8 e5m2": lambda: MXTensor.to_mx(weight(48, 96), torch.float8_e5m2, 32),
    "mxfp8 swizzled": lambda: MXTensor.to_mx(weight(144, 192), torch.float8_e4m3fn, 32, is_swizzled_scales=True),
    "mxfp6 e2m3": lambda: MXTensor.to_mx(weight(48, 96), "fp6_e2m3", 32),
    "mxfp6 e3m2": lambda: MXTensor.to_mx(weight(48, 96), "fp6_e3m2", 32),
    "mxfp4": lambda: MXTensor.to_mx(weight(48, 96), torch.float4_e2m1fn_x2, 32),
    "nvfp4": lambda: NVFP4Tensor.to_nvfp4(weight(48, 96)),
    "nvfp4 swizzled": lambda: NVFP4Tensor.to_nvfp4(
        weight(144, 96), per_tensor_scale=torch.tensor(0.01), is_swizzled_scales=True
    ),
}


CONFIGS = {
    "int8": lambda: Int8WeightOnlyConfig(version=2),
    "int8 dynamic": lambda: Int8DynamicActivationInt8WeightConfig(version=2),
    "int4": lambda: IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=PerGroup(32), mapping_type=MappingType.ASYMMETRIC, version=2
    ),
    "float8": lambda: Float8WeightOnlyConfig(version=2),
}


def save_model(folder: Path, name: str, shards: str = "1GB") -> nn.Module:
    """A checkpoint of a Llama that torchao quantized, in the folder "quantized", and that model."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(shape).save_pretrained(folder / "original")
    config = transformers.TorchAoConfig(CONFIGS[name]())
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "original", quantization_config=config, dtype=torch.float32
    )
    model.save_pretrained(folder / "quantized", max_shard_size=shards)
    return model
