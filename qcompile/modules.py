"""The module that stands where a linear was once its weight is packed, and what it shares with stacks of experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qcompile.layouts import LAYOUTS, Layout, choose_layout, to_layout
from qcompile.linear_spec import LinearSpec
from qcompile.ops import OP
from qcompile.packed import LOGICAL, PackedLinear, PackedWeight
from qcompile.reference import dequantize
from qcompile.scheme import ActivationScheme, Scheme

_Linear = TypeVar("_Linear", bound="QuantizedLinear")


class PackedModule(nn.Module):
    """A module whose buffers are a packed weight, laid out as the kernels of their device want it.

    `state_dict` holds the weight in the portable layout of `PackedWeight` whatever the device, and moving the module to
    another kind of device lays it out anew. Conversions of dtype reach the bias alone: codes and scales have dtypes of
    their own.

    Args:
        weight: in any layout.
        scheme: whose `weight` is that of the packed weight.
        dtype: of the original weight.
        bias: of any shape, or None.
        beside: buffers beside the weight, or None for each that is not there; only devices move them.
    """

    codes: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: PackedWeight,
        scheme: Scheme,
        dtype: torch.dtype,
        bias: Tensor | None,
        beside: Mapping[str, Tensor | None],
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.dtype = dtype
        self.packed_shape = weight.shape
        self.beside = tuple(beside)
        for name, tensor in beside.items():
            self.register_buffer(name, tensor)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        for name in weight.scheme.fields:
            self.register_buffer(name, None)
        self._store(to_layout(weight, self._layout_on(weight.device.type)))

    def _layout_on(self, device_type: str) -> Layout:
        return choose_layout(self.scheme, self.packed_shape, device_type)

    def _store(self, weight: PackedWeight) -> None:
        for name, tensor in zip(self.scheme.weight.fields, weight.tensors, strict=True):
            setattr(self, name, tensor)
        self.layout = weight.layout
        self.spec = self._spec().encode()
        self.fields = tuple(self.scheme.weight.fields)

    def _spec(self) -> LinearSpec:
        """The product's spec in the layout that is stored now: subclasses say."""
        raise NotImplementedError

    def change_activation(self, activation: ActivationScheme) -> None:
        """Quantize inputs, with dynamic scales, in this way from now on; the weight stays.

        Raises:
            ConfigError: an activation that does not go with the weight's scheme.
        """
        weight = self.packed()
        self.scheme = replace(self.scheme, activation=activation)
        self._store(to_layout(weight, self._layout_on(weight.device.type)))

    def packed(self) -> PackedWeight:
        """The weight as it is stored now."""
        return PackedWeight.from_tensors(self._tensors(), self.packed_shape, self.scheme.weight, self.layout)

    def _tensors(self) -> list[Tensor]:
        # Compilers guard all that is looked at here, at every call: so nothing but the buffers, and no unpacking, for
        # which they guard all keys. They trace it anew for each module: so few steps. Before Python 3.12 they trace a
        # comprehension as a function of its own, which takes twice the time of the loop.
        buffers: dict[str, Any] = self._buffers
        tensors = []
        for name in self.fields:
            tensors.append(buffers[name])
        return tensors

    def logical(self) -> PackedWeight:
        """The weight in the portable layout."""
        return to_layout(self.packed(), LAYOUTS[LOGICAL])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        target = fn(torch.empty(0, dtype=torch.uint8, device=self.codes.device)).device
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        if self.bias is not None:
            self.bias = nn.Parameter(fn(self.bias), requires_grad=False)
        for name in self.beside:
            if (given := getattr(self, name)) is not None:
                setattr(self, name, given.to(target))
        if target == self.codes.device:
            return self
        if target.type == self.codes.device.type or target.type == "meta":
            self._store(self.packed().to(target))
        else:
            self._store(to_layout(self.logical().to(target), self._layout_on(target.type)))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        logical = self.logical()
        for name, tensor in zip(self.scheme.weight.fields, logical.tensors, strict=True):
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        logical = self.logical()
        names = self.scheme.weight.fields
        device = self.codes.device
        given = {name: state_dict.get(prefix + name) for name in names}
        if all(isinstance(t, Tensor) for t in given.values()):
            tensors = [tensor.to(device) for tensor in given.values() if tensor is not None]
            loaded = PackedWeight.from_tensors(tensors, logical.shape, logical.scheme)
            loaded.check(prefix.rstrip("."))
            self._store(to_layout(loaded, LAYOUTS[self.layout]))
            # The parent's loader then finds the tensors it would copy in the layout that they are stored in.
            state_dict = {**state_dict, **dict(zip((prefix + n for n in names), self.packed().tensors, strict=True))}
        super()._load_from_state_dict(state_dict, prefix, *args)


class QuantizedLinear(PackedModule):
    """`y = x @ weight.T + bias` over a packed weight; an ordinary module with buffers.

    It runs eagerly, compiles with any backend, exports, deep-copies and moves between devices (`PackedModule`).

    Args:
        weight: packed [N, K], in any layout.
        scheme: the layer's scheme, whose group fits K.
        bias: [N] or None.
        input_scale: float32 scalar, exactly for static activations.
        dtype: of the original weight, and of `weight`.
        pre_quant_scale: [K], by which the input is multiplied before all else (AWQ's scales that were not folded).
    """

    input_scale: Tensor | None
    pre_quant_scale: Tensor | None

    def __init__(
        self,
        weight: PackedWeight,
        scheme: Scheme,
        bias: Tensor | None = None,
        input_scale: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        pre_quant_scale: Tensor | None = None,
    ) -> None:
        beside = {"input_scale": input_scale, "pre_quant_scale": pre_quant_scale}
        super().__init__(weight, scheme, dtype, bias, beside)

    @classmethod
    def of(cls: type[_Linear], linear: PackedLinear, **more: Any) -> _Linear:
        """The module of a linear, on its weight's device; `more` is for subclasses."""
        return cls(**vars(linear), **more)

    def linear(self) -> PackedLinear:
        """What it is made of, with the weight in the portable layout."""
        return PackedLinear(
            weight=self.logical(),
            scheme=self.scheme,
            bias=self.bias,
            input_scale=self.input_scale,
            dtype=self.dtype,
            pre_quant_scale=self.pre_quant_scale,
        )

    @property
    def out_features(self) -> int:
        """N."""
        return self.packed_shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.packed_shape[1]

    def _spec(self) -> LinearSpec:
        spec = LinearSpec(
            in_features=self.in_features, out_features=self.out_features, scheme=self.scheme, layout=self.layout
        )
        return spec if self.bias is None else spec.with_epilogue("bias")

    @property
    def weight(self) -> Tensor:
        """The weight [N, K] that the codes stand for, decoded anew at each reading.

        For code that looks at a linear's weight, or multiplies with it itself; `forward` does not decode it so.
        """
        return dequantize(self.logical(), self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        beside = self._buffers  # guarded less than attributes, see `_tensors`
        return OP(x, self._tensors(), self.bias, beside["input_scale"], beside["pre_quant_scale"], [], self.spec)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme}, bias={self.bias is not None}"
