"""Which tiles are worth trying for a shape: a roofline of bytes and operations, as expressions in M, N and K.

The time of a kernel is the longest of reading memory, reading the L2 cache and multiplying (Williams, Waterman and
Patterson, "Roofline: an insightful visual performance model", 2009), stretched by how unevenly its programs fill the
multiprocessors. Absolute times are not to be trusted; the order of tiles is what is used.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import sympy

from qcompile.codegen.devices import Device, device_of
from qcompile.codegen.spec import (
    GroupedSpec,
    KernelSpec,
    Tile,
    scales_of,
    sparse_cores,
    warps_multiply,
)
from qcompile.codegen.stream_spec import stream_objection, stream_scales
from qcompile.formats import FORMATS, FloatFormat, IntegerFormat, TableFormat

_M, _N, _K, _BITS, _X, _Y = sympy.symbols("M N K bits x_bytes y_bytes", positive=True)
_TM, _TN, _Z, _SMS = sympy.symbols("tile_m tile_n split processors", positive=True)
_PROGRAMS = sympy.ceiling(_M / _TM) * sympy.ceiling(_N / _TN) * _Z

EXPRESSIONS: dict[str, sympy.Expr] = {
    "memory": _N * _K * _BITS / 8 + _M * _K * _X + _M * _N * _Y,
    "cache": sympy.ceiling(_M / _TM) * _N * _K * _BITS / 8
    + sympy.ceiling(_N / _TN) * sympy.ceiling(_M / _TM) * _TM * _K * _X
    + sympy.Piecewise((0, sympy.Eq(_Z, 1)), (8 * _Z * _M * _N, True)),
    "operations": 2 * sympy.ceiling(_M / _TM) * _TM * sympy.ceiling(_N / _TN) * _TN * _K,
    "weights": sympy.ceiling(_M / _TM) * _N * _K,
    "fill": sympy.Max(1, sympy.ceiling(_PROGRAMS / _SMS) * _SMS / _PROGRAMS),
    "programs": _PROGRAMS,
}
"""Bytes from memory, bytes through the L2 cache, operations, weights that are decoded, how many times longer uneven
filling makes it, and programs."""

_SYMBOLS = (_M, _N, _K, _BITS, _X, _Y, _TM, _TN, _Z, _SMS)
_LAUNCH = 2e-6
_SPLIT_COST = 1e-6
"""Seconds of a launch, and of adding parts of K at the end."""
_TURN = 6e-7
"""Seconds from the arrival of a turn's operands to the end of its products."""
_NARROW = {128: 1.55, 256: 1.3}
"""How much longer `gemm_stream` multiplies 64 rows of x than half of 128, by its tiles' rows of the weight."""
_SPREAD = 3.0
"""As `_instructions`, of a sparse weight that `gemm_stream` makes dense."""
_SENDING = 1.3
"""As `_instructions`, of sending for a step's operands where it has half as many weights, for scales above scales."""
_APART = 1.75
"""How much longer `gemm_stream` multiplies where it waits for each product, to scale it."""
_HIDDEN = 0.4
"""Share of the time of decoding that is not hidden behind products with `Tile.overlap`."""


@functools.cache
def _compiled() -> dict[str, Callable[..., float]]:
    return {name: sympy.lambdify(_SYMBOLS, expression, "math") for name, expression in EXPRESSIONS.items()}


_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SCALE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # others: 1


def bytes_out(spec: KernelSpec) -> float:
    """Bytes of output for each row of the weight, and of activations: half of them if two rows make a column."""
    return (_BYTES[spec.out_dtype] if spec.stored is None else 1) * spec.width / spec.n


