"""LSQ through the adapters: its scales are variables that an optimizer trains beside the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import qjax
from qjax.estimators import lsq
from tests.transform.models import assert_trees_close, jitted, mismatches, normal

W3 = qjax.QuantSpec(qjax.Int(3), symmetric=True, granularity=qjax.PerChannel("output"))
A4 = qjax.QuantSpec(qjax.int4, symmetric=True)
RECIPE = qjax.Recipe([qjax.Rule(".*", weight=lsq(W3), input=lsq(A4, batch_axes=(0,)))])


@pytest.fixture(autouse=True)
def ranks_may_differ():
    with jax.numpy_rank_promotion("allow"):
        yield


def test_linen(rng):
    module, x = linen.Dense(4), normal(rng, 16, 6)
    q = qjax.flax.linen.prepare(module, RECIPE)
    variables = q.init(jax.random.key(0), x)
    shapes = {key: learned["scale"].shape for key, learned in variables["quant_params"].items()}
    assert shapes == {"kernel/input": (), "kernel/weight": (4,)}
    variables = q.calibrate(variables, x)
    trained = {name: variables[name] for name in ("params", "quant_params")}

    def loss(trained):
        return (q.apply({**variables, **trained}, x, mutable=["quant"])[0] ** 2).sum()

    gradient = jitted(jax.grad(loss), trained)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    moved = {**variables, **jax.tree.map(lambda p, g: p - 1e-3 * g, trained, gradient)}
    integer = q.convert(moved, x)
    assert mismatches(q.codes(moved, x), integer.codes(x))[0] == 0
    assert float(jitted(loss, {name: moved[name] for name in trained})) < float(jitted(loss, trained))


def test_nnx(rng):
    x = normal(rng, 16, 6)
    module = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    q = qjax.flax.nnx.prepare(module, RECIPE, x)
    q.calibrate()
    q(x)
    q.train()
    optimizer = nnx.Optimizer(q, optax.sgd(1e-3), wrt=nnx.Param)

    @nnx.jit
    def step(q, optimizer, x):
        value, gradient = nnx.value_and_grad(lambda q: (q(x) ** 2).sum())(q)
        optimizer.update(q, gradient)
        return value, gradient

    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(q, nnx.Param)))
    first, gradient = step(q, optimizer, x)
    after = nnx.to_pure_dict(nnx.state(q, nnx.Param))
    gradient = nnx.to_pure_dict(gradient)
    assert len(jax.tree.leaves(gradient)) == 4  # kernel, bias and two scales
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    assert_trees_close(after, jax.tree.map(lambda p, g: p - 1e-3 * g, before, gradient), 1e-6)
    assert float(step(q, optimizer, x)[0]) < float(first)
    q.eval()
    integer = q.convert(x)
    np.testing.assert_array_equal(integer(x), q(x))
