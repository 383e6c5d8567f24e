"""Saving quantized models, one file a format."""

from qcompile.checkpoint.saving.base import Rounded, Saved
from qcompile.checkpoint.saving.save import FORMATS, save

__all__ = ["FORMATS", "Rounded", "Saved", "save"]