def _instructions(spec: KernelSpec) -> float:
    """Instructions a weight in a turn of the loop, as counted in machine code of sm_90."""
    if spec.in_rows:
        return 0.7
    fmt = FORMATS[spec.weight]
    if spec.tile.form == "cores":
        return 1.7  # half as many are decoded
    few = -0.4 if warps_multiply(spec) and spec.target == "sm_90" else 0.0
    narrow = 2.0 if spec.groups > 1 and spec.columns < 64 else 0.0
    scales = scales_of(spec, spec.tile.scales)
    if scales == "sums":
        narrow = 0.2
    if spec.quads and scales == "fragments":
        narrow = 0.1 + 0.3 * spec.quads
    if spec.offset and scales == "weights":
        return 8.0
    if spec.offset:
        narrow += 1.0
    sparse = 0.5 * fmt.bits * spec.sparse
    if fmt.bits == 4:
        return {IntegerFormat: 2.4, FloatFormat: 2.9, TableFormat: 4.2}[type(fmt)] + narrow + few + sparse
    if isinstance(fmt, IntegerFormat) and fmt.bits < 8 and scales != "weights" and spec.target.startswith("sm_"):
        return (2.7 if fmt.bits < 4 else 3.0) + narrow + few + sparse
    return 3.6 + narrow + few + sparse


