"""Parameters whose memory was freed after packing: linears go on through the packed form, every other read raises."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompile import compat
from qcompile.errors import WeightReleasedError
from qcompile.linear_spec import LinearSpec
from qcompile.packed import PackedWeight
from qcompile.scheme import Scheme

_METADATA = frozenset(
    [
        "size",
        "dim",
        "stride",
        "is_floating_point",
        "is_complex",
        "numel",
        "nelement",
        "element_size",
        "untyped_storage",
        "requires_grad_",
        "_is_view",
        "storage_offset",
        "is_contiguous",
        "is_inference",
        "is_conj",
        "is_neg",
        "has_names",
        "ndimension",
        "get_device",
        "data_ptr",
        "__hash__",
        "__len__",
        "_has_symbolic_sizes_strides",
        "_is_zerotensor",
        "is_pinned",
        "is_shared",
    ]
)
_CONTENT_ATTRIBUTES = frozenset(("data", "T", "mT", "H", "mH", "real", "imag"))


class ReleasedParameter(nn.Parameter):
    """Keeps shape, strides, dtype and device of the parameter that it was, with no storage behind them."""

    qcompile_packed: PackedWeight
    qcompile_tensors: list[Tensor]
    qcompile_input_scale: Tensor | None
    qcompile_spec: str
    qcompile_spec_bias: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight, bias = (*args, *[None] * (3 - len(args)))[:3]
            bias = kwargs.get("bias", bias)
            spec = weight.qcompile_spec_bias if bias is not None else weight.qcompile_spec
            return torch.ops.qcompile.linear.default(
                x,
                weight.qcompile_tensors,
                bias,
                weight.qcompile_input_scale,
                None,
                [],
                spec,
            )
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
            allowed = name not in _CONTENT_ATTRIBUTES
        else:
            allowed = name in _METADATA
        if allowed:
            with compat.without_torch_function():
                return func(*args, **kwargs)
        raise WeightReleasedError(
            f"{name}: this weight was packed by qcompile and its original freed, as options={{'free_weights': True}} "
            "asked; leave that option out to keep the originals, or use qcompile.quantize_, which keeps a state_dict"
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ReleasedParameter({tuple(self.shape)}, {self.dtype})"


def release(parameter: nn.Parameter, packed: PackedWeight, scheme: Scheme, input_scale: Tensor | None) -> None:
    """Free a linear's weight [N, K], leaving a `ReleasedParameter` in its place.

    Shape and strides stay, so what Dynamo guards on stays true for graphs compiled before.
    """
    if isinstance(parameter, ReleasedParameter):
        return
    n, k = packed.shape
    spec = LinearSpec(in_features=k, out_features=n, scheme=scheme, layout=packed.layout)
    hollow = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device=parameter.device)
    hollow.untyped_storage().resize_(0)
    parameter.requires_grad_(False)
    parameter.data = hollow
    attributes = {
        "packed": packed,
        "tensors": list(packed.tensors),
        "input_scale": input_scale,
        "spec": spec.encode(),
        "spec_bias": spec.with_epilogue("bias").encode(),
    }
    for name, value in attributes.items():
        setattr(parameter, f"qcompile_{name}", value)
    parameter.__class__ = ReleasedParameter
