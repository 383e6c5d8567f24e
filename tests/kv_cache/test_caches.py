"""Static quantized caches: the plain module, and transformers' layers against its own unquantized ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.caches import KVCache
from qcompile.checkpoint.kv_scales import KVScales
from qcompile.errors import ConfigError, DeviceError
from qcompile.kv_cache import dequantize, parse_kv_cache, quantize

transformers = pytest.importorskip("transformers")
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from qcompile.integrations import caches
from qcompile.integrations.caches import QuantizedSlidingLayer, QuantizedStaticLayer, use_kv_cache

SCHEMES: tuple[Any, ...] = (
    "fp8",
    "fp8_e5m2",
    "int8",
    "int4",
    {"format": "fp8", "scales": "head"},
    {"format": "fp8", "scales": "token"},
)
SCALES = KVScales(k_scale=torch.tensor([0.01, 0.02]), v_scale=torch.tensor([0.03, 0.01]))
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}


def rounded(x: Tensor, kv_cache: Any, given: Tensor | None = None) -> Tensor:
    """What a token's keys become, alone."""
    scheme = parse_kv_cache(kv_cache)
    assert scheme is not None
    scale = None if scheme.dynamic else torch.ones(()) if given is None else given
    codes, scale = quantize(x, scheme, scale)
    return dequantize(codes, scale, scheme, x.shape[-1]).to(x.dtype)


def llama(**more: Any) -> nn.Module:
    config = transformers.LlamaConfig(**SHAPE, **more)
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize("kv_cache", SCHEMES, ids=str)
def test_module_keeps_what_is_stored_at_its_positions(kv_cache: Any) -> None:
    cache = KVCache(2, 3, 10, 16, kv_cache, dtype=torch.float32, value_dim=8)
    key, value = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 4, 8)
    position = torch.tensor([1, 2, 5, 9])
    keys, values = cache.update(position, key, value)
    assert torch.equal(keys[:, :, position], rounded(key, kv_cache))
    assert torch.equal(values[:, :, position], rounded(value, kv_cache))
    others = torch.tensor([0, 3, 4, 6, 7, 8])
    assert not keys[:, :, others].any()
    cache.reset()
    assert not any(t.any() for t in cache.update(torch.tensor([0]), torch.zeros(2, 3, 1, 16), torch.zeros(2, 3, 1, 8)))
    assert not cache.state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bytes_are_half_or_a_quarter_and_the_scales(dtype: torch.dtype) -> None:
    batch, heads, length, size = 2, 4, 64, 32
    whole = 2 * batch * heads * length * size * dtype.itemsize
    scales = 2 * batch * heads * length * 4
    expected = {"fp8": whole // 2 + 2 * 4, "int8": whole // 2 + scales, "int4": whole // 4 + scales}
    for kv_cache, count in expected.items():
        layer = QuantizedStaticLayer(length, parse_kv_cache(kv_cache))
        assert layer.nbytes == 0
        layer.update(*(torch.randn(batch, heads, 3, size, dtype=dtype) for _ in "kv"))
        assert layer.nbytes == count
        tensors = [t for t in vars(layer).values() if isinstance(t, Tensor) and t.numel() > 1]
        assert sum(t.nbytes for t in tensors) <= count


@pytest.mark.parametrize("kv_cache", SCHEMES, ids=str)
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("steps", [(4, 1, 1, 1, 1, 1), (9, 1, 2, 1), (1, 1, 6, 3), (6, 1), (3, 3, 1), (12,)], ids=str)
def test_layers_are_those_of_transformers_with_rounded_numbers(
    steps: tuple[int, ...], window: int | None, kv_cache: Any
) -> None:
    scheme = parse_kv_cache(kv_cache)
    if window is None:
        layer, plain = QuantizedStaticLayer(16, scheme), StaticLayer(16)
    else:
        layer, plain = QuantizedSlidingLayer(16, window, scheme), StaticSlidingWindowLayer(16, window)
    for again in range(2):
        for count in steps:
            key, value = torch.randn(2, 2, count, 16), torch.randn(2, 2, count, 8)
            assert layer.get_mask_sizes(count) == plain.get_mask_sizes(count)
            found = layer.update(key, value)
            expected = plain.update(rounded(key, kv_cache), rounded(value, kv_cache))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            assert int(layer.get_seq_length()) == int(plain.get_seq_length())
        if again == 0:
            order = torch.tensor([1, 1])
            layer.reorder_cache(order)
            assert torch.equal(layer.keys[0], layer.keys[1])
            layer.reset()
            plain.reset()
    assert layer.is_compileable


def test_addresses_stay() -> None:
    layer = QuantizedSlidingLayer(16, 4, parse_kv_cache("int8"))
    layer.update(torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 8))
    before = [t.data_ptr() for t in (layer.keys, layer.values, layer.key_scale, layer.value_scale)]
    for count in (5, 1, 3):
        layer.update(torch.randn(1, 1, count, 8), torch.randn(1, 1, count, 8))
    layer.reset()
    assert [t.data_ptr() for t in (layer.keys, layer.values, layer.key_scale, layer.value_scale)] == before


