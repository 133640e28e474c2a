"""A model's integer outputs as the floats that they mean."""

from __future__ import annotations

import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from qjax._codes import value_of
from qjax._formats import Int
from qjax._granularity import block_shape, statistic_shape
from qjax.interop._points import QuantPoint

_DTYPE = re.compile(r"q?(u?)int(\d+)(x2)?")


def interpret(codes: npt.ArrayLike, point: QuantPoint) -> np.ndarray:
    """Turn integer codes into floats exactly as torch's `dequantize` does: `real = scale · (q - zero_point)`.

    | point                                       | computed as                                                           |
    |---------------------------------------------|-----------------------------------------------------------------------|
    | per tensor                                  | `f32(scale) · f32(int32(q - zero_point))`, the difference wraps in int32 |
    | per channel, group or block                 | `f32(f64(f32(q) - f32(zero_point)) · f64(scale))`                       |
    | float zero_point (`…_float_qparams`)        | `(f32(q) - zero_point) · f32(scale)`                                    |
    | small floats (float8), q the bits as uint8  | `f32(value of q) · f32(scale)`                                          |

    What torch calls `int_repr` of a quantized tensor are codes; those of a model's output belong to the point of role
    "output" of the last module that has one. For argmax they need not be interpreted where the point is per tensor: its
    scale is positive, so the order is the same.

    Args:
      codes: Integers of the point's dtype (any integer array will do), of any shape where the point is per tensor; of four
        bits and less, one code an element.
      point: From `points`; one whose qparams are known.

    Returns:
      float32, of the shape of codes.

    Raises:
      TypeError: codes are no integers, or point is no QuantPoint.
      ValueError: A code outside what the dtype holds, another number of channels, or a point without qparams.

    Examples:
      >>> import numpy as np, qjax
      >>> state = {"fc.scale": np.float32(0.25), "fc.zero_point": np.int64(3)}
      >>> import os, tempfile
      >>> path = os.path.join(tempfile.mkdtemp(), "model.pt")
      >>> qjax.interop.save(path, state)
      >>> (point,) = qjax.interop.points(qjax.interop.load(path)).of("fc", "output")
      >>> print(qjax.interop.interpret(np.array([3, 4, 255], np.uint8), point))
      [ 0.    0.25 63.  ]

    References:
      PyTorch, `aten/src/ATen/native/quantized/AffineQuantizerBase.cpp` and `AffineQuantizer.cpp`.
    """
    codes = np.asarray(codes)
    check_point(point, "interpret")
    check_codes(codes, point, "interpret")
    assert point.scale is not None
    assert point.zero_point is not None
    spec = point.spec
    if spec is not None and not isinstance(spec.format, Int):
        reals = np.asarray(value_of(jnp.asarray(codes.astype(np.uint8)), spec.format))
        return reals * _spread(point.scale.astype(np.float32), point, codes.shape)
    scale = _spread(point.scale, point, codes.shape)
    zero_point = _spread(point.zero_point, point, codes.shape)
    # What overflows a float32 is an infinity, as in torch.
    with np.errstate(over="ignore", under="ignore"):
        if point.zero_point.dtype.kind == "f":
            return (codes.astype(np.float32) - zero_point.astype(np.float32)) * scale.astype(np.float32)
        if point.scale.size == 1 and point.axis is None:
            difference = (codes.astype(np.int64) - zero_point.astype(np.int64)).astype(np.int32)
            return difference.astype(np.float32) * scale.astype(np.float32)
        difference = codes.astype(np.float32) - zero_point.astype(np.float32)
        return (difference.astype(np.float64) * scale.astype(np.float64)).astype(np.float32)


def check_point(point: Any, caller: str) -> None:
    """Refuse what is no point, and one that has no law.

    Raises:
      TypeError: It is no QuantPoint.
      ValueError: Its qparams are not known, or its scale is not positive and finite.
    """
    if not isinstance(point, QuantPoint):
        raise TypeError(
            f"{caller}: point must be a QuantPoint, got {type(point).__name__}. Take one from qjax.interop.points(checkpoint), "
            'such as .of("fc", "output")[0].'
        )
    name = f"the {point.role} of {point.op or 'the model'}"
    if point.scale is None:
        raise ValueError(
            f"{caller}: {name} has no qparams in the file ({point.qparams_from.kind.replace('_', ' ')}): "
            f"{point.qparams_from.detail}."
        )
    if not point.has_law:
        bad = point.scale[~(np.isfinite(point.scale) & (point.scale > 0))].reshape(-1)[0]
        raise ValueError(
            f"{caller}: {name} has a scale of {bad}; it must be positive and finite. The model was converted before its "
            "observers saw data, or the file is damaged."
        )


def check_codes(codes: np.ndarray, point: QuantPoint, caller: str) -> None:
    """Refuse codes that cannot be the point's.

    Raises:
      TypeError: They are no integers.
      ValueError: A code outside what the dtype holds.
    """
    name = f"the {point.role} of {point.op or 'the model'}"
    if codes.dtype.kind not in "iu":
        raise TypeError(
            f"{caller}: codes must be integers, got dtype {codes.dtype}. Floats may be real numbers already (a model that ends "
            "in a DeQuantStub returns them); of a quantized tensor, pass tensor.int_repr().numpy()."
        )
    low, high = limits_of(point)
    if codes.size and not (low <= int(codes.min()) and int(codes.max()) <= high):
        hint = (
            "They were stored as another integer type, or are of another point."
            if int(codes.max()) - int(codes.min()) <= high - low
            else "They are of another point, or sums that were not requantized."
        )
        raise ValueError(
            f"{caller}: {name} has codes of {point.dtype}, which are {low} … {high}; got {int(codes.min())} … "
            f"{int(codes.max())}. {hint}"
        )


def limits_of(point: QuantPoint) -> tuple[int, int]:
    """What the dtype holds: torch's kernels saturate there, also where an observer's range is narrower."""
    spec = point.spec
    if spec is not None and not isinstance(spec.format, Int):
        return 0, 2**spec.format.bits - 1
    match = _DTYPE.fullmatch(point.dtype or "")
    if match is None:
        assert point.quant_min is not None
        assert point.quant_max is not None
        return int(point.quant_min), int(point.quant_max)
    bits = int(match[2])
    unsigned = bool(match[1])
    return (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _spread(values: np.ndarray, point: QuantPoint, shape: tuple[int, ...]) -> np.ndarray:
    """Scale or zero_point so that it broadcasts against codes of this shape."""
    if point.axis is not None:
        if not -len(shape) <= point.axis < len(shape) or shape[point.axis] != values.size:
            raise ValueError(
                f"interpret: the {point.role} of {point.op or 'the model'} has {values.size} channels along axis {point.axis}; "
                f"got codes of shape {shape}. Pass codes in the layout of the tensor (torch's weights have channels in axis 0)."
            )
        wanted = [1] * len(shape)
        wanted[point.axis] = values.size
        return values.reshape(wanted)
    if values.size == 1:
        return values.reshape(())
    granularity = None if point.spec is None else point.spec.granularity
    wanted = None if granularity is None else statistic_shape(shape, granularity, "interpret")
    if granularity is None or wanted != values.shape:
        raise ValueError(
            f"interpret: the {point.role} of {point.op or 'the model'} has scales of shape {values.shape}, one for each "
            f"{granularity or 'part'}; got codes of shape {shape}, which want {wanted}."
        )
    for axis, size in enumerate(block_shape(shape, granularity, "interpret")):
        if axis < values.ndim and size != 1:
            values = np.repeat(values, size, axis=axis)
    return values[tuple(slice(0, size) for size in shape)]
