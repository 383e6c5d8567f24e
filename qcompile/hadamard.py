"""The Hadamard transform of a tensor's last axis, in plain torch, so that compilers see through it.

A Hadamard matrix has entries of one magnitude and orthogonal rows: it spreads what stands out in one place over all.
That of a size is the Kronecker product of small ones, which are multiplied one after the other. Those of powers of two
are Sylvester's; for other sizes Paley's two constructions are tried ("On orthogonal matrices", 1933). Where there is
none, such as for 43 * 256, blocks of a power of two are turned by themselves.

It is QuaRot's online transform (Ashkboos et al. 2024, arXiv:2404.00456), R4 of SpinQuant (arXiv:2405.16406).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

_WIDEST = 64
"""Largest factor of a power of two, each of which is a small product."""
_LARGEST = 256
"""Largest matrix of Paley's."""


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _paley(size: int) -> bool:
    """Whether one of Paley's constructions has this size."""
    return size % 4 == 0 and (_is_prime(size - 1) or (size // 2 % 4 == 2 and _is_prime(size // 2 - 1)))


@functools.cache
def factors(size: int) -> tuple[int, ...]:
    """Sizes of the Hadamard matrices whose Kronecker product turns runs of an axis; their product divides `size`."""
    power = size & -size
    odd = size // power
    first = next((m for m in (odd << i for i in range(2, power.bit_length())) if m <= _LARGEST and _paley(m)), 0)
    bits = (power if odd == 1 or not first else size // first).bit_length() - 1
    count = -(-bits // (_WIDEST.bit_length() - 1))
    powers = [1 << (bits // count + (i < bits % count)) for i in range(count)]
    return (*((first,) if odd > 1 and first else ()), *powers)


def transform(x: Tensor, *, transposed: bool = False) -> Tensor:
    """x T, of x's shape and type: T is `gain(K) ** 0.5` times an orthogonal matrix [K, K].

    Entries of T are 0 or of one magnitude, a power of two, which every floating type holds.

    Args:
        x: floating point [..., K].
        transposed: multiply by the transposed matrix.
    """
    y, after = x, 1
    for size in reversed(factors(x.shape[-1])):
        matrix = _matrix(size, x.device).to(x.dtype) * _unit(size)
        matrix = matrix.t() if transposed else matrix
        y = y.reshape(-1, size) @ matrix if after == 1 else matrix.t() @ y.reshape(-1, size, after)
        after *= size
    return y.reshape(x.shape)


def _unit(size: int) -> float:
    """The magnitude of a factor's entries."""
    return float(2.0 ** -round(math.log2(size) / 2))


def gain(columns: int) -> float:
    """T T^T over the identity, of `transform` for an axis of `columns`."""
    return math.prod(size * _unit(size) ** 2 for size in factors(columns))


def turn_weight(weight: Tensor) -> Tensor:
    """The float32 weight [N, K] whose product with turned inputs is that of `weight` with inputs as they are."""
    return (transform(weight.double()) / gain(weight.shape[1])).float()


def unturn_weight(weight: Tensor) -> Tensor:
    """The inverse of `turn_weight`, up to rounding: float32."""
    return transform(weight.double(), transposed=True).float()


def turn_gram(gram: Tensor) -> Tensor:
    """The mean of x x^T over turned inputs, float32 [K, K], from that over inputs as they are."""
    half = transform(gram.double()).t()
    return transform(half).t().float().contiguous()


def _matrix(size: int, device: torch.device) -> Tensor:
    """A Hadamard matrix [size, size] of 1 and -1, int64; made by arithmetic, so that it is no constant of a graph."""
    i = torch.arange(size, device=device)
    if size & (size - 1) == 0:
        both = i[:, None] & i
        for shift in (4, 2, 1):
            both = both ^ (both >> shift)
        return 1 - 2 * (both & 1)
    if _is_prime(size - 1):
        q, one = size - 1, i[:, None] == i
        inner = torch.where(one, 1, _character(i[:, None] - i, q))
        edge = torch.where(i[:, None] == 0, 1, -1)
        return torch.where(one, 1, torch.where((i[:, None] == 0) | (i == 0), edge, inner))
    q, of, parity = size // 2 - 1, i // 2, i % 2
    inner = _character(of[:, None] - of, q)
    conference = torch.where((of[:, None] == 0) | (of == 0), 1, inner)
    beside = 1 - 2 * (parity[:, None] * parity)  # [[1, 1], [1, -1]]
    on_diagonal = torch.where(parity[:, None] + parity == 0, 1, -1)  # [[1, -1], [-1, -1]]
    return torch.where(of[:, None] == of, on_diagonal, conference * beside)


def _character(difference: Tensor, q: int) -> Tensor:
    """1 for squares modulo a prime q, else -1, and 0 for multiples of q: Euler's criterion."""
    base, power = difference.remainder(q), (q - 1) // 2
    result = torch.ones_like(base)
    while power:
        if power & 1:
            result = result * base % q
        base, power = base * base % q, power >> 1
    return torch.where(result == q - 1, -1, result)
