"""`qcompile::add_up`: sums of small tensors over GPUs that read each other's memory, by one kernel.

It is opaque to compilers, and chooses when it is called: what is larger than the memory that is shared goes the way of
`compat.all_reduce`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from qcompile import compat

_SHARED: dict[str, tuple[Any, Tensor]] = {}
"""By a group's name the group, and memory that its GPUs read of each other: bytes."""
LARGEST = 1 << 18
"""Bytes that are summed by one kernel; of more NCCL reads each once."""


def share(group: Any, device: torch.device) -> bool:
    """Let the GPUs of a process group read each other's memory, which all of them call; whether they can."""
    name = str(group.group_name)
    if name not in _SHARED or _SHARED[name][0] is not group:
        try:
            _SHARED[name] = group, compat.shared_memory(LARGEST, name, device)
        except (RuntimeError, AttributeError) as error:
            warnings.warn(f"the GPUs do not read each other's memory, and add by NCCL: {error}", stacklevel=2)
            return False
    return True


def _add_up(x: Tensor, group: str) -> Tensor:
    x = x.contiguous()
    size = x.numel() * x.element_size()
    if size > LARGEST or size % 16 or x.dtype not in (torch.bfloat16, torch.float32):  # that the kernel takes
        return compat.all_reduce(x, group)
    buffer = _SHARED[group][1][:size].view(x.dtype)
    return torch.ops.symm_mem.one_shot_all_reduce_copy.default(buffer, x.view(-1), "sum", group).view(x.shape)


def _shape(x: Tensor, group: str) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_library = torch.library.Library("qcompile", "FRAGMENT")
_library.define("add_up(Tensor x, str group) -> Tensor")
_library.impl("add_up", _add_up, "CUDA")
torch.library.register_fake("qcompile::add_up", _shape, lib=_library)
