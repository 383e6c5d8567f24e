"""Layers that compressed-tensors packs, against what it unpacks; old formats against fixtures of version 0.12."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from qcompile.checkpoint.compressed_tensors import CompressedTensors
from qcompile.errors import CheckpointError
from qcompile.scheme import Granularity
from tests.checkpoint.integer_files import write_llama
from tests.checkpoint.layer_files import check_model, decoded, load_layer
from tests.tolerance import assert_within, float_bound

compressors = pytest.importorskip("compressed_tensors.compressors")
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

FIXTURES = Path(__file__).parents[1] / "fixtures" / "compressed_tensors"
FP8 = torch.float8_e4m3fn


def scheme_of(weights: dict, inputs: dict | None = None) -> QuantizationScheme:
    return QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=None if inputs is None else QuantizationArgs(**inputs),
    )


def config_of(scheme: QuantizationScheme, format_name: str, **more: object) -> dict:
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=format_name)
    return json.loads(config.model_dump_json()) | more


def extents(args: QuantizationArgs, shape: tuple[int, int]) -> tuple[int, ...]:
    rows, columns = shape
    if args.strategy in ("group", "tensor_group"):
        return rows, -(-columns // args.group_size)
    if args.strategy == "block":
        return -(-rows // args.block_structure[0]), -(-columns // args.block_structure[1])
    return (rows, 1) if args.strategy == "channel" else (1,)


def compress(
    scheme: QuantizationScheme, format_name: str, shape: tuple[int, int], scale_dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Tensor], Tensor]:
    """What the library stores for a random weight, and the weight that it decodes."""
    args, count = scheme.weights, extents(scheme.weights, shape)
    power_of_two = format_name.startswith("mx")
    scale = torch.randint(-9, -3, count).float().exp2() if power_of_two else torch.rand(count) * 0.02 + 0.005
    state = {"weight": torch.randn(shape) * 0.05, "weight_scale": scale.to(scale_dtype)}
    if not args.symmetric:
        half = 1 << (args.num_bits - 1)
        state["weight_zero_point"] = torch.randint(-half, half, count, dtype=torch.int8)
    if format_name.startswith("nvfp4"):
        state["weight_global_scale"] = torch.tensor([1234.5])
        state["weight_scale"] = (scale * 1000).to(FP8).to(torch.float32)
    compressor = BaseCompressor.get_value_from_registry(format_name)
    stored = compressor.compress(state, scheme)
    if format_name.startswith("nvfp4"):  # the library's own result is bfloat16
        codes = unpack_fp4_from_uint8(stored["weight_packed"], *shape, dtype=torch.float32)
        scales = stored["weight_scale"].float()
        return stored, dequantize(codes, scales, None, args, torch.float32, stored["weight_global_scale"])
    return stored, compressor.decompress(dict(stored), scheme)["weight"]


def int_args(bits: int, **more: object) -> dict:
    return {"num_bits": bits, "type": "int", **more}


def only_text(value: object) -> str:
    return value if isinstance(value, str) else ""


FLOAT8 = {"num_bits": 8, "type": "float"}
INTEGERS = [
    {"strategy": "tensor"},
    {"strategy": "channel"},
    {"strategy": "group", "group_size": 16},
    {"strategy": "channel", "symmetric": False},
    {"strategy": "group", "group_size": 16, "symmetric": False},
]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("args", INTEGERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_integers_decode_as_the_library_does(tmp_path, bits, args, dtype):
    scheme = scheme_of(int_args(bits, **args))
    stored, expected = compress(scheme, "pack-quantized", (24, 80), dtype)
    found = load_layer(tmp_path, config_of(scheme, "pack-quantized"), stored, (24, 80))
    assert torch.equal(decoded(found).to(dtype), expected)
    assert found.scheme.weight.symmetric == scheme.weights.symmetric
    assert found.scheme.activation is None


@given(bits=st.integers(2, 8), rows=st.integers(9, 40), columns=st.integers(1, 100), symmetric=st.booleans())
def test_packed_integers_of_any_shape(tmp_path_factory, bits, rows, columns, symmetric):
    """The library fails on its own zero points of less than 9 rows."""
    scheme = scheme_of(int_args(bits, strategy="channel", symmetric=symmetric))
    stored, expected = compress(scheme, "pack-quantized", (rows, columns))
    config = config_of(scheme, "pack-quantized")
    found = load_layer(tmp_path_factory.mktemp("layer"), config, stored, (rows, columns))
    assert torch.equal(decoded(found), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("args", INTEGERS, ids=str)
@pytest.mark.parametrize("format_name", ["int-quantized", "naive-quantized"])
def test_integers_in_bytes_decode_as_the_library_does(tmp_path, bits, args, format_name):
    scheme = scheme_of(int_args(bits, **args))
    stored, expected = compress(scheme, format_name, (24, 80))
    found = load_layer(tmp_path, config_of(scheme, format_name), stored, (24, 80))
    assert torch.equal(decoded(found), expected)
    assert found.weight.scheme.format.bits == bits


@pytest.mark.parametrize(
    "args",
    [
        {"strategy": "tensor"},
        {"strategy": "channel"},
        {"strategy": "group", "group_size": 16},
        {"strategy": "block", "block_structure": [128, 128]},
    ],
    ids=str,
)
@pytest.mark.parametrize("format_name", ["float-quantized", "naive-quantized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_decodes_as_the_library_does(tmp_path, args, format_name, dtype):
    """Also with tiles that do not fit: 300 rows and 160 columns."""
    shape = (300, 160)
    scheme = scheme_of({**FLOAT8, **args})
    stored, expected = compress(scheme, format_name, shape, dtype)
    found = load_layer(tmp_path, config_of(scheme, format_name), stored, shape)
    assert torch.equal(decoded(found).to(dtype), expected)


MX = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}


@pytest.mark.parametrize(
    ("format_name", "bits"), [("mxfp4-pack-quantized", 4), ("mxfp6-pack-quantized", 6), ("mxfp8-quantized", 8)]
)
def test_mx_formats_decode_as_the_library_does(tmp_path, format_name, bits):
    scheme = scheme_of({"num_bits": bits, "type": "float", **MX})
    stored, expected = compress(scheme, format_name, (24, 96))
    assert stored["weight_scale"].dtype == torch.uint8
    found = load_layer(tmp_path, config_of(scheme, format_name), stored, (24, 96))
    assert torch.equal(decoded(found).to(expected.dtype), expected)
    assert found.scheme.weight.granularity == Granularity.group(32)


def nvfp4() -> QuantizationScheme:
    return scheme_of({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16})


def test_nvfp4_decodes_within_its_rounding(tmp_path):
    """The library divides scales by the global one, qcompile multiplies by its inverse: 3 roundings at most in each."""
    stored, expected = compress(nvfp4(), "nvfp4-pack-quantized", (24, 96))
    found = load_layer(tmp_path, config_of(nvfp4(), "nvfp4-pack-quantized"), stored, (24, 96))
    assert expected.dtype == torch.float32
    assert_within(decoded(found), expected, float_bound(expected, 3, torch.float32))


OLD = json.loads((FIXTURES / "old.json").read_text())
OLD_TENSORS = load_file(FIXTURES / "old.safetensors")


def old_layer(name: str) -> tuple[dict[str, Tensor], Tensor]:
    tensors = {key.removeprefix(name + "."): t for key, t in OLD_TENSORS.items() if key.startswith(name + ".")}
    return tensors, tensors.pop("expected")


@pytest.mark.parametrize("name", OLD["config_groups"])
def test_layers_of_version_0_12(tmp_path, name):
    """Words with gaps, activation order, 2:4 and bitmask sparsity, Marlin's order."""
    tensors, expected = old_layer(name)
    config = {"quant_method": "compressed-tensors", **OLD}
    found = load_layer(tmp_path, config, tensors, tuple(expected.shape), name)
    if name in ("sparse24", "bitmask"):
        assert found.dtype == torch.bfloat16
        assert torch.equal(found.float(), expected)
    else:
        assert torch.equal(decoded(found), expected)
        assert found.scheme.weight.act_order == name.startswith("g_idx")
        assert found.scheme.weight.sparsity == ("2:4" if name.startswith("marlin") else None)


