"""Which tiles are worth trying for a shape: a roofline of bytes and operations, as expressions in M, N and K.

The time of a kernel is the longest of reading memory, reading the L2 cache and multiplying (Williams, Waterman and
Patterson, "Roofline: an insightful visual performance model", 2009), stretched by how unevenly its programs fill the
multiprocessors. Absolute times are not to be trusted; the order of tiles is what is used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import sympy

from qcompile.codegen.spec import KernelSpec, Tile
from qcompile.formats import FORMATS


@dataclass(frozen=True)
class Device:
    """What the model knows of a kind of device.

    Attributes:
        processors: multiprocessors or compute units.
        memory, cache: bytes a second from memory and from the L2 cache.
        operations: bfloat16 tensor operations a second; 8-bit ones are twice as fast.
        shared: bytes of shared memory that a program may use.
    """

    processors: int
    memory: float
    cache: float
    operations: float
    shared: int


_DEVICES = {
    "sm_80": Device(108, 1.9e12, 5e12, 312e12, 163 * 1024),
    "sm_90": Device(132, 3.3e12, 7e12, 990e12, 227 * 1024),
    "sm_100": Device(148, 8e12, 15e12, 2250e12, 227 * 1024),
    "gfx942": Device(304, 5.3e12, 10e12, 1300e12, 64 * 1024),
}
_SMALL = Device(80, 0.9e12, 3e12, 150e12, 64 * 1024)
"""For every other device: what the least of them has."""


def device_of(target: str) -> Device:
    return _DEVICES.get(target, _SMALL)


_M, _N, _K, _BITS, _X, _Y = sympy.symbols("M N K bits x_bytes y_bytes", positive=True)
_TM, _TN, _Z, _SMS = sympy.symbols("tile_m tile_n split processors", positive=True)
_PROGRAMS = sympy.ceiling(_M / _TM) * sympy.ceiling(_N / _TN) * _Z

EXPRESSIONS: dict[str, sympy.Expr] = {
    "memory": _N * _K * _BITS / 8 + _M * _K * _X + _M * _N * _Y,
    "cache": sympy.ceiling(_M / _TM) * _N * _K * _BITS / 8
    + sympy.ceiling(_N / _TN) * _M * _K * _X
    + sympy.Piecewise((0, sympy.Eq(_Z, 1)), (8 * _Z * _M * _N, True)),
    "operations": 2 * sympy.ceiling(_M / _TM) * _TM * sympy.ceiling(_N / _TN) * _TN * _K,
    "fill": sympy.ceiling(_PROGRAMS / _SMS) * _SMS / _PROGRAMS,
}
"""Bytes from memory, bytes through the L2 cache, operations, and how many times longer uneven filling makes it."""

_SYMBOLS = (_M, _N, _K, _BITS, _X, _Y, _TM, _TN, _Z, _SMS)
_SPLIT_COST = 2e-6
"""Seconds that adding parts of K at the end takes."""


@functools.cache
def _compiled() -> dict[str, Callable[..., float]]:
    return {name: sympy.lambdify(_SYMBOLS, expression, "math") for name, expression in EXPRESSIONS.items()}


_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def seconds(spec: KernelSpec, m: int) -> float:
    """The model's time of a kernel for M = `m`."""
    device, tile = device_of(spec.target), spec.tile
    given = (
        m,
        spec.n,
        spec.k,
        FORMATS[spec.weight].bits,
        _BYTES.get(spec.x_dtype, 1),
        _BYTES[spec.out_dtype],
        tile.m,
        tile.n,
        tile.split,
        device.processors,
    )
    value = {name: compute(*given) for name, compute in _compiled().items()}
    rate = device.operations * {"int8": 2, "fp8": 2, "float32": 1 / 6}.get(spec.compute, 1)
    # A few resident programs hide each other's latency: filling counts fully for arithmetic, and for memory up to the
    # point where half the processors have work.
    programs = -(-m // tile.m) * -(-spec.n // tile.n) * tile.split
    reading = max(value["memory"] / device.memory, value["cache"] / device.cache)
    reading *= max(1.0, 2 * device.processors / programs)
    return max(reading, value["operations"] / rate * value["fill"]) + (_SPLIT_COST if tile.split > 1 else 0.0)


def shared_bytes(spec: KernelSpec) -> int:
    """Shared memory of the pipeline's stages, from above."""
    tile = spec.tile
    x = tile.m * tile.k * max(_BYTES.get(spec.x_dtype, 1), 1)
    weight = tile.n * tile.k * FORMATS[spec.weight].bits // 8
    return tile.stages * (x + weight) + 4 * tile.m * tile.n


def candidates(like: KernelSpec, m: int) -> list[KernelSpec]:
    """`like` with each tile that its template can run, without spilling registers, for M up to `m`."""
    largest = 32 if like.compute == "float32" else 128
    cover = next((size for size in (16, 32, 64, 128) if size >= min(m, largest)), 128)
    fragment = like.template == "gemm_fragment"
    # 8-bit values that become wider take as many times the registers.
    deepest = {"bfloat16": 64, "float16": 64, "float32": 32}.get(like.compute, 128)
    found = []
    for block_m in (64, 128) if cover == 128 else (cover,):
        for block_n in (64, 128):
            if fragment:
                deep = (64,) if like.compute == "float32" else (128, 256) if block_m <= 32 else (64, 128)
                depths = [d for d in deep if d <= like.k] or [64]
                warps = 4 * (block_n // 64)  # a warp group takes 64 rows
            else:
                depths = [next(d for d in (32, 64, 128) if d >= min(like.columns, deepest))]
                # Sums of blocks have a second accumulator beside the total.
                crowded = (like.groups > 1 and block_m * block_n >= 64 * 128) or like.compute == "float32"
                warps = 8 if block_m > 64 or crowded else 4
            for block_k in depths:
                for split in (1, 2, 4, 8):
                    if split == 1 or (2 * split * block_k <= like.k and block_m <= 64):
                        tile = Tile(m=block_m, n=block_n, k=block_k, split=split, warps=warps, stages=3)
                        found.append(replace(like, tile=tile))
    return found


def rank(specs: list[KernelSpec], m: int, keep: int = 5) -> list[KernelSpec]:
    """The kernels that fit the device, the one that the model finds fastest first."""
    fitting = [spec for spec in specs if shared_bytes(spec) <= device_of(spec.target).shared]
    ordered = sorted(fitting or specs[:1], key=lambda spec: (seconds(spec, m), spec.tile.split, spec.tile.n))
    return ordered[:keep]
