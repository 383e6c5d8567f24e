"""How far quantized layers are from their originals, and how uneven the channels of their weights and inputs are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qcompile.experts import GroupedLinear, QuantizedExperts, expert_modules
from qcompile.linears import linear_modules, matrix_of
from qcompile.modules import PackedModule, QuantizedLinear
from qcompile.progress import track
from qcompile.reference import dequantize

Original = Callable[[str], "Tensor | None"]
"""A layer's weight [N, K] (of experts [experts, N, K]) by the layer's name; None where there is none like it."""

_AT_ONCE = 1 << 18
"""Elements that are held in float64 at a time."""


@dataclass(frozen=True)
class Distance:
    """Between a matrix and what took its place.

    Attributes:
        sqnr_db: signal to quantization noise, 10 log10(sum a^2 / sum (a - b)^2); infinite where they are equal.
        cosine: the mean over rows of the cosine between both rows; rows of zeros alone are like each other and like
            nothing else.
    """

    sqnr_db: float
    cosine: float


def distance(original: Tensor, other: Tensor) -> Distance:
    """Compare two tensors [..., columns] of one shape, in float64, on the device of the first.

    Raises:
        ValueError: shapes differ, or there is no element.
    """
    if original.shape != other.shape or original.numel() == 0:
        raise ValueError(f"cannot compare {list(original.shape)} with {list(other.shape)}")
    original, other = original.reshape(-1, original.shape[-1]), other.reshape(-1, other.shape[-1])
    rows = max(1, _AT_ONCE // original.shape[1])
    signal = noise = cosines = 0.0
    for a, b in zip(original.split(rows), other.split(rows), strict=True):
        a, b = a.double(), b.to(a.device).double()
        signal += a.square().sum().item()
        noise += (a - b).square().sum().item()
        lengths = (a.square().sum(1) * b.square().sum(1)).sqrt()
        cosine = (a * b).sum(1) / torch.where(lengths == 0, 1.0, lengths)
        cosines += torch.where((a == 0).all(1) & (b == 0).all(1), 1.0, cosine).sum().item()
    return Distance(_decibels(signal, noise), cosines / len(original))


def _decibels(signal: float, noise: float) -> float:
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if 0 < signal / noise < math.inf else -math.inf


@dataclass(frozen=True)
class Samples:
    """Some of the calls of a layer.

    Attributes:
        inputs: tensors [R, ...], a row for each token: of a linear its input, of experts also which of them are hit.
        output: [R, N].
    """

    inputs: tuple[Tensor, ...]
    output: Tensor


@dataclass(frozen=True)
class LayerError:
    """A quantized layer beside the original.

    Attributes:
        name, scheme: of the layer. Experts of a mixture have a row for each projection and one for their whole.
        shape: (N, K), of stacked experts (experts, N, K); None for experts as a whole.
        bits: of memory for each element of the weight, with scales.
        weight: the decoded weight beside the original; None where the original is not at hand.
        output: what the layer makes of the original's inputs, beside what the original made of them; None where no
            token reached it.
    """

    name: str
    scheme: str
    shape: tuple[int, ...] | None
    bits: float | None
    weight: Distance | None = None
    output: Distance | None = None


@dataclass(frozen=True)
class Channels:
    """The largest magnitude in each input channel, of a layer's inputs or of its weight.

    Attributes:
        names: of the layers; several where they read the same inputs.
        maxima: float32 [K], on the CPU.
        rms: root of the mean square of all elements.
    """

    names: tuple[str, ...]
    maxima: Tensor
    rms: float

    @property
    def peak(self) -> float:
        """The largest magnitude over the root mean square."""
        return self.maxima.max().item() / self.rms if self.rms > 0 else 0.0

    def binned(self, bins: int) -> list[float]:
        """Maxima over the root mean square: of neighbouring channels the largest, so that there are at most `bins`."""
        scaled = self.maxima / self.rms if self.rms > 0 else self.maxima
        return [part.max().item() for part in scaled.tensor_split(min(bins, len(scaled)))]


def measured_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that quantization concerns, quantized or not: linears, and experts as a whole."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, (QuantizedLinear, QuantizedExperts))}
    return found | linear_modules(model) | expert_modules(model)


def module_weights(model: nn.Module) -> Original:
    """The weights of a model in memory, which is not quantized."""
    linears, experts = linear_modules(model), expert_modules(model)

    def read(name: str) -> Tensor | None:
        if name in linears:
            return matrix_of(linears[name])
        parent, _, projection = name.rpartition(".")
        if parent in experts and isinstance(found := getattr(experts[parent], projection, None), Tensor):
            return found.detach().transpose(1, 2) if experts[parent].is_transposed else found.detach()
        return None

    return read


def decoded_weight(module: PackedModule) -> Tensor:
    """float32 [N, K], of experts [experts, N, K]: what a quantized layer multiplies its input by."""
    if isinstance(module, GroupedLinear):
        weight, scale = module.weight.float(), module.pre_quant_scale
        return weight if scale is None else weight * scale[:, None]
    assert isinstance(module, QuantizedLinear)
    weight, scale = dequantize(module.logical()), module.pre_quant_scale
    return weight if scale is None else weight * scale


def weight_error(module: PackedModule, original: Tensor | None) -> Distance | None:
    """A quantized layer's weight beside the original; None where that is of another shape, or not there."""
    if original is None or module.codes.is_meta:
        return None
    decoded = decoded_weight(module)
    return distance(original.to(decoded.device), decoded) if original.shape == decoded.shape else None


