"""Pallas kernels for GPUs and TPUs: faster twins of some ops, each with a predicate and the plain op as its oracle.

Nothing in qjax calls them by itself. `supports(kernel, *args)` says whether one takes its arguments, and why not. On a CPU they
are interpreted, which shows that they are right and not how fast they are. docs/kernels.md has the table.
"""

from qjax.kernels._block_formats import fake_quantize_blocks, quantize_blocks
from qjax.kernels._histogram import histogram
from qjax.kernels._int8_matmul import int8_matmul
from qjax.kernels._observe_quantize import Observed, observe_quantize
from qjax.kernels._packed_matmul import packed_matmul
from qjax.kernels._stochastic import quantize_stochastic
from qjax.kernels._support import Support, supports

__all__ = [
    "Observed",
    "Support",
    "fake_quantize_blocks",
    "histogram",
    "int8_matmul",
    "observe_quantize",
    "packed_matmul",
    "quantize_blocks",
    "quantize_stochastic",
    "supports",
]
