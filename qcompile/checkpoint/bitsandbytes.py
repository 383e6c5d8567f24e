"""bitsandbytes: 4-bit NF4 and FP4, and LLM.int8().

NF4: Dettmers et al. 2023, QLoRA, arXiv:2305.14314. LLM.int8(): Dettmers et al. 2022, arXiv:2208.07339. Layout of
files: `QuantState.as_dict` and `Linear8bitLt` of https://github.com/bitsandbytes-foundation/bitsandbytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompile.checkpoint.flat_blocks import block_count, group_granularity, spread_blocks
from qcompile.checkpoint.method import LayerTensors, Method, register
from qcompile.checkpoint.store import TensorStore
from qcompile.errors import CheckpointError, shown
from qcompile.formats import TableFormat, get_format
from qcompile.methods import CHECKPOINT
from qcompile.packed import PackedLinear, PackedWeight
from qcompile.scheme import ActivationScheme, Granularity, Scheme, WeightScheme

_STATE = "weight.quant_state.bitsandbytes__"
_STATE_BYTES = 1 << 14
_STORAGE = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32)
_LARGEST_BLOCK = 1 << 16
_LARGEST = torch.finfo(torch.float32).max


@register
class BitsAndBytes(Method):
    """Linears that `bitsandbytes.nn.Linear4bit` or `Linear8bitLt` saved; which of the two a layer's tensors tell."""

    name = "bitsandbytes"

    def __init__(self, config: Mapping[str, Any], store: TensorStore) -> None:
        threshold = config.get("llm_int8_threshold", 6.0)
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold <= _LARGEST:
            raise CheckpointError(
                f"{store.path}: llm_int8_threshold is {shown(threshold)}; expected 0 (no outliers) or more"
            )
        self.threshold = float(threshold) or None

    def linear(self, tensors: LayerTensors, shape: tuple[int, int]) -> PackedLinear | Tensor | None:
        states = [suffix for suffix in tensors.suffixes() if suffix.startswith(_STATE)]
        if len(states) > 1:
            raise tensors.error(f"it has {len(states)} quantization states; a layer has one")
        if states:
            return _four_bit(tensors, shape, states[0])
        if "SCB" in tensors:
            return self._eight_bit(tensors, shape)
        if "weight" in tensors and not tensors.info("weight").dtype.is_floating_point:
            raise tensors.error(
                f"its weight is {tensors.info('weight').dtype}, but neither a 4-bit quantization state "
                "(weight.quant_state.bitsandbytes__nf4 or __fp4) nor SCB of LLM.int8() is there; save it again with "
                "bitsandbytes 0.41 or later"
            )
        return None

    def _eight_bit(self, tensors: LayerTensors, shape: tuple[int, int]) -> PackedLinear:
        """W = q * SCB / 127, a row's greatest magnitude at 127."""
        if "weight_format" in tensors:
            order = int(tensors.take("weight_format", torch.uint8, shape=()))
            if order != 0:
                raise tensors.error(
                    f"weight_format is {order}: int8 weights in the tile order of one kind of GPU, which old versions "
                    "of bitsandbytes wrote; load and save it with bitsandbytes 0.45 or later, which writes rows"
                )
        codes = tensors.take("weight", torch.int8, shape=shape)
        absmax = tensors.take("SCB", torch.float32, shape=(shape[0],))
        _check_finite(tensors, "SCB", absmax)
        weight = WeightScheme(format=get_format("int8"), granularity=Granularity.channel())
        packed = PackedWeight.from_codes(
            codes.view(torch.uint8) ^ 0x80, (absmax / 127)[:, None], None, weight, layer=tensors.name
        )
        activation = ActivationScheme(
            format=get_format("int8"), granularity=Granularity.channel(), outlier_threshold=self.threshold
        )
        return PackedLinear(weight=packed, scheme=Scheme(weight=weight, activation=activation, method=CHECKPOINT))


