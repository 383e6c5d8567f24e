"""torchao's tensors, from safetensors and at hand, against the weights that torchao decodes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import qcompile
from qcompile.checkpoint.method import LayerTensors, method_for
from qcompile.checkpoint.store import open_store
from qcompile.checkpoint.torchao import TorchAO
from qcompile.errors import CheckpointError, LayerError
from qcompile.modules import QuantizedLinear
from qcompile.packed import PackedLinear
from qcompile.reference import dequantize
from qcompile.scheme import ActivationScheme, Granularity
from qcompile.torchao_tensors import read_tensor
from tests.tolerance import assert_within, float_bound, rewrite_sqnr_floor, sqnr

pytest.importorskip("torchao")

from torchao.prototype.mx_formats.mx_tensor import MXTensor, QuantizeTensorToMXKwargs
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, QuantizeTensorToNVFP4Kwargs
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    Int4PlainInt32Tensor,
    Int4Tensor,
    Int4TilePackedTo4dTensor,
    IntxUnpackedToInt8Tensor,
    MappingType,
    PerRow,
    PerTensor,
    quantize_,
)
from torchao.quantization.granularity import PerBlock

from tests.checkpoint.torchao_files import CASES, CONFIGS, act, float8, int8, save_model, weight

MX_ACTIVATION = QuantizeTensorToMXKwargs(elem_dtype=torch.float8_e4m3fn)


def stored(tensor: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    return flatten_tensor_state_dict({"x.weight": tensor})


def load(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str], shape: tuple[int, ...]) -> PackedLinear:
    save_file(tensors, folder / "model.safetensors", metadata)
    store = open_store(folder)
    given = LayerTensors(store, "x")
    method = method_for(None, store)
    assert isinstance(method, TorchAO)
    loaded = method.linear(given, (shape[0], shape[1]))
    assert isinstance(loaded, PackedLinear)
    assert given.taken == set(store.names())
    return loaded


def both(folder: Path, tensor: Any) -> PackedLinear:
    """What a file and the tensor at hand hold, which is the same."""
    loaded = load(folder, *stored(tensor), tuple(tensor.shape))
    live = read_tensor(tensor)
    assert live.scheme == loaded.scheme
    pairs = [*zip(live.weight.tensors, loaded.weight.tensors, strict=True)]
    pairs += [(live.input_scale, loaded.input_scale), (live.pre_quant_scale, loaded.pre_quant_scale)]
    for one, other in pairs:
        assert (one is None and other is None) or torch.equal(one.float(), other.float())
    return loaded


@pytest.mark.parametrize("name", CASES)
def test_weights_decode_as_torchao_does(tmp_path, name):
    tensor = CASES[name]()
    loaded = both(tmp_path, tensor)
    expected = tensor.dequantize()
    assert torch.equal(dequantize(loaded.weight).to(expected.dtype), expected)


def nibbles(codes: Tensor) -> Tensor:
    """Two int4 in a byte, the even column low."""
    return (codes[:, ::2] & 15 | codes[:, 1::2] << 4).to(torch.int8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int4_is_a_scale_and_an_offset(tmp_path, dtype):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-8, 8, (24, 64), generator=generator)
    scale, zero = (torch.randn(2, 24, generator=generator).to(dtype) for _ in range(2))
    tensor = Int4Tensor(nibbles(codes), scale, zero, [1, 32], torch.Size([24, 64]))
    loaded = both(tmp_path, tensor)
    wide = [t.float().t().repeat_interleave(32, 1) for t in (scale, zero)]
    assert torch.equal(dequantize(loaded.weight), codes * wide[0] + wide[1])
    assert loaded.scheme.activation is None


def test_int4_with_float8_activations_is_symmetric(tmp_path):
    codes = torch.randint(-8, 8, (24, 64))
    scale = torch.rand(2, 24).bfloat16()
    tensor = Int4Tensor(
        nibbles(codes), scale, torch.zeros_like(scale), [1, 32], torch.Size([24, 64]),
        act_pre_scale=torch.rand(64).bfloat16(), activation_dtype=torch.float8_e4m3fn,
    )  # fmt: skip
    loaded = both(tmp_path, tensor)
    assert loaded.scheme.weight.symmetric
    assert str(loaded.scheme.activation) == "fp8_e4m3 dynamic per token"
    assert torch.equal(loaded.pre_quant_scale, tensor.act_pre_scale)
    assert torch.equal(dequantize(loaded.weight), codes * scale.float().t().repeat_interleave(32, 1))


def tile_packed(codes: Tensor) -> Tensor:
    """Of uint4 [N, K] (N a multiple of 8, K of 128), element by element as PyTorch's int4mm.cu describes its layout."""
    rows, columns = codes.shape
    packed = torch.zeros(rows // 8, columns // 128, 32, 4, dtype=torch.int64)
    for lane in range(32):
        for word in range(4):
            for nibble, step in enumerate((0, 8, 16, 24, 1, 9, 17, 25)):
                part = codes[lane // 4 :: 8, 32 * word + 2 * (lane % 4) + step :: 128]
                packed[:, :, lane, word] |= part << (4 * nibble)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


@pytest.mark.parametrize("shape", [(16, 1024), (12, 160)])
def test_tiles_of_tensor_cores(tmp_path, shape):
    rows, columns = (16, 1024)
    codes = torch.randint(0, 16, (rows, columns))
    pairs = torch.randn(columns // 32, rows, 2).bfloat16()
    tensor = Int4TilePackedTo4dTensor(tile_packed(codes), pairs, [1, 32], torch.Size(shape))
    scale, zero = (pairs[..., i].float().t().repeat_interleave(32, 1) for i in range(2))
    expected = ((codes - 8) * scale + zero)[: shape[0], : shape[1]]
    assert torch.equal(dequantize(both(tmp_path, tensor).weight), expected)


def test_int4_in_words(tmp_path):
    codes, zero = torch.randint(0, 16, (24, 64)), torch.randint(0, 16, (2, 24))
    scale = torch.rand(2, 24).half()
    words = sum(codes[:, i::8] << (4 * i) for i in range(8))
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    tensor = Int4PlainInt32Tensor(words, scale, zero.to(torch.int8), [1, 32], torch.Size([24, 64]))
    wide = [t.float().t().repeat_interleave(32, 1) for t in (scale, zero)]
    assert torch.equal(dequantize(both(tmp_path, tensor).weight), (codes - wide[1]) * wide[0])
    for_npus = Int4PlainInt32Tensor(words, scale, zero.half(), [1, 32], torch.Size([24, 64]))
    with pytest.raises(LayerError, match="Ascend"):
        read_tensor(for_npus)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_float_zero_points_become_offsets(tmp_path, dtype):
    """(q - zero) * scale and q * scale - zero * scale round alike where 16-bit factors make all products exact."""
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(-8, 8, (24, 64), generator=generator, dtype=torch.int8)
    scale, zero = (torch.randn(24, 2, generator=generator).to(dtype) for _ in range(2))
    tensor = IntxUnpackedToInt8Tensor(codes, scale, zero, torch.int4, [1, 32], dtype, None)
    wide = [t.float().repeat_interleave(32, 1) for t in (scale, zero)]
    found, expected = dequantize(both(tmp_path, tensor).weight), (codes - wide[1]) * wide[0]
    magnitude = (codes * wide[0]).abs() + (wide[1] * wide[0]).abs()
    if dtype == torch.float16:
        assert torch.equal(found, expected)
    assert_within(found, expected, float_bound(expected, 3, torch.float32, magnitude))


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (lambda: int8(act_quant_kwargs=act()), "int8 dynamic per token"),
        (lambda: int8(act_quant_kwargs=act(mapping_type=MappingType.ASYMMETRIC)), None),
        (lambda: float8(PerRow(), PerRow()), "fp8_e4m3 dynamic per token"),
        (lambda: float8(PerTensor(), PerTensor()), "fp8_e4m3 dynamic per tensor"),
        (lambda: float8(PerRow(), PerRow(), hp_value_ub=1.0), None),
        (lambda: float8(PerBlock([128, 128]), PerBlock([1, 128]), (256, 384)), "fp8_e4m3 dynamic per group 128"),
        (
            lambda: MXTensor.to_mx(weight(48, 96), torch.float8_e4m3fn, 32, act_quant_kwargs=MX_ACTIVATION),
            "fp8_e4m3 dynamic per group 32",
        ),
        (lambda: NVFP4Tensor.to_nvfp4(weight(48, 96), act_quant_kwargs=QuantizeTensorToNVFP4Kwargs()), None),
    ],
)
def test_activations(tmp_path, tensor, expected):
    activation = both(tmp_path, tensor()).scheme.activation
    assert (activation if activation is None else str(activation)) == expected
    if expected == "fp8_e4m3 dynamic per group 32":
        assert isinstance(activation, ActivationScheme)
        assert activation.scale_dtype == "float8_e8m0fnu"


def test_static_activations(tmp_path):
    static = {"act_quant_kwargs": act(granularity=PerTensor()), "act_quant_scale": torch.tensor([[0.02]])}
    loaded = both(tmp_path, int8(**static, act_quant_zero_point=torch.zeros(1, 1, dtype=torch.int8)))
    assert str(loaded.scheme.activation) == "int8 static per tensor"
    assert loaded.scheme.activation.granularity == Granularity.tensor()
    assert torch.equal(loaded.input_scale, torch.tensor(0.02))
    shifted = both(tmp_path, int8(**static, act_quant_zero_point=torch.ones(1, 1, dtype=torch.int8)))
    assert (shifted.scheme.activation, shifted.input_scale) == (None, None)


DAMAGE: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "qdata of another shape": (int8, {"qdata": torch.zeros(64, 48, dtype=torch.int8)}, r"_weight_qdata has shape"),
    "qdata of another dtype": (int8, {"qdata": torch.zeros(48, 64)}, "_weight_qdata has dtype torch.float32"),
    "NaN scale": (int8, {"scale": torch.full((48, 1), float("nan"))}, "scale holds NaN"),
    "scale missing": (int8, {"scale": None}, "_weight_scale is missing"),
    "integer scale": (int8, {"scale": torch.ones(48, 1, dtype=torch.int32)}, "_weight_scale has dtype torch.int32"),
    "fewer scales": (int8, {"scale": torch.ones(47, 1)}, r"scale has shape \(47, 1\), expected \(48, 1\)"),
    "block of strings": (int8, {"block_size": ["1", "64"]}, r"its block_size is \['1', '64'\]"),
    "block of 0": (int8, {"block_size": [1, 0]}, r"its block_size is \[1, 0\]"),
    "block of true": (int8, {"block_size": [True, 64]}, r"its block_size is \[True, 64\]"),
    "block too large": (int8, {"block_size": [1, 1 << 40]}, "its block_size is"),
    "block of 3": (int8, {"block_size": [1, 1, 64]}, "its block_size is"),
    "kwargs of a list": (int8, {"act_quant_kwargs": [1]}, r"its act_quant_kwargs are \[1\]"),
    "a static scale of 0": (
        lambda: int8(act_quant_kwargs=act(), act_quant_scale=torch.zeros(1, 1)),
        {},
        "act_quant_scale is 0.0",
    ),
    "codes of 8 bits": (CASES["intx rows"], {"qdata": torch.full((24, 64), 8, dtype=torch.int8)}, "more than 4 bits"),
    "a target of 9 bits": (CASES["intx rows"], {"target_dtype": "int9"}, "its target_dtype is 'int9'"),
    "zero points of 8 bits": (
        CASES["intx rows"],
        {"zero_point": torch.full((24, 1), -9, dtype=torch.int8)},
        "zero_point is out of the range of 4 bits",
    ),
    "float8 in int8": (CASES["float8 rows"], {"qdata": torch.zeros(48, 64, dtype=torch.int8)}, "qdata is torch.int8"),
    "an element of a class": (CASES["mxfp8"], {"elem_dtype": {"_type": "PerRow"}}, "its elem_dtype is 'PerRow'"),
    "a group of 7": (CASES["mxfp8"], {"block_size": 7}, "its block_size is 7; it divides the 96"),
    "a group of a string": (CASES["nvfp4"], {"block_size": "16"}, "its block_size is '16'"),
    "NaN e8m0": (
        CASES["mxfp8"],
        {"scale": torch.full((48, 3), 255, dtype=torch.uint8).view(torch.float8_e8m0fnu)},
        "scale holds NaN",
    ),
    "swizzled or not": (CASES["mxfp8"], {"is_swizzled_scales": 1}, "its is_swizzled_scales is 1"),
    "swizzled scales too short": (CASES["mxfp8"], {"is_swizzled_scales": True}, r"scale has shape \(48, 3\); swizzled"),
    "fp6 codes of 8 bits": (CASES["mxfp6 e2m3"], {"qdata": torch.full((48, 96), 64, dtype=torch.uint8)}, "6 bits"),
    "a scale for each row": (CASES["nvfp4 swizzled"], {"per_tensor_scale": torch.ones(144)}, "per_tensor_scale has"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_tensors_are_refused(tmp_path, what):
    make, changes, message = DAMAGE[what]
    tensor = make()
    tensors, metadata = stored(tensor)
    described = json.loads(metadata["x.weight"])
    for key, value in changes.items():
        if isinstance(value, Tensor):
            tensors[f"x._weight_{key}"] = value
        elif f"x._weight_{key}" in tensors:
            del tensors[f"x._weight_{key}"]
        else:
            described["_data"][key] = value
    metadata["x.weight"] = json.dumps(described)
    with pytest.raises(CheckpointError, match=message) as raised:
        load(tmp_path, tensors, metadata, tuple(tensor.shape))
    assert "model.safetensors: x: " in str(raised.value)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        (None, "metadata does not say which class"),
        ("{", "in no JSON"),
        ("[" * 9000, "in no JSON"),
        (" " * (1 << 17), "metadata does not say which class"),
        ("[1]", r"describes its weight as \[1\]"),
        ('{"_type": "Int8Tensor", "_data": 5}', "describes its weight as"),
        ('{"_type": "Int8Tensor"}', "scale has shape"),
        ('{"_type": "CutlassSemiSparseTensor", "_data": {}}', "torchao's 'CutlassSemiSparseTensor': no class that is"),
        ('{"_data": {}}', "torchao's 'None': no class"),
    ],
)
def test_damaged_metadata_is_refused(tmp_path, described, message):
    tensors, metadata = stored(int8())
    del metadata["x.weight"]
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, tensors, metadata if described is None else metadata | {"x.weight": described}, (48, 64))


