"""Every error says which argument, what came and what was expected; and the limits of each format."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Int, PerChannel, PerTensor, QParams, QTensor, QuantSpec
from tests.numerics.stress import format_id

PER_TENSOR = QuantSpec(qjax.int8)
PER_ROW = QuantSpec(qjax.uint4, granularity=PerChannel(0))
X = np.ones((3, 2), np.float32)
ONE, ZERO = jnp.float32(1), jnp.int32(0)


def per_row(scale=(1.0, 1.0, 1.0), zero_point=(0, 0, 0)):
    return QParams(jnp.array(scale, jnp.float32), jnp.array(zero_point, jnp.int32))


CONSTRUCTORS = {
    "bits too few": (lambda: Int(0), ValueError, ["bits", "from 1 to 16", "got 0"]),
    "bits too many": (lambda: Int(17), ValueError, ["bits", "from 1 to 16", "got 17"]),
    "bits a float": (lambda: Int(8.0), ValueError, ["bits", "integer", "got 8.0"]),
    "bits a bool": (lambda: Int(True), ValueError, ["bits", "got True"]),
    "signed a string": (lambda: Int(8, signed="no"), TypeError, ["signed", "True or False", "'no'"]),
    "observer of a format": (
        lambda: qjax.observers.min_max(qjax.int8),
        TypeError,
        ["spec must be a qjax.QuantSpec", "Int", r"qjax.QuantSpec\(qjax.int8\)"],
    ),
    "averaging constant a string": (
        lambda: qjax.observers.moving_average_min_max(PER_TENSOR, "slow"),
        TypeError,
        ["averaging_constant", "float", "'slow'"],
    ),
    "narrow unsigned": (lambda: Int(8, signed=False, narrow=True), ValueError, ["narrow=True", "signed=True"]),
    "axis not an int": (lambda: PerChannel("out"), TypeError, ["axis", "int", "'out'", "str"]),
    "axis a bool": (lambda: PerChannel(True), TypeError, ["axis", "True", "bool"]),
    "format a string": (lambda: QuantSpec("int8"), TypeError, ["format", "'int8'", "str", "qjax.int8"]),
    "granularity a class": (
        lambda: QuantSpec(qjax.int8, granularity=PerTensor),
        TypeError,
        ["granularity", r"qjax.PerTensor\(\)", "class"],
    ),
    "symmetric a string": (
        lambda: QuantSpec(qjax.int8, symmetric="per_channel"),
        TypeError,
        ["symmetric", "True or False", "'per_channel'"],
    ),
    "reduce_range a number": (
        lambda: QuantSpec(qjax.int8, reduce_range=1),
        TypeError,
        ["reduce_range", "got 1", "int"],
    ),
    "eps a string": (lambda: QuantSpec(qjax.int8, eps="tiny"), TypeError, ["eps", "float", "'tiny'"]),
    "unknown convention": (
        lambda: QuantSpec(qjax.int8, convention="tflite"),
        ValueError,
        ["convention", "'tflite'", "'torch_fake', 'torch_real'"],
    ),
    **{
        f"eps {eps}": (
            lambda eps=eps: QuantSpec(qjax.int8, eps=eps),
            ValueError,
            ["eps", "positive and finite", str(eps)],
        )
        for eps in (0.0, -1e-8, float("inf"), float("nan"), 1e-40)
    },
}

RANGES = {
    "shapes differ": (
        lambda: qjax.choose_qparams(np.zeros(3), np.ones(2), PER_ROW),
        ValueError,
        ["min_val", r"\(3,\)", "max_val", r"\(2,\)", "equal"],
    ),
    "a vector per tensor": (
        lambda: qjax.choose_qparams(np.zeros(3), np.ones(3), PER_TENSOR),
        ValueError,
        ["per_tensor", "min_val", "rank 0", r"\(3,\)"],
    ),
    "a scalar per channel": (
        lambda: qjax.choose_qparams(0.0, 1.0, PER_ROW),
        ValueError,
        [r"per_channel\(0\)", "min_val", "rank 1", r"\(\)"],
    ),
    "min above max": (
        lambda: qjax.choose_qparams(2.0, 1.0, PER_TENSOR),
        ValueError,
        ["min_val exceeds max_val", "observer"],
    ),
    "one channel's min above its max": (
        lambda: qjax.choose_qparams(np.float32([0, 2, 0]), np.ones(3, np.float32), PER_ROW),
        ValueError,
        ["min_val exceeds max_val"],
    ),
}

# For both functions that take (x, qparams, spec).
TENSORS = {
    "x an integer": ((np.ones(3, np.int32), QParams(ONE, ZERO), PER_TENSOR), TypeError, ["x", "floating", "int32"]),
    "zero_point a float": ((X, QParams(ONE, ONE), PER_TENSOR), TypeError, ["zero_point", "integer", "float32"]),
    "qparams per channel, spec per tensor": (
        (X, per_row(), PER_TENSOR),
        ValueError,
        ["scale", r"\(3,\)", r"expected \(\)", "whole tensor", "granularity"],
    ),
    "qparams per tensor, spec per channel": (
        (X, QParams(ONE, ZERO), PER_ROW),
        ValueError,
        ["scale", r"has shape \(\)", r"expected \(3,\)", "axis 0", r"\(3, 2\)"],
    ),
    "scale of another channel count": (
        (X.T, per_row(), PER_ROW),
        ValueError,
        ["scale", r"\(3,\)", r"expected \(2,\)", "axis 0", r"\(2, 3\)"],
    ),
    "zero_point of another shape": (
        (X, QParams(per_row().scale, ZERO), PER_ROW),
        ValueError,
        ["zero_point", r"has shape \(\)", r"expected \(3,\)"],
    ),
    "axis out of range": (
        (X, per_row(), PER_ROW.replace(granularity=PerChannel(2))),
        ValueError,
        ["axis 2", "rank 2", "-2 … 1"],
    ),
    "axis out of range below": (
        (X, per_row(), PER_ROW.replace(granularity=PerChannel(-3))),
        ValueError,
        ["axis -3", "rank 2"],
    ),
    "scale zero": ((X, QParams(jnp.float32(0), ZERO), PER_TENSOR), ValueError, ["scale", "positive", "got 0.0", "eps"]),
    "scale negative": ((X, QParams(-ONE, ZERO), PER_TENSOR), ValueError, ["scale", "positive", "got -1.0"]),
    "scale infinite": ((X, QParams(jnp.float32(np.inf), ZERO), PER_TENSOR), ValueError, ["scale", "finite", "got inf"]),
    "spec a format": ((X, QParams(ONE, ZERO), qjax.int8), TypeError, ["spec must be a qjax.QuantSpec", "Int"]),
    "qparams a tuple": ((X, (ONE, ZERO), PER_TENSOR), TypeError, ["qparams must be a qjax.QParams", "got tuple"]),
    "scale NaN": (
        (X, QParams(jnp.float32(np.nan), ZERO), PER_TENSOR),
        ValueError,
        ["scale", "got nan", "held NaN"],
    ),
    "one scale bad": ((X, per_row((1, -2, 1)), PER_ROW), ValueError, ["scale", "got -2.0 for channel 1"]),
    "zero_point below": (
        (X, QParams(ONE, jnp.int32(-129)), PER_TENSOR),
        ValueError,
        ["zero_point", "-128 … 127", "int8", "got -129"],
    ),
    "zero_point above": (
        (X, per_row(zero_point=(0, 15, 16)), PER_ROW),
        ValueError,
        ["zero_point", "0 … 15", "uint4", "got 16 for channel 2"],
    ),
    "zero_point beyond the reduced range": (
        (X, QParams(ONE, jnp.int32(128)), QuantSpec(qjax.uint8, reduce_range=True)),
        ValueError,
        ["zero_point", "0 … 127", "got 128"],
    ),
}


def assert_raises(call, error, words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert caught.match(word)
    return str(caught.value)


@pytest.mark.parametrize("case", CONSTRUCTORS)
def test_constructors(case):
    assert_raises(*CONSTRUCTORS[case])


@pytest.mark.parametrize("case", RANGES)
def test_ranges(case):
    call, error, words = RANGES[case]
    assert assert_raises(call, error, words).startswith("choose_qparams: ")


@pytest.mark.parametrize("name", ["quantize", "fake_quantize"])
@pytest.mark.parametrize("case", TENSORS)
def test_tensors(case, name):
    """The message begins with the function that the reader has called."""
    arguments, error, words = TENSORS[case]
    assert assert_raises(lambda: getattr(qjax, name)(*arguments), error, words).startswith(f"{name}: ")


def test_dequantize_to_integers():
    q = QTensor(jnp.zeros(2, jnp.int8), ONE, ZERO, PER_TENSOR)
    assert_raises(lambda: q.dequantize(jnp.int32), TypeError, ["dequantize: dtype", "floating", "int32"])


def test_dequantize_on_an_axis_that_is_not_there():
    q = QTensor(
        jnp.zeros(2, jnp.uint8), jnp.ones(2), jnp.zeros(2, jnp.int32), PER_ROW.replace(granularity=PerChannel(1))
    )
    assert_raises(q.dequantize, ValueError, ["dequantize", "axis 1", "rank 1"])


@pytest.mark.parametrize("case", [c for c in TENSORS if c.split()[0] in ("x", "axis", "qparams") or "shape" in c])
def test_shapes_and_dtypes_are_checked_under_jit(case):
    """Values cannot be looked at while they are traced; shapes and dtypes can."""
    (x, qparams, spec), error, words = TENSORS[case]
    assert_raises(lambda: jax.jit(lambda x, p: qjax.quantize(x, p, spec).codes)(x, qparams), error, words)


def test_values_are_not_checked_under_jit():
    low, high = jnp.float32(2), jnp.float32(1)
    scale, _ = jax.jit(lambda low, high: qjax.choose_qparams(low, high, PER_TENSOR))(low, high)
    assert float(scale) > 0
    jax.jit(lambda p: qjax.quantize(X, p, PER_TENSOR).codes)(QParams(jnp.float32(np.nan), ZERO))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("signed", "narrow"), [(True, False), (True, True), (False, False)])
def test_limits_of_a_format(signed, narrow, bits):
    """As many codes as bits can tell apart, all of which the storage dtype can hold; narrow is symmetric about 0."""
    number_format = Int(bits, signed=signed, narrow=narrow)
    codes = np.arange(number_format.quant_min, number_format.quant_max + 1)
    assert len(codes) == 2**bits - narrow
    assert codes[0] == (0 if not signed else -codes[-1] - (not narrow))
    np.testing.assert_array_equal(codes.astype(number_format.storage_dtype), codes)
    assert number_format.storage_dtype.itemsize == 1
    reduced = QuantSpec(number_format, reduce_range=True)
    assert (reduced.quant_min, reduced.quant_max) == (codes[0] // 2, codes[-1] // 2)


def test_presets():
    names = {"int8": -128, "uint8": 255, "int4": -8, "uint4": 15, "int2": -2, "uint2": 3}
    for name, limit in names.items():
        number_format = getattr(qjax, name)
        assert str(number_format) == name
        assert limit in (number_format.quant_min, number_format.quant_max)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (QuantSpec(qjax.int8, symmetric=True, granularity=PerChannel(-1)), "int8 symmetric per_channel(-1)"),
        (QuantSpec(qjax.uint8, reduce_range=True), "uint8 affine per_tensor 0..127"),
        (QuantSpec(Int(4, narrow=True), convention="torch_real"), "int4_narrow affine per_tensor torch_real"),
    ],
    ids=format_id,
)
def test_a_spec_reads_as_one_says_it(spec, words):
    assert str(spec) == words


def test_an_axis_may_be_a_numpy_integer():
    assert PerChannel(np.int64(1)) == PerChannel(1)
    assert type(PerChannel(np.int64(1)).axis) is int


@pytest.mark.parametrize(
    "make", [qjax.observers.min_max, qjax.observers.moving_average_min_max, qjax.observers.dynamic]
)
def test_states_of_other_channels_or_kinds_do_not_merge(make):
    observer = make(QuantSpec(qjax.int8, granularity=PerChannel(0)))
    three = observer.update(observer.init(X), X)
    one = observer.update(observer.init(X[:1]), X[:1])
    assert_raises(lambda: observer.merge(three, one), ValueError, [r"\(3,\) and \(1,\)", "same channels"])
    other = qjax.observers.moving_average_min_max if make is qjax.observers.min_max else qjax.observers.min_max
    if make is not qjax.observers.dynamic:
        foreign = other(observer.spec)
        state = foreign.update(foreign.init(X), X)
        assert_raises(lambda: observer.merge(three, state), TypeError, ["MinMaxState", "MovingAverageState"])
