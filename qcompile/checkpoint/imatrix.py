"""llama.cpp's importance matrices: files that say how large the inputs of each linear are, on some text.

What `llama-imatrix` writes as GGUF since July 2025 (https://github.com/ggml-org/llama.cpp/pull/9400): for each weight
`NAME.in_sum2`, sums of squares of its inputs, float32 [matrices, K], and `NAME.counts`, float32 [matrices, 1], of how
many tokens; a mixture's experts are several matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompile.checkpoint.gguf_file import GgufFile, GgufTensor, open_gguf
from qcompile.checkpoint.saving.gguf import ARCHITECTURES, Names
from qcompile.errors import CheckpointError, shown

_SUMS, _COUNTS, _FLOAT32 = ".in_sum2", ".counts", 0


def read_imatrix(path: Path, config: Any, layers: Iterable[str]) -> dict[str, Tensor]:
    """Mean squares of the inputs of those layers that a file knows, float32 [K] each.

    Args:
        config: transformers' of the model, which says what a file calls its layers.
        layers: names of linears.

    Raises:
        CheckpointError: a model of another architecture; a file that is no importance matrix, lacks one tensor of a
            pair, or holds numbers that are no sums of squares; or that knows none of the layers.
    """
    architecture = getattr(config, "model_type", None)
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: importance matrices are read for models of {', '.join(ARCHITECTURES)}, not "
            f"{shown(architecture)}; calibrate with a text instead"
        )
    file = open_gguf(path)
    kind = file.metadata.get("general.type")
    if kind != "imatrix":
        raise CheckpointError(
            f"{path}: is a GGUF file of {shown(kind)}, not an importance matrix; llama-imatrix makes one"
        )
    names, found = Names(config), {}
    for layer in layers:
        stored = names.in_file(f"{layer}.weight")
        if stored == "output.weight" and stored + _SUMS not in file.tensors:
            stored = "token_embd.weight"  # so llama.cpp calls a head that shares the embedding
        if stored + _SUMS in file.tensors:
            found[layer] = _mean(file, stored)
    if not found:
        raise CheckpointError(f"{path}: knows none of the model's layers; it is of another model")
    return found


def _mean(file: GgufFile, name: str) -> Tensor:
    """Of one matrix."""
    sums, counts = (_numbers(file, name + end) for end in (_SUMS, _COUNTS))
    if sums.shape[0] != 1 or counts.shape != (1, 1):
        raise CheckpointError(
            f"{file.path}: {name} has sums {tuple(sums.shape)} and counts {tuple(counts.shape)}; of a linear both are "
            "of one matrix"
        )
    mean = sums[0] / counts[0] if counts.item() else torch.ones_like(sums[0])  # never reached: nothing is known
    if not bool((torch.isfinite(mean) & (mean >= 0)).all()):
        raise CheckpointError(f"{file.path}: {name} has sums of squares that are negative or not finite; make it again")
    return mean


def _numbers(file: GgufFile, name: str) -> Tensor:
    tensor: GgufTensor | None = file.tensors.get(name)
    if tensor is None or tensor.kind != _FLOAT32:
        raise CheckpointError(f"{file.path}: {name} is missing or not float32; make the file again with llama-imatrix")
    rows = math.prod(tensor.shape[:-1])
    return tensor.rows(0, rows).view(torch.float32).reshape(rows, tensor.shape[-1])
