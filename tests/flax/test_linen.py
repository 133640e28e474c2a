"""A Linen module prepared: its collections, keys, keywords and methods, training with optax, and conversion."""

from typing import Any

import flax.core
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState

import qjax
from tests.transform.models import (
    A8,
    INPUTS,
    W8,
    assert_trees_equal,
    calibrated,
    evaluated,
    jitted,
    mismatches,
    normal,
    trained,
)

prepare = qjax.flax.linen.prepare
LEARNED = qjax.Recipe([qjax.Rule(".*", weight=qjax.estimators.lsq(W8), input=qjax.estimators.lsq(A8))])


@pytest.fixture(autouse=True)
def ranks_may_differ():
    with jax.numpy_rank_promotion("allow"):
        yield


class Block(nn.Module):
    """A dense layer, batch norm and dropout, as a submodule: its names have two parts."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(7, use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        return nn.Dropout(0.5, deterministic=not train)(nn.relu(x))


class Net(nn.Module):
    def setup(self):
        self.block, self.head = Block(), nn.Dense(3)

    def __call__(self, x, train=False):
        return self.head(self.block(x, train))

    def features(self, x, *, scale=1.0):
        return self.block(x, False) * scale


@pytest.fixture
def net(rng):
    x = normal(rng, 16, 5)
    return prepare(Net(), INPUTS), jax.jit(Net().init)(jax.random.key(0), x), x


def fake_dense(kernel, x, observed):
    """The product of the two operands, each quantized by hand; what the input's quantizer has observed before is `observed`."""
    observer = qjax.observers.min_max(A8)
    qparams = observer.qparams(observer.update(observed, x))
    weight = qjax.fake_quantize(kernel, qjax.choose_qparams(kernel.min(axis=0), kernel.max(axis=0), W8), W8)
    return qjax.fake_quantize(x, qparams, A8) @ weight


def test_variables_hold_a_collection_of_quantizers(net):
    q, variables, x = net
    made = jax.jit(q.init)(jax.random.key(0), x)
    assert sorted(made) == ["batch_stats", "params", "quant"]
    assert_trees_equal({name: made[name] for name in variables}, variables)  # those of model.init, with the same key
    assert sorted(made["quant"]) == ["block/Dense_0/input", "block/Dense_0/weight", "head/input", "head/weight"]
    assert_trees_equal(q.init_quant(variables, x), made)
    apply = jax.jit(Net().apply)
    np.testing.assert_array_equal(apply(made, x), apply(variables, x))  # the float model ignores it
    assert [op.name for op in q.ops(variables, x)] == ["block/Dense_0", "head"]


@pytest.mark.long
def test_a_training_step_by_hand(net):
    """Running averages are those of the quantized product, dropout takes the key given, and both come back."""
    q, variables, x = net
    variables = jitted(q.calibrate, variables, x)
    key = jax.random.key(3)

    @jax.jit
    def step(params, variables, x, key):
        out, updates = q.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats", "quant"], rngs={"dropout": key}
        )
        return out, updates

    def by_hand(params, variables, x):
        bn, start = params["block"]["BatchNorm_0"], variables["batch_stats"]["block"]["BatchNorm_0"]
        h = fake_dense(params["block"]["Dense_0"]["kernel"], x, variables["quant"]["block/Dense_0/input"])
        mean, var = h.mean(axis=0), (h**2).mean(axis=0) - h.mean(axis=0) ** 2
        stats = {"mean": 0.5 * start["mean"] + 0.5 * mean, "var": 0.5 * start["var"] + 0.5 * var}
        h = jax.nn.relu((h - mean) * jax.lax.rsqrt(var + 1e-5) * bn["scale"] + bn["bias"])
        h = jnp.where(mask(variables, x), h / 0.5, 0.0)
        return fake_dense(params["head"]["kernel"], h, variables["quant"]["head/input"]) + params["head"]["bias"], stats

    def mask(variables, x):  # Dropout's own at this place of the module tree, seen behind a shift that leaves no zeros
        params = jax.tree.map(lambda leaf: leaf, variables["params"])
        params["block"]["BatchNorm_0"]["bias"] += 100
        given = {"params": params, "batch_stats": variables["batch_stats"]}
        options = {"train": True, "rngs": {"dropout": key}, "mutable": ["batch_stats", "intermediates"]}
        _, seen = Net().apply(given, x, **options, capture_intermediates=True)
        return seen["intermediates"]["block"]["Dropout_0"]["__call__"][0] != 0

    out, updates = step(variables["params"], variables, 1.3 * x, key)
    want, stats = jitted(by_hand, variables["params"], variables, 1.3 * x)
    assert sorted(updates) == ["batch_stats", "quant"]
    got = updates["batch_stats"]["block"]["BatchNorm_0"]
    for name in ("mean", "var"):
        np.testing.assert_allclose(got[name], stats[name], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        out, want, rtol=1e-4, atol=0.02
    )  # a step of the head's input, where a product is at a tie
    assert float(jnp.median(jnp.abs(out - want))) < 1e-5
    assert float(updates["quant"]["block/Dense_0/input"].max_val) == float((1.3 * x).max())
    other = q.apply(
        variables, 1.3 * x, train=True, mutable=["batch_stats", "quant"], rngs={"dropout": jax.random.key(4)}
    )
    assert not (other[0] == out).all()


