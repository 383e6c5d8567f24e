"""The quantized layers of a model, those of experts one by one, as formats for saving see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from qcompile.errors import CheckpointError
from qcompile.experts import GroupedLinear, QuantizedExperts
from qcompile.modules import PackedModule, QuantizedLinear
from qcompile.packed import PackedWeight
from qcompile.parallel import check_whole
from qcompile.scheme import WHOLE, Scheme
from qcompile.stacks import expert


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A quantized linear.

    Attributes:
        name: of its module; an expert's goes on with the expert's number and projection.
        scheme: its own.
        shape: (N, K).
        dtype: of the original weight.
        weight: gives the packed weight in the logical layout, on the CPU.
        bias: [N] or None.
        input_scale: float32 [], exactly for static activations.
        pre_quant_scale: [K] or None.
    """

    name: str
    scheme: Scheme
    shape: tuple[int, int]
    dtype: torch.dtype
    weight: Callable[[], PackedWeight]
    bias: Tensor | None
    input_scale: Tensor | None
    pre_quant_scale: Tensor | None


def quantized_layers(model: nn.Module) -> list[Layer]:
    """All quantized linears, in the model's order.

    Raises:
        CheckpointError: there are none.
        ConfigError: the model is one process's part of another.
    """
    check_whole(model, "a file holds")
    layers: list[Layer] = []
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            layers.append(
                Layer(
                    name=name,
                    scheme=module.scheme,
                    shape=(module.out_features, module.in_features),
                    dtype=module.dtype,
                    weight=partial(_logical, module),
                    bias=module.bias,
                    input_scale=module.input_scale,
                    pre_quant_scale=module.pre_quant_scale,
                )
            )
        elif isinstance(module, QuantizedExperts):
            layers += _experts(name, module)
    if not layers:
        raise CheckpointError("the model has no quantized layers; quantize it first: qcompile.quantize_(model, config)")
    return layers


def _logical(module: PackedModule) -> PackedWeight:
    return module.logical().to("cpu")


class _LastStack:
    """The logical form of the stack of experts that was asked for last."""

    def __init__(self) -> None:
        self._module: PackedModule | None = None

    def logical(self, module: PackedModule) -> PackedWeight:
        if self._module is not module:
            self._weight, self._module = _logical(module), module
        return self._weight


def _experts(name: str, experts: QuantizedExperts) -> Iterator[Layer]:
    last = _LastStack()
    together = "gate_up_proj" in experts.first
    concatenated = bool(getattr(experts.gating.experts, "is_concatenated", True))
    for projection in (*experts.first, "down_proj"):
        module = experts.get_submodule(projection)
        assert isinstance(module, GroupedLinear)
        count = module.out_features
        rows = {projection: slice(0, count)}
        if together and projection != "down_proj":
            halves = (slice(0, count // 2), slice(count // 2, count))
            rows = dict(zip(("gate_proj", "up_proj"), halves if concatenated else _ALTERNATE, strict=True))
        for part, chosen in rows.items():
            for index in range(module.experts):
                yield _expert(f"{name}.{index}.{part}", module, index, chosen, last)


_ALTERNATE = (slice(0, None, 2), slice(1, None, 2))


def _expert(name: str, module: GroupedLinear, index: int, rows: slice, last: _LastStack) -> Layer:
    scheme = module.scheme
    if module.perm is not None:
        scheme = replace(scheme, weight=replace(scheme.weight, act_order=True))

    def own(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[index]

    def weight() -> PackedWeight:
        whole = expert(last.logical(module), index, module.out_features)
        if module.perm is not None:
            whole = replace(whole, scheme=scheme.weight, perm=module.perm[index].to("cpu"))
        return _rows(name, whole, rows)

    bias = own(module.bias)
    return Layer(
        name=name,
        scheme=scheme,
        shape=(len(range(*rows.indices(module.out_features))), module.in_features),
        dtype=module.dtype,
        weight=weight,
        bias=None if bias is None else bias[rows],
        input_scale=own(module.input_scale),
        pre_quant_scale=own(module.pre_quant_scale),
    )


def _rows(name: str, weight: PackedWeight, rows: slice) -> PackedWeight:
    """Some rows of a weight.

    Raises:
        CheckpointError: they share blocks with others.
    """
    start, stop, step = rows.indices(weight.shape[0])
    count, tall = len(range(start, stop, step)), weight.scheme.granularity.rows
    if count == weight.shape[0]:
        return weight
    blocks = rows
    if tall not in (1, WHOLE):
        if step != 1 or start % tall or (stop % tall and stop != weight.shape[0]):
            raise CheckpointError(f"{name}: its blocks of {tall} rows also hold rows of another projection")
        blocks = slice(start // tall, -(-stop // tall))

    def part(field: str, values: Tensor) -> Tensor:
        if field == "perm" or (tall == WHOLE and field in ("scale", "zero_point", "offset")):
            return values
        chosen = blocks if field in ("scale", "zero_point", "offset") else rows
        raw = values.view(torch.uint8) if values.element_size() == 1 else values
        return raw[chosen].contiguous().view(values.dtype)

    return replace(weight.map(part), shape=(count, weight.shape[1]))