def output_error(module: nn.Module, samples: Samples | None) -> Distance | None:
    """What a layer makes of the original's inputs, beside what the original made of them; None without samples."""
    if samples is None or len(samples.output) == 0:
        return None
    device = next(tensor for tensor in (*module.parameters(), *module.buffers())).device
    return distance(samples.output.to(device), module(*(tensor.to(device) for tensor in samples.inputs)))


def shape_of(module: PackedModule) -> tuple[int, ...]:
    """(N, K), of stacked experts (experts, N, K)."""
    assert isinstance(module, (QuantizedLinear, GroupedLinear))
    shape = (module.out_features, module.in_features)
    return (module.experts, *shape) if isinstance(module, GroupedLinear) else shape


def average_bits(model: nn.Module) -> float | None:
    """Of memory for each element of the quantized weights, with scales; None where there are none."""
    modules = [module for module in model.modules() if isinstance(module, PackedModule)]
    count = sum(math.prod(shape_of(module)) for module in modules)
    return 8 * sum(module.packed().nbytes for module in modules) / count if count else None


@torch.no_grad()
def layer_errors(
    model: nn.Module, original: Original, samples: Mapping[str, Samples], progress: bool = True
) -> list[LayerError]:
    """Every quantized layer of a model beside the original, in the model's order.

    Args:
        model: quantized by `qcompile.quantize_`, or loaded.
        original: the weights before.
        samples: of the original's layers, such as `Recording.samples`.
        progress: show a progress bar on a terminal.
    """
    kinds = (QuantizedLinear, GroupedLinear, QuantizedExperts)
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    found = []
    for name, module in track(modules, "comparing layers", progress):
        output = output_error(module, samples.get(name))
        if isinstance(module, PackedModule):
            shape = shape_of(module)
            bits = 8 * module.packed().nbytes / math.prod(shape)
            weight = weight_error(module, original(name))
            found.append(LayerError(name, str(module.scheme), shape, bits, weight, output))
        elif output is not None:
            found.append(LayerError(name, "experts as a whole", None, None, None, output))
    return found


def weight_channels(model: nn.Module) -> tuple[Channels, ...]:
    """Of the weights of all linears, quantized or not."""
    found = []
    for name, module in measured_layers(model).items():
        if isinstance(module, QuantizedLinear):
            weight = decoded_weight(module)
        elif isinstance(getattr(module, "weight", None), Tensor):
            weight = matrix_of(module).float()
        else:
            continue
        rms = weight.square().mean(dtype=torch.float64).sqrt().item()
        found.append(Channels((name,), weight.abs().amax(0).float().cpu(), rms))
    return tuple(found)
