"""How packed weights lie in memory for each kernel. Every layout is a bijection on codes, so nothing is kept twice.

| layout       | for                                       | codes                                                    |
| ------------ | ----------------------------------------- | -------------------------------------------------------- |
| `logical`    | anything; portable, what checkpoints hold | uint8 [N, ceil(K * bits / 8)], a bit stream a row        |
| `rows8`      | 8-bit symmetric weights                   | int8 or float8 [N, K]                                    |
| `fragment`   | Triton GEMM whose weights go to registers | int32 [N / 64, K / 64, 128 * bits], in MMA operand order |
| `fragment24` | the same, of 2:4 sparse weights           | int32 [N / 64, K / 64, 64 * (bits + 2)]                  |
| `rows16`     | generated C++ for CPUs                    | int32 [N / 16, K / 32, bits, 16], a lane a row           |

N and K are padded to the tile where a layout has one. Except for `logical`, the first dimension of every tensor but
`perm` runs over output features, so that layers sharing an input are merged by concatenating there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile import huge_pages
from qcompile.bitpack import pack_bits
from qcompile.formats import IntegerFormat
from qcompile.formats.whole import whole_numbers
from qcompile.packed import LOGICAL, PackedWeight
from qcompile.places import gathered, move_bits, quads_of, signed, slots
from qcompile.scheme import WHOLE, Granularity, Scheme

TILE = 64
"""Rows and columns of a `fragment` tile."""


class Layout(ABC):
    """A kernel's arrangement of a `PackedWeight`."""

    name: str
    mergeable: bool = False
    """Whether weights are merged by concatenating every tensor along its first dimension (N a multiple of `tile`)."""
    tile: int = 1
    streamed: bool = False
    """Whether kernels on CPUs read it from memory, which is the faster the larger its pages are."""

    @abstractmethod
    def objection(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Why a weight of this scheme and shape (N, K) cannot take this layout; None if it can."""

    @abstractmethod
    def pack(self, weight: PackedWeight) -> PackedWeight:
        """From the logical layout."""

    @abstractmethod
    def unpack(self, weight: PackedWeight) -> PackedWeight:
        """Back to the logical layout, bit for bit."""


class LogicalLayout(Layout):
    """The portable layout; kernels that take it decode the whole weight first."""

    name = LOGICAL

    def objection(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        return None

    def pack(self, weight: PackedWeight) -> PackedWeight:
        return weight

    def unpack(self, weight: PackedWeight) -> PackedWeight:
        return weight


class Rows8Layout(Layout):
    """8-bit codes in torch's own dtype, [N, K]; scales stay logical."""

    name = "rows8"
    mergeable = True

    def objection(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if scheme.weight.format.native_dtype is None:
            return f"{scheme.weight.format.name} is no 8-bit type of torch's"
        if scheme.weight.offset or scheme.weight.super_scale is not None:
            return "offsets or scales of scales; the kernel takes one scale a block"
        return None

    def pack(self, weight: PackedWeight) -> PackedWeight:
        fmt = weight.scheme.format
        assert fmt.native_dtype is not None
        codes = weight.codes ^ 0x80 if isinstance(fmt, IntegerFormat) else weight.codes
        return replace(weight, codes=codes.view(fmt.native_dtype), layout=self.name)

    def unpack(self, weight: PackedWeight) -> PackedWeight:
        codes = weight.codes.view(torch.uint8)
        if isinstance(weight.scheme.format, IntegerFormat):
            codes = codes ^ 0x80
        return replace(weight, codes=codes, layout=LOGICAL)


def plane_widths(bits: int) -> tuple[int, ...]:
    """A code's bits, lowest first, split into planes whose widths are powers of two: 3 is (2, 1), 7 is (4, 2, 1)."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def _in_fours(values: Tensor, quads: int) -> Tensor:
    """Bytes [N, groups] as [N / 64, ceil(K / 64), 128 * quads]: in tiles of 64 x 64 weights `w h q g r`.

    That is the scale of row 16 w + 8 r + h and, of the tile's groups of columns, number 2 q + g.
    """
    padded = F.pad(values, (0, -values.shape[1] % (2 * quads)))
    tiles = padded.view(-1, 4, 2, 8, padded.shape[1] // (2 * quads), quads, 2)  # w r h | tile q g
    return tiles.permute(0, 4, 1, 3, 5, 6, 2).flatten(2)


def _from_fours(values: Tensor, quads: int) -> Tensor:
    """The inverse of `_in_fours`, with the groups that it added."""
    tiles = values.unflatten(-1, (4, 8, quads, 2, 2))  # tile | w h q g r
    return tiles.permute(0, 2, 6, 3, 1, 4, 5).flatten(4).flatten(0, 3)


def _quads(weight: PackedWeight, name: str, tile: int) -> int:
    """`quads_of` of one of a weight's tensors in tiles of so many rows."""
    n, k = weight.shape
    scheme = weight.scheme
    taken = tile == TILE and name in ("scale", "offset")
    return quads_of(scheme.scale_dtype, scheme.granularity.block_of((n, k))[1], k) if taken else 0


def _rows_last(weight: PackedWeight, tile: int) -> PackedWeight:
    """What is stored per block of weights, [row blocks, groups], becomes [N / tile, groups, tile]; codes stay."""
    n, k = weight.shape

    def arrange(name: str, values: Tensor) -> Tensor:
        if name in ("codes", "perm"):
            return values
        rows = 1 if name.startswith("super") else weight.scheme.granularity.block_of((n, k))[0]
        raw = values.view(torch.uint8) if values.element_size() == 1 else values
        padded = F.pad(raw.repeat_interleave(rows, 0)[:n], (0, 0, 0, -n % tile))
        if quads := _quads(weight, name, tile):
            return _in_fours(padded, quads).contiguous().view(values.dtype)
        turned = padded.unflatten(0, (-1, tile)).transpose(1, 2)
        # A copy, whose strides are the usual ones also where there is one group: merging must not change strides.
        return turned.clone(memory_format=torch.contiguous_format).view(values.dtype)

    return weight.map(arrange)


def _rows_first(weight: PackedWeight, tile: int) -> PackedWeight:
    """The inverse of `_rows_last`."""
    n, k = weight.shape

    def arrange(name: str, values: Tensor) -> Tensor:
        if name in ("codes", "perm"):
            return values
        rows, columns = (1, k) if name.startswith("super") else weight.scheme.granularity.block_of((n, k))
        if quads := _quads(weight, name, tile):
            whole = _from_fours(values.view(torch.uint8), quads)
            return whole[:n:rows, : -(-k // columns)].contiguous().view(values.dtype)
        return values.transpose(1, 2).flatten(0, 1)[:n:rows].clone(memory_format=torch.contiguous_format)

    return weight.map(arrange)


def _blocks_objection(scheme: Scheme) -> str | None:
    columns = scheme.weight.granularity.columns
    if columns != WHOLE and columns % 16:
        return f"blocks of {columns} columns; the kernel takes multiples of 16"
    above = scheme.weight.super_scale
    if above is not None and above.columns != WHOLE and above.columns % 16:
        return f"scales above {above.columns} columns; the kernel takes multiples of 16"
    return None


class FragmentLayout(Layout):
    """64x64 tiles in the order in which a warp group's MMA takes its first operand from registers.

    In a tile, thread t = 32 w + 4 h + l holds the 32 codes of n = 16 w + 8 r + h and k = 16 v + 8 s + 2 l + b for
    v < 4 and r, s, b < 2, in as many words as a code has bits. A pair b = 0, 1 sits in the halves of a word, and one
    mask extracts both. Codes of 8 bits are in byte 2 b + r of word 2 v + s. Others are in bytes 2 b + s, where slot
    2 v + r is the same bits of each of the four bytes (`places.slots`): as many slots as fit from the lowest bit of
    each word on, and in what is then left of the highest bits of words the rest of them (`places.gathered`).

    | bits | in word i      | others, and the words that their bits come from, the highest first                       |
    | ---- | -------------- | ---------------------------------------------------------------------------------------- |
    | 2    | 4 i to 4 i + 3 |                                                                                          |
    | 3    | 2 i, 2 i + 1   | 6, 7 in a byte, of two bits each from words 0, 1, 2: 7 above 6                           |
    | 4    | 2 i, 2 i + 1   |                                                                                          |
    | 5    | i              | 5: three bits from word 0, two from 3; 6: from 1, 4; 7: three from 2, one each from 3, 4 |
    | 6    | i              | 6: two bits each from words 0, 1, 2; 7: from 3, 4, 5                                     |
    | 7    | i              | 7: one bit each from words 0 to 6                                                        |

    Words of a tile are in planes of 8, 4, 2 and 1 words a thread (`plane_widths`): word f + i of thread t, of the plane
    that begins at word f and has p words a thread, is number 128 f + p t + i. The bits of words of FP4 and of tables of
    16 values change places then (`places.bit_places`).

    All that is per block becomes [N / 64, groups, 64], and what is above it [N / 64, super groups, 64]. Scales of one
    byte for 16 or 32 columns (and offsets of that type) become [N / 64, K / 64, 4096 / columns] instead (`_in_fours`):
    with Q = 32 / columns words of four (`places.quads_of`) for two rows of a tile, word Q (t // 4) + q has in byte
    2 g + r what thread t needs for row r and the tile's group 2 q + g of columns.
    """

    name = "fragment"
    mergeable = True
    tile = TILE

    def objection(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        return _blocks_objection(scheme)

    def pack(self, weight: PackedWeight) -> PackedWeight:
        n, k = weight.shape
        bits = weight.scheme.format.bits
        fields = _fragments(F.pad(weight.unpack_codes(), (0, -k % TILE, 0, -n % TILE)))
        words = _join_fields(fields, 8) if bits == 8 else _join_slots(fields, bits)
        planes = [plane.flatten(2) for plane in words.split(plane_widths(bits), -1)]
        codes = move_bits(torch.cat(planes, -1), weight.scheme.format)
        return replace(_rows_last(weight, TILE), codes=codes, layout=self.name)

    def unpack(self, weight: PackedWeight) -> PackedWeight:
        n, k = weight.shape
        bits = weight.scheme.format.bits
        stored = move_bits(weight.codes, weight.scheme.format, back=True)
        planes = stored.split([128 * width for width in plane_widths(bits)], -1)
        words = torch.cat([plane.unflatten(-1, (128, -1)) for plane in planes], -1)
        codes = _split_fields(words, 8) if bits == 8 else _split_slots(words, bits)
        matrix = _matrix(codes)[:n, :k].contiguous()
        return replace(_rows_first(weight, TILE), codes=pack_bits(matrix, bits), layout=LOGICAL)


def _fragments(matrix: Tensor) -> Tensor:
    """Codes [N, K], N and K multiples of 64, as [N / 64, K / 64, 128 threads, 16 fields j, 2 halves b]."""
    tiles_n, tiles_k = matrix.shape[0] // TILE, matrix.shape[1] // TILE
    fields = matrix.view(tiles_n, 4, 2, 8, tiles_k, 4, 2, 4, 2)  # n: w r h, k: v s l b
    return fields.permute(0, 4, 1, 3, 7, 5, 6, 2, 8).reshape(tiles_n, tiles_k, 128, 16, 2)  # w h l | v s r | b


def _matrix(fields: Tensor) -> Tensor:
    """The inverse of `_fragments`."""
    tiles_n, tiles_k = fields.shape[:2]
    split = fields.view(tiles_n, tiles_k, 4, 8, 4, 4, 2, 2, 2)  # w h l | v s r | b
    return split.permute(0, 2, 7, 3, 1, 5, 6, 4, 8).reshape(tiles_n * TILE, tiles_k * TILE)


def _join_fields(fields: Tensor, width: int) -> Tensor:
    """Fields [.., j, 2] of `width` bits as int32 words: j, b at bit 16 b + width (j % f), f = 16 / width in each."""
    plane = fields.unflatten(-2, (-1, 16 // width)).to(torch.int32)
    words = torch.zeros(plane.shape[:-2], dtype=torch.int32, device=plane.device)
    for slot in range(16 // width):
        words |= plane[..., slot, 0] << (width * slot) | plane[..., slot, 1] << (16 + width * slot)
    return words


def _split_fields(words: Tensor, width: int) -> Tensor:
    """The inverse of `_join_fields`, uint8."""
    shifts = width * torch.arange(16 // width, dtype=torch.int32, device=words.device)
    both = words[..., None, None] >> (shifts[:, None] + torch.tensor([0, 16], dtype=torch.int32, device=words.device))
    return (both & ((1 << width) - 1)).to(torch.uint8).flatten(-3, -2)


def _join_slots(fields: Tensor, bits: int) -> Tensor:
    """Fields [.., j = 4 v + 2 s + r, b] of `bits` bits as int32 words [.., bits], as `places.slots` has them."""
    split = fields.unflatten(-2, (4, 2, 2)).to(torch.int32)  # v s r b
    bytes_ = [16 * b + 8 * s for s in range(2) for b in range(2)]
    words = torch.zeros(*fields.shape[:-2], bits, dtype=torch.int32, device=fields.device)
    for slot, (number, low) in enumerate(slots(bits)):
        pairs = split[..., slot // 2, :, slot % 2, :].flatten(-2)  # s b
        both = sum(pairs[..., i] << place for i, place in enumerate(bytes_)) << low
        for word, down, taken in _parts_of(number, bits):
            words[..., word] |= (both & signed(taken * 0x1010101)) << down
    return words


def _split_slots(words: Tensor, bits: int) -> Tensor:
    """The inverse of `_join_slots`, uint8."""
    bytes_ = torch.tensor([16 * b + 8 * s for s in range(2) for b in range(2)], dtype=torch.int32, device=words.device)
    found = []
    for number, low in slots(bits):
        both = torch.zeros_like(words[..., 0])
        for word, down, taken in _parts_of(number, bits):
            both |= (words[..., word] >> down) & signed(taken * 0x1010101)
        found.append((both.unsqueeze(-1) >> (bytes_ + low)) & ((1 << bits) - 1))
    split = torch.stack(found, -2).unflatten(-1, (2, 2)).unflatten(-3, (4, 2))  # v r s b
    return split.transpose(-3, -2).flatten(-4, -2).to(torch.uint8)


def _parts_of(number: int, bits: int) -> tuple[tuple[int, int, int], ...]:
    """Of byte `number` of `places.slots` the parts, as `places.gathered` has them."""
    return ((number, 0, 0xFF),) if number < bits else gathered(bits)[number - bits]


class Fragment24Layout(Layout):
    """2:4 sparse weights of 4 or 8 bits in the tiles of `fragment`, in the order of sparse tensor cores.

    Two of the four columns 4 i to 4 i + 3 are kept. Where `fragment` has these columns in field j = 4 v + 2 s + r of
    threads 4 q + 2 p and 4 q + 2 p + 1 (p < 2), their codes, in their order, are here both halves of a field of one
    thread, number 4 q + 2 p + s, which has `bits` / 2 words for v = 2 u + t: field 4 u + 2 t + r of those that
    `_join_fields` makes. All threads' words come first, then a word of each that says which columns are kept: of thread
    4 q + v column 4 i + c is in bit 16 r + 8 s + 4 p + c.

    If less than two codes of four differ from the code of 0, others are kept too: of each pair of columns one, the
    first. What is per block is as in `fragment`.
    """

    name = "fragment24"
    mergeable = True
    tile = TILE

    def objection(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        return _blocks_objection(scheme) if scheme.weight.sparsity == "2:4" else "it is not 2:4 sparse"

    def pack(self, weight: PackedWeight) -> PackedWeight:
        n, k = weight.shape
        bits, zero = weight.scheme.format.bits, weight.scheme.zero_code
        codes = F.pad(weight.unpack_codes(), (0, -k % TILE, 0, -n % TILE), value=zero)
        fields = _fragments(codes).unflatten(3, (2, 2, 2, 2)).unflatten(2, (32, 2, 2))  # tiles | q p e | u t s r b
        groups = fields.permute(0, 1, 2, 3, 7, 5, 6, 8, 4, 9)  # q p s u t r e b
        kept = groups != zero
        alone = kept.flatten(-2).sum(-1) < 2
        kept[..., 0] |= alone.unsqueeze(-1) & ~kept[..., 1]
        order = kept.flatten(-2).to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[..., :2]
        words = _join_fields(groups.flatten(-2).gather(-1, order).flatten(5, 7), bits).flatten(2)
        places = kept.permute(0, 1, 2, 5, 6, 7, 4, 3, 8, 9).flatten(5).to(torch.int32)  # q u t | r s p e b
        places = (places << torch.arange(32, dtype=torch.int32, device=codes.device)).sum(-1, dtype=torch.int32)
        return replace(_rows_last(weight, TILE), codes=torch.cat([words, places.flatten(2)], -1), layout=self.name)

    def unpack(self, weight: PackedWeight) -> PackedWeight:
        n, k = weight.shape
        bits, zero = weight.scheme.format.bits, weight.scheme.zero_code
        words, places = weight.codes.split([64 * bits, 128], -1)
        kept = places.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=words.device) & 1
        kept = kept.unflatten(-1, (2, 2, 2, 4)).unflatten(2, (32, 2, 2))  # tiles | q u t | r s p c
        kept = kept.permute(0, 1, 2, 7, 6, 3, 4, 5, 8)  # q p s u t r | c
        order = kept.sort(dim=-1, descending=True, stable=True).indices[..., :2]
        groups = torch.full(kept.shape, zero, dtype=torch.uint8, device=words.device)
        pairs = _split_fields(words.unflatten(-1, (128, bits // 2)), bits)  # tiles | q p s | u t r | half
        groups.scatter_(-1, order, pairs.view(order.shape))
        fields = groups.unflatten(-1, (2, 2)).permute(0, 1, 2, 3, 8, 5, 6, 4, 7, 9)  # q p e | u t s r | b
        matrix = _matrix(fields.flatten(5, 8).flatten(2, 4))[:n, :k].contiguous()
        return replace(_rows_first(weight, TILE), codes=pack_bits(matrix, bits), layout=LOGICAL)


class Rows16Layout(Layout):
    """Blocks of 16 rows, side by side in the lanes of vectors of int32; runs of 32 columns.

    Column k = 4 t + 2 c + h of a run (t < 8; c, h < 2) lies in byte 2 h + c of a row's words: h says in which half of a
    word, so that neighbours k, k + 1 are the two halves of a word shifted by 8 c. A plane of width p (`plane_widths`)
    takes p words of a row: its field of that column is in word t // (8 / p) at bit 8 (2 h + c) + p (t % (8 / p)). The
    planes follow each other.

    All that is per block becomes [N / 16, groups, 16], and what is above it [N / 16, super groups, 16].
    """

    name = "rows16"
    mergeable = True
    streamed = True
    tile = 16
    run = 32

    def objection(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        return _blocks_objection(scheme)

    def pack(self, weight: PackedWeight) -> PackedWeight:
        n, k = weight.shape
        codes = F.pad(weight.unpack_codes(), (0, -k % self.run, 0, -n % self.tile))
        fields = codes.view(-1, self.tile, codes.shape[1] // self.run, 8, 2, 2)  # n: block row, k: run t c h
        fields = fields.permute(0, 2, 3, 1, 5, 4)  # block run t row h c
        planes = []
        low = 0
        for width in plane_widths(weight.scheme.format.bits):
            plane = ((fields >> low) & ((1 << width) - 1)).unflatten(2, (width, 8 // width))
            words = torch.zeros_like(plane[:, :, :, 0])
            for slot in range(8 // width):
                words |= plane[:, :, :, slot] << (width * slot)
            planes.append(words)
            low += width
        words = torch.cat(planes, 2).flatten(4).contiguous().view(torch.int32).squeeze(-1)
        return replace(_rows_last(weight, self.tile), codes=words, layout=self.name)

    def unpack(self, weight: PackedWeight) -> PackedWeight:
        n, k = weight.shape
        bits = weight.scheme.format.bits
        blocks, runs = weight.codes.shape[:2]
        stored = weight.codes.view(torch.uint8).view(blocks, runs, bits, self.tile, 2, 2)  # h c
        codes = torch.zeros(blocks, runs, 8, self.tile, 2, 2, dtype=torch.uint8, device=weight.device)
        low = 0
        for width in plane_widths(bits):
            plane = stored[:, :, low : low + width]
            fields = [(plane >> (width * slot)) & ((1 << width) - 1) for slot in range(8 // width)]
            codes |= torch.stack(fields, 3).flatten(2, 3) << low
            low += width
        matrix = codes.permute(0, 3, 1, 2, 5, 4).reshape(blocks * self.tile, runs * self.run)[:n, :k]
        return replace(_rows_first(weight, self.tile), codes=pack_bits(matrix.contiguous(), bits), layout=LOGICAL)


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (LogicalLayout(), Rows8Layout(), FragmentLayout(), Fragment24Layout(), Rows16Layout())
}


def integer_product(scheme: Scheme, shape: tuple[int, int]) -> bool:
    """Whether 8-bit integers on both sides are summed before any scale: one a row or tensor, and sums fit in int32."""
    weight, activation = scheme.weight, scheme.activation
    return (
        activation is not None
        and weight.format.native_dtype == activation.dtype == torch.int8
        and weight.super_scale is None
        and not weight.offset
        and weight.granularity in (Granularity.channel(), Granularity.tensor())
        and not activation.granularity.is_group
        and shape[1] <= (2**31 - 1) // 128**2
    )


def multiplies_integers(scheme: Scheme) -> bool:
    """Whether a product of codes is one of integers, group by group: int8 activations, and weights of whole numbers."""
    activation = scheme.activation
    return (
        activation is not None
        and activation.format.name == "int8"
        and activation.scale_dtype == "float32"
        and whole_numbers(scheme.weight.format.name) is not None
    )


def halves_objection(layout: str, half: int, columns: int) -> str | None:
    """Why a kernel cannot join the two halves of a product's columns, of weights of `half` x `columns`; None if it can.

    A program takes whole tiles of both, and finds the second half by 32-bit numbers.
    """
    tile = LAYOUTS[layout].tile
    if half % tile:
        return f"halves of {half} output features are no multiple of {tile}"
    return "its weight is too large" if half * columns >= 2**31 else None


def choose_layout(scheme: Scheme, shape: tuple[int, int], device_type: str) -> Layout:
    """The layout whose kernel serves a layer best on a kind of device.

    On GPUs 8-bit weights with 8-bit activations are `rows8`, other 2:4 sparse ones `fragment24` and all others
    `fragment`; on CPUs all are `rows16`. What these do not take is `logical`.
    """
    if device_type == "cuda":
        order = [*(["rows8"] if scheme.activation is not None else []), "fragment24", "fragment"]
    else:
        order = ["rows16"]
    for name in order:
        if LAYOUTS[name].objection(scheme, shape) is None:
            return LAYOUTS[name]
    return LAYOUTS[LOGICAL]


def to_layout(weight: PackedWeight, layout: Layout) -> PackedWeight:
    """The same weight in another layout."""
    if weight.layout == layout.name:
        return weight
    source, block = LAYOUTS[weight.layout], weight.scheme.granularity.rows
    n, k = weight.shape
    unit = math.lcm(source.tile, layout.tile, max(1, block))
    step = unit * max(1, _CHUNK // (unit * k))
    if source.tile == layout.tile == 1 or (step >= n and not layout.streamed):
        return layout.pack(source.unpack(weight))
    parts = [layout.pack(source.unpack(rows_of(weight, first, first + step))) for first in range(0, n, step)]
    shared = {"perm"} if layout.tile > 1 or block != WHOLE else {"perm", "scale", "zero_point", "offset"}

    def joined(name: str, tensor: Tensor) -> Tensor:
        if name in shared:
            return tensor
        pieces = [getattr(part, name) for part in parts]
        return huge_pages.joined(pieces) if layout.streamed else torch.cat(pieces)

    return replace(parts[0].map(joined), shape=weight.shape)


def rows_of(weight: PackedWeight, first: int, last: int) -> PackedWeight:
    """Some rows of a weight in any layout, from one that begins a tile and a block of rows; views."""
    tile = LAYOUTS[weight.layout].tile
    if tile == 1:
        return weight.rows(first, last)
    part = weight.map(lambda name, tensor: tensor if name == "perm" else tensor[first // tile : -(-last // tile)])
    return replace(part, shape=(min(last, weight.shape[0]) - first, weight.shape[1]))


_CHUNK = 1 << 22
"""Weights that are laid out, or back, at a time, so that the copies this makes of a large layer stay small."""
