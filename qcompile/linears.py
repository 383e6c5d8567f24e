"""The linear modules of a model that quantization replaces, and what takes their place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qcompile.modules import QuantizedLinear
from qcompile.packed import PackedWeight
from qcompile.reference import quantize_weight
from qcompile.scheme import Scheme
from qcompile.torchao_tensors import read_tensor


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, GPT-2's linear, whose weight is [K, N]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that `quantize_` can replace, by qualified name; one that has several names by its first."""
    found = {n: m for n, m in model.named_modules() if n and (type(m) is nn.Linear or is_conv1d(m))}
    # Attention modules read the weight of their `out_proj` themselves.
    owned = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    return {n: m for n, m in found.items() if id(m) not in owned}


def matrix_of(module: nn.Module) -> Tensor:
    """The weight [N, K] of one of `linear_modules`; a view."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().t() if is_conv1d(module) else weight.detach()


def quantized_linear(
    name: str,
    module: nn.Module,
    scheme: Scheme | None,
    input_scale: Tensor | None,
    packed: PackedWeight | None = None,
) -> QuantizedLinear:
    """What takes the place of one of `linear_modules`.

    Args:
        name: the layer's, for errors.
        scheme: fitted to its shape; None for a weight that torchao quantized.
        input_scale: float32 scalar, exactly for static activations.
        packed: the weight as it was quantized already; None rounds it to the nearest codes.

    Raises:
        LayerError: a weight that cannot be quantized so.
    """
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    if scheme is None:
        taken = read_tensor(weight, name)
        return QuantizedLinear(taken.weight, taken.scheme, bias, taken.input_scale, weight.dtype, taken.pre_quant_scale)
    if packed is None:
        scheme.check_rounded(name)
        with torch.no_grad():
            packed = quantize_weight(matrix_of(module), scheme.weight, name)
    return QuantizedLinear(packed, scheme, bias, input_scale, weight.dtype)