def test_modes_are_those_of_the_plain_function(net):
    q, variables, x = net
    plain = qjax.prepare(lambda v, x: Net().apply(v, x), INPUTS)
    float_variables, variables = variables, jitted(q.calibrate, variables, x)
    qvars = calibrated(plain, float_variables, x)
    assert_trees_equal(variables["quant"], qvars.state)
    assert sorted(variables) == ["batch_stats", "params", "quant"]
    new = 2 * x
    out, updates = jitted(lambda v, x: q.apply(v, x, mutable=["quant"]), variables, new)
    want, after = trained(plain, qvars, float_variables, new)
    np.testing.assert_array_equal(out, want)
    assert updates.keys() == {"quant"}
    assert_trees_equal(updates["quant"], after.state)
    want = evaluated(plain, qvars, float_variables, new)
    np.testing.assert_array_equal(jitted(q.apply, variables, new), want)
    out, updates = jitted(lambda v, x: q.apply(v, x, mutable="quant", mode="eval"), variables, new)
    np.testing.assert_array_equal(out, want)
    assert_trees_equal(updates["quant"], variables["quant"])
    out, updates = jitted(lambda v, x: q.apply(v, x, mutable=["quant"], mode="calibrate"), variables, new)
    np.testing.assert_array_equal(out, jitted(Net().apply, variables, new))
    assert_trees_equal(updates["quant"], jitted(q.calibrate, variables, new)["quant"])
    codes = jitted(q.codes, variables, x), jitted(plain.codes, qvars, float_variables, x)
    assert mismatches(*codes)[0] == 0


@pytest.mark.parametrize("mutable", [True, ["quant", "intermediates"], nn.DenyList("params")])
def test_filters_of_mutable(net, mutable):
    q, variables, x = net

    def seen(apply, variables, mutable):  # shapes are enough
        return jax.eval_shape(lambda v, x: apply(v, x, mutable=mutable, capture_intermediates=True)[1], variables, x)

    updates = seen(q.apply, q.init_quant(variables, x), mutable)
    expected = seen(Net().apply, variables, ["intermediates"] if isinstance(mutable, list) else mutable)
    assert sorted(updates) == sorted([*expected, "quant"])
    assert jax.tree.structure(updates["intermediates"]) == jax.tree.structure(expected["intermediates"])


@pytest.mark.long
def test_conversion(net, rng):
    q, variables, x = net

    @jax.jit
    def trained_once(variables, x):  # running averages other than 0 and 1
        variables, options = q.calibrate(variables, x), {"train": True, "mutable": ["batch_stats", "quant"]}
        return {**variables, **q.apply(variables, x, **options, rngs={"dropout": jax.random.key(1)})[1]}

    variables = trained_once(variables, x)
    program = q.convert(variables, x, train=False)
    explicit = qjax.convert(q.function(train=False), q.qvars(variables), variables, x)
    for count in (16, 3):
        new = 1.5 * normal(rng, count, 5)
        want = jitted(q.apply, variables, new)
        np.testing.assert_array_equal(jitted(program, new), want)
        np.testing.assert_array_equal(jitted(explicit, new), want)
        assert mismatches(jitted(program.codes, new), jitted(q.codes, variables, new))[0] == 0
    assert program.weights["head"].codes.dtype == jnp.int8
    floats = sum(leaf.nbytes for leaf in jax.tree.leaves((variables["params"], variables["batch_stats"])))
    assert program.nbytes < floats


