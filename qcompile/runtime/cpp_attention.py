"""Generated C++ kernels of attention over a cache, called through ctypes."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from qcompile.attention import empty_result
from qcompile.codegen.cpp_attention import CppAttentionSpec
from qcompile.runtime import cpp

_MASKS = {torch.bool: 1, torch.float32: 2, torch.bfloat16: 3, torch.float16: 4}


class _Half(ctypes.Structure):
    """The template's struct of the same name."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "head", "position")),
        *((name, ctypes.c_int64) for name in ("scale_batch", "scale_head", "scale_position", "size")),
    )


class _Rows(ctypes.Structure):
    """The template's struct of the same name."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "query")))


class _Each(ctypes.Structure):
    """The template's struct of the same name."""

    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64))


class _Attention(ctypes.Structure):
    """The template's struct of the same name."""

    _fields_ = (
        ("query", _Rows),
        ("y", _Rows),
        ("key", _Half),
        ("value", _Half),
        ("mask", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("mask_kind", "mask_batch", "mask_head", "mask_query")),
        ("pages", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("pages_batch", "page")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "group", "queries", "context")),
        ("length", _Each),
        ("start", _Each),
        *((name, ctypes.c_int64) for name in ("causal", "window")),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
    )


def _half(codes: Tensor, scale: Tensor | None, size: int) -> _Half:
    """Codes [B, H, T, width], neighbours in a row next to each other, and their scale [], [H] or [B, H, T, ...]."""
    strides: tuple[int, ...] = (0, 0, 0)
    address = None
    if scale is not None:
        address, given = scale.data_ptr(), scale.stride()
        strides = given[:3] if len(given) > 2 else (0, given[0] if given else 0, 0)
    return _Half(codes.data_ptr(), address, *codes.stride()[:3], *strides, size)


def _each(integers: Tensor | None) -> _Each:
    """Integers [] or [B] or none."""
    if integers is None:
        return _Each(None, 0)
    return _Each(integers.data_ptr(), integers.stride(0) if integers.numel() > 1 else 0)


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


class AttentionKernel:
    """The function of a loaded library.

    Raises:
        OSError: it cannot be loaded, or the operating system keeps its instructions from this process.
    """

    def __init__(self, spec: CppAttentionSpec, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        if library.prepare() != 0:
            raise OSError(f"the operating system does not permit {spec.isa}")
        self.spec = spec
        self.attention = library.attention
        self.attention.argtypes = (ctypes.POINTER(_Attention), ctypes.c_int)
        self.attention.restype = None

    def __call__(
        self,
        query: Tensor,
        key: tuple[Tensor, Tensor | None, int],
        value: tuple[Tensor, Tensor | None, int],
        mask: Tensor | None,
        length: Tensor | None,
        scale: float,
        softcap: float,
        *,
        causal: bool,
        window: int,
        start: Tensor | None = None,
        block_table: Tensor | None = None,
    ) -> Tensor:
        """softmax(query key^T) value, as `qcompile.attention.reference` has it: [B, Hq, Q, Dv] of query's dtype.

        Args:
            query: [B, Hq, Q, D], of the spec's dtype.
            key, value: codes or numbers [B, H, T, width], their scale, and their size.
            mask: broadcast to [B, Hq, Q, T].
            length, start, block_table: as in the reference.
            causal, window: as in an `AttentionSpec`.
        """
        codes, key_scale, key_size = key
        heads, page = codes.shape[1:3]
        query, codes, value_codes = _rows(query), _rows(codes), _rows(value[0])
        key_scale, value_scale = (t if t is None or t.dim() < 4 else _rows(t) for t in (key_scale, value[1]))
        y = empty_result(query, value[2])
        context, pages = page, (0, 0)
        if block_table is not None:
            block_table = _rows(block_table.to(torch.int32))
            context, pages = page * block_table.shape[1], (block_table.data_ptr(), block_table.stride(0))
        masks = [None, 0, 0, 0, 0]
        if mask is not None:
            mask = mask if mask.dtype in _MASKS else mask.to(torch.float32)
            mask = _rows(mask.expand(*query.shape[:3], context))
            masks = [mask.data_ptr(), _MASKS[mask.dtype], *mask.stride()[:3]]
        length, start = (None if t is None else t.to(torch.int64) for t in (length, start))
        given = _Attention(
            _Rows(query.data_ptr(), *query.stride()[:3]),
            _Rows(y.data_ptr(), *y.stride()[:3]),
            _half(codes, key_scale, key_size),
            _half(value_codes, value_scale, value[2]),
            *masks,
            *pages,
            page,
            len(query),
            heads,
            query.shape[1] // heads,
            query.shape[2],
            context,
            _each(length),
            _each(start),
            causal,
            window,
            scale,
            softcap,
        )
        if y.numel():
            self.attention(given, torch.get_num_threads())
        return y


@functools.cache
def load(spec: CppAttentionSpec) -> AttentionKernel | None:
    """The kernel of a spec; see `cpp.open_library`."""
    return cpp.open_library(spec, AttentionKernel, f"attention over {spec.number}, torch attends instead")
