"""What the deployed kernel computes: integer dots and convolutions, requantized; and the conversion to it."""

from qjax.integer._convert import convert
from qjax.integer._program import IntegerOp, IntegerProgram
from qjax.integer._saved import SavedProgram, load_integer

__all__ = ["IntegerOp", "IntegerProgram", "SavedProgram", "convert", "load_integer"]