def test_frozen_variables_and_bytes(net):
    q, variables, x = net
    variables, apply = jitted(q.calibrate, variables, x), jax.jit(q.apply)
    want = apply(variables, x)
    np.testing.assert_array_equal(apply(flax.core.freeze(variables), x), want)
    blank = q.init_quant(jax.tree.map(jnp.zeros_like, variables), x)
    restored = flax.serialization.from_bytes(blank, flax.serialization.to_bytes(variables))
    np.testing.assert_array_equal(apply(restored, x), want)


def test_a_method_and_its_keywords(net):
    q, variables, x = net
    variables = jitted(lambda v, x: q.calibrate(v, x, method="features"), variables, x)
    assert sorted(variables["quant"]) == ["block/Dense_0/input", "block/Dense_0/weight"]
    features = jax.jit(lambda v, x, **keywords: q.apply(v, x, method=Net.features, **keywords))
    out = features(variables, x, scale=jnp.float32(3))
    np.testing.assert_array_equal(out, 3 * features(variables, x))
    program = q.convert(variables, x, method="features", scale=3.0)
    np.testing.assert_array_equal(jitted(program, x), out)
    with pytest.raises(TypeError, match=r"keyword argument 'scale' holds an array.*method=lambda module, x, mask"):
        q.convert(variables, x, method="features", scale=jnp.float32(3))


def test_python_numbers_stay_python_numbers(rng):
    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x, depth, factor):
            for _ in range(depth):
                x = nn.Dense(5)(x)
            return x if factor == 1.0 else x * factor

    q, x = prepare(Scaled(), INPUTS), normal(rng, 4, 5)

    @jax.jit
    def both(x):
        variables = q.calibrate(Scaled().init(jax.random.key(0), x, 2, factor=1.0), x, 2, factor=1.0)
        return q.apply(variables, x, 2, factor=0.5), q.apply(variables, x, 2, factor=1.0)

    half, whole = both(x)
    np.testing.assert_array_equal(half, 0.5 * whole)


def test_an_array_in_a_keyword_is_an_argument(rng):
    """A weight that is picked by it is an activation, as it is where the index is an argument by position."""

    class Routed(nn.Module):
        @nn.compact
        def __call__(self, x, *, expert):
            w = self.param("w", nn.initializers.lecun_normal(), (3, 5, 4))
            return x @ w[expert]

    q, x = prepare(Routed(), INPUTS), normal(rng, 2, 5)
    variables = q.init(jax.random.key(0), x, expert=jnp.int32(0))
    by_keyword = q.ops(variables, x, expert=jnp.int32(1))
    by_place = qjax.prepare(lambda v, x, expert: Routed().apply(v, x, expert=expert), INPUTS).ops(
        variables, x, jnp.int32(1)
    )
    assert [(op.name, op.weight) for op in by_keyword] == [(op.name, op.weight) for op in by_place]


def test_only_params_are_weights(rng):
    class Codebook(nn.Module):
        @nn.compact
        def __call__(self, x):
            book = self.variable("batch_stats", "book", lambda: jnp.ones((5, 4)))
            return nn.Dense(5)(x) @ book.value

    x = normal(rng, 2, 3)
    variables = Codebook().init(jax.random.key(0), x)
    for ops in (
        prepare(Codebook(), INPUTS).ops(variables, x),
        qjax.prepare(Codebook().apply, INPUTS).ops(variables, x),
    ):
        assert [op.weight for op in ops] == ["rhs", None]
        assert ops[0].name == "Dense_0"


class QuantState(TrainState):
    variables: Any  # all collections but the parameters


