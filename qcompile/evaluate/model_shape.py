"""The shapes of a model, read without its weights, and what they take of memory under a scheme."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qcompile.calibrate.statistics import observed
from qcompile.checkpoint.store import check_exists
from qcompile.errors import CheckpointError
from qcompile.experts import expert_modules, projection_shapes
from qcompile.kv_cache import parse_kv_cache
from qcompile.linears import linear_modules, shape_of
from qcompile.packed import stored_bytes
from qcompile.presets import PRESETS
from qcompile.scheme import Scheme

Shape = tuple[int, int]

_HEAD = "lm_head"


@dataclass(frozen=True)
class ModelShape:
    """What decides a model's memory and time.

    Attributes:
        name: for people.
        linears: (N, K) of the linears that are quantized, but the output head, and how many there are.
        products: the same as a compiled model runs them: those that read one tensor are one.
        head: (N, K) of the output head, if there is one.
        experts: (E, N, K) of stacks of experts' weights, and how many there are.
        active: experts that a token goes through.
        tied: whether the embedding is the head's weight.
        other: bytes of all else, the embedding included, in 16 bits.
        layers: with a KV cache.
        heads: of queries.
        kv_heads, head_dim: of the cache.
        width: of the residual stream.
        vocabulary: of the output.
    """

    name: str
    linears: Mapping[Shape, int]
    products: Mapping[Shape, int]
    head: Shape | None
    experts: Mapping[tuple[int, int, int], int]
    active: int
    tied: bool
    other: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    width: int
    vocabulary: int

    @property
    def weights(self) -> int:
        """Parameters of linears, head and experts."""
        head = math.prod(self.head) if self.head else 0
        linears = sum(math.prod(shape) * count for shape, count in self.linears.items())
        return head + linears + sum(math.prod(shape) * count for shape, count in self.experts.items())


def read_model(path: Path) -> ModelShape:
    """The shapes of a model; no weights are read.

    Args:
        path: a folder with a `config.json`, such a file, or a GGUF file.

    Raises:
        CheckpointError: not there, naming files like it, or nothing that transformers makes a language model of.
    """
    from qcompile.checkpoint.loader import skeleton_of

    check_exists(path)
    model = skeleton_of(path).to("meta")
    text = model.config.get_text_config()  # type: ignore[operator,union-attr]
    needed = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
    if missing := [key for key in needed if not isinstance(getattr(text, key, None), int)]:
        raise CheckpointError(f"{path}: it has no {', '.join(missing)}; recommend knows decoders with attention")
    modules = linear_modules(model)
    shapes = {name: shape_of(module) for name, module in modules.items()}
    head = shapes.pop(_HEAD, None)
    stacks: Counter[tuple[int, int, int]] = Counter()
    for module in expert_modules(model).values():
        stacks.update(projection_shapes(module).values())
    quantized = {id(module.weight) for module in modules.values()}
    of_experts = {id(p) for module in expert_modules(model).values() for p in module.parameters()}
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    quantized -= {id(embedding.weight)}  # which stays, where the head shares it
    rest = sum(p.numel() for p in model.parameters() if id(p) not in quantized | of_experts)
    heads = text.num_attention_heads
    return ModelShape(
        name=path.stem if path.suffix == ".gguf" else (path.parent if path.is_file() else path).absolute().name,
        linears=Counter(shapes.values()),
        products=_products(model, {name: modules[name] for name in shapes}),
        head=head,
        experts=stacks,
        active=getattr(text, "num_experts_per_tok", None) or 1,
        tied=bool(getattr(text, "tie_word_embeddings", False)),
        other=2 * rest,
        layers=text.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        width=text.hidden_size,
        vocabulary=text.vocab_size,
    )


def _products(model: nn.Module, modules: Mapping[str, nn.Module]) -> Mapping[Shape, int]:
    """Shapes of the products that are left when linears that read one tensor are merged, and how many there are.

    They are seen while the model runs without data; where it cannot, each linear counts alone.
    """
    inputs: list[tuple[torch.Tensor, list[str]]] = []

    def observe(name: str, x: torch.Tensor) -> None:
        own = next((names for tensor, names in inputs if tensor is x), None)
        if own is None:
            inputs.append((x, [name]))
        else:
            own.append(name)

    try:
        with torch.no_grad(), observed(modules, observe):
            model(input_ids=torch.zeros((1, 4), dtype=torch.int64, device="meta"), use_cache=True)
    except Exception:  # whatever a model's code does with values that are not there
        return Counter(shape_of(module) for module in modules.values())
    return Counter((sum(shape_of(modules[n])[0] for n in names), shape_of(modules[names[0]])[1]) for _, names in inputs)


def head_scheme(mix: Sequence[tuple[Scheme, float]]) -> Scheme:
    """What `qcompile quantize` makes of the output head: 8 bits, where other layers have fewer."""
    if len(mix) == 1 and mix[0][0].weight.format.bits >= 8:
        return mix[0][0]
    return PRESETS["int8_weight_only"]


def weight_bytes(model: ModelShape, mix: Sequence[tuple[Scheme, float]]) -> int:
    """Packed weights of linears, experts and head, and all else in 16 bits.

    Args:
        mix: schemes with their shares of each shape's layers; empty for an unquantized model.

    Raises:
        LayerError: a scheme that does not go with a shape.
    """
    if not mix:
        shared = math.prod(model.head) if model.tied and model.head else 0
        return model.other + 2 * (model.weights - shared)
    total = float(model.other)
    layers = [*model.linears.items(), *(((n, k), e * count) for (e, n, k), count in model.experts.items())]
    for shape, count in layers:
        total += sum(share * count * packed_bytes(scheme, shape) for scheme, share in mix)
    if model.head is not None:
        total += packed_bytes(head_scheme(mix), model.head)
    return round(total)


def packed_bytes(scheme: Scheme, shape: Shape) -> int:
    """Of one linear's packed weight."""
    return stored_bytes(scheme.weight.fit(f"{shape[0]}x{shape[1]}", shape), shape)


def cache_bytes(model: ModelShape, kind: str, batch: int, context: int) -> int:
    """Keys and values of all layers, with their scales."""
    vectors = 2 * model.layers * model.kv_heads * batch * context
    scheme = parse_kv_cache(kind)
    assert scheme is not None
    stored = scheme.format.width(model.head_dim) * scheme.format.dtype.itemsize
    return vectors * (stored + (4 if scheme.dynamic else 0))


def activation_bytes(model: ModelShape, batch: int, context: int) -> int:
    """What is alive at most while a context is read at once: the residual stream twice, the widest product's input and
    output in 16 bits, and float32 logits of the last token of each sequence."""
    widest = max((n + k for n, k in model.products), default=0)
    return batch * context * 2 * (2 * model.width + widest) + 4 * batch * model.vocabulary
