"""What the comparisons with other libraries share: tensors whose every block is full of ties, and one call of qjax.

A case is x, scale and zero_point. The three float types of x meet scales of their own type, so that a library that rounds
after every operation does, and float32 ones, so that it does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax._granularity import Granularity, statistic_shape
from tests.numerics.stress import DTYPES, SCALES, assert_same_bits, format_id, stress, zero_points

FLOAT32, BFLOAT16, FLOAT16 = DTYPES
#: The dtype of x, and that of scale.
DTYPE_PAIRS = [(FLOAT32, FLOAT32), *((x, s) for x in DTYPES[1:] for s in (x, FLOAT32))]
EAGER = DTYPE_PAIRS[:2]  # what is tried eagerly, too: float16 compiles for long
JIT, BOTH = ("jit",), ("jit", "eager")
Case = tuple[np.ndarray, np.ndarray, np.ndarray]


def pair_id(dtypes: tuple[np.dtype, np.dtype]) -> str:
    """How a pair of dtypes is called."""
    return "-".join(map(str, dtypes))


def with_dtypes(values: Iterable[Any], *few: Any) -> Any:
    """Parameters: the dtypes of x and scale, and one of the values. But for float32 and for a few values they are long."""
    params = []
    for dtypes in DTYPE_PAIRS:
        for value in values:
            short = value in few or dtypes == DTYPE_PAIRS[0]
            name = f"{pair_id(dtypes)}-{format_id(value)}"
            params.append(pytest.param(dtypes, value, id=name, marks=() if short else pytest.mark.long))
    return params


def with_dtype(names: Iterable[str], dtypes: Iterable[np.dtype], *few: str) -> Any:
    """Parameters: a name and a dtype. But for float32 and for a few names they are long."""
    return [
        pytest.param(
            name, dtype, id=f"{name}-{dtype}", marks=() if name in few or dtype == FLOAT32 else pytest.mark.long
        )
        for name in names
        for dtype in dtypes
    ]


def ways_for(number_format: qjax.Int, dtype: np.dtype) -> tuple[str, ...]:
    """Eager code compiles each operation for each shape: both ways for one format and one dtype."""
    return BOTH if number_format == qjax.int8 and dtype == FLOAT32 else JIT


def cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The same as another dtype, overflow and all."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return np.asarray(values).astype(dtype)


class Layout(NamedTuple):
    """A granularity, the block of a matrix that shares a scale, and the grid of blocks; `crop` rows and columns are cut."""

    granularity: Granularity
    block: tuple[int, int]
    grid: tuple[int, int]
    crop: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        return str(self.granularity)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of x."""
        rows, columns = (b * g - c for b, g, c in zip(self.block, self.grid, self.crop, strict=True))
        return rows, columns

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Scales or zero_points, an element of x each."""
        full = np.kron(np.asarray(values).reshape(self.grid), np.ones(self.block, np.int8)).astype(values.dtype)
        return full[: self.shape[0], : self.shape[1]]


TENSOR = Layout(qjax.PerTensor(), (8, 512), (1, 1))
CHANNEL = Layout(qjax.PerChannel(0), (1, 2048), (20, 1))
LAST_CHANNEL = Layout(qjax.PerChannel(-1), (2048, 1), (1, 20))
TOKEN = Layout(qjax.PerToken(), (1, 2048), (20, 1))
GROUP = Layout(qjax.PerGroup(-1, 32), (1, 32), (40, 33))
FIRST_GROUP = Layout(qjax.PerGroup(0, 16), (16, 1), (33, 80))
BLOCK = Layout(qjax.PerBlock((4, 16)), (4, 16), (23, 29))
RAGGED_GROUP = Layout(qjax.PerGroup(-1, 32, pad=True), (1, 32), (40, 33), (0, 5))
RAGGED_BLOCK = Layout(qjax.PerBlock((4, 16), pad=True), (4, 16), (23, 29), (3, 9))


def scales_of(dtype: np.dtype) -> np.ndarray:
    """The awkward scales, in a dtype: float16 holds six of the ten."""
    with np.errstate(over="ignore", under="ignore"):
        scales = np.array(SCALES).astype(dtype)
    return scales[(scales > 0) & np.isfinite(scales)]


def tensor_cases(
    number_format: qjax.Int, rng: np.random.Generator, dtype: np.dtype, scale_dtype: np.dtype
) -> Iterator[Case]:
    """Each scale with each zero_point, for the whole of x."""
    for scale in scales_of(scale_dtype):
        for point in np.int32(zero_points(number_format)):
            yield np.resize(stress(np.float32(scale), rng, dtype), TENSOR.shape), scale, point


def grid_cases(
    layout: Layout,
    number_format: qjax.Int,
    rng: np.random.Generator,
    dtype: np.dtype,
    scale_dtype: np.dtype,
) -> Iterator[Case]:
    """Blocks that lie at random, each with a scale, a zero_point and the ties of these."""
    scales = scales_of(scale_dtype)
    which = rng.integers(0, scales.size, math.prod(layout.grid))
    pool = [stress(np.float32(scale), rng, dtype) for scale in scales]
    blocks = np.stack([rng.choice(pool[k], math.prod(layout.block)) for k in which])
    x = blocks.reshape(*layout.grid, *layout.block).swapaxes(1, 2)
    x = x.reshape([b * g for b, g in zip(layout.block, layout.grid, strict=True)])
    x = np.ascontiguousarray(x[: layout.shape[0], : layout.shape[1]])
    points = rng.choice(zero_points(number_format), which.size).astype(np.int32)
    shape = statistic_shape(x.shape, layout.granularity)
    yield x, scales[which].reshape(shape), points.reshape(shape)


def cases(layout: Layout, number_format: qjax.Int, rng: np.random.Generator, *dtypes: np.dtype) -> Iterator[Case]:
    """The cases of any layout; dtypes are those of x and scale."""
    make = tensor_cases if layout is TENSOR else lambda *args: grid_cases(layout, *args)
    return make(number_format, rng, *dtypes)


def calls_of(spec: qjax.QuantSpec, ways: tuple[str, ...] = JIT) -> dict[str, Callable[..., Any]]:
    """Codes, their reals in the dtype of x, and fake-quantized x: "jit" and "eager"."""

    def call(x: jax.Array, scale: jax.Array, zero_point: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        qparams = qjax.QParams(scale, zero_point)
        q = qjax.quantize(x, qparams, spec)
        return q.codes, q.dequantize(x.dtype), qjax.fake_quantize(x, qparams, spec)

    every = {"jit": jax.jit(call), "eager": lambda *arrays: call(*map(jnp.asarray, arrays))}
    return {way: every[way] for way in ways}


def is_nan(x: np.ndarray) -> np.ndarray:
    """np.isnan, which for bfloat16 warns about signalling NaN."""
    with np.errstate(invalid="ignore"):
        return x != x


def positive_zero(y: np.ndarray) -> np.ndarray:
    """-0 made +0: for libraries that keep codes as floats, among which there is a -0."""
    with np.errstate(invalid="ignore"):
        return np.where(y == 0, y.dtype.type(0), y)


def compare(
    spec: qjax.QuantSpec,
    every: Iterator[Case],
    peer: Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]],
    ways: tuple[str, ...] = JIT,
) -> int:
    """Fails where codes, reals or fake-quantized x differ from the peer's; returns how many of each were compared.

    Codes are integers here, and most peers keep them as floats when they fake-quantize: where these are NaN, the reals of
    their codes are expected, and the sign of a zero is not compared.
    """
    compared, calls = 0, calls_of(spec, ways)
    for x, scale, point in every:
        codes, real, fake = peer(x, scale, point)
        fake = positive_zero(np.where(is_nan(fake), real, fake))
        for way, call in calls.items():
            what = f"{way}, scale {np.unique(scale)[:12]}, zero_point {np.unique(point)}, {spec}"
            got = call(x, scale, point)
            compared += assert_same_bits(got[0], codes.astype(spec.format.storage_dtype), f"codes, {what}", x)
            assert_same_bits(got[1], real, f"reals, {what}", x)
            assert_same_bits(positive_zero(np.asarray(got[2])), fake, f"fake-quantized, {what}", x)
    return compared


def differ(
    formula: Callable[..., np.ndarray],
    codes: np.ndarray,
    x: np.ndarray,
    scale: np.ndarray,
    point: np.ndarray,
    dtype: np.dtype,
    number_format: qjax.Int,
) -> int:
    """How many codes of finite x another formula gets wrong: formula(x, scale, zero_point, r), r rounding to the dtype."""

    def rounded(values: np.ndarray) -> np.ndarray:
        return np.asarray(values).astype(np.float32).astype(dtype).astype(np.float32)

    with np.errstate(all="ignore"):
        wide = np.where(np.isfinite(x.astype(np.float32)), x, x.dtype.type(0)).astype(np.float32)
        found = formula(wide, np.float32(scale), np.float32(point), rounded)
        found = np.clip(np.nan_to_num(found), number_format.quant_min, number_format.quant_max)
    return int(np.sum((found != codes) & np.isfinite(x.astype(np.float32))))


_MAX = 3.4028235e38
# fmt: off
_RANGES = np.float32([
    (0, 0), (-0.0, 0), (-1, 3), (-0.1, 0.1), (2, 5), (-7, -3), (5, 5), (-5, -5), (-127.5, 127.5), (-128, 127), (-1, 127),
    (-1e-12, 0), (0, 1e-30), (1e-45, 1e-40), (-1e-40, 1e-45), (0, 255 * 2.0**-23), (-3e38, 3e38), (-1e38, 2e38),
    (-6e-5, 6e-5), (-1e-7, 2e-6), (0, 65504), (-65504, 65504), (0, _MAX), (-_MAX, 0), (-_MAX, _MAX), (0, np.inf),
    (1, np.inf),
])
# fmt: on
UNDEFINED_RANGES = np.float32([(np.nan, np.nan), (np.nan, 1), (0, np.nan), (-np.inf, np.inf), (-np.inf, 0)])


def ranges(rng: np.random.Generator, dtype: np.dtype, limits: tuple[int, int] = (-20, 20)) -> tuple[np.ndarray, ...]:
    """min_val and max_val: odd ones, random ones of all sizes (e^limits), and such whose zero_point is a tie, or nearly."""
    size = np.exp(rng.uniform(*limits, 12_000)).astype(np.float32)
    both = np.sort(rng.standard_normal((12_000, 2)).astype(np.float32) * size[:, None], axis=1)
    scale = np.repeat(np.exp(rng.uniform(-5, 5, 240)), 50)
    steps = np.tile(np.arange(50), 240)
    low = (-(steps * 2 + 0.5) * scale).astype(np.float32)
    levels = rng.choice([7, 15, 127, 255], low.size)
    high = (low + levels * scale + np.spacing(low) * rng.integers(-1, 2, low.size)).astype(np.float32)
    tie = np.stack([low, high], 1)
    with np.errstate(over="ignore"):
        every = np.concatenate([_RANGES, both, tie[tie[:, 1] >= tie[:, 0]]]).astype(dtype)
    every = every[every[:, 0] > -np.inf]  # what overflowed float16
    return np.ascontiguousarray(every[:, 0]), np.ascontiguousarray(every[:, 1])


def chosen(spec: qjax.QuantSpec, ways: tuple[str, ...] = JIT) -> dict[str, Callable[..., Any]]:
    """choose_qparams for a row of ranges, "jit" and "eager": scale and zero_point."""

    def call(low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
        scale, zero_point = qjax.choose_qparams(low, high, spec.replace(granularity=qjax.PerChannel(0)))
        return scale, zero_point

    every = {"jit": jax.jit(call), "eager": lambda *arrays: call(*map(jnp.asarray, arrays))}
    return {way: every[way] for way in ways}


def halfway(form: qjax.Float) -> np.ndarray:
    """Every number of a format that is not negative, and the middles between them, ascending; float64."""
    codes = np.arange(form.max_code + 1)
    field, fraction = codes >> form.mantissa, codes % 2**form.mantissa
    significand = np.where(field > 0, 1, 0) + fraction / 2**form.mantissa
    numbers = np.ldexp(significand, np.maximum(field, 1) - form.exponent_bias)
    return np.sort(np.concatenate([numbers, (numbers[1:] + numbers[:-1]) / 2]))


def neighbours(x: np.ndarray, rng: np.random.Generator, ulps: int = 2) -> np.ndarray:
    """Each number, or one that lies some ulps from it; what would no longer be finite becomes 0."""
    bits = x.view(f"i{x.dtype.itemsize}") + rng.integers(-ulps, ulps + 1, x.shape).astype(f"i{x.dtype.itemsize}")
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(bits.view(x.dtype).astype(np.float32)), bits.view(x.dtype), x.dtype.type(0))


def float_rows(form: qjax.Float, rng: np.random.Generator, dtype: np.dtype, shape: tuple[int, int]) -> np.ndarray:
    """Rows that hold ties of the format, for the scale that takes their largest magnitude to its largest number."""
    with np.errstate(over="ignore", under="ignore"):
        amax = np.where(rng.random(shape[0]) < 0.3, rng.integers(-12, 15), rng.uniform(-12, 15, shape[0]))
        amax = np.exp2(amax).astype(np.float32).astype(dtype)[:, None]
        scale = (amax.astype(np.float32) / np.float32(form.quant_max)).astype(dtype).astype(np.float64)
        x = (rng.choice(halfway(form), shape) * rng.choice([-1, 1], shape) * scale).astype(dtype)
        x = np.clip(neighbours(x, rng).astype(np.float32), -amax.astype(np.float32), amax.astype(np.float32))
    x = x.astype(dtype)
    x[:, 0] = amax[:, 0]
    return x


def gradient_of(spec: qjax.QuantSpec) -> Callable[..., jax.Array]:
    """The gradient of fake-quantized x for a cotangent dy: a jitted function of x, scale, zero_point and dy."""

    def call(x: jax.Array, scale: jax.Array, zero_point: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: qjax.fake_quantize(x, qjax.QParams(scale, zero_point), spec), x)[1](dy)[0]

    return jax.jit(call)


def assert_same_gradient(actual: object, expected: np.ndarray, dy: np.ndarray) -> None:
    """Passes where both stop in the same places, ours is dy elsewhere and theirs dy but for a few roundings of it."""
    actual, passes = np.asarray(actual), expected != 0
    np.testing.assert_array_equal(actual != 0, passes)
    assert_same_bits(actual[passes], dy[passes])
    error = np.abs(expected.astype(np.float64) - dy.astype(np.float64))[passes]
    assert np.all(error <= 4 * float(ml_dtypes.finfo(dy.dtype).eps) * dy[passes].astype(np.float64))
