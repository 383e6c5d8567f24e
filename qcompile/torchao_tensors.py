"""torchao's quantized tensors (https://github.com/pytorch/ao), taken apart: from a model at hand, or from a checkpoint.

The classes' docstrings state what they hold. Swizzled scales: "1D block scaling factors layout" of
https://docs.nvidia.com/cuda/cublas/.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qcompile.bitpack import unpack_bits
from qcompile.errors import LayerError, QCompileError, shown
from qcompile.formats import get_format
from qcompile.methods import CHECKPOINT
from qcompile.packed import PackedLinear, PackedWeight
from qcompile.scheme import WHOLE, ActivationScheme, Granularity, Scheme, SuperScale, WeightScheme

_FLOATS = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
_FLOAT8 = {"float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2"}
_FLOAT6 = {"fp6_e2m3": "fp6_e2m3", "fp6_e3m2": "fp6_e3m2"}


class Parts(ABC):
    """One of torchao's tensors in pieces: named tensors, and other attributes in the JSON of its checkpoints.

    Methods raise what `error` makes where a piece is missing, or not as it must be.

    Attributes:
        name: of the layer.
        kind: the class's name.
        data: the attributes that are no tensors.
    """

    name: str
    kind: str
    data: Mapping[str, Any]

    @abstractmethod
    def __contains__(self, part: str) -> bool:
        """Whether there is such a tensor."""

    @abstractmethod
    def info(self, part: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """A tensor's dtype and shape."""

    @abstractmethod
    def take(self, part: str, *dtypes: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A tensor, which must be of this shape and one of these dtypes."""

    @abstractmethod
    def error(self, reason: str) -> QCompileError:
        """What to raise for this layer."""

    def shape(self, part: str) -> tuple[int, ...]:
        return self.info(part)[1]

    def dtype(self, part: str) -> torch.dtype:
        return self.info(part)[0]

    def reshaped(self, name: str, *dtypes: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """An attribute whose dimensions of extent 1 may be missing."""
        stored = self.shape(name)
        if [size for size in stored if size != 1] != [size for size in shape if size != 1]:
            raise self.error(f"{name} has shape {stored}, expected {shape}")
        return self.take(name, *dtypes, shape=stored).view(shape)

    def scales(self, name: str, *dtypes: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Finite numbers, a float32 or narrower."""
        values = self.reshaped(name, *(dtypes or _FLOATS), shape=shape)
        if not torch.isfinite(values.float()).all():
            raise self.error(f"{name} holds NaN or infinity; get the file again, or quantize the model again")
        return values

    def block(self, shape: tuple[int, int]) -> Granularity:
        """The blocks of `block_size`; empty or missing is the whole tensor."""
        size = self.data.get("block_size") or list(shape)
        if (
            not isinstance(size, list)
            or len(size) != 2
            or not all(type(extent) is int and 0 < extent <= whole for extent, whole in zip(size, shape, strict=True))
        ):
            raise self.error(f"its block_size is {shown(size)} in a weight of {list(shape)}")
        rows, columns = size
        if columns == shape[1] and rows in (1, shape[0]):
            return Granularity.channel() if rows == 1 else Granularity.tensor()
        return Granularity.group(columns) if rows == 1 else Granularity.block(rows, columns)

    def pre_scale(self, columns: int) -> Tensor | None:
        """`act_pre_scale`: what the input is multiplied by first, [K]."""
        if "act_pre_scale" not in self:
            return None
        whole = math.prod(self.shape("act_pre_scale")) == columns
        return self.scales("act_pre_scale", shape=(columns if whole else 1,)).expand(columns).contiguous()


def read(parts: Parts, shape: tuple[int, int]) -> PackedLinear:
    """The linear of shape (N, K) whose weight this is.

    Raises:
        QCompileError: what `parts.error` makes of parts that do not fit together, or of a class that is not known.
    """
    if parts.kind not in _READERS:
        raise parts.error(f"no class that is readable; those are {', '.join(_READERS)}")
    return _READERS[parts.kind](parts, shape)


def _loaded(
    parts: Parts,
    codes: Tensor,
    weight: WeightScheme,
    scale: Tensor,
    *,
    zero_point: Tensor | None = None,
    offset: Tensor | None = None,
    super_scale: Tensor | None = None,
    activation: ActivationScheme | None = None,
    input_scale: Tensor | None = None,
) -> PackedLinear:
    packed = PackedWeight.from_codes(
        codes,
        scale.contiguous(),
        zero_point,
        weight,
        layer=parts.name,
        offset=None if offset is None else offset.contiguous(),
        super_scale=super_scale,
    )
    return PackedLinear(
        weight=packed,
        scheme=Scheme(weight=weight, activation=activation, method=CHECKPOINT),
        input_scale=input_scale,
        pre_quant_scale=parts.pre_scale(codes.shape[1]),
    )


def _affine(
    parts: Parts,
    values: Tensor,
    bits: int,
    granularity: Granularity,
    scale: Tensor,
    zero: Tensor | None,
    activation: ActivationScheme | None = None,
    input_scale: Tensor | None = None,
) -> PackedLinear:
    """W = (q - zero) * scale, q int8 [N, K] of which `bits` are used, zero an integer or a float or None.

    A float zero becomes the offset -scale * zero in float32: exact where both are of 16 bits, and then so is
    q * scale, so that both ways to compute W round once.
    """
    bits, half = max(bits, 2), 1 << (max(bits, 2) - 1)
    if values.numel() and not -half <= int(values.amin()) <= int(values.amax()) < half:
        raise parts.error(f"qdata holds numbers of more than {bits} bits; get the file again")
    codes = (values.to(torch.int16) + half).to(torch.uint8)
    name = _FLOATS[scale.dtype]
    if zero is None or not bool(zero.any()):
        weight = WeightScheme(format=get_format(f"int{bits}"), granularity=granularity, scale_dtype=name)
        return _loaded(parts, codes, weight, scale, activation=activation, input_scale=input_scale)
    if zero.is_floating_point():
        weight = WeightScheme(format=get_format(f"int{bits}"), granularity=granularity, symmetric=False, offset=True)
        wide = scale.float()
        offset = -(wide * zero.float())
        return _loaded(parts, codes, weight, wide, offset=offset, activation=activation, input_scale=input_scale)
    shifted = zero.to(torch.int16) + half
    if not 0 <= int(shifted.amin()) <= int(shifted.amax()) < 256:
        raise parts.error(f"zero_point is out of the range of {bits} bits; get the file again")
    weight = WeightScheme(format=get_format(f"uint{bits}"), granularity=granularity, symmetric=False, scale_dtype=name)
    return _loaded(
        parts,
        codes,
        weight,
        scale,
        zero_point=shifted.to(torch.uint8).contiguous(),
        activation=activation,
        input_scale=input_scale,
    )


def _int4(parts: Parts, shape: tuple[int, int]) -> PackedLinear:
    """W = q * scale + zero_point, q two's complement, two in a byte, the even column low; scales [K / g, N]."""
    n, k = shape
    group = parts.block(shape)
    _check_even(parts, k)
    codes = _nibbles(parts.take("qdata", torch.int8, torch.uint8, shape=(n, k // 2))) ^ 8
    blocks = group.scale_shape(shape)[::-1]
    scale, offset = (parts.scales(name, shape=blocks).t() for name in ("scale", "zero_point"))
    activation = None
    if _tag(parts.data.get("activation_dtype")) in _FLOAT8:
        activation = ActivationScheme(
            format=get_format(_FLOAT8[_tag(parts.data["activation_dtype"])]), granularity=Granularity.channel()
        )
    if offset.dtype != scale.dtype:
        raise parts.error(f"scale is {scale.dtype}, zero_point {offset.dtype}; they are of one dtype")
    symmetric = not bool(offset.any())
    weight = WeightScheme(
        format=get_format("int4"),
        granularity=group,
        symmetric=symmetric,
        offset=not symmetric,
        scale_dtype=_FLOATS[scale.dtype],
    )
    return _loaded(parts, codes, weight, scale, offset=None if symmetric else offset, activation=activation)


def _int4_tiles(parts: Parts, shape: tuple[int, int]) -> PackedLinear:
    """W = (u - 8) * scale + zero in the order of PyTorch's tinygemm: word i of lane l of tile (a, b) holds

    row n = 8 a + l // 4 and, from the lowest nibble up, columns 32 (I b + i) + 2 (l % 4) + 0, 8, 16, 24, 1, 9, 17, 25,
    where each lane has I words. N is padded to 8 rows, K to 1024 columns.
    """
    n, k = shape
    group = parts.block(shape)
    stored = parts.shape("qdata")
    if len(stored) != 4 or stored[2] != 32 or stored[3] not in (1, 2, 4):
        raise parts.error(f"qdata has shape {stored}; it is [N / 8, K / (32 words), 32, words]")
    padded_n, padded_k = 8 * stored[0], 32 * stored[1] * stored[3]
    if not n <= padded_n < n + 64 or not k <= padded_k < k + 1024:
        raise parts.error(f"qdata of shape {stored} holds {padded_n} x {padded_k}, not {n} x {k} padded")
    words = parts.take("qdata", torch.int32, shape=stored)
    fields = _nibbles(words).view(stored[0], stored[1], 8, 4, stored[3], 2, 4)
    codes = fields.permute(0, 2, 1, 4, 6, 3, 5).reshape(padded_n, padded_k)[:n, :k].contiguous()
    size = group.block_of(shape)[1]
    pairs = parts.scales("scale_and_zero", shape=(-(-padded_k // size), padded_n, 2))[: -(-k // size), :n]
    weight = WeightScheme(
        format=get_format("int4"),
        granularity=group,
        symmetric=False,
        offset=True,
        scale_dtype=_FLOATS[pairs.dtype],
    )
    return _loaded(parts, codes, weight, pairs[..., 0].t(), offset=pairs[..., 1].t())


def _int4_words(parts: Parts, shape: tuple[int, int]) -> PackedLinear:
    """W = (u - zero_point) * scale, eight u in an int32 from its lowest nibble up; scales [K / g, N]. For XPUs."""
    n, k = shape
    group = parts.block(shape)
    if k % 8:
        raise parts.error(f"its {k} input features are no multiple of 8")
    if parts.dtype("zero_point") != torch.int8:
        raise parts.error("zero points in floating point are those of Ascend NPUs, whose order of codes is another")
    codes = _nibbles(parts.take("qdata", torch.int32, shape=(n, k // 8)))
    blocks = group.scale_shape(shape)[::-1]
    scale = parts.scales("scale", shape=blocks).t()
    zero = parts.reshaped("zero_point", torch.int8, shape=blocks).t().to(torch.int16) - 8
    return _affine(parts, codes.to(torch.int16) - 8, 4, group, scale, zero)


def _int8(parts: Parts, shape: tuple[int, int]) -> PackedLinear:
    """W = (q - zero_point) * scale."""
    group = parts.block(shape)
    blocks = group.scale_shape(shape)
    values = parts.take("qdata", torch.int8, shape=shape)
    scale = parts.scales("scale", shape=blocks)
    zero = parts.reshaped("zero_point", torch.int8, shape=blocks) if "zero_point" in parts else None
    activation = _activation(parts)
    input_scale = None
    if activation is not None and "act_quant_scale" in parts:
        input_scale = parts.scales("act_quant_scale", shape=()).float()
        if not float(input_scale) > 0:
            raise parts.error(f"act_quant_scale is {float(input_scale)}; it is positive; calibrate the model again")
        activation = ActivationScheme(format=activation.format, granularity=Granularity.tensor(), dynamic=False)
        if "act_quant_zero_point" in parts and bool(parts.reshaped("act_quant_zero_point", torch.int8, shape=()).any()):
            activation = input_scale = None
    return _affine(parts, values, 8, group, scale, zero, activation, input_scale)


def _intx(parts: Parts, shape: tuple[int, int]) -> PackedLinear:
    """W = (q - zero_point) * scale, q of 1 to 8 bits in an int8 each."""
    group = parts.block(shape)
    blocks = group.scale_shape(shape)
    target = _tag(parts.data.get("target_dtype"))
    if target not in [f"int{bits}" for bits in range(1, 9)]:
        raise parts.error(f"its target_dtype is {shown(target)}; it is int1 to int8")
    values = parts.take("qdata", torch.int8, shape=shape)
    scale = parts.scales("scale", shape=blocks)
    zero = parts.scales("zero_point", torch.int8, *_FLOATS, shape=blocks)
    return _affine(parts, values, int(target.removeprefix("int")), group, scale, zero)


def _float8(parts: Parts, shape: tuple[int, int]) -> PackedLinear:
    """W = q * scale."""
    group = parts.block(shape)
    fmt = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}.get(parts.dtype("qdata"))
    if fmt is None:
        raise parts.error(f"qdata is {parts.dtype('qdata')}; readable are {', '.join(_FLOAT8)}")
    codes = parts.take("qdata", parts.dtype("qdata"), shape=shape).view(torch.uint8)
    scale = parts.scales("scale", shape=group.scale_shape(shape))
    weight = WeightScheme(format=get_format(fmt), granularity=group, scale_dtype=_FLOATS[scale.dtype])
    return _loaded(parts, codes, weight, scale, activation=_activation(parts))


def _mx(parts: Parts, shape: tuple[int, int]) -> PackedLinear:
    """Microscaling formats: W = q * 2**e, a scale for each 32 columns; fp4 two in a byte, the even column low."""
    n, k = shape
    block = _group(parts, k)
    element = _tag(parts.data.get("elem_dtype"))
    if element in _FLOAT8:
        name = _FLOAT8[element]
        codes = parts.take("qdata", getattr(torch, element), shape=shape).view(torch.uint8)
    elif element in _FLOAT6:
        name = _FLOAT6[element]
        codes = parts.take("qdata", torch.uint8, shape=shape)
        if codes.numel() and int(codes.amax()) >> 6:
            raise parts.error("qdata holds codes of more than 6 bits; get the file again")
    elif element == "float4_e2m1fn_x2":
        name = "fp4_e2m1"
        _check_even(parts, k)
        codes = _nibbles(parts.take("qdata", torch.uint8, shape=(n, k // 2)))
    else:
        raise parts.error(f"its elem_dtype is {shown(element)}; readable are {', '.join((*_FLOAT8, *_FLOAT6))}, fp4")
    scale = _block_scales(parts, torch.float8_e8m0fnu, (n, k // block))
    weight = WeightScheme(format=get_format(name), granularity=Granularity.group(block), scale_dtype="float8_e8m0fnu")
    return _loaded(parts, codes, weight, scale, activation=_activation(parts))


def _nvfp4(parts: Parts, shape: tuple[int, int]) -> PackedLinear:
    """W = q * scale * per_tensor_scale (1 if missing), a scale for each 16 columns."""
    n, k = shape
    block = _group(parts, k)
    _check_even(parts, k)
    codes = _nibbles(parts.take("qdata", torch.uint8, shape=(n, k // 2)))
    scale = _block_scales(parts, torch.float8_e4m3fn, (n, k // block))
    whole = torch.ones((), device=codes.device)
    if "per_tensor_scale" in parts:
        whole = parts.scales("per_tensor_scale", torch.float32, shape=())
    weight = WeightScheme(
        format=get_format("fp4_e2m1"),
        granularity=Granularity.group(block),
        scale_dtype="float8_e4m3fn",
        super_scale=SuperScale(columns=WHOLE, dtype="float32"),
    )
    return _loaded(parts, codes, weight, scale, super_scale=whole.expand(n, 1).contiguous())


_READERS: dict[str, Callable[[Parts, tuple[int, int]], PackedLinear]] = {
    "Float8Tensor": _float8,
    "Int8Tensor": _int8,
    "Int4Tensor": _int4,
    "Int4TilePackedTo4dTensor": _int4_tiles,
    "Int4PlainInt32Tensor": _int4_words,
    "IntxUnpackedToInt8Tensor": _intx,
    "MXTensor": _mx,
    "NVFP4Tensor": _nvfp4,
}


def _nibbles(words: Tensor) -> Tensor:
    """uint8 codes along the last dimension, from the lowest nibble of each word up."""
    stream = words.contiguous().view(torch.uint8)
    return unpack_bits(stream, 4, 2 * stream.shape[-1])


def _check_even(parts: Parts, columns: int) -> None:
    if columns % 2:
        raise parts.error(f"its {columns} input features are odd, but two codes share a byte")


def _group(parts: Parts, columns: int) -> int:
    size = parts.data.get("block_size")
    if type(size) is not int or size < 1 or columns % size:
        raise parts.error(f"its block_size is {shown(size)}; it divides the {columns} input features")
    return size


def _block_scales(parts: Parts, dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
    """Scales [N, groups], which may be stored in tiles of 128 rows and 4 groups.

    In a tile (r, c) is at row r % 32, column 4 (r // 32) + c of 32 x 16 bytes; tiles follow each other row by row.
    """
    swizzled = parts.data.get("is_swizzled_scales", False)
    if not isinstance(swizzled, bool):
        raise parts.error(f"its is_swizzled_scales is {shown(swizzled)}; it is true or false")
    if swizzled:
        tiles = (-(-shape[0] // 128), -(-shape[1] // 4))
        if math.prod(parts.shape("scale")) != tiles[0] * tiles[1] * 512:
            raise parts.error(f"scale has shape {parts.shape('scale')}; swizzled, {shape} has {tiles} tiles")
        stored = parts.take("scale", dtype, shape=parts.shape("scale")).view(torch.uint8)
        rows = stored.reshape(*tiles, 32, 4, 4).permute(0, 3, 2, 1, 4)
        scale = rows.reshape(128 * tiles[0], 4 * tiles[1])[: shape[0], : shape[1]].contiguous().view(dtype)
    else:
        scale = parts.reshaped("scale", dtype, shape=shape)
    if bool(torch.isnan(scale.float()).any()):
        raise parts.error("scale holds NaN; get the file again, or quantize the model again")
    return scale


def _tag(value: Any) -> str:
    """The name of a dtype, an enum's member or a class in torchao's JSON."""
    if isinstance(value, dict):
        data = value.get("_data")
        return data if isinstance(data, str) else str(value.get("_type"))
    return value if isinstance(value, str) else ""


def _activation(parts: Parts) -> ActivationScheme | None:
    """Of `act_quant_kwargs`. What has no such scheme (asymmetric, 4-bit, clipped activations) is left unquantized."""
    kwargs = parts.data.get("act_quant_kwargs")
    if kwargs is None:
        return None
    if not isinstance(kwargs, dict) or not isinstance(kwargs.get("_data"), dict):
        raise parts.error(f"its act_quant_kwargs are {shown(kwargs)}")
    kind, data = kwargs.get("_type"), kwargs["_data"]
    if kind == "QuantizeTensorToMXKwargs":
        element, block = _tag(data.get("elem_dtype")), data.get("block_size")
        if element not in _FLOAT8 or block != parts.data.get("block_size"):
            return None
        return ActivationScheme(
            format=get_format(_FLOAT8[element]), granularity=Granularity.group(block), scale_dtype="float8_e8m0fnu"
        )
    granularity = _token_granularity(data.get("granularity"))
    if granularity is None or (granularity.is_group and parts.data.get("block_size", [])[-1:] != [granularity.columns]):
        return None
    if kind == "QuantizeTensorToFloat8Kwargs":
        element = _tag(data.get("float8_dtype"))
        clipped = data.get("hp_value_lb") is not None or data.get("hp_value_ub") is not None
        if element not in _FLOAT8 or clipped:
            return None
        return ActivationScheme(format=get_format(_FLOAT8[element]), granularity=granularity)
    if kind == "QuantizeTensorToInt8Kwargs" and _tag(data.get("mapping_type")) == "SYMMETRIC":
        return ActivationScheme(format=get_format("int8"), granularity=granularity)
    return None


def _token_granularity(given: Any) -> Granularity | None:
    kind = given.get("_type") if isinstance(given, dict) else None
    if kind == "PerRow":
        return Granularity.channel()
    if kind == "PerTensor":
        return Granularity.tensor()
    if kind == "PerBlock":
        size = given["_data"].get("block_size") if isinstance(given.get("_data"), dict) else None
        if isinstance(size, list) and len(size) == 2 and size[0] == 1 and type(size[1]) is int and size[1] > 0:
            return Granularity.group(size[1])
    return None


def is_torchao(tensor: object) -> bool:
    """Whether a tensor is of one of torchao's classes (torchao itself is not imported)."""
    return any(c.__name__ == "TorchAOBaseTensor" for c in type(tensor).__mro__)


class _Live(Parts):
    """A tensor at hand."""

    def __init__(self, tensor: Tensor, name: str) -> None:
        from torchao.prototype.safetensors.safetensors_utils import TensorSubclassAttributeJSONEncoder

        self.tensor, self.name, self.kind = tensor, name, type(tensor).__name__
        if self.kind not in _READERS:
            raise self.error(f"no class that is readable; those are {', '.join(_READERS)}")
        self.data = json.loads(json.dumps(tensor, cls=TensorSubclassAttributeJSONEncoder))["_data"]

    def __contains__(self, part: str) -> bool:
        return isinstance(getattr(self.tensor, part, None), Tensor)

    def info(self, part: str) -> tuple[torch.dtype, tuple[int, ...]]:
        value = getattr(self.tensor, part)
        return value.dtype, tuple(value.shape)

    def take(self, part: str, *dtypes: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        value: Tensor = getattr(self.tensor, part).detach()
        if value.dtype not in dtypes or tuple(value.shape) != shape:
            wanted = " or ".join(map(str, dtypes))
            raise self.error(f"{part} is {value.dtype} {tuple(value.shape)}, expected {wanted} {shape}")
        return value.contiguous()

    def error(self, reason: str) -> QCompileError:
        return LayerError(f"{self.name}: torchao's {self.kind}: {reason}")


def read_tensor(tensor: Tensor, layer: str = "weight") -> PackedLinear:
    """The linear whose weight is this tensor of torchao's, [N, K], bit for bit.

    Raises:
        LayerError: a class that is not known, or no matrix; names the layer.
    """
    parts = _Live(tensor, layer)
    if tensor.dim() != 2:
        raise parts.error(f"it has {tensor.dim()} dimensions; a linear's weight has 2")
    with torch.no_grad():
        return read(parts, (int(tensor.shape[0]), int(tensor.shape[1])))
