"""LSQ on arrays: its closed form in float64, torch's autograd on the published formula, finite differences, and corners."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import PerChannel, PerGroup, PerTensor, PerToken, QuantSpec
from qjax.estimators import EstimatorVars, LSQState, lsq, lsq_fake_quantize
from tests.numerics.stress import DTYPES, assert_same_bits

INT3 = QuantSpec(qjax.Int(3), symmetric=True)
UINT3 = QuantSpec(qjax.Int(3, signed=False))  # z = 0
AFFINE = QuantSpec(qjax.Int(3))
FORMATS = {
    "int3": (INT3, None, (-4, 3)),
    "uint3": (UINT3, None, (0, 7)),
    "int3, z = -1": (AFFINE, -1, (-3, 4)),
    "int2": (QuantSpec(qjax.int2, symmetric=True), None, (-2, 1)),
    "narrow int8": (QuantSpec(qjax.Int(8, narrow=True), symmetric=True), None, (-127, 127)),
    "uint8, reduced": (QuantSpec(qjax.uint8, reduce_range=True), 3, (-3, 124)),
}


def closed_form(x, s, steps, factor, mask="before_rounding"):
    """The value and the two derivatives of each element, in float64."""
    low, high = steps
    r = np.asarray(x, np.float64) / np.asarray(s, np.float64)
    taken = np.clip(np.rint(r), low, high)
    inside = {"before_rounding": (r >= low) & (r <= high), "after_rounding": taken == np.rint(r), "none": r == r}[mask]
    return taken * s, 1.0 * inside, factor * (taken - np.where(inside, r, 0))


def derivatives(x, s, spec, **options):
    """Value, d/dx and d/ds of each element, by forward mode: a tangent for each element of x, and one for s alike in all."""
    fn = lambda x, s: lsq_fake_quantize(x, s, spec, **options)  # noqa: E731
    value, dx = jax.jvp(lambda x: fn(x, s), (x,), (jnp.ones_like(x),))
    _, ds = jax.jvp(lambda s: fn(x, s), (s,), (jnp.ones_like(s),))
    return value, dx, ds


@pytest.mark.parametrize("mask", ["before_rounding", "after_rounding", "none"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_closed_form(rng, name, mask):
    spec, zero_point, steps = FORMATS[name]
    x = jnp.asarray(rng.normal(size=(50, 7)) * max(map(abs, steps)) / 2, jnp.float32)
    s = jnp.float32(0.73)
    spec = spec.replace(mask=mask)
    value, dx, ds = jax.jit(lambda x, s: derivatives(x, s, spec, zero_point=zero_point))(x, s)
    factor = 1 / math.sqrt(x.size * steps[1])
    want = closed_form(x, float(s), steps, factor, mask)
    np.testing.assert_allclose(value, want[0], rtol=1e-6)
    np.testing.assert_array_equal(dx, want[1])
    np.testing.assert_allclose(ds, want[2], rtol=1e-5, atol=2e-5 * factor * steps[1])
    assert 0 < (want[1] == 0).sum() < x.size or mask == "none" or name == "narrow int8"


# x / s with s = 0.5, Q = -4 … 3, and what comes of it: steps taken, dy/dx, dy/ds at g = 1.
CORNERS = [
    (0.5, 0, 1, -0.5),  # ties go to the even step
    (1.5, 2, 1, 0.5),
    (2.5, 2, 1, -0.5),
    (-0.5, 0, 1, 0.5),
    (0.0, 0, 1, 0.0),
    (-0.0, 0, 1, 0.0),
    (3.0, 3, 1, 0.0),  # at the ends it is inside, as for torch's clamp; the paper's formula has 0 and Q there
    (-4.0, -4, 1, 0.0),
    (3.0000005, 3, 0, 3.0),
    (3.4, 3, 0, 3.0),  # rounds to a step there is, but is outside before it is rounded
    (-4.3, -4, 0, -4.0),
    (2.75, 3, 1, 0.25),
    (1e30, 3, 0, 3.0),
    (math.inf, 3, 0, 3.0),
    (-math.inf, -4, 0, -4.0),
    (math.nan, -4, 0, -4.0),  # the code of NaN in convention "torch_fake"
]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_corners(compiled):
    ratio, steps, dx, ds = (np.array(column, np.float32) for column in zip(*CORNERS, strict=True))
    fn = lambda x, s: derivatives(x, s, INT3, gradient_scale="none")  # noqa: E731
    got = (jax.jit(fn) if compiled else fn)(jnp.asarray(0.5 * ratio), jnp.float32(0.5))
    for actual, wanted in zip(got, (0.5 * steps, dx, ds), strict=True):
        np.testing.assert_array_equal(actual, wanted)
    with np.errstate(invalid="ignore"):
        paper = np.where(ratio <= -4, -4, np.where(ratio >= 3, 3, np.rint(ratio) - ratio))  # equation 3
    ends = (ratio == 3) | (ratio == -4) | np.isnan(ratio)
    np.testing.assert_array_equal(got[2][~ends], paper[~ends])


def test_where_no_mask_holds_an_infinity_still_has_a_finite_gradient():
    x = jnp.array([math.inf, -math.inf, math.nan, 9.0], jnp.float32)
    _, dx, ds = derivatives(x, jnp.float32(0.5), INT3.replace(mask="none"), gradient_scale="none")
    np.testing.assert_array_equal(dx, 1)
    np.testing.assert_array_equal(ds, [3, -4, -4, 3 - 18])


def lsq_net(torch, x, scale, low, high, factor):
    """The published formula, with autograd: both quantities are the identity backwards, one of them scaled."""
    s = (scale - scale * factor).detach() + scale * factor
    q = (x / s).clamp(low, high)
    return ((q.round() - q).detach() + q) * s


@pytest.mark.parametrize(
    ("gradient_scale", "per_channel"), [("paper", False), ("paper", True), ("lsq_net", True), ("none", False)]
)
def test_torch_agrees(rng, per_channel, gradient_scale):
    torch = pytest.importorskip("torch")
    x = rng.normal(size=(6, 5, 4)).astype(np.float32)
    s = (np.abs(rng.normal(size=(5,))) / 2 + 0.1).astype(np.float32) if per_channel else np.float32(0.3)
    cotangent = rng.normal(size=x.shape).astype(np.float32)
    number = {"paper": x.size / 5 if per_channel else x.size, "lsq_net": x.size, "none": None}[gradient_scale]
    factor = 1.0 if number is None else 1 / math.sqrt(number * 3)
    tx = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    ts = torch.tensor(s, dtype=torch.float64, requires_grad=True)
    out = lsq_net(torch, tx, ts.reshape(1, 5, 1) if per_channel else ts, -4, 3, factor)
    out.backward(torch.tensor(cotangent, dtype=torch.float64))
    spec = INT3.replace(granularity=PerChannel(1) if per_channel else PerTensor())
    fn = lambda x, s: lsq_fake_quantize(x, s, spec, gradient_scale=gradient_scale)  # noqa: E731
    both = jax.jit(lambda x, s, g: (lambda value, vjp: (value, *vjp(g)))(*jax.vjp(fn, x, s)))
    value, dx, ds = both(x, jnp.asarray(s), cotangent)
    np.testing.assert_allclose(value, out.detach().numpy(), rtol=1e-6)
    np.testing.assert_allclose(dx, tx.grad.numpy(), rtol=1e-6)
    np.testing.assert_allclose(ds, ts.grad.numpy(), rtol=1e-5, atol=1e-5 * float(np.abs(ts.grad.numpy()).max()))


def test_finite_differences_where_the_function_is_smooth(rng):
    """With the steps held, y = s · steps inside and s · Q outside: the true slope in s is dy/ds + r inside."""
    x, h = rng.uniform(-3, 3, 200).astype(np.float32), 1e-3
    r = x / np.float32(0.5)
    smooth = np.abs(r - np.rint(r)) < 0.45  # no step is crossed
    up, down = (np.asarray(lsq_fake_quantize(x, jnp.float32(0.5 + d), INT3), np.float64) for d in (h, -h))
    _, dx, ds = derivatives(jnp.asarray(x), jnp.float32(0.5), INT3, gradient_scale="none")
    slope = np.asarray(ds) + np.where(dx == 1, r, 0)
    np.testing.assert_allclose(((up - down) / (2 * h))[smooth], slope[smooth], atol=1e-3)


def test_the_next_derivative_is_that_of_the_value():
    x, scale, spec = jnp.array([0.3, -0.7, 9.0]), jnp.float32(0.01), qjax.QuantSpec(qjax.int8, symmetric=True)
    second = jax.hessian(lambda x: (qjax.estimators.lsq_fake_quantize(x, scale, spec) ** 3).sum())(x)
    np.testing.assert_allclose(second, np.diag([1.8, -4.2, 0.0]), atol=1e-5)


@pytest.mark.parametrize("dtype", [*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.long)], ids=str)
def test_dtypes_jit_and_vmap(rng, dtype):
    spec, options = INT3.replace(granularity=PerChannel(-1)), {"batch_axes": (0,)}
    x = jnp.asarray(rng.normal(size=(3, 6, 4)), dtype)
    s = jnp.asarray(np.abs(rng.normal(size=(4,))) / 4 + 0.1, jnp.float32)

    def both(x, s):
        value, vjp = jax.vjp(lambda x, s: lsq_fake_quantize(x, s, spec, **options), x, s)
        return value, *vjp(jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape).astype(x.dtype))

    eager, compiled = both(x, s), jax.jit(both)(x, s)
    assert [leaf.dtype for leaf in eager] == [dtype, dtype, jnp.float32]
    for a, b in zip(eager[:2], compiled[:2], strict=True):
        assert_same_bits(a, b)
    np.testing.assert_allclose(eager[2], compiled[2], rtol=1e-5, atol=1e-6)  # a sum, in an order of its own
    want = closed_form(x.astype(jnp.float32), np.asarray(s), (-4, 3), 1 / math.sqrt(6 * 3))
    np.testing.assert_allclose(np.asarray(eager[0], np.float32), want[0], rtol=float(jnp.finfo(dtype).eps))
    if dtype != DTYPES[0]:
        return
    many, one = jax.jit(jax.vmap(both, (0, None)))(x, s), jax.jit(both)
    for i in range(3):
        for a, b in zip(many, one(x[i], s), strict=True):
            np.testing.assert_allclose(np.asarray(a[i], np.float32), np.asarray(b, np.float32), rtol=1e-5, atol=1e-6)


def test_groups_have_a_scale_each(rng):
    x = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
    spec = INT3.replace(granularity=PerGroup(-1, 4))
    estimator = lsq(spec)
    variables = jax.jit(lambda x: estimator.update(estimator.init(x), x))(x)
    groups = np.asarray(x).reshape(4, 2, 4)
    np.testing.assert_allclose(variables.params["scale"], 2 * np.abs(groups).mean(axis=-1) / np.sqrt(3), rtol=1e-6)
    total = lambda p, x: estimator.fake_quantize(variables._replace(params=p), x).sum()  # noqa: E731
    gradient = jax.jit(jax.grad(total))(variables.params, x)
    scale = np.asarray(variables.params["scale"])[..., None]
    want = closed_form(groups, scale, (-4, 3), 1 / math.sqrt(4 * 3))[2].sum(axis=-1)
    np.testing.assert_allclose(gradient["scale"], want, rtol=1e-4, atol=1e-5)
    padded = lsq(spec.replace(granularity=PerGroup(-1, 3, pad=True)))
    mean = jax.jit(lambda x: padded.update(padded.init(x), x).state.mean_abs[:, -1])(x)  # a group of two
    np.testing.assert_allclose(mean, np.abs(x[:, 6:]).mean(axis=-1), rtol=1e-6)


def test_whatever_the_scale_is_it_is_used_as_a_positive_one():
    x = jnp.array([-1.0, 0.3, 9.0])
    loss = lambda s, spec=INT3: lsq_fake_quantize(x, s, spec, gradient_scale="none").sum()  # noqa: E731
    value, slope = jax.value_and_grad(loss)(jnp.float32(0.5))
    mirrored = jax.value_and_grad(loss)(jnp.float32(-0.5))
    np.testing.assert_array_equal(mirrored, [value, -slope])
    eps = 2.0**-23
    for small in (0.0, -0.0, 1e-10, -1e-10):  # raised to eps, and the gradient still knows which way is up
        value, slope = jax.value_and_grad(loss)(jnp.float32(small))
        np.testing.assert_array_equal(value, np.float32(eps) * 2)  # steps -4, 3, 3
        np.testing.assert_array_equal(slope, -2 if small < 0 else 2)
    np.testing.assert_array_equal(loss(jnp.float32(1e-3), INT3.replace(eps=0.25)), np.float32(-1 + 0.25 + 0.75))
    assert np.isnan(jax.jit(loss)(jnp.float32(np.nan)))
    with pytest.raises(ValueError, match="scale must be positive and finite, got nan"):
        loss(jnp.float32(np.nan))


def test_what_was_seen_merges_and_scans(rng):
    estimator = lsq(INT3.replace(granularity=PerChannel(-1)))
    data = [jnp.asarray(rng.normal(size=(size, 4)) * size, jnp.float32) for size in (3, 5, 2)]
    empty = estimator.init(data[0])
    assert not estimator.is_calibrated(empty).any()
    states = [estimator.update(empty, x) for x in data]
    one = estimator.update(estimator.update(states[0], data[1]), data[2])
    merged = estimator.merge(estimator.merge(states[0], states[1]), states[2])
    other = estimator.merge(states[0], estimator.merge(states[2], states[1]))
    whole = np.abs(np.concatenate(data))
    for variables in (one, merged, other):
        np.testing.assert_allclose(variables.state.mean_abs, whole.mean(axis=0), rtol=1e-6)
        np.testing.assert_array_equal(variables.state.max_abs, whole.max(axis=0))
        np.testing.assert_array_equal(variables.state.count, 10)
        np.testing.assert_allclose(variables.params["scale"], 2 * whole.mean(axis=0) / np.sqrt(3), rtol=1e-6)
        assert estimator.is_calibrated(variables).all()
    for a, b in zip(jax.tree.leaves(estimator.merge(empty, one)), jax.tree.leaves(one), strict=True):
        assert_same_bits(a, b)
    xs = jnp.asarray(rng.normal(size=(3, 6, 4)), jnp.float32)
    scanned = jax.lax.scan(lambda v, x: (estimator.update(v, x), None), empty, xs)[0]
    np.testing.assert_allclose(scanned.state.mean_abs, np.abs(xs).mean(axis=(0, 1)), rtol=1e-6)
    assert estimator.update(one, jnp.zeros((0, 4))) is one
    largest = lsq(UINT3, init_scale="max")
    x = jnp.array([1.0, 3.5])
    np.testing.assert_array_equal(largest.update(largest.init(x), x).params["scale"], 0.5)
    zeros = lsq(INT3).update(lsq(INT3).init(x), jnp.zeros(2))
    np.testing.assert_array_equal(zeros.params["scale"], np.float32(2.0**-23))
    with pytest.raises(ValueError, match="only variables of tensors with the same channels can be merged"):
        estimator.merge(one, estimator.init(jnp.zeros((2, 3))))
    with pytest.raises(ValueError, match=r"scale of shape \(4,\), but x of shape \(2, 3\)"):
        estimator.update(one, jnp.zeros((2, 3)))


def test_other_formats_and_conventions(rng):
    """The codes are those of `qjax.quantize`; a float format has its numbers for steps."""
    x, s = jnp.asarray(rng.normal(size=40) * 3, jnp.float32), jnp.float32(0.7)
    for spec in (
        QuantSpec(qjax.e2m1),
        QuantSpec(qjax.nf4),
        QuantSpec(qjax.uint4, symmetric=True, convention="brevitas"),
        INT3.replace(convention="modelopt"),
    ):
        q = qjax.quantize(x, lsq(spec).qparams(EstimatorVars({"scale": s}, None)), spec)
        value, dx, ds = jax.jit(lambda x, s, spec=spec: derivatives(x, s, spec, gradient_scale="none"))(x, s)
        np.testing.assert_allclose(value, q.dequantize(), rtol=1e-6)
        r = np.asarray(x / s)
        np.testing.assert_allclose(ds, q.dequantize() / s - np.where(dx == 1, r, 0), atol=1e-5)
        middle = int(q.zero_point)
        np.testing.assert_array_equal(dx, (r >= spec.quant_min - middle) & (r <= spec.quant_max - middle))


def test_it_is_a_value():
    assert lsq(INT3) == lsq(INT3, zero_point=None)
    assert hash(lsq(INT3)) == hash(lsq(INT3))
    assert lsq(INT3).spec.mask == "before_rounding"
    assert lsq(INT3.replace(mask="none")).spec.mask == "none"
    assert lsq(INT3) != lsq(INT3, gradient_scale="none")
    assert isinstance(lsq(INT3).init(jnp.zeros(3)).state, LSQState)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: lsq(qjax.int8), TypeError, "LSQ: spec must be a qjax.QuantSpec"),
        (lambda: lsq(INT3.replace(granularity=PerToken())), ValueError, "a parameter for each token"),
        (lambda: lsq(INT3.replace(rounding="stochastic")), ValueError, "'stochastic' is random"),
        (lambda: lsq(AFFINE.replace(float_zero_point=True)), ValueError, "Drop float_zero_point"),
        (lambda: lsq(qjax.mxfp4), ValueError, "scale_rule='mx_floor' does not allow"),
        (lambda: lsq(INT3, zero_point=1), ValueError, "zero_point of a symmetric spec .* is 0, got 1"),
        (lambda: lsq(UINT3, zero_point=7), ValueError, r"zero_point must lie in 0 … 6 .* got 7"),
        (lambda: lsq(UINT3, zero_point=-1), ValueError, "zero_point must lie in 0 … 6"),
        (lambda: lsq(UINT3, zero_point=1.0), TypeError, "zero_point must be an int, got 1.0 of type float"),
        (
            lambda: lsq(INT3, gradient_scale="lsqnet"),
            ValueError,
            "unknown gradient_scale 'lsqnet'; expected one of 'paper'",
        ),
        (lambda: lsq(INT3, init_scale="mean"), ValueError, "unknown init_scale 'mean'"),
        (lambda: lsq(INT3, batch_axes=0), TypeError, r"a tuple of ints such as \(0,\), got 0"),
        (lambda: lsq(INT3, batch_axes=(0,), gradient_scale="none"), ValueError, "gradient_scale='none' has none"),
        (
            lambda: lsq_fake_quantize(jnp.zeros(3), 1.0, INT3, batch_axes=(1,)),
            ValueError,
            r"batch_axes \(1,\) are out of",
        ),
        (lambda: lsq_fake_quantize(jnp.zeros(3, jnp.int32), 1.0, INT3), TypeError, "LSQ: x must be floating point"),
        (
            lambda: lsq_fake_quantize(jnp.zeros(3), jnp.ones(3), INT3),
            ValueError,
            r"LSQ: scale has shape \(3,\), expected \(\)",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()