def resident(spec: KernelSpec, device: Device) -> int:
    """Programs that a multiprocessor holds at a time, by shared memory, an estimate of registers, and warps."""
    tile = spec.tile
    registers = min(255, 72 + tile.m * tile.n // (32 * tile.warps))
    by_registers = 65536 // (32 * tile.warps * registers)
    return max(1, min(by_registers, device.shared // (shared_bytes(spec) + 1024), 64 // tile.warps))


def seconds(spec: KernelSpec, m: int, device: Device | None = None) -> float:
    """The model's time of a kernel for M = `m`, or as many rows of each expert of a stack.

    On a device of the kernel's target, unless another is named.

    Reading memory and the cache go on beside the rest. Decoding and multiplying take turns, unless the tile overlaps
    them, on unevenly filled processors; and a program's turns follow each other.
    """
    device, tile = device or device_of(spec.target), spec.tile
    if tile.form == "stream":
        return _stream_seconds(spec, m, device)
    value = {name: compute(*_given(spec, m, device)) for name, compute in _compiled().items()}
    multiplying = value["operations"] / (
        device.operations * 0.83 * {"int8": 2, "fp8": 2, "float32": 1 / 6}.get(spec.compute, 1)
    )
    decoding = value["weights"] * _instructions(spec) / (device.processors * 128 * 1.3e9)
    hidden = _HIDDEN if tile.overlap else 1.0
    # Half of what uneven filling costs is made up for by the programs that run alone, which run faster.
    working = (multiplying + hidden * decoding) * value["fill"] ** 0.5
    reading = value["memory"] / (device.memory * 0.95) / min(1.0, value["programs"] / (0.8 * device.processors))
    rounds = math.ceil(value["programs"] / (device.processors * resident(spec, device)))
    turns = _TURN * rounds * math.ceil(spec.k / (tile.split * tile.k)) if tile.form != "slab" else 0.0
    return (
        _LAUNCH + max(reading, value["cache"] / device.cache, working, turns) + (_SPLIT_COST if tile.split > 1 else 0)
    )


def _stream_seconds(spec: KernelSpec, m: int, device: Device) -> float:
    """`seconds` of a stream, which decodes while it multiplies if at all, one program on a processor at a time."""
    tile = spec.tile
    alike = replace(spec, tile=replace(tile, form="loop", split=1))
    value = {name: compute(*_given(alike, m, device)) for name, compute in _compiled().items()}
    programs = value["programs"] * tile.split or min(device.processors, 4 * value["programs"])
    fill = math.ceil(programs / device.processors) * device.processors / programs
    slow = _NARROW[tile.n] * max(1.0, 48 / tile.m) if tile.m <= 64 else 1.0
    rate = device.operations * 0.83 * (2 if spec.compute == "int8" else 1)
    working = value["operations"] / rate * slow
    instructions, scales = _SPREAD if spec.sparse else _instructions(spec), "" if spec.in_rows else stream_scales(spec)
    table = isinstance(FORMATS[spec.weight], TableFormat)
    if scales == "pairs":  # 64 columns' scales take 64 instructions a group for both rows of a thread, or more
        instructions = 3 + 0.5 * spec.offset + 32 / min(64, spec.columns) * (1 + spec.offset) + 2.2 * table
    elif scales == "fragments" and 0 < spec.super_columns < spec.k:  # sums are multiplied too
        instructions = 3.7 + 0.3 * spec.quads + 1.3 * spec.offset + 1.7 * table + _SENDING * (tile.m == tile.n == 128)
    if scales == "products":
        working *= _APART
    # A group decodes while the other multiplies, for half of the time that products take.
    working += max(0.0, value["weights"] * instructions / (device.processors * 128 * 1.3e9) - working / 2)
    working *= fill
    reading = value["memory"] / (device.memory * 0.95) / min(1.0, programs / (0.8 * device.processors))
    parts = 0.0
    if tile.split != 1 and (tile.split or value["programs"] % device.processors):
        parts = _SPLIT_COST + 3 * (1 + (tile.split or 4)) * tile.m * tile.n * device.processors / device.cache
    return _LAUNCH + max(reading, value["cache"] / device.cache, working) + parts


def _given(spec: KernelSpec, m: int, device: Device) -> tuple[float, ...]:
    """Values of `_SYMBOLS`."""
    return (
        m,
        stacked_rows(spec, m),
        spec.k,
        spec.stored_bits + 8 * _SCALE_BYTES.get(spec.scale_dtype, 1) / spec.columns,
        _BYTES.get(spec.x_dtype, 1),
        bytes_out(spec),
        spec.tile.m,
        spec.tile.n,
        spec.tile.split,
        device.processors,
    )


def stacked_rows(spec: KernelSpec, m: int) -> int:
    """Rows of the weight; of a stack those of all experts, or of a quarter if M is 1: few have a row then."""
    if not isinstance(spec, GroupedSpec):
        return spec.n
    return spec.n * (spec.experts if m > 1 else -(-spec.experts // 4))


def shared_bytes(spec: KernelSpec) -> int:
    """Shared memory of the pipeline's stages, from above.

    Scales of blocks are copied there too; those with offsets go through it once more on their way to the weights.
    """
    tile = spec.tile
    width = _BYTES.get(spec.x_dtype, 1)
    if tile.form == "slab":
        return tile.m * (spec.k // tile.split) * width + 4 * tile.m * tile.n
    x = tile.m * tile.k * width
    weight = tile.n * tile.k * spec.stored_bits // 8
    scale = _SCALE_BYTES.get(spec.scale_dtype, 1)
    block = scale * (2 if spec.offset else 1) + (not spec.symmetric and not spec.offset)
    blocks = tile.n * -(-tile.k // spec.columns) if spec.groups > 1 else 0
    stages = tile.stages * (x + weight + blocks * block) + (8 * blocks if spec.offset else 0)
    if tile.form == "stream":  # in which sums of two groups go through 16 KB each to their operands
        stages += 33 * 1024 + tile.stages * tile.n * 8 * (0 < spec.super_columns < spec.k)
    elif spec.sparse and tile.form == "loop":  # in which words and positions go through it to their weights
        stages += 256 * tile.n
    elif tile.overlap and FORMATS[spec.weight].bits not in (4, 8):  # as do words of other widths
        stages += tile.n * tile.k
    return max(stages, 4 * tile.m * tile.n)


def candidates(like: KernelSpec, m: int) -> list[KernelSpec]:
    """`like` with each tile that its template can run, for M up to `m`, without spilling registers in its loop.

    After the loop, a thread that holds 128 sums may spill a few for operands of the epilogue, once a program.
    """
    tiles = _rows8_tiles(like, m) if like.in_rows else _fragment_tiles(like, m)
    return [replace(like, tile=tile) for tile in tiles + _streams(like, m)]


def _covers(m: int, largest: int) -> tuple[int, ...]:
    """Heights of tiles for up to `m` rows."""
    if m <= 32:
        return (16,) if m <= 16 else (32,)
    least = min(max(m // 4, min(m // 2, 64)), 128)
    return tuple(size for size in (32, 64, 128, 256) if least <= size <= min(m, largest)) or (largest,)


def _eight(like: KernelSpec) -> bool:
    """Whether tiles may have 8 rows of x, whose warps multiply for themselves on Hopper too.

    A warp group multiplies 16 rows at least by Triton, and no warp of it goes on before all four have multiplied.
    """
    fmt = FORMATS[like.weight]
    # Bytes of other formats are exchanged between threads on their way to warps that multiply for themselves.
    whole = isinstance(fmt, IntegerFormat) or fmt.bits == 4
    plain = like.activation is None and not like.sparse and whole and fmt.bits < 8
    served = like.compute in ("bfloat16", "float16") and like.target.startswith("sm_")
    return plain and served and not _tensor_memory(like.target)


def _splits(like: KernelSpec, k: int, block_m: int) -> tuple[int, ...]:
    return tuple(z for z in (1, 2, 4, 8) if z == 1 or (2 * z * k <= like.k and block_m <= 128))


def _fragment_tiles(like: KernelSpec, m: int) -> list[Tile]:
    wide = like.compute == "float32"
    found = []
    largest = 32 if wide else 64 if like.activation_scale == "group" else 256
    if like.sparse:  # whose words need registers too
        largest = min(largest, 64 if _before_hopper(like.target) else 128)
    heights = _covers(m, largest)
    if m == 1 and _eight(like):
        heights = (8, *heights)
    for block_m in heights:
        # Weights that are scaled in float32 need registers beside the accumulator's, and so do activations of 8 bits
        # that are converted where the tensor cores read both sides from registers.
        crowded = scales_of(replace(like, tile=replace(like.tile, m=block_m)), "products") == "weights"
        most = 64 if crowded or (like.activation is not None and _before_hopper(like.target)) else 128
        small = block_m <= 32 or like.sparse
        deep = (64,) if wide else (128, 256) if block_m <= 32 else (64, 128, 256)
        apart = scales_of(replace(like, tile=replace(like.tile, m=block_m)), "sums") == "sums"
        if block_m == 8 and like.offset and not apart:  # both of 256 columns are more than fit beside eight rows
            deep = (128,)
        depths = [k for k in deep if k <= like.k] or [64]
        for block_n, k in itertools.product((64, 128) if small or wide else (64, 128, 256), depths):
            # A warp has 16 rows, or 32 of larger tiles; an accumulator has at most `most` registers of a thread.
            plain = small or crowded
            for warps in (block_n // 16,) if block_n == 64 or plain else (block_n // 16, block_n // 32):
                if block_m * block_n > most * 32 * warps or block_m * k > 128 * 256:
                    continue
                if warps > 8 and _tensor_memory(like.target):
                    continue
                # Of AMD's eight warps each has 256 registers a thread, too few for products and what is added to them.
                if block_m == 32 and warps > 4 and like.offset and not crowded and not like.target.startswith("sm_"):
                    continue
                # Parts of K that are added at the end spill beside as many sums that come from tensor memory.
                whole = _tensor_memory(like.target) and block_m * block_n >= 128 * 128
                for split, stages in itertools.product((1,) if whole else _splits(like, k, block_m), (3, 4)):
                    tile = Tile(m=block_m, n=block_n, k=k, split=split, warps=warps, stages=stages)
                    found += [replace(tile, **way) for way in _ways(like, tile)]
    return found + _slabs(like, m) + _cores(like, m)


def _ways(like: KernelSpec, tile: Tile) -> list[dict[str, Any]]:
    """Where scales go, and whether products overlap decoding, which is for operands in registers: Hopper's."""
    small = tile.m <= 32
    deep = tile.k >= 128 and like.target == "sm_90"
    given = replace(like, tile=tile)
    if scales_of(given, "sums") == "sums":
        return [{"scales": "sums"}]
    if small and scales_of(given, _few_rows(like)) in ("products", "fragments"):
        return [{"scales": _few_rows(like)}]
    only = scales_of(given, "products")
    if only != "products":  # there is no choice
        return [{}, {"overlap": True}] if not small and deep and only == "total" else [{}]
    ways: list[dict[str, Any]] = []
    fragments = scales_of(given, "fragments") == "fragments"
    products = not fragments or (tile.m <= 64 and not like.quads)
    if products and _holds_products(like, tile):
        ways.append({})
    if fragments:
        ways += [{"scales": "fragments"}, *([{"scales": "fragments", "overlap": True}] if deep else [])]
    return ways


def _few_rows(like: KernelSpec) -> str:
    """Where scales go in products of few rows: those of narrow groups into fragments, which makes products wide.

    Those that are integers need too many registers where they are not decoded by words, which is for NVIDIA's.
    """
    words = like.target.startswith("sm_") or like.scale_dtype.startswith("float8")
    return "fragments" if like.quads and words else "products"


def _before_hopper(target: str) -> bool:
    """Whether tensor cores read both sides of a product from registers: NVIDIA's before sm_90."""
    return target.startswith("sm_") and int(target[3:]) < 90


def _tensor_memory(target: str) -> bool:
    """Whether sums of products are in tensor memory, which 4 or 8 warps reach: data centers' Blackwell."""
    return target.startswith("sm_") and int(target[3:]) in (100, 101, 103)


def _holds_products(like: KernelSpec, tile: Tile) -> bool:
    """Whether registers hold products that are multiplied after, a second accumulator, beside what else there is."""
    sums = tile.m * tile.n // (32 * tile.warps)
    if like.activation_scale == "group":  # which takes a scale a product more
        return sums < 64 and tile.k <= 64
    if not like.target.startswith("sm_") or sums < 64:
        return True
    if _before_hopper(like.target):
        blocks = 0 < like.super_columns < like.k  # whose scales are loaded too: by more threads, each loads fewer
        return sums == 64 and tile.k <= 64 and tile.warps in ((8,) if blocks else (4, 8))
    if _tensor_memory(like.target) and tile.split > 1:
        return False
    return sums == 64 and tile.k <= 128 and tile.warps <= 8


def _slabs(like: KernelSpec, m: int) -> list[Tile]:
    """Tiles of programs that hold all their weights in registers, 64 words a thread at most."""
    bits = FORMATS[like.weight].bits
    held = bits in (2, 4, 8) and not like.offset and scales_of(like, "products") != "weights"
    if m > 16 or like.compute == "float32" or not held:
        return []
    found = []
    cuts = ((64, 4), (128, 4), (128, 8))
    heights = (8, 16) if m == 1 and _eight(like) else (16,)
    for block_m, (block_n, warps), split in itertools.product(heights, cuts, (2, 4, 8, 16)):
        part = like.k // split
        even = like.k % (split * 128) == 0 and 256 <= part <= 1024
        if even and part * block_n * like.loaded_bits <= 64 * 32 * 32 * warps:
            tile = Tile(m=block_m, n=block_n, k=128, split=split, warps=warps, stages=1, form="slab")
            found += [replace(tile, **way) for way in _ways(like, tile)]
    return found


def _cores(like: KernelSpec, m: int) -> list[Tile]:
    """Tiles for sparse tensor cores, which read whole turns and have one scale for 64 columns at least.

    For few rows: more are multiplied faster as dense weights, by instructions of a warp group.
    """
    scales = scales_of(like, "products")
    sixteen = like.compute in ("bfloat16", "float16") and like.activation is None and like.super_columns == 0
    served = like.sparse and sparse_cores(like.target) and sixteen and scales != "weights"
    if m > 32 or not served or 0 < like.aligned < 64:
        return []
    found, height = [], 8 if m == 1 else 16 if m <= 16 else 32
    for block_n, along, tiles in itertools.product((64, 128), (1, 2, 4), (1, 2)):
        warps, k = along * block_n // 64, 64 * along * tiles
        for split, stages in itertools.product((1, 2, 4, 8), (3, 4)):
            if 2 <= warps <= 8 and like.k % (split * k) == 0 and -(-like.n // 64) * 64 % block_n == 0:
                cut = Tile(m=height, n=block_n, k=k, split=split, warps=warps, stages=stages)
                found.append(replace(cut, form="cores"))
    return found


def _streams(like: KernelSpec, m: int) -> list[Tile]:
    """Tiles of programs that share all steps evenly, with as many stages as fit.

    Sums take 128 registers at most, with products that are multiplied after. Dense weights of up to 32 rows are
    multiplied faster by a loop.
    """
    if m <= (1 if like.sparse else 32) or stream_objection(like) is not None:
        return []
    found = []
    processors = device_of(like.target).processors
    heights = (16,) if m <= 16 else (32,) if m <= 32 else (64, 128) if m > 64 else (64,)
    most = 128 * 256 if like.in_rows or stream_scales(like) != "products" else 128 * 128
    for block_m, block_n in itertools.product(heights, (256,) if like.gated else (128, 256)):
        if block_m * block_n > most:
            continue
        tiles = -(-m // block_m) * -(-like.n // block_n)
        for split in (0, *(z for z in (1, 2, 4, 8) if z == 1 or (tiles * z <= processors and 256 * z <= like.k))):
            tile = Tile(m=block_m, n=block_n, k=128, split=split, warps=8, stages=8, form="stream", scales="fragments")
            while shared_bytes(replace(like, tile=tile)) > device_of(like.target).shared:
                tile = replace(tile, stages=tile.stages - 1)
            found.append(tile)
    return found


def _rows8_tiles(like: KernelSpec, m: int) -> list[Tile]:
    # 8-bit values that become wider take as many times the registers.
    deepest = {"bfloat16": 64, "float16": 64, "float32": 32}.get(like.compute, 256)
    narrow = like.compute in ("bfloat16", "float16", "float32")
    # Sums of fp8 are added to a second accumulator every few products, and only Hopper multiplies int8 asynchronously.
    small = like.target.startswith("sm_") and (like.compute, like.target) != ("int8", "sm_90")
    heights = _covers(m, 64 if narrow or like.groups > 1 else 256)
    # Registers hold 64 products a thread beside as many sums and scales of 128 tokens.
    if m >= 128 and like.groups > 1 and like.compute == "fp8" and like.target == "sm_90":
        heights = (*heights, 128)
    found = []
    for block_m in heights:
        least = next(d for d in (32, 64, 128, 256) if d >= min(like.columns, deepest, 256))
        if like.groups > 1:
            depths: tuple[int, ...] = (min(least, 128),)
        else:
            depths = tuple(k for k in (128, 256) if k <= deepest and (k == 128 or block_m <= 64)) or (deepest,)
        for block_n, k in itertools.product((64, 128) if narrow else (64, 128, 256), depths):
            warps = block_n // 16
            if block_m * block_n > 128 * 256 or (like.groups > 1 and block_n > (128 if block_m <= 64 else 64)):
                continue
            if small and (block_m > 128 or block_m * block_n > 128 * 128):
                continue
            if block_n == 256 and _tensor_memory(like.target):  # of 16 warps, which do not reach it
                continue
            # Parts of K that are added at the end would spill beside two accumulators of 64 sums.
            splits = (1,) if like.groups > 1 and block_m > 64 else _splits(like, k, block_m)
            for split, stages in itertools.product(splits, (3, 4, 6) if block_m <= 64 else (3, 4)):
                found.append(Tile(m=block_m, n=block_n, k=k, split=split, warps=warps, stages=stages))
    return found


def rank(specs: list[KernelSpec], m: int, keep: int = 5) -> list[KernelSpec]:
    """The kernels that fit the device, the one that the model finds fastest first."""
    fitting = [spec for spec in specs if shared_bytes(spec) <= device_of(spec.target).shared]
    ordered = sorted(fitting or specs[:1], key=lambda spec: (seconds(spec, m), spec.tile.split, spec.tile.n))
    return ordered[:keep]
