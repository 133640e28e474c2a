"""What is measured on trained models: codes that differ, the noise at each op, and how weights lie on their grid."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from experiments.demo.model import OPS, Params, op_outputs
from experiments.demo.results import CodesCompared, WeightHistogram

_BINS_PER_STEP = 4


def compare_codes(
    simulated: Mapping[str, qjax.QTensor], integer: Mapping[str, qjax.QTensor]
) -> dict[str, CodesCompared]:
    """Count the codes that differ at each quantization point.

    Raises:
      ValueError: The two have different points, or a point has two shapes: then nothing was compared.
    """
    if simulated.keys() != integer.keys():
        only = sorted(simulated.keys() ^ integer.keys())
        raise ValueError(f"compare_codes: these points are in one of the two alone: {', '.join(only)}.")
    compared: dict[str, CodesCompared] = {}
    for point, expected in simulated.items():
        codes = [np.asarray(q.codes) for q in (expected, integer[point])]
        if codes[0].shape != codes[1].shape:
            raise ValueError(f"compare_codes: {point} has shapes {codes[0].shape} and {codes[1].shape}.")
        compared[point] = {"compared": codes[0].size, "differ": int(np.count_nonzero(codes[0] != codes[1]))}
    return compared


def check_equal(compared: Mapping[str, CodesCompared]) -> None:
    """Leave the program when a code differs: what follows would claim what is not so."""
    differing = [
        f"{point}: {counts['differ']} of {counts['compared']}" for point, counts in compared.items() if counts["differ"]
    ]
    if differing:
        raise SystemExit("The integer program computes other codes than the simulation:\n  " + "\n  ".join(differing))


def sqnr_db(reference: jax.Array, noisy: jax.Array) -> jax.Array:
    """Return the signal-to-quantization-noise ratio `10 · log10(Σ reference² / Σ (reference − noisy)²)` in decibels."""
    return 10.0 * jnp.log10(jnp.sum(jnp.square(reference)) / jnp.sum(jnp.square(reference - noisy)))


@jax.jit
def op_sqnr(simulated: Mapping[str, qjax.QTensor], params: Params, x: jax.Array) -> dict[str, jax.Array]:
    """Return the SQNR of what each op gives out: its codes' reals against float arithmetic with the same parameters.

    Errors add up along the network, so an op's figure holds the noise of all ops before it.

    Args:
      simulated: From `prepared.codes(qvars, params, x)`.
      params: The float parameters that were quantized.
      x: The images, shape (n, 8, 8, 1).
    """
    reference = op_outputs(params, x)
    return {op: sqnr_db(reference[op], simulated[f"{op}/output"].dequantize()) for op in OPS}


def weight_histogram(op: str, setting: str, kernel: jax.Array, codes: qjax.QTensor) -> WeightHistogram:
    """Count the weights of an op before and after rounding, each divided by the scale of its output channel.

    Args:
      op: Its name.
      setting: The name of the setting.
      kernel: The float weights, output channels last.
      codes: Their codes, one scale for each output channel.
    """
    low, high = int(codes.spec.quant_min), int(codes.spec.quant_max)
    # The scale maps the largest weight to quant_max + ½ (torch's rule), so half a step on either side holds them all.
    edges = np.linspace(low - 0.5, high + 0.5, (high - low + 1) * _BINS_PER_STEP + 1)
    steps = np.asarray(kernel) / np.asarray(codes.scale)[None, None, None, :]
    grid = np.arange(low, high + 1)
    return {
        "op": op,
        "setting": setting,
        "edges": edges.tolist(),
        "float_counts": np.histogram(np.clip(steps, edges[0], edges[-1]), edges)[0].tolist(),
        "codes": grid.tolist(),
        "code_counts": [int(np.count_nonzero(np.asarray(codes.codes) == code)) for code in grid],
    }