def test_plain_weights_are_left(tmp_path):
    tensors, metadata = flatten_tensor_state_dict({"x.weight": torch.randn(4, 8)})
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    store = open_store(tmp_path)
    assert TorchAO({"quant_method": "torchao"}, store).linear(LayerTensors(store, "x"), (4, 8)) is None


@pytest.mark.parametrize("shards", ["1GB", "40KB"])
@pytest.mark.parametrize("name", ["int4", "float8"])
def test_models_that_transformers_saved(tmp_path, name, shards):
    model = save_model(tmp_path, name, shards)
    assert len(list((tmp_path / "quantized").glob("*.safetensors"))) > (shards == "40KB")
    loaded = qcompile.load(tmp_path / "quantized", progress=False)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected, found = model(ids).logits, loaded(ids).logits
    linears = [m for m in loaded.modules() if isinstance(m, QuantizedLinear)]
    assert len(linears) == 14
    assert sqnr(expected, found) >= rewrite_sqnr_floor(40, 96)


def test_quantized_embeddings_are_decoded(tmp_path):
    model = nn.ModuleDict({"embed": nn.Embedding(48, 64), "head": nn.Linear(64, 48, bias=False)}).requires_grad_(False)
    quantize_(model, CONFIGS["int4"](), filter_fn=lambda module, name: name in ("embed", "head"))
    tensors, metadata = flatten_tensor_state_dict(model.state_dict())
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    with torch.device("meta"):
        empty = nn.ModuleDict({"embed": nn.Embedding(48, 64), "head": nn.Linear(64, 48, bias=False)})
    loaded = qcompile.load(tmp_path, model=empty, dtype=torch.float32, progress=False)
    assert torch.equal(loaded["embed"].weight, model["embed"].weight.dequantize())
    assert torch.equal(loaded["head"].weight, model["head"].weight.dequantize())
    assert isinstance(loaded["head"], QuantizedLinear)
