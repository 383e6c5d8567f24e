"""A quantizing compiler for PyTorch: `torch.compile(model, backend="qcompile", options={"config": "int4"})`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qcompile.checkpoint.loader import load
from qcompile.checkpoint.saving import save
from qcompile.config import QuantConfig
from qcompile.decorator import quantized
from qcompile.quantize import quantize_
from qcompile.report import explain

if TYPE_CHECKING:
    from qcompile.integrations.transformers import TransformersConfig

__version__ = "0.1.0"
__all__ = ["QuantConfig", "TransformersConfig", "explain", "load", "quantize_", "quantized", "save"]


def __getattr__(name: str) -> Any:
    """`TransformersConfig`, which needs transformers, is imported when it is asked for."""
    if name != "TransformersConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from qcompile.integrations.transformers import TransformersConfig

    return TransformersConfig