STATIC = {**FLOAT8, "strategy": "tensor"}
KINDS = {
    "self_attn": (scheme_of(int_args(4, strategy="group", group_size=32)), "pack-quantized"),
    "gate_proj": (scheme_of(STATIC, STATIC), "float-quantized"),
    "up_proj": (scheme_of({"num_bits": 4, "type": "float", **MX}), "mxfp4-pack-quantized"),
}


def write_model(folder: Path, kinds: dict[str, tuple[QuantizationScheme, str]], format_name: str) -> nn.Module:
    """A Llama whose layers with these parts in their names have these schemes."""

    def pack(name: str, shape: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
        for part, (scheme, stored_as) in kinds.items():
            if part in name:
                stored, weight = compress(scheme, stored_as, shape)
                inputs = {"input_scale": torch.tensor([0.01])} if scheme.input_activations else {}
                return stored | inputs, weight.float()
        return {}, torch.empty(0)

    given = {
        part: {**json.loads(scheme.model_dump_json()), "targets": [f"re:.*{part}"], "format": stored_as}
        for part, (scheme, stored_as) in kinds.items()
    }
    config = groups(*given.values(), format=format_name, quantization_status="compressed", ignore=["lm_head"])
    return write_llama(folder, config, pack)


@pytest.mark.filterwarnings("ignore:You passed")
@pytest.mark.parametrize("part", KINDS)
def test_models_are_those_that_transformers_loads(tmp_path, part):
    scheme, format_name = KINDS[part]
    write_model(tmp_path, {"self_attn": (scheme, format_name)}, format_name)
    settings = CompressedTensorsConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=settings)
    check_model(tmp_path, loaded.eval())