@pytest.mark.parametrize(
    ("kv_cache", "factor"),
    [("fp8", 1.0), ("fp8_e5m2", 448 / 57344), ({"format": "int8", "scales": "head"}, 448 / 127.5)],
    ids=str,
)
def test_scales_of_a_checkpoint_are_taken(kv_cache: Any, factor: float) -> None:
    layer = QuantizedStaticLayer(8, parse_kv_cache(kv_cache), SCALES)
    key, value = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16)
    keys, values = layer.update(key, value)
    assert torch.equal(layer.key_scale, SCALES.k_scale * factor)
    per_head = {"format": layer.kv_cache.format.name, "scales": "head"}
    assert torch.equal(keys[:, :, :3], rounded(key, per_head, SCALES.k_scale * factor))
    assert torch.equal(values[:, :, :3], rounded(value, per_head, SCALES.v_scale * factor))


def test_scales_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="kv_cache int8 with scales per tensor: nothing gives the scales; calibrate"):
        KVCache(1, 2, 8, 16, {"format": "int8", "scales": "tensor"})
    with pytest.raises(ConfigError, match=r"has shape \(3,\); it is \[\] or \[2\]"):
        KVCache(1, 2, 8, 16, "fp8", k_scale=torch.ones(3))
    with pytest.raises(ConfigError, match="needs a format"):
        KVCache(1, 2, 8, 16, None)


def test_products_that_a_device_has_not_are_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    given, states = {"format": "fp8", "compute": "fp8"}, [torch.randn(1, 2, 3, 16) for _ in "kv"]
    makers: tuple[Callable[[], object], ...] = (
        lambda: KVCache(1, 2, 8, 16, given),
        lambda: QuantizedStaticLayer(8, parse_kv_cache(given)).update(*states),
        lambda: qcompile.TransformersCache(llama(), given, max_cache_len=8),
        lambda: qcompile.TransformersPagedCache(llama(), given, batch=1, max_length=8),
    )
    for make in makers:
        with pytest.raises(
            DeviceError, match=r'"compute": "fp8", and cpu does not multiply FP8 .* leave "compute" out'
        ):
            make()
    monkeypatch.setattr("qcompile.attention._without_fp8", lambda _: None)
    for make in makers:
        make()


def test_a_graph_that_allocates_knows_what_a_device_multiplies() -> None:
    given, states = parse_kv_cache({"format": "fp8", "compute": "fp8"}), [torch.randn(1, 2, 3, 16) for _ in "kv"]
    compiled = torch.compile(lambda k, v: QuantizedStaticLayer(8, given).update(k, v), backend="eager")
    with pytest.raises(DeviceError, match=r"a cache on cpu: .* cpu does not multiply FP8"):
        compiled(*states)


