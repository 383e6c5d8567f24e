"""Devices that kernels are generated for: their rates, and the products that people know them by."""

from __future__ import annotations

from dataclasses import dataclass, replace


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


@dataclass(frozen=True, kw_only=True)
class Card:
    """A product that has a device's kind.

    Attributes:
        target: what kernels are generated for.
        capacity: bytes of memory.
        device: its rates.
        tuned: the name of its table in `codegen/tuned`; "" if there is none.
    """

    target: str
    capacity: int
    device: Device
    tuned: str = ""


_SHARED_89 = 99 * 1024
CARDS: dict[str, Card] = {
    "a100": Card(target="sm_80", capacity=80 * 10**9, device=replace(_DEVICES["sm_80"], memory=2.0e12)),
    "a100-40gb": Card(target="sm_80", capacity=40 * 10**9, device=replace(_DEVICES["sm_80"], memory=1.55e12)),
    "3090": Card(target="sm_86", capacity=24 * 10**9, device=Device(82, 0.936e12, 2.2e12, 71e12, _SHARED_89)),
    "4090": Card(target="sm_89", capacity=24 * 10**9, device=Device(128, 1.008e12, 5e12, 165e12, _SHARED_89)),
    "l4": Card(target="sm_89", capacity=24 * 10**9, device=Device(58, 0.3e12, 2e12, 121e12, _SHARED_89)),
    "l40s": Card(target="sm_89", capacity=48 * 10**9, device=Device(142, 0.864e12, 5e12, 362e12, _SHARED_89)),
    "h100": Card(target="sm_90", capacity=80 * 10**9, device=_DEVICES["sm_90"], tuned="nvidia-h100"),
    "h200": Card(target="sm_90", capacity=141 * 10**9, device=replace(_DEVICES["sm_90"], memory=4.8e12)),
    "b200": Card(target="sm_100", capacity=180 * 10**9, device=_DEVICES["sm_100"]),
    "5090": Card(target="sm_120", capacity=32 * 10**9, device=Device(170, 1.79e12, 6e12, 209e12, _SHARED_89)),
    "mi300x": Card(target="gfx942", capacity=192 * 10**9, device=_DEVICES["gfx942"]),
}
"""By the names that people know them by; rates of data sheets, without sparsity, and estimates of the L2 caches'."""