def _four_bit(tensors: LayerTensors, shape: tuple[int, int], suffix: str) -> PackedLinear | Tensor:
    """W = quant_map[code] * absmax[index // blocksize], of the flattened weight, whose even codes are high nibbles.

    With a table of values that is not bitsandbytes' own, the weight is decoded.
    """
    quant_type = suffix.removeprefix(_STATE)
    if quant_type not in ("nf4", "fp4"):
        raise tensors.error(f"its 4-bit type is {shown(quant_type)}; bitsandbytes has nf4 and fp4")
    state = _quant_state(tensors, suffix)
    if state.get("quant_type") != quant_type:
        raise tensors.error(f"{suffix} says quant_type {shown(state.get('quant_type'))}")
    if state.get("shape") != list(shape):
        raise tensors.error(f"{suffix} says shape {shown(state.get('shape'))}, but the model's layer is {list(shape)}")
    block = _block_size(tensors, suffix, state, "blocksize")
    fmt = get_format(quant_type)
    assert isinstance(fmt, TableFormat)
    table = tensors.take("weight.quant_map", torch.float32, shape=(16,))
    _check_finite(tensors, "weight.quant_map", table)
    codes = _nibbles(tensors, shape)
    absmax = _absmax(tensors, suffix, state, block_count(block, shape))
    if not torch.equal(table, torch.tensor(fmt.values)):
        return table[codes.int()] * absmax.repeat_interleave(block)[: codes.numel()].view(shape)
    scheme = WeightScheme(format=fmt, granularity=group_granularity(block, shape))
    packed = PackedWeight.from_codes(codes, spread_blocks(absmax, block, shape), None, scheme, layer=tensors.name)
    return PackedLinear(weight=packed, scheme=Scheme(weight=scheme, method=CHECKPOINT))


def _nibbles(tensors: LayerTensors, shape: tuple[int, int]) -> Tensor:
    """uint8 codes [N, K] of `weight`, bytes that may be declared to be of another dtype (`bnb_4bit_quant_storage`)."""
    info, count = tensors.info("weight"), shape[0] * shape[1]
    if math.prod(info.shape) * info.dtype.itemsize != (count + 1) // 2:
        raise tensors.error(
            f"weight is {info.dtype} {tuple(info.shape)}; {list(shape)} in 4 bits are {(count + 1) // 2} bytes"
        )
    packed = tensors.take("weight", *_STORAGE, shape=tuple(info.shape)).flatten().view(torch.uint8)
    return torch.stack([packed >> 4, packed & 15], -1).flatten()[:count].view(shape)


def _absmax(tensors: LayerTensors, suffix: str, state: Mapping[str, Any], count: int) -> Tensor:
    """float32 [count], decoded if it was quantized itself ("double quantization")."""
    if "weight.nested_absmax" not in tensors:
        absmax = tensors.take("weight.absmax", torch.float32, shape=(count,))
    else:
        block = _block_size(tensors, suffix, state, "nested_blocksize")
        offset = state.get("nested_offset")
        if isinstance(offset, bool) or not isinstance(offset, (int, float)) or not abs(offset) <= _LARGEST:
            raise tensors.error(f"{suffix} says nested_offset {shown(offset)}; it is a number")
        codes = tensors.take("weight.absmax", torch.uint8, shape=(count,))
        table = tensors.take("weight.nested_quant_map", torch.float32, shape=(256,))
        scale = tensors.take("weight.nested_absmax", torch.float32, shape=(-(-count // block),))
        absmax = table[codes.int()] * scale.repeat_interleave(block)[:count] + torch.tensor(float(offset))
    _check_finite(tensors, "weight.absmax", absmax)
    return absmax


def _quant_state(tensors: LayerTensors, suffix: str) -> dict[str, Any]:
    """The JSON object that a uint8 tensor spells."""
    info = tensors.info(suffix)
    if len(info.shape) != 1 or info.shape[0] > _STATE_BYTES:
        raise tensors.error(f"{suffix} has shape {tuple(info.shape)}; it is at most {_STATE_BYTES} bytes of JSON")
    spelled = bytes(tensors.take(suffix, torch.uint8, shape=tuple(info.shape)).tolist())
    try:
        state = json.loads(spelled)
    except (ValueError, RecursionError) as error:
        raise tensors.error(f"{suffix} is no JSON ({error}); get the file again") from None
    if not isinstance(state, dict):
        raise tensors.error(f"{suffix} is a {type(state).__name__} in JSON; it is an object; get the file again")
    return state


def _block_size(tensors: LayerTensors, suffix: str, state: Mapping[str, Any], key: str) -> int:
    size = state.get(key)
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= _LARGEST_BLOCK:
        raise tensors.error(f"{suffix} says {key} {shown(size)}; it is an integer from 1 to {_LARGEST_BLOCK}")
    return size


def _check_finite(tensors: LayerTensors, suffix: str, scales: Tensor) -> None:
    if not torch.isfinite(scales).all():
        raise tensors.error(f"{suffix} holds NaN or infinity; get the file again, or quantize the model again")
