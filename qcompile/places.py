"""Where bits of codes, and scales, lie in the layout `fragment` if its decoders want them elsewhere than in order."""

from __future__ import annotations

from torch import Tensor, zeros_like

from qcompile.formats import FloatFormat, Format, TableFormat

_FLOAT_PLACES = ((6, 7, 8, 15), (0, 1, 2, 9), (10, 11, 12, 19), (4, 5, 14, 13))
"""For each of the four codes in the lower half of a word of E2M1: where its bits lie, lowest first."""


_THIRDS = ((0, 0, 0xC0), (1, 2, 0x30), (2, 4, 0x0C))
_GATHERED = {
    3: (_THIRDS,),
    5: (
        ((0, 0, 0xE0), (3, 3, 0x18)),
        ((1, 0, 0xE0), (4, 3, 0x18)),
        ((2, 0, 0xE0), (3, 1, 0x10), (4, 2, 0x08)),
    ),
    6: (_THIRDS, tuple((word + 3, down, taken) for word, down, taken in _THIRDS)),
    7: (tuple((word, word, 0x80 >> word) for word in range(7)),),
}
"""For codes of so many bits: bytes that are gathered from what whole codes leave of a thread's words.

Of each byte the parts: of word number `word`, shifted down by `down`, the bits of the mask `taken`.
"""


def gathered(bits: int) -> tuple[tuple[tuple[int, int, int], ...], ...]:
    """`_GATHERED` for codes of `bits` bits, which has none if they fill bytes."""
    return _GATHERED.get(bits, ())


def slots(bits: int) -> tuple[tuple[int, int], ...]:
    """For the eight codes in bytes of a thread's words: which byte, and the lowest bit there.

    Bytes are those of the `bits` words, which have as many codes as fit, from the lowest bit; after them, from number
    `bits`, those that are `gathered`, whose codes end at the highest bit.
    """
    found = [(word, bits * i) for word in range(bits) for i in range(8 // bits)]
    for number, parts in enumerate(gathered(bits), bits):
        low = min(taken & -taken for _, _, taken in parts).bit_length() - 1
        found += [(number, first) for first in range(low, 8, bits)]
    assert len(found) == 8
    return tuple(found)


def bit_places(fmt: Format) -> tuple[int, ...] | None:
    """Where the bits of a word of eight 4-bit codes lie, if not in order.

    In order code j of a half is at bit 4 j there. E2M1's fields are in each half's first code where bfloat16 has its
    own; one rotation of the word brings those of the second there, another those of the third, two those of the fourth.
    A table's codes are looked up by byte permutations, which take four, of three bits each, from the lower half of a
    word: so both halves' first two codes are in the lower half, the others in the higher, and their last bits are the
    last of bytes, or the fourth.
    """
    if fmt.bits != 4:
        return None
    if isinstance(fmt, FloatFormat):
        return tuple((place + 16 * b) % 32 for b in range(2) for places in _FLOAT_PLACES for place in places)
    if isinstance(fmt, TableFormat):
        found = []
        for b, j in ((b, j) for b in range(2) for j in range(4)):
            half, code = j // 2, 2 * (j % 2) + b
            found += [16 * half + 4 * code + i for i in range(3)] + [8 * code + 7 - 4 * half]
        return tuple(found)
    return None


def moves(places: tuple[int, ...], *, back: bool = False) -> dict[int, int]:
    """How the bits of words come to their places: by how much up each is shifted, and which are, as a mask.

    Args:
        back: the inverse.
    """
    found: dict[int, int] = {}
    for bit, place in enumerate(places):
        source, target = (place, bit) if back else (bit, place)
        found[target - source] = found.get(target - source, 0) | 1 << source
    return found


def move_bits(words: Tensor, fmt: Format, *, back: bool = False) -> Tensor:
    """int32 words of eight 4-bit codes in order, with their bits in their places; or back."""
    places = bit_places(fmt)
    if places is None:
        return words
    moved = zeros_like(words)
    for up, mask in moves(places, back=back).items():
        moved |= (words & signed(mask)) << up if up >= 0 else (words >> -up) & signed(mask >> -up)
    return moved


def signed(word: int) -> int:
    """The int32 that has the bits of a number of 32 bits."""
    return word - (word >> 31 << 32)


def quads_of(scale_dtype: str, columns: int, k: int) -> int:
    """How many words of four scales each two rows, 8 apart, have for 64 columns; 0 if scales do not lie in fours.

    Those do that have one byte and belong to 16 or 32 of more columns.
    """
    byte = scale_dtype.startswith("float8") or scale_dtype in ("int8", "uint8")
    return 32 // columns if byte and columns in (16, 32) and columns < k else 0