def test_a_train_state(net, rng):
    """The loop of the Flax guides, with `q.apply` in the place of `model.apply`: it compiles once and learns."""
    q, variables, x = net
    labels = jnp.asarray(rng.integers(0, 3, 16))
    variables = q.init_quant(variables, x)
    traces = []

    with jax.numpy_dtype_promotion("standard"):
        state = QuantState.create(
            apply_fn=q.apply,
            params=variables.pop("params"),
            tx=optax.adam(0.03),
            variables=variables,
        )

        @jax.jit
        def step(state, key):
            traces.append(1)

            def loss(params):
                logits, updates = state.apply_fn(
                    {"params": params, **state.variables},
                    x,
                    train=True,
                    mutable=["batch_stats", "quant"],
                    rngs={"dropout": key},
                )
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

            (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
            return state.apply_gradients(grads=grads, variables={**state.variables, **updates}), value

        losses = []
        for i in range(40):
            state, value = step(state, jax.random.key(i))
            losses.append(float(value))
    assert len(traces) == 1
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:3])


@pytest.mark.long
def test_learned_scales_are_a_collection(net):
    """`quant_params` is there where something is learned; it has the gradients of the plain function, and optax takes them."""
    _, variables, x = net
    q, plain = prepare(Net(), LEARNED), qjax.prepare(lambda v, x: Net().apply(v, x), LEARNED)
    qvars = calibrated(plain, variables, x)
    variables = jitted(q.calibrate, variables, x)
    assert sorted(variables) == ["batch_stats", "params", "quant", "quant_params"]
    assert_trees_equal((variables["quant_params"], variables["quant"]), (qvars.params, qvars.state))

    def loss(trained, variables, x):
        out, updates = q.apply({**variables, **trained}, x, mutable=["quant"])
        return (out**2).mean(), updates

    def plain_loss(trained, variables, x):
        return (plain(qvars._replace(params=trained["quant_params"]), {**variables, **trained}, x)[0] ** 2).mean()

    learned = {name: variables[name] for name in ("params", "quant_params")}
    rest = {"batch_stats": variables["batch_stats"]}
    grads, updates = jax.jit(jax.grad(loss, has_aux=True))(learned, variables, x)
    want = jax.jit(jax.grad(plain_loss))({**learned, "params": variables["params"]}, rest, x)
    assert_trees_equal(grads, want)
    assert all(bool((leaf != 0).any()) for leaf in jax.tree.leaves(grads["quant_params"]))
    assert updates.keys() == {"quant"}  # a forward pass learns nothing
    moved, _ = optax.sgd(0.1).update(grads, optax.sgd(0.1).init(learned))
    trained = {**variables, **optax.apply_updates(learned, moved)}
    program = q.convert(trained, x)
    np.testing.assert_array_equal(jitted(program, x), jitted(q.apply, trained, x))
    scale = trained["quant_params"]["head/weight"]["scale"]
    np.testing.assert_array_equal(program.weights["head"].scale, scale)
    assert not (scale == variables["quant_params"]["head/weight"]["scale"]).any()


def test_prepared_modules_compare_by_what_they_are(net):
    q, _, _ = net
    assert q == prepare(Net(), INPUTS)
    assert hash(q) == hash(prepare(Net(), INPUTS))
    assert q != prepare(Net(), INPUTS, compute="dequantized")


def test_errors(net):
    q, variables, x = net
    with pytest.raises(TypeError, match=r"must be a flax\.linen\.Module, got function.*qjax\.prepare"):
        prepare(lambda x: x, INPUTS)
    with pytest.raises(TypeError, match=r"recipe must be a qjax\.Recipe"):
        prepare(Net(), [qjax.Rule(".*")])
    with pytest.raises(ValueError, match="compute must be one of"):
        prepare(Net(), INPUTS, compute="int")
    with pytest.raises(ValueError, match=r'no collection "quant" .*, which are batch_stats, params\..*q\.init_quant'):
        q.apply(variables, x)
    blank = q.init_quant(variables, x)
    with pytest.raises(ValueError, match="has observed nothing"):
        jax.jit(lambda x: q.apply(blank, x))(x)
    for mode in ("train", "calibrate"):
        with pytest.raises(ValueError, match=rf"mode '{mode}' observes, but \"quant\" is not mutable"):
            q.apply(blank, x, mode=mode, mutable=["batch_stats"])
    with pytest.raises(ValueError, match="unknown mode 'test'"):
        q.apply(blank, x, mode="test")
    with pytest.raises(qjax.RecipeError, match="block/Dense_0"):
        prepare(Net(), qjax.Recipe([qjax.Rule("Dense_0", weight=W8)])).init_quant(variables, x)
