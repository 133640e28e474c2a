"""What a new estimator has to write: three that are not qjax's own, each a few lines, go all the way through."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import QParams, Recipe, Rule
from qjax.estimators import Estimator, EstimatorVars
from tests.transform.models import W8, assert_trees_close, calibrated, jitted, mismatches, normal

U4 = qjax.QuantSpec(qjax.uint4)


@jax.custom_jvp
def clipping_level(x, alpha, value):
    return value


@clipping_level.defjvp
def _(primals, tangents):
    x, alpha, value = primals
    above = x >= alpha
    return value, jnp.where(above | (x < 0), 0, tangents[0]) + jnp.where(above, tangents[1], 0)


@dataclasses.dataclass(frozen=True)
class Pact(Estimator):
    """PACT: a clipping level that is learned, with another gradient and another relation to the scale than LSQ's."""

    def init(self, x):
        return EstimatorVars({"alpha": jnp.float32(1)}, jnp.bool_(False))

    def update(self, vars, x):
        return EstimatorVars(
            {"alpha": jnp.maximum(vars.params["alpha"], jax.lax.stop_gradient(x).max())}, jnp.bool_(True)
        )

    def merge(self, a, b):
        return EstimatorVars({"alpha": jnp.maximum(a.params["alpha"], b.params["alpha"])}, a.state | b.state)

    def is_calibrated(self, vars):
        return vars.state

    def qparams(self, vars):
        return QParams(vars.params["alpha"] / 15, jnp.int32(0))

    def estimate(self, vars, x, rounded):
        return clipping_level(x, jnp.broadcast_to(vars.params["alpha"], x.shape), rounded.value)


@jax.custom_vjp
def element_wise(delta, x, value):
    return value


element_wise.defvjp(
    lambda delta, x, value: (value, (delta, x - value)),
    lambda kept, g: (None, g * (1 + kept[0] * jnp.sign(g) * kept[1]), None),
)


@dataclasses.dataclass(frozen=True)
class Ewgs(Estimator):
    """EWGS: nothing is learned, the range is observed in training, too, and the gradient is not linear in that of y."""

    delta: float = 0.2
    observes_training = True

    @property
    def observer(self):
        return qjax.observers.moving_average_min_max(self.spec, 0.5)

    def init(self, x):
        return EstimatorVars({}, self.observer.init(x))

    def update(self, vars, x):
        return EstimatorVars({}, self.observer.update(vars.state, x))

    def merge(self, a, b):
        return EstimatorVars({}, self.observer.merge(a.state, b.state))

    def is_calibrated(self, vars):
        return self.observer.is_calibrated(vars.state)

    def qparams(self, vars):
        return self.observer.qparams(vars.state)

    def estimate(self, vars, x, rounded):
        return element_wise(self.delta, x, rounded.value)


@dataclasses.dataclass(frozen=True)
class Adaptive(Estimator):
    """AdaRound's idea: a parameter for each element says which way it is rounded, so the codes are not those of the law."""

    def init(self, x):
        return EstimatorVars({"up": jnp.zeros(x.shape)}, jnp.bool_(False))

    def update(self, vars, x):
        return EstimatorVars({"up": x * 8 - jnp.floor(x * 8) - 0.5}, jnp.bool_(True))

    def merge(self, a, b):
        raise NotImplementedError

    def is_calibrated(self, vars):
        return vars.state

    def qparams(self, vars):
        return QParams(jnp.float32(1 / 8), jnp.int32(0))

    def quantize(self, vars, x):
        codes = jnp.clip(jnp.floor(x * 8) + (vars.params["up"] > 0).astype(x.dtype), -128, 127)
        return codes.astype(jnp.int8), jnp.ones(x.shape, bool)

    def estimate(self, vars, x, rounded):
        soft = jax.nn.sigmoid(vars.params["up"]) / 8
        return soft - jax.lax.stop_gradient(soft) + rounded.value


