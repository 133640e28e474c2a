"""fake_quantize makes no codes: its numbers are those of the codes bit for bit, and so are its values and its mask."""

import functools
import itertools
from typing import get_args

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax._arithmetic import computed_once
from qjax._codes import _rounds_by_addition, code_of, round_to_format, value_of
from qjax._conventions import Convention
from qjax._quantize import QTensor, dequantize, quantize_with_mask

ADDED = (
    *(qjax.e4m3, qjax.e5m2, qjax.e3m2, qjax.e2m3, qjax.e2m1),
    *(qjax.Float(4, 3, special="fn", saturate=False), qjax.Float(5, 10, saturate=False), qjax.Float(5, 10)),
    *(
        qjax.Float(2, 1, special="none", saturate=False),
        qjax.Float(4, 0, special="none"),
        qjax.Float(3, 0, special="fn"),
    ),
    *(qjax.Float(1, 2, special="none"), qjax.Float(3, 4), qjax.Float(4, 3, special="fn", bias=60), qjax.Float(7, 8)),
    qjax.Float(4, 3, special="fn", bias=-60),
)
BY_CODES = (qjax.e4m3fnuz, qjax.Float(8, 7), qjax.e8m0, qjax.Float(4, 3, signed=False), qjax.Float(4, 3, bias=110))


def same(found, expected):
    np.testing.assert_array_equal(np.asarray(found).view(np.uint32), np.asarray(expected).view(np.uint32))


def values(form, rng):
    """Every bfloat16, numbers across the format's exponents, its ties and their neighbours."""
    every = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    some = np.ldexp(rng.uniform(-2, 2, 2**16), rng.integers(-130, 128, 2**16)).astype(np.float32)
    levels = np.unique(np.asarray(value_of(jnp.arange(2 ** min(form.bits, 10), dtype=jnp.uint32), form)))
    levels = np.sort(levels[np.isfinite(levels)])
    ties = ((levels[1:].astype(np.float64) + levels[:-1]) / 2).astype(np.float32)
    with np.errstate(over="ignore"):
        beyond = np.float32(form.quant_max) * np.float32([1, -1, 1.0625, 1.25, 1.5, 1.03125, 1.0 + 2.0**-11])
    ties = np.concatenate([ties, -ties, beyond])
    near = [np.nextafter(ties, np.float32(side)) for side in (-np.inf, np.inf)]
    exponent = getattr(form, "max_exponent", 0)
    wide = np.ldexp(rng.uniform(-1, 1, 2**16), min(exponent + 2, 127)).astype(np.float32)
    nans = np.uint32([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF]).view(np.float32)
    return jnp.asarray(np.concatenate([every, some, wide, ties, *near, nans]))


@functools.partial(jax.jit, static_argnums=1)
def both_ways(x, form):
    codes, in_range = code_of(x, form)
    return (value_of(codes, form), in_range), round_to_format(x, form)


@pytest.mark.parametrize(
    "form", [*ADDED[:5], *(pytest.param(form, marks=pytest.mark.long) for form in ADDED[5:] + BY_CODES)], ids=str
)
def test_numbers_of_a_format_are_those_of_its_codes(form, rng):
    x = values(form, rng)
    assert _rounds_by_addition(form) == (form in ADDED)
    (expected, expected_range), (found, in_range) = both_ways(x, form)
    same(found, expected)
    np.testing.assert_array_equal(in_range, expected_range)
    if form == qjax.e4m3:
        same(round_to_format(x, form)[0], expected)


@pytest.mark.parametrize("form", BY_CODES, ids=str)
def test_formats_that_an_addition_would_not_round_right_go_by_codes(form):
    assert not _rounds_by_addition(form)


@pytest.mark.parametrize("rounding", ["floor", "half_away", "stochastic"])
def test_other_roundings_go_by_codes(rounding, rng):
    x = jnp.asarray(rng.normal(size=500), jnp.float32)
    bits = jax.random.bits(jax.random.key(0), x.shape) if rounding == "stochastic" else None
    codes, in_range = code_of(x, qjax.e4m3, rounding, bits)
    found = round_to_format(x, qjax.e4m3, rounding, bits)
    same(found[0], value_of(codes, qjax.e4m3))
    np.testing.assert_array_equal(found[1], in_range)


GRANULARITIES = (
    *(qjax.PerTensor(), qjax.PerChannel(0), qjax.PerChannel(-1), qjax.PerChannel((0, 1)), qjax.PerToken()),
    *(qjax.PerGroup(-1, 16), qjax.PerGroup(0, 8), qjax.PerBlock((8, 16)), qjax.PerGroup(-1, 20, pad=True)),
)


