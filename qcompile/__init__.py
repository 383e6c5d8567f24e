"""A quantizing compiler for PyTorch: `torch.compile(model, backend="qcompile", options={"config": "int4"})`."""

from qcompile.checkpoint.loader import load
from qcompile.checkpoint.saving import save
from qcompile.config import QuantConfig
from qcompile.decorator import quantized
from qcompile.quantize import quantize_
from qcompile.report import explain

__version__ = "0.1.0"
__all__ = ["QuantConfig", "explain", "load", "quantize_", "quantized", "save"]
