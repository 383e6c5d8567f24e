"""Tensors seen apart from what they mean: has one changed, and its bytes."""

from __future__ import annotations

import torch
from torch import Tensor


def version(tensor: Tensor) -> tuple[int, int]:
    """A value that changes with in-place edits and with assignments to `.data` (inference tensors track only those)."""
    return (0 if tensor.is_inference() else tensor._version, tensor.data_ptr())


def by_bytes(tensor: Tensor) -> Tensor:
    """8-bit floats as uint8, all else as it is."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 and tensor.is_floating_point() else tensor
