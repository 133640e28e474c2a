"""The engine and the choice about derived weights, handed through by both adapters: the codes are the plain function's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qjax
from qjax import Recipe, Rule, observers
from tests.transform.models import A8, W8, jitted, mismatches, normal

FULL = Recipe([Rule(".*", weight=W8.replace(granularity=qjax.PerTensor()), input=observers.min_max(A8))])
BY_KIND = {"dot": "qnnpack", "conv": "onednn"}


@pytest.fixture(autouse=True)
def ranks_may_differ():
    with jax.numpy_rank_promotion("allow"):
        yield


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (24, 16))
        bias = self.param("bias", nn.initializers.normal(0.3), (16,))
        return nn.Dense(4, name="head")(x @ (kernel * jnp.triu(jnp.ones((24, 16)))) + bias)


class NnxMasked(nnx.Module):
    def __init__(self, params):
        self.kernel, self.bias = nnx.Param(params["kernel"]), nnx.Param(params["bias"])
        self.head = nnx.Linear(16, 4, rngs=nnx.Rngs(0))
        self.head.kernel.set_value(params["head"]["kernel"])

    def __call__(self, x):
        return self.head(x @ (self.kernel[...] * jnp.triu(jnp.ones((24, 16)))) + self.bias[...])


def prepared_twice(variables, x):
    options = {"engine": BY_KIND, "derived_weights": "weight"}
    return (
        qjax.flax.linen.prepare(Masked(), FULL, **options),
        qjax.flax.nnx.prepare(NnxMasked(variables["params"]), FULL, x, **options),
    )


def test_options_reach_the_prepared_function(rng):
    x = normal(rng, 2, 24)
    variables = jitted(Masked().init, jax.random.key(0), x)
    linen, held = prepared_twice(variables, x)
    assert (linen.engine, held.engine, hash(linen) == hash(linen)) == (BY_KIND, BY_KIND, True)
    hash(nnx.graphdef(held))
    for function in (linen.function(), held.function(), linen._call((x,), {}, None, False)[0], held._call((x,), {})[0]):
        assert (function.engine, function.derived_weights) == (BY_KIND, "weight")
    assert [op.weight for op in held.ops(x)] == [op.weight for op in linen.ops(variables, x)] == ["rhs", "rhs"]


@pytest.mark.long
def test_codes_are_those_of_the_engine(rng):
    x = normal(rng, 400, 24)
    variables = jitted(Masked().init, jax.random.key(0), x)
    linen, held = prepared_twice(variables, x)
    calibrated = jitted(linen.calibrate, variables, x)
    held.calibrate()
    nnx.jit(lambda q, x: q(x))(held, x)
    held.eval()
    codes = {}
    for engine in (BY_KIND, "fbgemm"):
        plain = qjax.prepare(Masked().apply, FULL, engine=engine, derived_weights="weight")
        codes[str(engine)] = jitted(plain.codes, linen.qvars(calibrated), variables, x)
    want, others = codes.values()
    assert len(want) == 4
    assert mismatches(want, others)[0] > 0  # so that it can be seen whose arithmetic it is
    assert mismatches(jitted(linen.codes, calibrated, x), want)[0] == 0
    assert mismatches(jitted(linen.convert(calibrated, x).codes, x), want)[0] == 0
    assert mismatches(nnx.jit(lambda q, x: q.codes(x))(held, x), want)[0] == 0
    program = held.convert(x)
    assert mismatches(jitted(program.codes, x), want)[0] == 0
    np.testing.assert_array_equal(jitted(program, x), nnx.jit(lambda q, x: q(x))(held, x))


@pytest.mark.parametrize("option", [{"engine": "x87"}, {"derived_weights": "both"}])
def test_unknown_options(rng, option):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name} must be one of"):
        qjax.flax.linen.prepare(Masked(), FULL, **option)
    params = {"kernel": jnp.ones((24, 16)), "bias": jnp.ones(16), "head": {"kernel": jnp.ones((16, 4))}}
    with pytest.raises(ValueError, match=f"{name} must be one of"):
        qjax.flax.nnx.prepare(NnxMasked(params), FULL, normal(rng, 2, 24), **option)
