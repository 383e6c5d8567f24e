"""What a checkpoint holds, read from the headers of its files and from one layer of each kind."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qcompile.checkpoint.kv_scales import is_kv_scale, kv_scales
from qcompile.checkpoint.loader import skeleton
from qcompile.checkpoint.method import LayerTensors
from qcompile.checkpoint.source import Source, open_checkpoint, quantization_config
from qcompile.checkpoint.store import TensorStore, read_json
from qcompile.errors import CheckpointError, LayerError
from qcompile.experts import expert_modules, projection_shapes
from qcompile.linears import linear_modules, shape_of
from qcompile.packed import PackedLinear
from qcompile.scheme import Scheme

_EXPERT_PARTS = {"gate_proj": ("gate_proj", "w1"), "up_proj": ("up_proj", "w3"), "down_proj": ("down_proj", "w2")}

_LONGEST = 200
"""Characters of a text among the metadata that is shown."""


@dataclass(frozen=True)
class LayerRow:
    """A linear layer.

    Attributes:
        name: of its module.
        shape: (N, K).
        format: of the codes; None if the layer is not quantized.
        bits: of a code, or of a weight that is not quantized.
        scales: what shares one, as in "group 128".
        scale_dtype: None if there are none; of scales of scales after a slash.
        zero_points: "zero points", "offsets", or None for a symmetric weight.
        act_order: whether the columns are sorted by group.
        activations: how inputs are quantized, None where they are not.
        nbytes: of its tensors in the files.
    """

    name: str
    shape: tuple[int, int]
    format: str | None
    bits: int
    scales: str | None
    scale_dtype: str | None
    zero_points: str | None
    act_order: bool
    activations: str | None
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """A checkpoint.

    Attributes:
        path: of the file or folder.
        model: what transformers calls its type; None if nothing says.
        method: how it is quantized; None if it is not.
        layers: linear layers, in the model's order.
        other: count and bytes of all other tensors, by dtype.
        nbytes: of all tensors.
        kv_scales: key and value scales of attention modules, by name.
        metadata: what the files say beside their tensors, numbers and short texts.
    """

    path: str
    model: str | None
    method: str | None
    layers: tuple[LayerRow, ...]
    other: dict[str, tuple[int, int]]
    nbytes: int
    kv_scales: dict[str, tuple[list[float], list[float]]]
    metadata: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def inspect(path: str | Path) -> Inspection:
    """Look at a checkpoint without loading it.

    Layers whose tensors have equal names, dtypes and shapes are read once: what the values say (whether a weight is
    symmetric, whether its columns are sorted) is taken to hold for all of them.

    Raises:
        CheckpointError: see `qcompile.load`.
    """
    path = Path(path)
    source = open_checkpoint(path)
    store = source.store
    taken: set[str] = set()
    rows = []
    known: dict[Any, Scheme | None] = {}
    for name, shape in _linears(source):
        tensors = LayerTensors(store, name)
        if not tensors.suffixes():
            continue  # tied to another
        row = _row(source, tensors, shape, known)
        taken |= {f"{name}.{suffix}" for suffix in tensors.suffixes()}
        rows.append(row)
    shared = _shared(store)
    taken |= shared
    other: dict[str, tuple[int, int]] = {}
    for name in store.names():
        if name not in taken and not is_kv_scale(name):
            kind = _kind(store, name)
            count, nbytes = other.get(kind, (0, 0))
            other[kind] = (count + 1, nbytes + _nbytes(store, name))
    scales = {
        module: (found.k_scale.flatten().tolist(), found.v_scale.flatten().tolist())
        for module, found in kv_scales(store).items()
    }
    return Inspection(
        path=str(path),
        model=getattr(source.config, "model_type", None),
        method=None if source.method is None else source.method.name,
        layers=tuple(rows),
        other=other,
        nbytes=sum(_nbytes(store, name) for name in store.names() if name not in shared),
        kv_scales=scales,
        metadata=_metadata(path, store),
    )


def _linears(source: Source) -> Iterator[tuple[str, tuple[int, int]]]:
    """The model's linear layers, those of experts that lie apart among them; none of a file without a description."""
    if source.config is None:
        return
    model: nn.Module = skeleton(source.config, torch.bfloat16)
    there = set(source.store.names())
    for name, module in linear_modules(model).items():
        yield name, shape_of(module)
    owners = {name.rpartition(".")[0] for name in there}
    for name, module in expert_modules(model).items():
        for projection, (count, n, k) in projection_shapes(module).items():
            together = projection == "gate_up_proj"
            for part in ("gate_proj", "up_proj") if together else (projection,):
                for index in range(count):
                    for known in _EXPERT_PARTS[part]:
                        full = f"{name}.{index}.{known}"
                        if full in owners:
                            yield full, (n // 2 if together else n, k)


def _row(source: Source, tensors: LayerTensors, shape: tuple[int, int], known: dict[Any, Scheme | None]) -> LayerRow:
    store, name = source.store, tensors.name
    nbytes = sum(_nbytes(store, f"{name}.{suffix}") for suffix in tensors.suffixes())
    header = tuple((s, _kind(store, f"{name}.{s}"), tensors.info(s).shape) for s in sorted(tensors.suffixes()))
    key = (shape, header)
    if key not in known:
        try:
            found = None if source.method is None else source.method.linear(tensors, shape)
        except LayerError as error:
            raise CheckpointError(f"{store.path}: {error}") from None
        known[key] = found.scheme if isinstance(found, PackedLinear) else None
    scheme = known[key]
    if scheme is None:
        bits = tensors.info("weight").dtype.itemsize * 8 if "weight" in tensors else 0
        return LayerRow(name, shape, None, bits, None, None, None, False, None, nbytes)
    weight = scheme.weight
    above = f"/{weight.super_scale.dtype}" if weight.super_scale is not None else ""
    return LayerRow(
        name=name,
        shape=shape,
        format=weight.format.name,
        bits=weight.format.bits,
        scales=str(weight.granularity),
        scale_dtype=weight.scale_dtype + above,
        zero_points=None if weight.symmetric else "offsets" if weight.offset else "zero points",
        act_order=weight.act_order,
        activations=None if scheme.activation is None else str(scheme.activation),
        nbytes=nbytes,
    )


def _kind(store: TensorStore, name: str) -> str:
    """A tensor's type in the file."""
    from qcompile.checkpoint.gguf import GgufStore
    from qcompile.checkpoint.gguf_blocks import BLOCK_TYPES

    if isinstance(store, GgufStore) and store.is_quantized(name):
        return BLOCK_TYPES[store.kind(name)].name
    return str(store.info(name).dtype).removeprefix("torch.")


def _nbytes(store: TensorStore, name: str) -> int:
    """Bytes of a tensor in the file."""
    from qcompile.checkpoint.gguf import GgufStore
    from qcompile.checkpoint.gguf_blocks import BLOCK_TYPES

    info = store.info(name)
    count = math.prod(info.shape)
    if isinstance(store, GgufStore) and store.is_quantized(name):
        kind = BLOCK_TYPES[store.kind(name)]
        return count // kind.columns * kind.nbytes
    return count * info.dtype.itemsize


def _shared(store: TensorStore) -> set[str]:
    """Names of tensors that are in the file under another name: an embedding whose codes the head has too."""
    from qcompile.checkpoint.gguf import GgufStore

    there = isinstance(store, GgufStore) and "output.weight" not in store.file.tensors
    return {"model.embed_tokens.weight"} if there and "lm_head.weight" in store.names() else set()


def _metadata(path: Path, store: TensorStore) -> dict[str, Any]:
    from qcompile.checkpoint.gguf import GgufStore

    if isinstance(store, GgufStore):
        metadata = store.file.metadata
        return {
            k: v for k, v in metadata.items() if isinstance(v, (int, float)) or (isinstance(v, str) and len(v) < 200)
        }
    described = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    config = quantization_config(path, described) if path.is_dir() else None
    plain = {k: v for k, v in (config or {}).items() if isinstance(v, (bool, int, float, str))}
    return {**{k: v for k, v in store.metadata.items() if len(v) < _LONGEST}, **plain}
