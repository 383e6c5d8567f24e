"""A quantizing compiler for PyTorch: `torch.compile(model, backend="qcompile", options={"config": "int4"})`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qcompile.calibrate.assign import choose_schemes
from qcompile.checkpoint.loader import load
from qcompile.checkpoint.saving import save
from qcompile.config import QuantConfig
from qcompile.decorator import quantized
from qcompile.errors import suggestion
from qcompile.parallel import parallelize
from qcompile.quantize import quantize_
from qcompile.report import explain

if TYPE_CHECKING:
    from qcompile.integrations.caches import TransformersCache, calibrate_kv_cache
    from qcompile.integrations.paged_caches import TransformersPagedCache
    from qcompile.integrations.transformers import TransformersConfig

__version__ = "0.1.0"
__all__ = [
    "QuantConfig",
    "TransformersCache",
    "TransformersConfig",
    "TransformersPagedCache",
    "calibrate_kv_cache",
    "choose_schemes",
    "explain",
    "load",
    "parallelize",
    "quantize_",
    "quantized",
    "save",
]

_NEEDS_TRANSFORMERS = {
    "TransformersCache": "qcompile.integrations.caches",
    "TransformersConfig": "qcompile.integrations.transformers",
    "TransformersPagedCache": "qcompile.integrations.paged_caches",
    "calibrate_kv_cache": "qcompile.integrations.caches",
}


def __getattr__(name: str) -> Any:
    """What needs transformers is imported when it is asked for."""
    if name not in _NEEDS_TRANSFORMERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; {suggestion(name, __all__)}")
    return getattr(importlib.import_module(_NEEDS_TRANSFORMERS[name]), name)
