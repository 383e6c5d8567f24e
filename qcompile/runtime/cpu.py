"""Quantized products on CPUs, from the best kernels that torch has.

| layout and activations             | few rows of x (M)                      | more rows                        |
| ---------------------------------- | -------------------------------------- | -------------------------------- |
| `int4pack`                         | aten int4pack, bfloat16, up to M = 48  | decode + mm                      |
| `rows8` int8, int8 activations (1) | aten int8 x int8 -> int32, exact       | the same                         |
| `rows8` int8 per row, weight only  | aten int8pack, bfloat16, up to M = 16  | decode + mm                      |
| everything else                    | decode + mm                            | decode + mm                      |

(1) with one scale a row or tensor on both sides; other granularities go the general way.

"Decode + mm" decodes a few hundred rows of the weight at a time into a buffer that stays in the cache and multiplies
by them, so a weight is never held whole in a wide dtype. It computes in bfloat16 (float32 sums, the product rounded to
bfloat16) for bfloat16 and for quantized activations, and in float32 for float32 and float16, and for weights with
offsets, where a scaled code and its offset nearly cancel. Codes and zero points are exact in bfloat16; a scale a row or
tensor multiplies the product in float32, so only scales of groups or blocks round the decoded weight. Quantized
activations enter as exact codes, except those with a scale a group, which are rounded to bfloat16. The kernels for few
rows round float32 and float16 activations to bfloat16: they are slow on others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from qcompile.bitpack import unpack_bits
from qcompile.errors import DeviceError
from qcompile.formats import FloatFormat, Format, IntegerFormat
from qcompile.layouts import TILE, int4pack_rows
from qcompile.linear_spec import LinearSpec
from qcompile.packed import PackedWeight
from qcompile.reference import dequantize_activation

INT4PACK_ROWS = 48
"""Largest M of aten's int4pack kernel: its time grows with M while decoding costs the same for any."""

INT8PACK_ROWS = 16
"""Largest M of aten's int8pack kernel."""

BUFFER_ELEMENTS = 1 << 20
"""Weights decoded at a time: 2 MB of bfloat16."""

_INT32_SAFE_COLUMNS = (2**31 - 1) // 128**2


def _scale_follows(spec: LinearSpec) -> bool:
    """Whether all columns share a scale and nothing else, so that it multiplies the product."""
    weight = spec.scheme.weight
    plain = not weight.offset and weight.super_scale is None
    return plain and weight.granularity.scale_shape(spec.shape)[1] == 1


def _integer_product(spec: LinearSpec) -> bool:
    activation = spec.scheme.activation
    return (
        spec.layout == "rows8"
        and activation is not None
        and spec.scheme.weight.format.native_dtype == activation.format.native_dtype == torch.int8
        and _scale_follows(spec)
        and not activation.granularity.is_group
        and spec.in_features <= _INT32_SAFE_COLUMNS
    )


def _int8pack(spec: LinearSpec) -> bool:
    return (
        spec.layout == "rows8"
        and spec.scheme.activation is None
        and isinstance(spec.scheme.weight.format, IntegerFormat)
        and _scale_follows(spec)
    )


def kernel_name(spec: LinearSpec) -> str:
    """What multiplies by a weight of this spec, for reports."""
    if _integer_product(spec):
        return "aten int8 x int8 (int32)"
    if spec.layout == "int4pack":
        return f"aten int4pack (bf16), decode + mm above M = {INT4PACK_ROWS}"
    if _int8pack(spec):
        return f"aten int8pack (bf16), decode + mm above M = {INT8PACK_ROWS}"
    return "decode + mm"


def product(x: Tensor, x_scale: Tensor | None, weight: list[Tensor], parsed: LinearSpec) -> Tensor:
    """x [M, K] (8-bit codes if `x_scale` is given) times the packed weight: float32 [M, N], or x's bfloat16.

    Plain ATen but for `qcompile::gemm_cpu`, so a compiler fuses the scales with the epilogue.

    Raises:
        DeviceError: a weight laid out for GPUs.
    """
    if parsed.layout == "fragment":
        raise DeviceError(
            "weights in layout fragment are for GPUs; move the module with .to('cpu'), which lays them out anew"
        )
    if _integer_product(parsed):
        y = torch._int_mm(x, weight[0].t()).to(torch.float32)
    else:
        if x_scale is not None:
            assert parsed.scheme.activation is not None
            if parsed.scheme.activation.granularity.is_group:
                x, x_scale = dequantize_activation(x, x_scale, parsed.scheme.activation), None
            x = x.to(torch.bfloat16)
        y = torch.ops.qcompile.gemm_cpu(x, weight, parsed.encode())
    if x_scale is not None:
        y = y.to(torch.float32) * x_scale
    if parsed.layout != "int4pack" and _scale_follows(parsed):
        rows = parsed.scheme.weight.granularity.block_of(parsed.shape)[0]
        per_row = weight[1].reshape(-1).to(torch.float32)
        if per_row.shape[0] not in (1, parsed.out_features):
            per_row = per_row.repeat_interleave(rows)[: parsed.out_features]
        y = y.to(torch.float32) * per_row
    return y


