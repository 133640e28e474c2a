"""Quantization of functions: trace (which value is a weight) → recipe (what to do with it) → interpret (do it)."""

from qjax.transform._fold_params import fold_batch_norm
from qjax.transform._ops import OpInfo, OpTable
from qjax.transform._prepare import Prepared, QuantVars, prepare
from qjax.transform._recipe import Recipe
from qjax.transform._rule import BatchNormChoice, RecipeError, Rule

__all__ = [
    "BatchNormChoice",
    "OpInfo",
    "OpTable",
    "Prepared",
    "QuantVars",
    "Recipe",
    "RecipeError",
    "Rule",
    "fold_batch_norm",
    "prepare",
]
