"""Has a tensor changed since it was last looked at?"""

from __future__ import annotations

from torch import Tensor


def version(tensor: Tensor) -> tuple[int, int]:
    """A value that changes with in-place edits and with assignments to `.data` (inference tensors track only those)."""
    return (0 if tensor.is_inference() else tensor._version, tensor.data_ptr())
