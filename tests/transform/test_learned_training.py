"""LSQ trained with optax on scikit-learn's digits, 2-bit weights and activations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import qjax
from qjax import PerChannel, QuantSpec, Recipe, Rule
from qjax.estimators import lsq
from tests.transform.models import dense, jitted, mismatches

datasets = pytest.importorskip("sklearn.datasets")

W2 = lsq(QuantSpec(qjax.int2, symmetric=True, granularity=PerChannel(-1)))
A2 = lsq(QuantSpec(qjax.uint2), batch_axes=(0,))
RECIPE = Recipe([Rule(".*", weight=W2, input=A2)])
STEPS, BATCH = 250, 128


def network(params, x):
    h = jax.nn.relu(dense(params["first"], x))
    h = jax.nn.relu(dense(params["second"], h))
    return dense(params["third"], h)


def digits():
    pixels, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(5).permutation(len(pixels))
    x, y = jnp.asarray(pixels[order] / 16, jnp.float32), jnp.asarray(labels[order], jnp.int32)
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


def cross_entropy(logits, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def start(seed):
    rng = np.random.default_rng(seed)
    sizes = {"first": (64, 32), "second": (32, 24), "third": (24, 10)}
    return {
        name: {"w": jnp.asarray(rng.normal(size=s) * np.sqrt(2 / s[0]), jnp.float32), "b": jnp.zeros(s[1])}
        for name, s in sizes.items()
    }


def trainer(prepared, qvars, data):
    """The steps, with the scales trained, or kept where calibration put them."""
    x, y = data
    optimizer = optax.adam(5e-3)
    order = jnp.asarray(np.random.default_rng(1).integers(0, len(x), (STEPS, BATCH)))

    def loss(trainable, batch):
        params, learned = trainable
        out, _ = prepared(qvars._replace(params=learned), params, x[batch], mode="train")
        return cross_entropy(out, y[batch])

    def step(carry, batch):
        trainable, opt_state, learns = carry
        value, gradient = jax.value_and_grad(loss)(trainable, batch)
        gradient = (gradient[0], jax.tree.map(lambda g: learns * g, gradient[1]))
        updates, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(trainable, updates), opt_state, learns), value

    @jax.jit
    def run(trainable, learns):
        (trainable, *_), losses = jax.lax.scan(step, (trainable, optimizer.init(trainable), learns), order)
        return trainable, losses

    return run


def test_learned_scales_beat_frozen_ones_and_deploy():
    data, (test_x, test_y) = digits()
    params = start(0)
    prepared = qjax.prepare(network, RECIPE)
    qvars = jitted(lambda p, x: prepared(prepared.init(p, x), p, x, mode="calibrate")[1], params, data[0])
    final, run = {}, trainer(prepared, qvars, data)
    evaluate = jax.jit(lambda learned, p, x: prepared(qvars._replace(params=learned), p, x, mode="eval")[0])
    for learns in (True, False):
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an int32 power
            (trained, learned), losses = run((params, qvars.params), jnp.float32(learns))
        after, losses = qvars._replace(params=learned), np.asarray(losses)
        logits = evaluate(learned, trained, test_x)
        if learns:
            codes = jitted(prepared.codes, after, trained, test_x)
            integer = qjax.convert(prepared, after, trained, test_x)
            assert mismatches(codes, jitted(integer.codes, test_x))[0] == 0
            np.testing.assert_array_equal(jitted(integer, test_x), logits)
        assert float((logits.argmax(axis=1) == test_y).mean()) > 0.88
        final[learns] = losses[-20:].mean(), float(cross_entropy(logits, test_y)), after
    for key, start_, moved in ((k, qvars.params[k], final[True][2].params[k]) for k in qvars.params):
        change = np.abs(moved["scale"] / start_["scale"] - 1)
        assert change.max() > 0.05, key
        np.testing.assert_array_equal(final[False][2].params[key]["scale"], start_["scale"])
    assert final[True][0] < 0.75 * final[False][0]  # the loss in training: 0.165 and 0.270
    assert final[True][1] < 0.85 * final[False][1]  # of the integer program on the test set: 0.275 and 0.365
