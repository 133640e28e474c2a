"""How far two quantization points lie apart, and the likely reason, inferred from their numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from qjax._codes import value_of
from qjax._formats import Format, Int
from qjax._granularity import block_shape
from qjax._quantize import QTensor
from qjax.interop._explain.code_statistics import pieces
from qjax.interop._points import QuantPoint

_SAME_RATIO = 1e-6  # a few roundings to float32 and not more
_FEW_ULPS = 4
_RULES = {
    "half": "(quant_max - quant_min) / 2, as torch's observers do",
    "max": "quant_max, as narrow-range libraries do",
    "min": "-quant_min, as torch's fused kernel does where the minimum is the largest",
}


class CodeDifference(NamedTuple):
    """Two tensors of codes, element by element."""

    size: int
    differ: int  # codes that are different
    largest: float  # difference of two codes; a whole number but for small floats
    steps: float  # difference of two reals, in steps of the first's scale
    near: float  # share of the elements whose reals are at most half a step of each apart
    correlation: float  # of the reals
    permuted: bool  # whether the codes are the same ones in another order


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PointDifference:
    """One point of two models that differs.

    Args:
      op: The module's path.
      role: Weight, input or output.
      name: What to call the point, with the stage of QAT.
      a: The point of the first model.
      b: The point of the second.
      codes: Codes that differ, of how many; None where one of them has no codes.
      largest_code: The largest difference of two codes.
      ulps: The largest difference of two scales, in units in the last place of a float32; None where they are not paired.
      ratio: The smallest and the largest scale of the first divided by that of the second.
      zero_point: The largest difference of two zero_points.
      effect: In steps of the first's scale, by how much a value may differ.
      reason: The likely reason.
    """

    op: str
    role: str
    name: str
    a: QuantPoint
    b: QuantPoint
    codes: tuple[int, int] | None
    largest_code: float | None
    ulps: int | None
    ratio: tuple[float, float] | None
    zero_point: int | float | None
    effect: float
    reason: str


def difference(name: str, a: QuantPoint, b: QuantPoint, tensors: tuple[Any, Any]) -> PointDifference | None:
    """Compare two points of one name, and their codes where both have them; None where nothing differs."""
    assert a.scale is not None
    assert b.scale is not None
    assert a.zero_point is not None
    assert b.zero_point is not None
    codes = _codes(a, b, tensors)
    same_scale = np.array_equal(a.scale.reshape(-1), b.scale.reshape(-1), equal_nan=True)
    same_zero = np.array_equal(a.zero_point.reshape(-1), b.zero_point.reshape(-1), equal_nan=True)
    same_kind = (a.dtype, a.axis) == (b.dtype, b.axis) and (not _range_differs(a, b))
    if same_scale and same_zero and same_kind and (not codes.differ if codes is not None else _same_codes(*tensors)):
        return None
    paired = a.scale.size == b.scale.size or 1 in (a.scale.size, b.scale.size)
    pairs = np.broadcast_arrays(a.scale.reshape(-1), b.scale.reshape(-1)) if paired else None
    ulps = ratio = zero = None
    if pairs is not None and a.valid and b.valid:
        x, y = (side.astype(np.float32).view(np.int32).astype(np.int64) for side in map(np.ascontiguousarray, pairs))
        ulps = int(np.max(np.abs(x - y), initial=0)) if a.scale.size == b.scale.size else None
        quotients = pairs[0].astype(np.float64) / pairs[1].astype(np.float64)
        ratio = float(quotients.min()), float(quotients.max())
        points = np.broadcast_arrays(a.zero_point.reshape(-1), b.zero_point.reshape(-1))
        zero = np.max(np.abs(points[0].astype(np.float64) - points[1].astype(np.float64)), initial=0).item()
        zero = int(zero) if zero == int(zero) else zero
    return PointDifference(
        op=a.op,
        role=a.role,
        name=name,
        a=a,
        b=b,
        codes=None if codes is None else (codes.differ, codes.size),
        largest_code=None if codes is None else codes.largest,
        ulps=ulps,
        ratio=ratio,
        zero_point=zero,
        effect=codes.steps if codes is not None else _effect(a, b, pairs),
        reason=_reason(a, b, ratio, ulps, zero, codes, tensors),
    )


def _range_differs(a: QuantPoint, b: QuantPoint) -> bool:
    """Whether the codes in use are known to differ: a converted file does not hold by which range it was observed."""
    known = all(point.codes_from.kind not in ("fixed", "assumed") for point in (a, b))
    return known and (a.quant_min, a.quant_max) != (b.quant_min, b.quant_max)


def _effect(a: QuantPoint, b: QuantPoint, pairs: Sequence[np.ndarray] | None) -> float:
    """The largest difference of what the two ends of the codes stand for, in steps of the first."""
    if pairs is None or not a.valid or not b.valid or a.quant_min is None or b.quant_min is None:
        return float("inf")
    assert a.quant_max is not None
    assert b.quant_max is not None
    ends = (a.quant_min, b.quant_min), (a.quant_max, b.quant_max)
    if a.dtype == b.dtype:  # codes that both have
        ends = tuple((end, end) for end in (max(a.quant_min, b.quant_min), min(a.quant_max, b.quant_max)))
    assert a.zero_point is not None
    assert b.zero_point is not None
    scale_a, scale_b = (side.astype(np.float64) for side in pairs)
    zero_a, zero_b = (zero.reshape(-1).astype(np.float64) for zero in (a.zero_point, b.zero_point))
    found = [np.max(np.abs((q_a - zero_a) - (q_b - zero_b) * (scale_b / scale_a)), initial=0) for q_a, q_b in ends]
    return float(max(found))


def _codes(a: QuantPoint, b: QuantPoint, tensors: tuple[Any, Any]) -> CodeDifference | None:
    """Element by element and in pieces; None where there are no two tensors of integer codes of one shape."""
    first, second = tensors
    if not isinstance(first, QTensor) or not isinstance(second, QTensor) or not a.valid or not b.valid:
        return None
    formats = first.spec.format, second.spec.format
    if not all(isinstance(each, Int) for each in formats) and formats[0] != formats[1]:
        return None
    x, y = np.asarray(first.codes), np.asarray(second.codes)
    if x.shape != y.shape:
        return None
    differ = near = 0
    largest = steps = 0.0
    sums = np.zeros(5)
    counts = [np.zeros(2**16, np.int64), np.zeros(2**16, np.int64)]
    for piece in pieces(x.shape, 2**20):
        p, q = (_numbers(part[piece], each) for part, each in zip((x, y), formats, strict=True))
        apart = np.abs(p - q)
        differ += int(np.count_nonzero(x[piece] != y[piece]))
        largest = max(largest, float(apart.max(initial=0)))
        scale_a, scale_b = (_of_piece(point.scale, point, x.shape, piece) for point in (a, b))
        zero_a, zero_b = (_of_piece(point.zero_point, point, x.shape, piece) for point in (a, b))
        real_a, real_b = (p - zero_a) * scale_a, (q - zero_b) * scale_b
        gap = np.abs(real_a - real_b)
        steps = max(steps, float(np.max(gap / scale_a, initial=0)))
        near += int(np.count_nonzero(gap <= 0.5 * (scale_a + scale_b) * (1 + 1e-5)))
        sums += [real_a.sum(), real_b.sum(), np.square(real_a).sum(), np.square(real_b).sum(), (real_a * real_b).sum()]
        for count, part in zip(counts, (x[piece], y[piece]), strict=True):
            count += np.bincount((part.astype(np.int32) & 0xFFFF).reshape(-1), minlength=2**16)
    size = max(x.size, 1)
    mean_a, mean_b, square_a, square_b, product = sums / size
    spread = np.sqrt(max(square_a - mean_a**2, 0) * max(square_b - mean_b**2, 0))
    correlation = float((product - mean_a * mean_b) / spread) if spread > 0 else float(differ == 0)
    permuted = differ > 0 and np.array_equal(counts[0], counts[1])
    largest = int(largest) if largest == int(largest) else largest
    return CodeDifference(x.size, differ, largest, steps, near / size, correlation, permuted)


def _numbers(codes: np.ndarray, number_format: Format) -> np.ndarray:
    """What codes stand for before they are scaled; a NaN is taken for 0, which leaves it out of sums."""
    if isinstance(number_format, Int):
        return codes.astype(np.int32)
    return np.nan_to_num(np.asarray(value_of(jnp.asarray(codes), number_format)))


def _same_codes(first: Any, second: Any) -> bool:
    """Whether two tensors have the same codes; of what is no tensor of codes, there are none that differ."""
    if not isinstance(first, QTensor) or not isinstance(second, QTensor):
        return True
    x, y = np.asarray(first.codes), np.asarray(second.codes)
    return x.shape == y.shape and all(np.array_equal(x[piece], y[piece]) for piece in pieces(x.shape))


def _of_piece(values: Any, point: QuantPoint, shape: tuple[int, ...], piece: tuple[slice, ...]) -> np.ndarray:
    """The scales or zero_points of a piece of the codes, in float64, laid out to broadcast against it."""
    values = np.asarray(values).astype(np.float64)
    if values.size == 1:
        return values.reshape(())
    if point.axis is not None:
        part = values.reshape(-1)[piece[point.axis]] if point.axis < len(piece) else values.reshape(-1)
        return part.reshape([-1 if axis == point.axis else 1 for axis in range(len(shape))])
    assert point.spec is not None
    for axis, size in enumerate(block_shape(shape, point.spec.granularity, "compare")):
        where = piece[axis] if axis < len(piece) else slice(0, shape[axis])
        index = np.arange(where.start or 0, shape[axis] if where.stop is None else where.stop) // max(size, 1)
        values = np.take(values, index, axis=axis)
    return values


def _reason(
    a: QuantPoint,
    b: QuantPoint,
    ratio: tuple[float, float] | None,
    ulps: int | None,
    zero: int | float | None,
    codes: CodeDifference | None,
    tensors: tuple[Any, Any],
) -> str:
    assert a.scale is not None
    assert b.scale is not None
    shapes = [np.shape(tensor.codes) for tensor in tensors if isinstance(tensor, QTensor)]
    if len(shapes) == 2 and shapes[0] != shapes[1]:
        return f"another shape: {_x(shapes[0])} against {_x(shapes[1])}"
    if not a.valid or not b.valid:
        return "a scale that is no positive number"
    if a.dtype != b.dtype:
        return f"another dtype: {a.dtype} against {b.dtype}"
    if codes is not None and codes.permuted and codes.near < 0.9:
        return "axis or layout: the same codes in another order, such as HWIO for OIHW, or a feature map flattened otherwise"
    if a.scale.size != b.scale.size or (a.axis is None) != (b.axis is None):
        return _granularity(a, b)
    if a.axis != b.axis:
        return f"axis: a scale for each channel of axis {a.axis} against axis {b.axis}"
    if codes is not None and codes.correlation < 0.9 and codes.near < 0.9:
        return "other weights altogether"
    if ratio == (1.0, 1.0):
        return _of_equal_scales(a, b, zero, codes)
    rule = _scale_rule(a, b)
    if rule is not None:
        return rule
    if ulps is not None and ulps <= _FEW_ULPS:
        return (
            f"rounding order: the scales are {ulps} ulp apart, as when one range goes through other roundings (torch's C++ "
            "kernels and its Python observers)"
        )
    if _symmetric(a) != _symmetric(b) and a.role == "weight":
        return f"scheme: {_word(a)} against {_word(b)}"
    if codes is not None and codes.near < 0.99:
        return "other weights, though alike: as before and after some steps of training"
    if a.role == "weight":
        what = "the same weights, by another range" if codes is not None else "another range of the weight"
        return f"{what}: it was clipped, or observed at another time"
    return "another range: other calibration data, or another observer"


def _granularity(a: QuantPoint, b: QuantPoint) -> str:
    assert a.scale is not None
    assert b.scale is not None
    if 1 not in (a.scale.size, b.scale.size):
        return f"granularity: {a.scale.size} scales against {b.scale.size}"
    names = ("one scale for the tensor", f"{max(a.scale.size, b.scale.size)} scales, one for each channel")
    one, many = (a, b) if a.scale.size == 1 else (b, a)
    text = f"granularity: {names[0]} against {names[1]}" if one is a else f"granularity: {names[1]} against {names[0]}"
    assert one.scale is not None
    assert many.scale is not None
    quotient = float(one.scale.reshape(-1)[0]) / float(many.scale.max())
    if abs(quotient - 1) <= _SAME_RATIO:
        return f"{text}, the largest of them: the same range"
    return f"{text}; and the range is another, too"


def _of_equal_scales(a: QuantPoint, b: QuantPoint, zero: int | float | None, codes: CodeDifference | None) -> str:
    if zero:
        if zero <= 1:
            return "rounding of the zero_point: it is one off, at equal scales"
        return f"the range is shifted: zero_points are up to {zero:g} apart, at equal scales"
    if codes is not None and codes.differ:
        if codes.largest == 1:
            return (
                "rounding order: codes are one off, at equal qparams (ties, x · (1/scale) for x / scale, or zero_point added "
                "before rounding for after)"
            )
        return "other weights, at equal qparams"
    return (
        f"another range of codes: {a.quant_min}..{a.quant_max} against {b.quant_min}..{b.quant_max}, at equal qparams"
    )


def _scale_rule(a: QuantPoint, b: QuantPoint) -> str | None:
    """A known quotient of two scale rules, in every channel to a few roundings."""
    assert a.scale is not None
    assert b.scale is not None
    bits = None if a.spec is None or not isinstance(a.spec.format, Int) else a.spec.format.bits
    if bits is None or bits < 3:
        return None
    assert a.zero_point is not None
    assert b.zero_point is not None
    found = a.scale.reshape(-1).astype(np.float64) / b.scale.reshape(-1).astype(np.float64)
    moved = (a.zero_point.reshape(-1) != b.zero_point.reshape(-1)) & (a.role == "weight")
    # Where both are at eps, they are equal.
    found = found[(np.abs(found - 1) > _SAME_RATIO) & ~moved]
    if not found.size:
        return None
    # Fake-quantization's buffers, and zero_points of its own, are those of torch's fused kernel.
    fused = bool(moved.any()) or any(point.codes_from.kind == "observer" for point in (a, b))
    rule = _rule_of(found, bits, fused=fused)
    if rule is None or not moved.any():
        return rule
    count = np.count_nonzero(moved)
    return f"{rule}; in channels whose weights have one sign ({count} here) the fused kernel moves zero_point, too"


def _rule_of(found: np.ndarray, bits: int, *, fused: bool) -> str | None:
    whole, half = 2**bits - 1, 2 ** (bits - 1) - 1
    for quotient, first, second in ((whole / half, half, whole), (half / whole, whole, half)):
        if _all_near(found, quotient):
            return (
                f"reduce_range: the range divided by {first} against {second}: "
                f"{'A' if first == half else 'B'} leaves one bit free, as torch's x86 and fbgemm do"
            )
    rule = _of_two_sides(found, whole, half)
    if fused and rule is not None:
        return rule
    divisors = {"half": whole / 2, "max": float(half), "min": float(half + 1)}
    for first, x in divisors.items():
        for second, y in divisors.items():
            if first != second and _all_near(found, y / x):
                return f"scale rule: max|x| divided by {x:g}, {_RULES[first]}, against {y:g}, {_RULES[second]}"
    return rule


def _of_two_sides(found: np.ndarray, whole: int, half: int) -> str | None:
    """Torch's observers against its fused kernel, which divides each side of a range by the number of codes that it has."""
    for one, other, quotients in (
        ("A", "B", (half / (whole / 2), (half + 1) / (whole / 2))),
        ("B", "A", ((whole / 2) / half, (whole / 2) / (half + 1))),
    ):
        if all(min(abs(float(f) / q - 1) for q in quotients) <= _SAME_RATIO for f in _distinct(found)):
            return (
                f"scale rule: {one} divides max|x| by {whole / 2:g}, {_RULES['half']}; {other} takes "
                f"max(-min / {half + 1}, max / {half}), as torch's fused kernel does"
            )
    return None


def _all_near(found: np.ndarray, quotient: float) -> bool:
    return bool(np.all(np.abs(found / quotient - 1) <= _SAME_RATIO))


def _distinct(found: np.ndarray) -> np.ndarray:
    """A few of many quotients that are nearly equal."""
    return np.unique(np.round(found, 9))[:10_000]


def _symmetric(point: QuantPoint) -> bool:
    assert point.zero_point is not None
    middle = 0 if point.quant_min is None or point.quant_min < 0 else ((point.quant_max or 0) + 1) // 2
    return bool(np.all(point.zero_point == middle))


def _word(point: QuantPoint) -> str:
    return "symmetric" if _symmetric(point) else "affine"


def _x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "one number"
