"""The tokenizer of a GGUF file."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

from qcompile.checkpoint.gguf_file import open_gguf
from qcompile.errors import CheckpointError


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a GGUF file, built by transformers.

    Takes several seconds: transformers looks at every token by itself.

    Raises:
        CheckpointError: as `open_gguf`; also a tokenizer that transformers cannot build, or gguf or transformers is not
            installed.
    """
    rule = open_gguf(path).metadata.get("tokenizer.ggml.pre")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import gguf  # noqa: F401  (transformers reads the file with it)
        import transformers
    except ImportError as error:
        raise CheckpointError(f'the tokenizer of {path} needs {error.name}: `pip install "qcompile[demo]"`') from None
    try:
        # transformers draws its own progress bars here, which would break the caller's.
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # of any kind, also panics of the tokenizers library, which are no Exception
        raise CheckpointError(f"transformers cannot build the tokenizer of {path}: {error}") from None
    if rule == "smollm":
        _split_digits(tokenizer)
    return tokenizer


def _split_digits(tokenizer: Any) -> None:
    """The file's rule "smollm" splits numbers into digits before anything else; transformers does not read the rule."""
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
