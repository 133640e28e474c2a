"""What a program says about quantization: the points that its code names, and the tensors of the file that they are about."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from qjax._formats import Int
from qjax._granularity import Granularity, PerChannel
from qjax._quantize import QTensor
from qjax._spec import Convention, QuantSpec
from qjax.containers import FormatError
from qjax.interop._points import Origin, QuantPoint, Role, scheme_of

_LIMITS = {"uint8": (0, 255), "int8": (-128, 127), "int16": (-(2**15), 2**15 - 1), "uint16": (0, 2**16 - 1)}
_MEND = "The file is damaged or forged."


class Program(NamedTuple):
    """What the program in a file says, or what follows from the tensors beside it."""

    dialect: str
    points: tuple[QuantPoint, ...]
    claimed: frozenset[str]  # keys of tensors whose meaning the points give


def spec_of(
    dtype: str,
    low: int,
    high: int,
    *,
    symmetric: bool,
    granularity: Granularity,
    convention: Convention,
    eps: float | None = None,
) -> tuple[QuantSpec, bool] | None:
    """The spec for codes of a dtype, and whether its range is just the one given; None where the dtype has no format here."""
    if dtype not in _LIMITS:
        return None
    full = Int(int(dtype.removeprefix("u").removeprefix("int")), signed=not dtype.startswith("u"))
    narrower = [Int(bits, signed=full.signed) for bits in range(1, full.bits)] + [
        Int(bits, narrow=True) for bits in range(2, full.bits + 1) if full.signed
    ]
    options = {"symmetric": symmetric, "granularity": granularity, "convention": convention, "eps": eps}
    candidates = [QuantSpec(full, **options), QuantSpec(full, **options, reduce_range=True)]
    candidates += [QuantSpec(form, **options) for form in narrower]
    for spec in candidates:
        if (spec.quant_min, spec.quant_max) == (low, high):
            return spec, True
    return candidates[0], False


def program_point(
    op: str,
    role: Role,
    *,
    dtype: str,
    limits: tuple[int, int],
    qparams_from: Origin,
    codes_from: Origin,
    convention: Convention = "torch_decomposed",
    granularity: Granularity,
    symmetric: bool,
    scale: np.ndarray | None = None,
    zero_point: np.ndarray | None = None,
    tensor: str | None = None,
    eps: float | None = None,
) -> QuantPoint:
    """A point of a program: dtype and range are what the program says, whatever format they make."""
    found = spec_of(
        dtype.removeprefix("q"), *limits, symmetric=symmetric, granularity=granularity, convention=convention, eps=eps
    )
    plain = QuantSpec(Int(8), symmetric=symmetric, granularity=granularity)
    return QuantPoint(
        op=op,
        role=role,
        dtype=dtype,
        scheme=scheme_of(plain),
        quant_min=limits[0],
        quant_max=limits[1],
        axis=granularity.axes[0] if isinstance(granularity, PerChannel) else None,
        scale=scale,
        zero_point=zero_point,
        qparams_from=qparams_from,
        codes_from=codes_from,
        tensor=tensor,
        spec=found[0] if found is not None and found[1] else None,
    )


def qtensor(
    codes: Any, point: QuantPoint, granularity: Granularity, shape: tuple[int, ...], place: str
) -> QTensor | None:
    """Codes of the file with the qparams of a point; None where float32 does not hold these, or codes have no format here.

    Args:
      codes: What the file has.
      point: Gives dtype, range, scale and zero_point.
      granularity: Which elements share a scale.
      shape: What the scale must have, for these codes.
      place: What to call it in messages.

    Raises:
      FormatError: They contradict each other.
    """
    if not isinstance(codes, np.ndarray) or point.scale is None or point.zero_point is None or point.dtype is None:
        return None
    if codes.dtype.name != point.dtype:
        raise FormatError(f"codes of {codes.dtype.name}", expected=point.dtype, mend=_MEND, place=place)
    if point.scale.shape != shape:
        raise FormatError(
            f"a scale of shape {point.scale.shape} for codes of shape {codes.shape}",
            expected=f"shape {shape}",
            mend=_MEND,
            place=place,
        )
    if not point.valid:
        raise FormatError(
            "a scale that is not positive and finite",
            expected="a number that is",
            mend="The model was converted before its observers saw data, or the file is damaged.",
            place=place,
        )
    assert point.quant_min is not None
    assert point.quant_max is not None
    symmetric = not bool(np.any(point.zero_point)) and point.quant_min < 0
    found = spec_of(
        point.dtype,
        int(point.quant_min),
        int(point.quant_max),
        symmetric=symmetric,
        granularity=granularity,
        convention="torch_decomposed",
    )
    with np.errstate(over="ignore", under="ignore"):
        scale, zero_point = point.scale.astype(np.float32), point.zero_point.astype(np.int32)
    same = np.array_equal(scale.astype(np.float64), point.scale) and np.array_equal(zero_point, point.zero_point)
    if found is None or not same:
        return None
    spec = found[0]
    if spec.reduce_range:  # the range is of what quantizes; codes are of the whole format
        spec = spec.replace(reduce_range=False)
    return QTensor(codes, scale, zero_point, spec)  # type: ignore[arg-type]  # numpy arrays: nothing is copied to a device
