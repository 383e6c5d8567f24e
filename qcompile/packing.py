"""Packed forms of plain parameters, made once and found again by every graph that reads the same parameter."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from qcompile.errors import LayerError
from qcompile.layouts import Layout, to_layout
from qcompile.packed import PackedWeight, concatenate
from qcompile.reference import quantize_weight
from qcompile.released import ReleasedParameter
from qcompile.scheme import Scheme
from qcompile.tensors import version
from qcompile.torchao_tensors import is_torchao, read_tensor


@dataclass
class _Entry:
    others: tuple[weakref.ref[Tensor], ...]
    versions: tuple[tuple[int, int], ...]
    packed: PackedWeight


_store: WeakIdKeyDictionary = WeakIdKeyDictionary()  # first parameter -> {key: _Entry}


def packed_weight(
    parameters: tuple[Tensor, ...], transposed: bool, scheme: Scheme, layout: Layout, layer: str
) -> PackedWeight:
    """The packed rows of all parameters, one below another; packed anew only after a parameter changed.

    Args:
        parameters: floating point [N_i, K], or [K, N] if `transposed` (then one); or tensors of torchao's, [N_i, K].
        scheme: fitted to K.
        layer: named in errors.

    Raises:
        LayerError: a parameter that cannot be quantized, or came quantized in another way.
    """
    if isinstance(parameters[0], ReleasedParameter):  # by an earlier compilation; such are packed one by one
        return parameters[0].qcompile_packed
    entries: dict[Any, _Entry] = _store.setdefault(parameters[0], {})
    key = (scheme, layout.name, transposed, tuple(id(p) for p in parameters[1:]))
    versions = tuple(version(p) for p in parameters)
    found = entries.get(key)
    if (
        found is not None
        and found.versions == versions
        and all(r() is p for r, p in zip(found.others, parameters[1:], strict=True))
    ):
        return found.packed
    with torch.no_grad():
        parts = [_pack(p, transposed, scheme, layer) for p in parameters]
        packed = to_layout(parts[0] if len(parts) == 1 else concatenate(parts), layout)
    entries[key] = _Entry(tuple(weakref.ref(p) for p in parameters[1:]), versions, packed)
    return packed


def _pack(parameter: Tensor, transposed: bool, scheme: Scheme, layer: str) -> PackedWeight:
    if not is_torchao(parameter):
        return quantize_weight(parameter.t() if transposed else parameter, scheme.weight, layer)
    prepared = read_tensor(parameter, layer)
    if (prepared.scheme.weight, prepared.scheme.activation) != (scheme.weight, scheme.activation):
        raise LayerError(
            f"{layer}: torchao quantized its weight to {prepared.scheme}, but the graph is for {scheme}; call "
            "torch.compiler.reset() after quantizing a model anew"
        )
    return prepared.weight