def gemm(x: Tensor, weight: list[Tensor], spec: LinearSpec) -> Tensor:
    """x [M, K] in floating point times the packed weight, without a scale that follows (see `product`).

    Returns:
        [M, N] in bfloat16 if x is, else in float32.
    """
    m, n = x.shape[0], spec.out_features
    packed = PackedWeight.from_tensors(weight, spec.shape, spec.scheme.weight, spec.layout)
    out_dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    if m == 0:
        return x.new_empty((0, n), dtype=out_dtype)
    if spec.layout == "int4pack":
        if m <= INT4PACK_ROWS:
            return _int4pack_mm(x.to(torch.bfloat16), packed, spec).to(out_dtype)
        return _int4pack_decode_mm(x.to(out_dtype), packed, spec)
    if m <= INT8PACK_ROWS and _int8pack(spec):
        few: Tensor = torch.ops.aten._weight_int8pack_mm(x.to(torch.bfloat16).contiguous(), packed.codes, _ones(n))
        return few.to(out_dtype)
    return _decode_mm(x.to(out_dtype), packed, spec)


@functools.lru_cache(maxsize=64)
def _ones(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.bfloat16)


def _int4pack_mm(x: Tensor, packed: PackedWeight, spec: LinearSpec) -> Tensor:
    n, group = spec.out_features, spec.scheme.weight.granularity.columns
    codes, pairs, zero_point = packed.codes, packed.scale, packed.zero_point
    y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), codes, group, pairs)[:, :n]
    if zero_point is None:
        return y.contiguous()
    # The kernel's bfloat16 zeros are rounded; add what that lost, so that a code at its zero point stands for 0.
    exact = (8 - zero_point.to(torch.float32)).t() * pairs[:, :n, 0]
    lost = exact - pairs[:, :n, 1]
    return torch.addmm(y.to(torch.float32), x.unflatten(1, (-1, group)).sum(-1, dtype=torch.float32), lost)


