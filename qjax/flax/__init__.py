"""Adapters for Flax: a Linen module prepared beside `init` and `apply`, an NNX module that holds its quantizers."""

from qjax.flax import linen, nnx

__all__ = ["linen", "nnx"]