def test_a_model_of_three_formats(tmp_path):
    """transformers does not load it."""
    check_model(tmp_path, write_model(tmp_path, KINDS, "mixed-precision"))


# ---------------------------------------------------------------------------------------------------------------------
# Configurations


def fp8_layer(**more: Tensor) -> dict[str, Tensor]:
    return {"weight": torch.zeros(8, 32).to(FP8), "weight_scale": torch.ones(8, 1), **more}


def groups(*given: dict, **more: object) -> dict:
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {f"group_{i}": group for i, group in enumerate(given)},
        **more,
    }


CHANNEL = {**FLOAT8, "strategy": "channel"}
TOKEN = {**FLOAT8, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (None, None),
        (TOKEN, "fp8_e4m3 dynamic per token"),
        ({**FLOAT8, "strategy": "tensor", "dynamic": True}, "fp8_e4m3 dynamic per tensor"),
        ({**FLOAT8, "strategy": "tensor"}, "fp8_e4m3 static per tensor"),
        ({"num_bits": 8, "strategy": "tensor"}, "int8 static per tensor"),
        ({"num_bits": 8, "strategy": "token", "dynamic": True}, "int8 dynamic per token"),
    ],
    ids=str,
)
def test_inputs(tmp_path, inputs, expected):
    config = groups({"targets": ["Linear"], "weights": CHANNEL, "input_activations": inputs})
    found = load_layer(tmp_path, config, fp8_layer(input_scale=torch.tensor([0.5])), (8, 32))
    decoded(found)
    assert found.scheme.activation is None if expected is None else str(found.scheme.activation) == expected
    if found.input_scale is not None:
        assert found.input_scale.shape == ()
        assert found.input_scale == 0.5


