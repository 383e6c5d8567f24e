"""Sums of rows over GPUs that write into each other's memory.

`qcompile::add_up` is the sum alone. Passes make it a part of the norm behind it, `qcompile::norm_quantize`, whose
kernel either is. What that memory does not hold goes the way of `compat.all_reduce`, decided when it is called.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompile import compat, norms
from qcompile.norm_spec import NormSpec, largest_sum


@dataclass(frozen=True)
class Shared:
    """What a process of a group writes and reads; the kernel in `codegen/templates/norm_quantize.py` says how.

    Attributes:
        own: int64, this GPU's memory, which all GPUs write.
        peers: int64 [size], the addresses of the memory of each.
        calls: int32 [2], on this GPU.
        rank: the process's number.
    """

    own: Tensor
    peers: Tensor
    calls: Tensor
    rank: int

    @property
    def size(self) -> int:
        return self.peers.numel()


_SHARED: dict[str, tuple[Any, Shared]] = {}
"""By a group's name the group, and its memory."""


def share(group: Any, device: torch.device) -> bool:
    """Let the GPUs of a process group write each other's memory, which all of them call; whether they can."""
    name = str(group.group_name)
    if name not in _SHARED or _SHARED[name][0] is not group:
        words = 2 * group.size() * largest_sum(group.size()) // 4
        try:
            own, peers = compat.shared_memory(group, words, torch.int64, device)
        except (RuntimeError, AttributeError) as error:
            warnings.warn(f"the GPUs do not write each other's memory, and add by NCCL: {error}", stacklevel=2)
            return False
        addresses = torch.tensor([peer.data_ptr() for peer in peers], device=device)
        calls = torch.zeros(2, dtype=torch.int32, device=device)
        _SHARED[name] = group, Shared(own, addresses, calls, group.rank())
    return True


def shared(group: str) -> Shared:
    """The memory of a group that shares some."""
    return _SHARED[group][1]


def _add_up(x: Tensor, group: str) -> Tensor:
    k = int(x.shape[-1])
    spec = NormSpec(k=k, number="", columns=k, powers=False, group=group, keep_sum=True)
    (total,) = norms.OP(x, None, None, None, spec.encode())
    return total


_library = torch.library.Library("qcompile", "FRAGMENT")
_library.define("add_up(Tensor x, str group) -> Tensor")
_library.impl("add_up", _add_up, "CompositeImplicitAutograd")
ADD_UP = torch.ops.qcompile.add_up.default
"""The sum of rows [..., K] over the processes of a group, by name; what passes look for."""
