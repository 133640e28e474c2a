"""qjax: simulated quantization in JAX, trained through and handed to PyTorch. See README.md."""

from qjax import containers, estimators, integer, interop, observers, transform
from qjax._fake_quantize import fake_quantize
from qjax._formats import Int, int2, int4, int8, uint2, uint4, uint8
from qjax._qparams import QParams, choose_qparams
from qjax._quantize import QTensor, dequantize, quantize
from qjax._spec import PerChannel, PerTensor, QuantSpec
from qjax.integer import IntegerOp, IntegerProgram, convert
from qjax.transform import Prepared, QuantVars, Recipe, RecipeError, Rule, prepare

__all__ = [
    "Int",
    "IntegerOp",
    "IntegerProgram",
    "PerChannel",
    "PerTensor",
    "Prepared",
    "QParams",
    "QTensor",
    "QuantSpec",
    "QuantVars",
    "Recipe",
    "RecipeError",
    "Rule",
    "choose_qparams",
    "containers",
    "convert",
    "dequantize",
    "estimators",
    "fake_quantize",
    "int2",
    "int4",
    "int8",
    "integer",
    "interop",
    "observers",
    "prepare",
    "quantize",
    "transform",
    "uint2",
    "uint4",
    "uint8",
]