def test_inputs_of_mxfp8_and_tiles(tmp_path):
    tiles = {**FLOAT8, "strategy": "block", "block_structure": "128x128"}
    inputs = {**FLOAT8, "strategy": "group", "group_size": 128, "dynamic": True}
    layer = fp8_layer(weight_scale=torch.ones(1, 1))
    found = load_layer(
        tmp_path, groups({"targets": ["Linear"], "weights": tiles, "input_activations": inputs}), layer, (8, 32)
    )
    assert str(found.scheme.activation) == "fp8_e4m3 dynamic per group 128"
    mx = {**FLOAT8, **MX}
    layer = fp8_layer(weight_scale=torch.full((8, 1), 127, dtype=torch.uint8))
    config = groups({"targets": ["Linear"], "weights": mx, "input_activations": {**mx, "dynamic": True}})
    found = load_layer(tmp_path, config, layer, (8, 32))
    assert found.scheme.activation.scale_dtype == "float8_e8m0fnu"
    assert found.scheme.activation.granularity == Granularity.group(32)


@pytest.mark.parametrize(
    "inputs",
    [
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"},
        {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": False},
        {**FLOAT8, "strategy": "group", "group_size": 16, "dynamic": True},
    ],
    ids=str,
)
def test_inputs_that_stay_are_told_once(tmp_path, inputs):
    config = groups({"targets": ["Linear"], "weights": CHANNEL, "input_activations": inputs})
    with pytest.warns(UserWarning, match="stay in the model's dtype") as told:
        found = load_layer(tmp_path, config, fp8_layer(), (8, 32))
    assert len(told) == 1
    assert found.scheme.activation is None


def test_the_most_specific_group_decides(tmp_path):
    config = groups(
        {"targets": ["Linear"], "weights": {**FLOAT8, "strategy": "tensor"}},
        {"targets": ["re:.*up_proj$"], "weights": {**FLOAT8, "strategy": "group", "group_size": 16}},
        {"targets": ["a.up_proj"], "weights": CHANNEL},
    )
    for name, scale in (("a.up_proj", (8, 1)), ("b.up_proj", (8, 2)), ("b.down_proj", (1, 1))):
        layer = fp8_layer(weight_scale=torch.ones(scale))
        assert load_layer(tmp_path, config, layer, (8, 32), name).weight.scale.shape == scale


@pytest.mark.parametrize("preset", ["W8A8", "FP8_DYNAMIC", "fp8_block", "FP8"])
def test_a_group_may_be_named_for_a_preset(tmp_path, preset):
    count = {"W8A8": (8, 1), "FP8_DYNAMIC": (8, 1), "fp8_block": (1, 1), "FP8": (1,)}[preset]
    layer = fp8_layer(weight_scale=torch.ones(count), input_scale=torch.ones(1))
    if preset == "W8A8":
        layer["weight"] = torch.zeros(8, 32, dtype=torch.int8)
    found = load_layer(
        tmp_path, {"quant_method": "compressed-tensors", "config_groups": {preset: ["Linear"]}}, layer, (8, 32)
    )
    decoded(found)
    assert found.scheme.activation is not None


@pytest.mark.parametrize("preset", PRESET_SCHEMES)
def test_every_preset_of_the_library_is_known(preset):
    CompressedTensors({"config_groups": {preset: ["Linear"]}}, None)


def test_a_layer_with_a_plain_weight_is_not_quantized(tmp_path):
    config = groups({"targets": ["Linear"], "weights": CHANNEL}, ignore=["x"])
    assert load_layer(tmp_path, config, {"weight": torch.zeros(8, 32, dtype=torch.bfloat16)}, (8, 32)) is None


def test_zero_points_of_symmetric_weights_are_dropped(tmp_path):
    config = groups({"targets": ["Linear"], "weights": CHANNEL})
    assert load_layer(tmp_path, config, fp8_layer(weight_zero_point=torch.zeros(8, 1).to(FP8)), (8, 32)) is not None
    with pytest.raises(CheckpointError, match="symmetric"):
        load_layer(tmp_path, config, fp8_layer(weight_zero_point=torch.ones(8, 1).to(FP8)), (8, 32))


# ---------------------------------------------------------------------------------------------------------------------
# Hostile input


@pytest.mark.parametrize(
    ("broken", "match"),
    [
        ({"weight": torch.full((8, 32), float("nan")).to(FP8)}, "NaN or infinity"),
        ({"weight": torch.zeros(8, 31).to(FP8)}, r"weight has shape \(8, 31\), expected \(8, 32\)"),
        ({"weight": torch.zeros(8, 32, dtype=torch.int16)}, "weight holds integers, but the configuration says float"),
        ({"weight_scale": torch.full((8, 1), float("nan"))}, "scale that is nan"),
        ({"weight_scale": torch.full((8, 1), float("inf"))}, "scale that is inf"),
        ({"weight_scale": torch.zeros(8, 1)}, "scale that is 0"),
        ({"weight_scale": torch.full((8, 1), -1.0)}, "scale that is -1"),
        ({"weight_scale": torch.ones(4, 1)}, r"weight_scale has shape \(4, 1\)"),
        ({"weight_scale": torch.ones(8, 1, dtype=torch.float64)}, "dtype torch.float64"),
        ({"input_scale": torch.zeros(1)}, "input_scale holds a scale that is 0"),
        ({"input_scale": torch.ones(2)}, "it is one number"),
    ],
    ids=only_text,
)
def test_broken_tensors(tmp_path, broken, match):
    config = groups({"targets": ["Linear"], "weights": CHANNEL, "input_activations": {**FLOAT8, "strategy": "tensor"}})
    with pytest.raises(CheckpointError, match=match) as error:
        load_layer(tmp_path, config, fp8_layer(input_scale=torch.ones(1)) | broken, (8, 32))
    assert "model.safetensors: x" in str(error.value)


@pytest.mark.parametrize(
    ("broken", "match"),
    [
        ({"weight_packed": torch.zeros(16, 5, dtype=torch.int32)}, "take 4 words"),
        ({"weight_packed": torch.zeros(4, dtype=torch.int32)}, "has shape"),
        ({"weight_shape": torch.tensor([16, 33])}, "weight_shape says"),
        ({"weight_shape": torch.tensor([16, 32, 1])}, "weight_shape has shape"),
        ({"weight_g_idx": torch.full((32,), 2, dtype=torch.int32)}, "names groups outside"),
        ({"weight_g_idx": torch.zeros(32, dtype=torch.int32)}, "groups other than 16 columns"),
        ({"weight_g_idx": torch.zeros(31, dtype=torch.int32)}, "weight_g_idx has shape"),
        ({"weight_zero_point": torch.zeros(3, 2, dtype=torch.int32)}, "weight_zero_point has shape"),
    ],
    ids=only_text,
)
def test_broken_words(tmp_path, broken, match):
    scheme = scheme_of(int_args(4, strategy="group", group_size=16, symmetric=False))
    stored, _ = compress(scheme, "pack-quantized", (16, 32))
    with pytest.raises(CheckpointError, match=match):
        load_layer(tmp_path, config_of(scheme, "pack-quantized"), stored | broken, (16, 32))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 1e-39])