def _int4pack_decode_mm(x: Tensor, weight: PackedWeight, spec: LinearSpec) -> Tensor:
    """Decode in the packed order of rows, which differs within each 64; then sort the columns of the product."""
    n, k = spec.shape
    codes, pairs, zero_point = weight.codes, weight.scale, weight.zero_point
    group, m = spec.scheme.weight.granularity.columns, x.shape[0]
    order = int4pack_rows()
    from_packed = torch.cat([order[0::2], order[1::2]])  # low nibbles, then high ones
    blocks = codes.shape[0] // TILE
    columns = codes.view(blocks, k, 32)
    scale = pairs[..., 0].unflatten(1, (blocks, TILE))[:, None, :, from_packed].to(x.dtype)
    offset: Tensor | None = None
    if zero_point is not None:
        padded = torch.nn.functional.pad(zero_point, (0, 0, 0, blocks * TILE - n))
        offset = padded.t().unflatten(1, (blocks, TILE))[:, None, :, from_packed].to(x.dtype)
    step = max(1, min(blocks, BUFFER_ELEMENTS // (k * TILE)))
    buffer = torch.empty(k * step * TILE, dtype=x.dtype)
    y = torch.empty(m, blocks, TILE, dtype=x.dtype)
    inverse = from_packed.argsort()
    for first in range(0, blocks, step):
        part = columns[first : first + step].transpose(0, 1)
        count = part.shape[1]
        decoded = buffer[: k * count * TILE].view(k, count, TILE)
        decoded[..., :32] = part & 15
        decoded[..., 32:] = part >> 4
        grouped = decoded.unflatten(0, (-1, group))
        grouped.sub_(8 if offset is None else offset[:, :, first : first + count])
        grouped.mul_(scale[:, :, first : first + count])
        sorted_columns = torch.mm(x, decoded.view(k, -1)).view(m, count, TILE)[..., inverse]
        y[:, first : first + count] = sorted_columns
    return y.view(m, -1)[:, :n].contiguous()


def _decode_mm(x: Tensor, packed: PackedWeight, spec: LinearSpec) -> Tensor:
    n, k = spec.shape
    if packed.offset is not None and x.dtype != torch.float32:
        return _decode_mm(x.to(torch.float32), packed, spec).to(x.dtype)
    block_rows, columns = spec.scheme.weight.granularity.block_of(spec.shape)
    decode = _decoder(spec.scheme.weight.format, spec.layout)
    step = min(n, max(64, BUFFER_ELEMENTS // k))
    buffer = torch.empty(step, k, dtype=x.dtype)
    y = torch.empty(x.shape[0], n, dtype=x.dtype)
    for first in range(0, n, step):
        part = packed.codes[first : first + step]
        weight = buffer[: part.shape[0]]
        decode(part, weight)
        rows = torch.arange(first, first + part.shape[0]) // block_rows
        if packed.zero_point is not None:
            _each_block(weight, packed.zero_point[rows], columns, Tensor.sub_)
        if not _scale_follows(spec):
            _each_block(weight, _of_rows(packed.scale, packed.super_scale, rows, packed), columns, Tensor.mul_)
        if packed.offset is not None:
            _each_block(weight, _of_rows(packed.offset, packed.super_offset, rows, packed), columns, Tensor.add_)
        torch.mm(x, weight.t(), out=y[:, first : first + part.shape[0]])
    return y


def _of_rows(per_block: Tensor, above: Tensor | None, rows: Tensor, packed: PackedWeight) -> Tensor:
    """Scales (or offsets) of some rows of blocks, times what is above them: float32 [rows, column blocks]."""
    if per_block.element_size() == 1:
        values = per_block.view(torch.uint8)[rows].view(per_block.dtype).to(torch.float32)
    else:
        values = per_block[rows].to(torch.float32)
    if above is None:
        return values
    scheme = packed.scheme
    assert scheme.super_scale is not None
    blocks = values.shape[1] if above.shape[1] == 1 else scheme.super_scale.columns // scheme.granularity.columns
    return values * above[rows].to(torch.float32).repeat_interleave(blocks, 1)[:, : values.shape[1]]


def _each_block(weight: Tensor, values: Tensor, columns: int, apply: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Apply an in-place operator of float32 accuracy to every run of `columns` of a row and its value [rows, runs]."""
    k = weight.shape[1]
    values = values.to(torch.float32)
    if torch.equal(values, values.to(weight.dtype).to(torch.float32)):
        values = values.to(weight.dtype)
    if k % columns:
        apply(weight, values.repeat_interleave(columns, 1)[:, :k])
    else:
        apply(weight.unflatten(1, (-1, columns)), values.unsqueeze(-1))


def _decoder(fmt: Format, layout: str) -> Callable[[Tensor, Tensor], None]:
    """A function that writes the values of a few rows' codes into a buffer [rows, K]."""
    if layout == "rows8" and isinstance(fmt, FloatFormat):
        return functools.partial(_decode_float8, fmt)
    if layout == "rows8":
        return _decode_int8
    if isinstance(fmt, IntegerFormat):
        return functools.partial(_decode_integer, fmt)
    return functools.partial(_decode_by_table, fmt)


def _decode_int8(codes: Tensor, out: Tensor) -> None:
    out.copy_(codes)


def _decode_float8(fmt: FloatFormat, codes: Tensor, out: Tensor) -> None:
    """Move the fields into a bfloat16's and correct the exponent's bias; much faster than torch's conversion on CPUs.

    Exact for every finite code. Infinities and NaN, which quantizers do not write, are what follows the largest number.
    """
    shift = 7 - fmt.mantissa
    moved = out.view(torch.int16) if out.dtype == torch.bfloat16 else torch.empty(out.shape, dtype=torch.int16)
    moved.copy_(codes.view(torch.int8))  # extends the sign, which thus reaches the top bit
    moved.mul_(1 << shift).bitwise_and_((0x7F << shift) - 0x8000)
    if moved.data_ptr() != out.data_ptr():
        out.copy_(moved.view(torch.bfloat16))
    out.mul_(2.0 ** (127 - (2 ** (fmt.exponent - 1) - 1)))


def _decode_integer(fmt: IntegerFormat, codes: Tensor, out: Tensor) -> None:
    out.copy_(_unpack(codes, fmt.bits, out.shape[1]))
    if fmt.offset:
        out.sub_(fmt.offset)


def _decode_by_table(fmt: Format, codes: Tensor, out: Tensor) -> None:
    table = fmt.decode(torch.arange(1 << fmt.bits, dtype=torch.int32))
    assert isinstance(table, Tensor)
    index = _unpack(codes, fmt.bits, out.shape[1]).to(torch.int32)
    out.copy_(table.to(out.dtype).index_select(0, index.view(-1)).view(out.shape))


def _unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """`unpack_bits`, faster for widths that cross bytes: 8 codes fill `bits` bytes."""
    if 8 % bits == 0 or count % 8:
        return unpack_bits(packed, bits, count)
    fields = packed.unflatten(-1, (-1, bits))
    codes = torch.empty(*fields.shape[:-1], 8, dtype=torch.uint8)
    for index in range(8):
        byte, shift = divmod(index * bits, 8)
        value = fields[..., byte] >> shift
        if shift + bits > 8:
            value |= fields[..., byte + 1] << (8 - shift)
        codes[..., index] = value
    return codes.bitwise_and_((1 << bits) - 1).flatten(-2)
