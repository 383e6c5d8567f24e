"""Files and folders from anywhere: what is damaged or hostile is an error that names it, and nothing worse."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import qcompile
from qcompile.checkpoint.method import LayerTensors, Method, method_for, register
from qcompile.checkpoint.source import open_checkpoint, quantization_config
from qcompile.checkpoint.store import INDEX, open_store, read_json
from qcompile.errors import CheckpointError, ConfigError, DeviceError, QCompileError

TENSORS = {"a.weight": torch.arange(12.0).view(3, 4), "a.bias": torch.arange(3.0), "b.weight": torch.zeros(2, 2)}
fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def container(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file whose header is anything."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def read_all(path: Path) -> dict[str, torch.Tensor]:
    store = open_store(path)
    return {name: store.read(name) for name in store.names()}


def fails(path: Path, *words: str) -> None:
    """Reading is an error of ours, and takes no memory to speak of."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as error:
            read_all(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    for word in words:
        assert word in str(error.value), str(error.value)


@contextmanager
def names(*places: Any) -> Iterator[None]:
    """Errors of ours may come, if they name one of the places; others may not."""
    text = ""
    try:
        yield
    except QCompileError as error:
        text = str(error)
    assert not text or any(str(place) in text for place in places), text


def test_a_file_and_a_folder(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for path in (tmp_path, tmp_path / "model.safetensors"):
        store = open_store(path)
        assert store.metadata == {"format": "pt"}
        assert store.info("a.weight").shape == (3, 4)
        assert all(torch.equal(store.read(name), TENSORS[name]) for name in store.names())
        with pytest.raises(CheckpointError, match="no tensor named c"):
            store.read("c")


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = {
    "empty": b"",
    "short": b"\x01\x02",
    "no header": struct.pack("<Q", 0),
    "length beyond the file": container({"a": entry()}, bytes(8), length=1 << 20),
    "length of exabytes": container({"a": entry()}, bytes(8), length=(1 << 64) - 1),
    "no JSON": container(b"{]", bytes(8)),
    "no object": container([1, 2], bytes(8)),
    "deep": container(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", bytes(8)),
    "not UTF-8": container(b'{"\xff": 1}', bytes(8)),
    "data cut short": container({"a": entry(shape=(4,), offsets=(0, 16))}, bytes(8)),
    "data left over": container({"a": entry()}, bytes(80)),
    "overlap": container({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "gap": container({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
    "backwards": container({"a": entry(offsets=(8, 0))}, bytes(8)),
    "negative offset": container({"a": entry(offsets=(-8, 0))}, bytes(8)),
    "offsets that overflow": container({"a": entry(offsets=(0, 1 << 64))}, bytes(8)),
    "size that is not the shape's": container({"a": entry(shape=(3,))}, bytes(8)),
    "negative extent": container({"a": entry(shape=(-2,))}, bytes(8)),
    "huge extent": container({"a": entry(shape=(1 << 62,))}, bytes(8)),
    "extents whose product overflows": container({"a": entry(shape=(1 << 33, 1 << 33, 2))}, bytes(8)),
    "unknown dtype": container({"a": entry(dtype="F33")}, bytes(8)),
    "dtype of another size": container({"a": entry(dtype="F16")}, bytes(8)),
    "dtype that is none": container({"a": entry(dtype=7)}, bytes(8)),
    "metadata of numbers": container({"__metadata__": {"a": 1}, "a": entry()}, bytes(8)),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_damaged_headers(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    fails(path, str(path), "damaged")


def test_names_twice_in_a_header_are_one_tensor_or_an_error(tmp_path):
    text = b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2)
    path = tmp_path / "model.safetensors"
    path.write_bytes(container(text, bytes(8)))
    with names(path):
        assert list(read_all(path)) == ["a"]


@fuzz
@given(data=st.data())
def test_damage_anywhere(tmp_path, data):
    """Some bytes are others, or the end is missing: an error of ours, or tensors as the header describes them."""
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with names(path):
        store = open_store(path)
        for name in store.names():
            info, tensor = store.info(name), store.read(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (info.dtype, info.shape)


def test_files_that_change_after_they_were_opened(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    store = open_store(path)
    os.replace(path, tmp_path / "moved")
    assert torch.equal(store.read("b.weight"), TENSORS["b.weight"])


def shards(folder: Path, **changes: Any) -> Path:
    """Two shards and their index, in which `changes` are made."""
    folder.mkdir(exist_ok=True)
    where = {name: f"model-0000{1 + (name[0] == 'b')}-of-00002.safetensors" for name in TENSORS}
    for file in set(where.values()):
        save_file({n: TENSORS[n] for n, f in where.items() if f == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": where | changes}))
    return folder


def test_shards(tmp_path):
    found = read_all(shards(tmp_path))
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


OUTSIDE = [
    "../x.safetensors",
    "/etc/passwd",
    "a/b.safetensors",
    "..",
    ".",
    "",
    "a\\b",
    "a\0b",
    "a\nb",
    7,
    None,
    ["x"],
    {},
]


@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
def test_shards_that_lie_elsewhere(tmp_path, name):
    save_file(TENSORS, tmp_path / "x.safetensors")
    shards(tmp_path / "model", **{"b.weight": name})
    fails(tmp_path / "model", INDEX, "b.weight", "same folder")


def test_missing_and_wrong_shards(tmp_path):
    folder = shards(tmp_path, c=f"model-{3:05}-of-00002.safetensors")
    fails(folder, "model-00003-of-00002.safetensors", "missing")
    folder = shards(tmp_path, **{"b.weight": "model-00001-of-00002.safetensors"})
    fails(folder, INDEX, "b.weight")
    folder = shards(tmp_path, c="model-00001-of-00002.safetensors")
    fails(folder, INDEX, "c is in model-00001")
    folder = shards(tmp_path)
    save_file(TENSORS, folder / "model-00002-of-00002.safetensors")
    fails(folder, "also in model-00001-of-00002.safetensors")


def test_a_shard_that_is_a_folder_or_a_link_to_nowhere(tmp_path):
    folder = shards(tmp_path)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to(tmp_path / "nowhere")
    fails(folder, shard.name, "missing")
    shard.unlink()
    shard.symlink_to(shard)
    fails(folder, shard.name, "missing")
    shard.unlink()
    shard.mkdir()
    fails(folder, shard.name, "missing")


def test_links_to_files_elsewhere_are_followed(tmp_path):
    """The cache of the Hugging Face hub is made of them."""
    (tmp_path / "blobs").mkdir()
    save_file(TENSORS, tmp_path / "blobs" / "1234")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blobs" / "1234")
    assert read_all(tmp_path / "snapshot").keys() == TENSORS.keys()


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)


@fuzz
@given(index=anything, weight_map=st.booleans())
@example(index={"a": "x" * 100_000}, weight_map=True)
@example(index={"a": "model-00001-of-00002.safetensors\0"}, weight_map=True)
def test_any_index(tmp_path, index, weight_map):
    folder = shards(tmp_path / "model")
    (folder / INDEX).write_text(json.dumps({"weight_map": index} if weight_map else index))
    with pytest.raises(CheckpointError, match=r"model.*safetensors"):
        read_all(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff\xfe", b"[" * 100_000, b'{"weight_map": {}}'])
def test_an_index_that_is_none(tmp_path, content):
    folder = shards(tmp_path)
    (folder / INDEX).write_bytes(content)
    fails(folder, INDEX)


def test_a_description_that_is_too_long(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=r"config\.json: 1099511627776 bytes are too many"):
        read_json(path)


class Attack:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "x.ckpt"])
def test_pickles_are_refused_unread(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Attack()))
    fails(tmp_path, name, "pickle", "safe_serialization=True")
    with zipfile.ZipFile(tmp_path / "model.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Attack()))
    fails(tmp_path, "model.safetensors", "damaged")


def test_nothing_there(tmp_path):
    fails(tmp_path / "no", "no", "no such file")
    fails(tmp_path, str(tmp_path), "no *.safetensors")


@fuzz
@given(config=anything)
def test_any_quantization_config(tmp_path, config):
    """A method, or an error of ours."""
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    for described in ({"quantization_config": config}, {"text_config": {"quantization_config": config}}, {"x": config}):
        (tmp_path / "config.json").write_text(json.dumps(described))
        with names(tmp_path, "quantization_config"):
            open_checkpoint(tmp_path)


@settings(fuzz, max_examples=30)
@given(config=anything, name=st.sampled_from(["model_type", "text_config", "num_hidden_layers", "architectures"]))
def test_any_config(tmp_path, config, name):
    """Never anything but a model's configuration or an error of ours."""
    pytest.importorskip("transformers")
    save_file(TENSORS, tmp_path / "model.safetensors")
    described = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, name: config}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with names(tmp_path):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "head_dim"])
@pytest.mark.parametrize("value", [10**9, 10**15, -1])
def test_descriptions_of_larger_models_than_the_files_hold(tmp_path, key, value):
    pytest.importorskip("transformers")
    save_file(TENSORS, tmp_path / "model.safetensors")
    small = {
        "vocab_size": 8,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 8,
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | small | {key: value}))
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{key}|makes no model"):
        qcompile.load(tmp_path)


def test_where_quantization_configs_lie(tmp_path):
    gptq = {"bits": 4, "group_size": 128}
    (tmp_path / "quantize_config.json").write_text(json.dumps(gptq))
    assert quantization_config(tmp_path, {}) == {"quant_method": "gptq", **gptq}
    assert quantization_config(tmp_path, {"quantization_config": {"quant_method": "awq"}}) == {"quant_method": "awq"}
    old = quantization_config(tmp_path, {"compression_config": {"format": "pack-quantized"}})
    assert old == {"quant_method": "compressed-tensors", "format": "pack-quantized"}


def test_layers_say_what_is_wrong_with_their_tensors(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    layer = LayerTensors(open_store(path), "a")
    assert set(layer.suffixes()) == {"weight", "bias"}
    assert torch.equal(layer.take("bias", torch.float32, shape=(3,)), TENSORS["a.bias"])
    for arguments, word in [
        (("scales",), "scales is missing"),
        (("weight", torch.int32), "expected torch.int32"),
    ]:
        with pytest.raises(CheckpointError, match=word) as error:
            layer.take(*arguments)
        assert str(path) in str(error.value)
        assert ": a: " in str(error.value)
    for shape in ((4, 3), (3,), (None, 5), (3, 4, 1)):
        with pytest.raises(CheckpointError, match="weight has shape"):
            layer.take("weight", shape=shape)


class Strict(Method):
    name = "test-strict"
    activation_dtypes = (torch.bfloat16,)
    min_capability = 90

    def __init__(self, config, store):
        pass

    def linear(self, tensors, shape):
        return None


@pytest.fixture
def strict(tmp_path):
    from qcompile.checkpoint.method import METHODS

    register(Strict)
    save_file({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "test-strict"}}))
    yield tmp_path
    del METHODS["test-strict"]


def test_methods_of_ones_own(strict, monkeypatch):
    for name in ("test-strict", "gptq"):
        with pytest.raises(ValueError, match=f"'{name}' is registered already"):
            register(type("Second", (Strict,), {"name": name}))
    assert isinstance(method_for({"quant_method": "test-strict"}, open_store(strict)), Strict)
    with pytest.raises(CheckpointError, match=r"'test-strikt' is unknown \(.*register\); did you mean test-strict"):
        method_for({"quant_method": "test-strikt"}, open_store(strict))
    qcompile.load(strict, model=nn.Linear(2, 2), dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"test-strict .*float32; pass dtype=, one of torch\.bfloat16"):
        qcompile.load(strict, model=nn.Linear(2, 2), dtype=torch.float32)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    with pytest.raises(ConfigError, match=r"compute capability 9\.0, and cuda has 8\.9"):
        qcompile.load(strict, model=nn.Linear(2, 2), device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("package", ["transformers", "accelerate"])
@pytest.mark.parametrize("name", ["config.json", "model.gguf"])
def test_what_is_not_installed_is_named(tmp_path, monkeypatch, package, name):
    (tmp_path / name).write_text('{"model_type": "llama"}')
    save_file(TENSORS, tmp_path / "model.safetensors")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda what: None if what == package else found(what))
    with pytest.raises(CheckpointError, match=rf"needs {package}: `pip install \"qcompile\[hf\]\"`"):
        qcompile.load(tmp_path if name == "config.json" else tmp_path / name)


def test_a_gpu_that_is_not_there_is_told_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="sees no GPU here; choose cpu"):
        qcompile.load(tmp_path / "nothing", device="cuda")