def specs():
    """Of each convention every kind of format and two granularities of each, others for the next; and what is special."""
    turn = itertools.cycle(GRANULARITIES)
    for convention, (form, symmetric) in itertools.product(
        get_args(Convention), ((qjax.int8, True), (qjax.uint4, False), (qjax.e4m3, True))
    ):
        for granularity in (next(turn), next(turn)):
            if convention != "modelopt" or symmetric:
                yield qjax.QuantSpec(form, symmetric=symmetric, granularity=granularity, convention=convention)
    for convention in ("torch_fake", "torch_real"):
        yield qjax.QuantSpec(qjax.uint8, granularity=qjax.PerChannel(-1), float_zero_point=True, convention=convention)
    for block in (qjax.mxfp8_e5m2, qjax.mxfp6_e2m3, qjax.mxint8):
        yield block.replace(granularity=qjax.PerGroup(-1, 16))
    yield from (qjax.nvfp4_16x16, qjax.QuantSpec(qjax.int8, symmetric=True, rounding="floor"))
    yield qjax.QuantSpec(qjax.nf4, granularity=qjax.PerGroup(-1, 16))
    for mask in ("before_rounding", "none"):
        yield qjax.QuantSpec(qjax.int8, symmetric=True, granularity=qjax.PerChannel(-1), mask=mask)
        yield qjax.mxfp4.replace(granularity=qjax.PerGroup(-1, 16), mask=mask)


def check_spec(spec, dtype, rng, *, eager):
    x = np.ldexp(rng.normal(size=(16, 48)), rng.integers(-3, 3, (16, 48)))
    observer = qjax.observers.dynamic(spec)
    x = jnp.asarray(x, dtype)
    qparams = observer.qparams(observer.update(observer.init(x), x * 0.7))
    x = x.at[0, :8].set(jnp.asarray([0.0, -0.0, jnp.inf, -jnp.inf, jnp.nan, -1e-6, 1e4, -3.0], dtype))
    if not spec.float_zero_point:  # ties
        step = jnp.broadcast_to(jnp.max(qparams.step), (48,))
        x = x.at[1].set(((np.arange(48, dtype=np.float32) - 24.5) * step).astype(dtype))

    def by_codes(x, qparams):
        codes, in_range = quantize_with_mask(x, qparams, spec, caller="test")
        return dequantize(QTensor.of(codes, qparams, spec), x.dtype), in_range

    def fake(x, qparams):
        value, vjp = jax.vjp(lambda x: qjax.fake_quantize(x, qparams, spec), x)
        return value, vjp(jnp.ones_like(x))[0] != 0

    expected = jax.jit(by_codes)(x, qparams)
    ways = [[out[1] for out in jax.jit(jax.vmap(fake, (0, None)))(jnp.stack([x, x]), qparams)]]
    if eager:
        ways += [fake(x, qparams), jax.jit(fake)(x, qparams)]
    for value, in_range in ways:
        same(value.astype(jnp.float32), expected[0].astype(jnp.float32))
        np.testing.assert_array_equal(in_range, expected[1])


FEW = (
    *(qjax.QuantSpec(qjax.uint8), qjax.QuantSpec(qjax.int8, symmetric=True, granularity=qjax.PerChannel(-1))),
    *(qjax.mxfp8_e4m3.replace(granularity=qjax.PerGroup(-1, 16)), qjax.nvfp4),
)


@pytest.mark.parametrize("spec", FEW, ids=str)
def test_values_are_those_of_codes(spec, rng):
    check_spec(spec, jnp.float32, rng, eager=True)


@pytest.mark.long
def test_values_are_those_of_codes_everywhere(rng):
    for spec, dtype in zip(
        specs(), itertools.cycle([jnp.float32, jnp.bfloat16, jnp.float32, jnp.float16]), strict=False
    ):
        check_spec(spec, dtype, rng, eager=False)


def test_minus_zero_is_no_integer():
    """The code 0 stands for +0, also where a sum of -0.4 and a zero_point of 0 is rounded."""
    for convention in get_args(Convention):
        spec = qjax.QuantSpec(qjax.int8, symmetric=True, convention=convention)
        value = qjax.fake_quantize(
            jnp.asarray([-0.2, -0.0, 0.2], jnp.float32), qjax.QParams(jnp.float32(1), jnp.int32(0)), spec
        )
        assert not np.signbit(value).any(), convention


def test_computed_once_changes_nothing():
    x = np.float32([1.5, -0.0, np.inf, -np.inf, np.nan, 2.0**-126, 3.4e38])
    same(computed_once(jnp.asarray(x)), x)
    same(jax.jit(computed_once)(x), x)
    np.testing.assert_array_equal(computed_once(jnp.asarray([-3, 0, 7], jnp.int32)), [-3, 0, 7])
    np.testing.assert_array_equal(
        jax.grad(lambda x: (computed_once(x) ** 2).sum())(jnp.asarray([3.0], jnp.float32)), [6.0]
    )