def test_a_model_cache_takes_the_modules_scales() -> None:
    model = llama()
    model.model.layers[1].self_attn.kv_scales = SCALES
    cache = qcompile.TransformersCache(model, "fp8", max_cache_len=8)
    model(torch.randint(0, 128, (1, 3)), past_key_values=cache)
    assert cache.layers[0].key_scale.shape == ()
    assert torch.equal(cache.layers[1].key_scale, SCALES.k_scale)
    assert cache.nbytes == sum(layer.nbytes for layer in cache.layers)


@pytest.mark.parametrize("per_head", [True, False])
def test_calibration_leaves_the_greatest_magnitude(per_head: bool) -> None:
    model, seen = llama(), []
    model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda m, i, o: seen.append(o))
    batches = [torch.randint(0, 128, (2, 5)), {"input_ids": torch.randint(0, 128, (1, 7))}]
    qcompile.calibrate_kv_cache(model, batches, per_head=per_head)
    top = torch.cat([o.unflatten(-1, (2, -1)).flatten(0, 1) for o in seen]).abs().amax((0, 2))
    scales = model.model.layers[0].self_attn.kv_scales
    assert torch.equal(scales.v_scale, (top if per_head else top.amax()) / 448)
    kv_cache = {"format": "int8", "scales": "head" if per_head else "tensor"}
    cache = qcompile.TransformersCache(model, {"kv_cache": kv_cache}, max_cache_len=8)
    model(torch.randint(0, 128, (1, 3)), past_key_values=cache)
    assert cache.layers[0].value_scale.shape == ((2,) if per_head else ())
    with pytest.raises(ConfigError, match="at least one batch"):
        qcompile.calibrate_kv_cache(model, [])


def test_a_configuration_without_a_kv_cache_is_refused() -> None:
    with pytest.raises(ConfigError, match="the configuration has no kv_cache"):
        qcompile.TransformersCache(llama(), {"rules": [{"layers": "*", "scheme": "int4"}]}, max_cache_len=8)


def test_generate_takes_the_cache_both_ways() -> None:
    model = llama()
    ids = torch.randint(1, 128, (2, 6))
    options = GREEDY | {"max_new_tokens": 8, "attention_mask": torch.ones_like(ids)}
    given = qcompile.TransformersCache(model, "int8", max_cache_len=16)
    first = model.generate(ids, past_key_values=given, **options)
    use_kv_cache(model, "int8")
    found = model.generate(ids, cache_implementation="static", return_dict_in_generate=True, **options)
    assert isinstance(found.past_key_values, qcompile.TransformersCache)
    assert torch.equal(found.sequences, first)


def test_beams_reorder_the_cache() -> None:
    model = llama()
    ids = torch.randint(1, 128, (2, 6))
    options = GREEDY | {"max_new_tokens": 6, "num_beams": 3, "attention_mask": torch.ones_like(ids)}
    exact = model.generate(ids, **options)
    cache = qcompile.TransformersCache(model, "int8", max_cache_len=16)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), exact)


def test_layers_of_other_kinds_stay() -> None:
    config = transformers.Gemma3TextConfig(
        **SHAPE, head_dim=16, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    cache = qcompile.TransformersCache(model, "fp8", max_cache_len=16)
    assert [type(layer) for layer in cache.layers] == [QuantizedSlidingLayer, QuantizedStaticLayer]
    assert cache.is_sliding == [True, False]


def test_both_kinds_of_arguments_that_transformers_gives_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds, window = ["sliding_attention", "full_attention"], {"sliding_window": 4}
    for given in (window, [window, {}]):
        monkeypatch.setattr(caches, "get_layer_types_and_kwargs", lambda config, given=given: (kinds, given))
        full = qcompile.TransformersCache(llama(), "fp8", max_cache_len=8).layers
        assert [type(layer) for layer in full] == [QuantizedSlidingLayer, QuantizedStaticLayer]
        assert full[0].max_cache_len == 4