def fn(params, x):
    return jax.nn.relu(x @ params["first"]["w"]) @ params["second"]["w"]


def case(rng, **rule):
    params = {name: {"w": normal(rng, 6, 6)} for name in ("first", "second")}
    recipe = Recipe(
        [Rule(".*", weight=W8, input=qjax.observers.fixed(U4, scale=0.5, zero_point=8)), Rule("second", **rule)]
    )
    prepared, x = qjax.prepare(fn, recipe), normal(rng, 16, 6)
    return prepared, calibrated(prepared, params, x), params, x


def check_deployment(prepared, qvars, params, x):
    codes = jitted(prepared.codes, qvars, params, x)
    integer = qjax.convert(prepared, qvars, params)
    assert mismatches(codes, jitted(integer.codes, x))[0] == 0
    return codes


def test_another_learned_parameter(rng):
    prepared, qvars, params, x = case(rng, weight=W8, input=Pact(U4))
    qvars = qvars._replace(params={"second/input": {"alpha": 0.5 * qvars.params["second/input"]["alpha"]}})

    def loss(learned, x):
        return prepared(qvars._replace(params=learned), params, x, mode="train")[0].sum()

    slope = jitted(jax.grad(loss), qvars.params, x)["second/input"]["alpha"]
    codes = check_deployment(prepared, qvars, params, x)
    hidden = jax.nn.relu(codes["first/input"].dequantize() @ codes["first/weight"].dequantize())
    above = hidden >= qvars.params["second/input"]["alpha"]
    want = jnp.where(above, codes["second/weight"].dequantize().sum(axis=1)[None], 0).sum()
    assert above.any()
    np.testing.assert_allclose(slope, want, rtol=1e-5)
    with pytest.raises(TypeError, match=r"a Pact is made by no function of qjax.estimators, .* Those that can are lsq"):
        prepared.recipe.to_json()
    assert "Pact" in str(prepared.recipe)


def test_a_range_that_is_observed_and_a_gradient_that_is_not_linear(rng):
    prepared, qvars, params, x = case(rng, weight=W8, input=Ewgs(U4, 0.2))
    assert qvars.params == {"second/input": {}}
    trained = jitted(lambda q, x: prepared(q, params, x, mode="train")[1], qvars, 3 * x)
    assert float(trained.state["second/input"].max_val) > float(qvars.state["second/input"].max_val)
    assert jax.tree.structure(trained) == jax.tree.structure(qvars)
    codes = check_deployment(prepared, trained, params, x)

    hidden = jax.nn.relu(codes["first/input"].dequantize() @ codes["first/weight"].dequantize())
    estimator = Ewgs(U4, 0.2)
    variables = EstimatorVars({}, trained.state["second/input"])
    g = jnp.cos(hidden)
    (got,) = jax.vjp(lambda h: estimator.fake_quantize(variables, h), hidden)[1](g)
    rest = hidden - estimator.fake_quantize(variables, hidden)
    assert_trees_close(got, g * (1 + 0.2 * jnp.sign(g) * rest), 1e-6)


def test_codes_by_another_way_than_the_law(rng):
    prepared, qvars, params, x = case(rng, weight=Adaptive(qjax.QuantSpec(qjax.int8, symmetric=True)), input=U4)
    w = params["second"]["w"]
    nearest = jnp.floor(w * 8 + 0.5)
    codes = check_deployment(prepared, qvars, params, x)
    np.testing.assert_array_equal(codes["second/weight"].codes, nearest)
    flipped = qvars._replace(params=jax.tree.map(lambda up: -up, qvars.params))
    codes = check_deployment(prepared, flipped, params, x)
    np.testing.assert_array_equal(codes["second/weight"].codes, 2 * jnp.floor(w * 8) + 1 - nearest)

    def loss(learned):
        return prepared(qvars._replace(params=learned), params, x, mode="train")[0].sum()

    assert np.any(jitted(jax.grad(loss), qvars.params)["second/weight"]["up"])
