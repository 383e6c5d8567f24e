"""Number formats: how a stored code turns into a number. Each is described once, here."""

from qcompile.formats.base import FORMATS, Format, get_format
from qcompile.formats.floating import FloatFormat
from qcompile.formats.integer import IntegerFormat
from qcompile.formats.table import TableFormat

__all__ = ["FORMATS", "FloatFormat", "Format", "IntegerFormat", "TableFormat", "get_format"]
