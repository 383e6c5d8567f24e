"""What people get wrong: each message names the place, the reason and the way out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qcompile
from qcompile.backend import parse_options
from qcompile.errors import CalibrationError, CheckpointError, ConfigError, DeviceError, LayerError, nearest, suggestion
from qcompile.flags import override


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 16)).requires_grad_(False)


def compiled(module: nn.Module, x: torch.Tensor, **options: Any) -> torch.Tensor:
    torch._dynamo.reset()
    return torch.compile(module, backend="qcompile", options=options)(x)


def test_nearest() -> None:
    names = ["int4", "int8", "INT8", "fp8"]
    assert nearest("INT8", names) == ["int8"]  # the first of those that differ in case alone
    assert nearest("itn4", names) == ["int4"]
    assert nearest("four", names) == nearest(4, names) == []
    assert suggestion("fp9", names) == "did you mean fp8?"
    assert suggestion(None, names) == "there are int4, int8, INT8, fp8"


@pytest.mark.parametrize("options", ["int4", ["int4"], [("config", "int4")], 4])
def test_options_that_are_no_mapping(options: Any) -> None:
    with pytest.raises(ConfigError, match=r'options must be a mapping such as \{"config": "int4"\}, not '):
        parse_options(options, None)


def test_options_with_keys_that_are_no_names() -> None:
    with pytest.raises(ConfigError, match="unknown option 4; qcompile's own are config, "):
        parse_options({4: "int4"}, None)


@pytest.mark.parametrize("name", ["max_autotune", "max-autotune"])
def test_options_of_inductor_have_their_types(name: str) -> None:
    with pytest.raises(ConfigError, match=f"Inductor's option {name} must be of type bool, not 'yes'"):
        parse_options({name: "yes"}, None)
    assert parse_options({name: True, "triton.cudagraphs": False}, None).inductor[name] is True


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"preset": "int4", "kv_cache": "fp8"}, r'kv_cache does not stand beside a scheme.*\{"rules": \[\{"layers"'),
        ({"weight": {"format": "int4"}, "ignore": ["lm_head"]}, "ignore does not stand beside a scheme"),
        ("settings/int4", r"settings/int4: the file of a configuration ends in \.yaml, \.yml or \.json"),
        ("int4.toml", r"int4\.toml: the file of a configuration ends in"),
    ],
)
def test_configurations(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_options({"config": config}, None)


def test_quantize_takes_a_model_and_a_list_of_batches() -> None:
    for wrong in ("int4", nn.Linear, None):
        with pytest.raises(ConfigError, match=r"quantize_ takes a model, an nn\.Module, and then its configuration"):
            qcompile.quantize_(wrong, "int4")
    gptq, batch = {"preset": "int4", "method": "gptq"}, torch.randn(8, 64)
    for single in (batch, {"input": batch}, "text", 3):
        with pytest.raises(CalibrationError, match=r"a list of batches, not .*; put a single batch into a list"):
            qcompile.quantize_(model(), gptq, calibration=single)


def test_weights_without_values() -> None:
    with pytest.raises(LayerError, match=r"^0: its weight is on the meta device, without values; load the model first"):
        qcompile.quantize_(model().to("meta"), "int4")


def test_a_model_that_is_quantized_already() -> None:
    done = qcompile.quantize_(model(), "int4")
    with pytest.raises(ConfigError, match="there are none, or all are quantized"):
        qcompile.quantize_(done, "int8")


def test_inputs_of_another_width_or_type() -> None:
    done = qcompile.quantize_(model(), "int4")
    with pytest.raises(LayerError, match=r"of 64 input features is given 32, in \[4, 32\]"):
        done(torch.randn(4, 32))
    with pytest.raises(LayerError, match=r"is given torch\.int64; it multiplies floating-point numbers"):
        done(torch.ones(4, 64, dtype=torch.int64))


def test_a_model_without_linears() -> None:
    convolution = nn.Conv1d(8, 8, 3).requires_grad_(False)
    with pytest.warns(UserWarning, match="Conv1d has no linear layers: its configuration quantizes nothing"):
        compiled(convolution, torch.randn(1, 8, 10), config="int4")


def test_a_decorator_without_a_configuration() -> None:
    with pytest.raises(TypeError, match=r'@qcompile\.quantized\("int4"\) above Block'):

        @qcompile.quantized
        class Block(nn.Module): ...


def test_names_that_the_package_has_not() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise_'; did you mean quantize_, "):
        qcompile.quantise_  # noqa: B018


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"device": "cup"}, DeviceError, "device 'cup' is unknown; did you mean cpu"),
        ({"device": 3.5}, DeviceError, "device 3.5 is unknown; there are cpu, "),
        ({"dtype": "bfloat16"}, ConfigError, r"such as torch\.bfloat16, not 'bfloat16'"),
        ({"dtype": torch.int8}, ConfigError, r"such as torch\.bfloat16, not torch\.int8"),
        ({}, CheckpointError, r"no such file or folder; did you mean Llama-8B\.gguf\?"),
    ],
)
def test_loading(tmp_path: Path, given: dict[str, Any], kind: type[Exception], message: str) -> None:
    (tmp_path / "Llama-8B.gguf").touch()
    with pytest.raises(kind, match=message):
        qcompile.load(tmp_path / "llama-8b.guff", **given)


def test_a_model_that_was_not_downloaded(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=re.escape("downloaded first: `hf download OWNER/NAME`")):
        qcompile.load(tmp_path / "owner" / "name")


def test_a_format_that_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"format 'gtpq' cannot be written; did you mean gptq\?"):
        qcompile.save(qcompile.quantize_(model(), "int4"), tmp_path / "out", "gtpq")


@pytest.fixture
def caches() -> Callable[..., Any]:
    pytest.importorskip("transformers")
    return qcompile.TransformersCache


def test_caches(caches: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"Sequential is no model of transformers; .*KVCache"):
        caches(model(), "fp8", max_cache_len=16)
    for length in ("16", 0, True):
        with pytest.raises(ConfigError, match=f"max_cache_len is a number of tokens, not {length!r}"):
            caches(model(), "fp8", max_cache_len=length)


def test_a_folder_for_dumps_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        override(dump=tmp_path / "file"),
        pytest.raises(Exception, match=r"QCOMPILE_DUMP .*; name a folder to write to"),
    ):
        compiled(model(), torch.randn(2, 64), config="int4")