def test_broken_global_scales(tmp_path, scale):
    stored, _ = compress(nvfp4(), "nvfp4-pack-quantized", (8, 32))
    stored["weight_global_scale"] = torch.tensor([scale])
    with pytest.raises(CheckpointError, match="weight_global_scale"):
        load_layer(tmp_path, config_of(nvfp4(), "nvfp4-pack-quantized"), stored, (8, 32))


def test_nan_exponents(tmp_path):
    scheme = scheme_of({"num_bits": 4, "type": "float", **MX})
    stored, _ = compress(scheme, "mxfp4-pack-quantized", (8, 32))
    stored["weight_scale"] = torch.full_like(stored["weight_scale"], 255)
    with pytest.raises(CheckpointError, match="scale that is nan"):
        load_layer(tmp_path, config_of(scheme, "mxfp4-pack-quantized"), stored, (8, 32))


@pytest.mark.parametrize(
    ("broken", "match"),
    [
        ({"bitmask": torch.full((16, 8), 255, dtype=torch.uint8)}, "bitmask marks 1024 weights"),
        ({"bitmask": torch.zeros(16, 7, dtype=torch.uint8)}, "bitmask has shape"),
        ({"shape": torch.tensor([[16], [65]])}, "shape is not that"),
        ({"shape": torch.tensor([16])}, "it is two numbers"),
        ({"compressed": torch.zeros(3, dtype=torch.int16)}, "dtype torch.int16"),
    ],
    ids=only_text,
)
def test_broken_sparse_layers(tmp_path, broken, match):
    tensors, _ = old_layer("sparse24_fp8")
    with pytest.raises(CheckpointError, match=match):
        load_layer(tmp_path, {"quant_method": "compressed-tensors", **OLD}, tensors | broken, (16, 64), "sparse24_fp8")


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"format": "made-up"}, "readable are"),
        ({"config_groups": []}, None),
        ({"config_groups": [1]}, "object of groups"),
        ({"config_groups": {"g": 3}}, "object with targets"),
        ({"config_groups": {"W9A9": ["Linear"]}}, "preset"),
        ({"config_groups": {"g": {"targets": "Linear"}}}, "list of names"),
        ({"config_groups": {"g": {"targets": ["re:("]}}}, "no regular expression"),
        ({"config_groups": {"g": {"targets": ["re:" + "a" * 2000]}}}, "longer than"),
        ({"config_groups": {"g": {"targets": [], "format": "zip"}}}, "readable are"),
        ({"config_groups": {"g": {"targets": [], "weights": 8}}}, "object with num_bits"),
        ({"config_groups": {"g": {"targets": [], "weights": {"num_bits": 10**9}}}}, "num_bits"),
        ({"config_groups": {"g": {"targets": [], "weights": {"type": "complex"}}}}, "int or float"),
        ({"config_groups": {"g": {"targets": [], "weights": {"strategy": "group"}}}}, "positive group_size"),
        ({"config_groups": {"g": {"targets": [], "weights": {"strategy": "block"}}}}, "block_structure"),
        ({"config_groups": {"g": {"targets": [], "weights": {"dynamic": 3}}}}, "dynamic"),
        ({"ignore": "lm_head"}, "list of names"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        ({"sparsity_config": {"format": "marlin-2:4"}}, "sparsity_config"),
    ],
    ids=only_text,
)
def test_broken_configurations(config, match):
    if match is None:
        CompressedTensors(config, None)
        return
    with pytest.raises(CheckpointError, match=match):
        CompressedTensors(config, None)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (groups(), "no config group targets it"),
        (groups({"targets": ["Linear"], "weights": None}), "no weights"),
        (groups({"targets": ["Linear"], "weights": CHANNEL}, ignore=["re:x"]), "ignore"),
        (groups({"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}), "says int of 8 bits"),
        (groups({"targets": ["Linear"], "weights": {**CHANNEL, "num_bits": 4}}), "says float of 4 bits"),
        (groups({"targets": ["Linear"], "weights": {**CHANNEL, "symmetric": False}}), "zero points"),
        (
            groups({"targets": ["Linear"], "weights": CHANNEL, "input_activations": {**FLOAT8}}),
            "input_scale is missing",
        ),
    ],
    ids=only_text,
)
def test_configurations_that_contradict_the_tensors(tmp_path, config, match):
    with pytest.raises(CheckpointError, match=match):
        load_layer(tmp_path, config, fp8_layer(), (8, 32))
