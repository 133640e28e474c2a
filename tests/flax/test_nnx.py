"""An NNX module prepared: its Variables, transforms, optimizer and switches, its names, and conversion."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

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

prepare = qjax.flax.nnx.prepare


@pytest.fixture(autouse=True)
def ranks_may_differ():
    with jax.numpy_rank_promotion("allow"):
        yield


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(5, 7, use_bias=False, rngs=rngs), nnx.Linear(7, 3, rngs=rngs)])
        self.norm = nnx.BatchNorm(7, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, *, scale=None):
        x = self.dropout(nnx.relu(self.norm(self.layers[0](x))))
        x = self.layers[1](x)
        return x if scale is None else x * scale


call = nnx.jit(lambda q, x, **kwargs: q(x, **kwargs))


@pytest.fixture
def net(rng):
    x = normal(rng, 16, 5)
    return prepare(Net(nnx.Rngs(0)), INPUTS, x), x


def plain(module):
    """The same module as a plain function of its state, which is what `qjax.prepare` takes, and that state."""
    graphdef, state = nnx.split(module)

    def fn(state, x):
        merged = nnx.merge(graphdef, state)
        return merged(x), nnx.state(merged)

    return qjax.prepare(fn, INPUTS), state


def test_variables_and_names(net):
    q, x = net
    state = nnx.state(q, qjax.flax.nnx.QuantState)
    names = [f"layers/{i}/{role}/{side}_val" for i in (0, 1) for role in ("input", "weight") for side in ("min", "max")]
    assert sorted(state["quant_state"]) == sorted(names)
    assert [op.name for op in q.ops(x)] == ["layers/0", "layers/1"]
    weights = nnx.state(q, nnx.Param)
    assert sorted(weights) == ["module"]  # nothing is learned of these quantizers
    assert len(jax.tree.leaves(weights)) == 5


def test_modes_are_those_of_the_plain_function(net):
    """Outputs, running averages, dropout's counts and observer states, in each mode and through both switches."""
    q, x = net
    q.calibrate()
    function, state = plain(q.module)
    qvars, out = calibrated(function, state, x), call(q, x)
    assert_trees_equal(q.qvars(), qvars)
    np.testing.assert_array_equal(out, nnx.jit(lambda m, x: m(x))(nnx.merge(nnx.graphdef(q.module), state), x))

    q.train()
    assert (q.mode, q.module.norm.use_running_average, q.module.dropout.deterministic) == ("train", False, False)
    function, state = plain(q.module)
    (want, after), qvars = trained(function, qvars, state, 2 * x)  # first, since the state is that of the module itself
    out = call(q, 2 * x)
    np.testing.assert_array_equal(out, want)
    kept = [nnx.to_pure_dict(nnx.filter_state(state, nnx.Not(nnx.RngKey))) for state in (nnx.state(q.module), after)]
    assert_trees_equal(*kept)
    assert_trees_equal(q.qvars(), qvars)
    assert q.module.dropout.rngs.count.get_value() == 1
    assert not (call(q, 2 * x) == out).all()  # another mask

    q.eval()
    assert (q.mode, q.module.norm.use_running_average, q.module.dropout.deterministic) == ("eval", True, True)
    function, state = plain(q.module)
    before, qvars = nnx.to_pure_dict(nnx.state(q, nnx.Not(nnx.RngKey))), q.qvars()
    out = call(q, 3 * x)
    np.testing.assert_array_equal(out, evaluated(function, qvars, state, 3 * x)[0])
    assert_trees_equal(nnx.to_pure_dict(nnx.state(q, nnx.Not(nnx.RngKey))), before)
    codes = nnx.jit(lambda q, x: q.codes(x))(q, 3 * x)
    assert mismatches(codes, jitted(function.codes, qvars, state, 3 * x))[0] == 0


def test_the_switches_of_a_module_around_it(net):
    class Outer(nnx.Module):
        def __init__(self, inner):
            self.inner = inner

    q, _ = net
    outer = Outer(q)
    for switch, mode in ((outer.eval, "eval"), (outer.train, "train"), (q.calibrate, "calibrate"), (q.eval, "eval")):
        switch()
        assert q.mode == mode
        assert q.module.norm.use_running_average == (mode != "train")
    assert nnx.view(q, mode="train").mode == "train"
    seen = nnx.view(q, deterministic=False, use_running_average=False)
    assert (seen.mode, seen.module.norm.use_running_average, q.mode) == ("train", False, "eval")


def test_split_and_merge(net):
    q, x = net
    q.calibrate()
    call(q, x)
    q.eval()
    graphdef, quant, rest = nnx.split(q, qjax.flax.nnx.QuantState, ...)
    copy = nnx.merge(graphdef, quant, rest)
    np.testing.assert_array_equal(call(copy, x), call(q, x))
    assert copy.mode == "eval"
    assert hash(graphdef) == hash(nnx.graphdef(q))

    @jax.jit
    def pure(quant, x):  # a function of the ranges alone
        return nnx.merge(graphdef, quant, rest)(x)

    wider = jax.tree.map(lambda leaf: 4 * leaf, quant)
    np.testing.assert_array_equal(pure(quant, x), call(q, x))
    assert not (pure(wider, x) == call(q, x)).all()


@pytest.mark.parametrize("transform", [nnx.jit, pytest.param(nnx.remat, marks=pytest.mark.long)])
def test_training(net, rng, transform):
    """`nnx.value_and_grad` and `nnx.Optimizer` in one step that compiles once: the loss falls, no range has a gradient."""
    q, x = net
    labels, traces = x[:, :3].argmax(axis=1), []

    def loss(q, x):
        logits = transform(lambda q, x: q(x))(q, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @nnx.jit
    def step(q, optimizer, x):
        traces.append(1)
        value, grads = nnx.value_and_grad(loss)(q, x)
        optimizer.update(q, grads)
        return value, grads

    with jax.numpy_dtype_promotion("standard"):
        optimizer = nnx.Optimizer(q, optax.adam(0.03), wrt=nnx.Param)
        first, grads = step(q, optimizer, x)
        losses = [float(first)] + [float(step(q, optimizer, x)[0]) for _ in range(30)]
    assert sorted(grads) == ["module"]
    assert all(bool((leaf != 0).any()) for leaf in jax.tree.leaves(grads))
    assert len(traces) == 1
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:3])
    ranges = nnx.grad(lambda q: loss(q, x), argnums=nnx.DiffState(0, qjax.flax.nnx.QuantState))(q)
    assert not any(leaf.any() for leaf in jax.tree.leaves(ranges))


@pytest.mark.long
def test_gradients_are_those_of_the_plain_function(net):
    q, x = net
    q.calibrate()
    call(q, x)
    q.eval()
    function, state = plain(q.module)
    qvars = q.qvars()
    grads = nnx.jit(nnx.grad(lambda q: (q(x) ** 2).sum()))(q)["module"]
    want = jax.jit(jax.grad(lambda s: (function(qvars, s, x, mode="eval")[0][0] ** 2).sum(), allow_int=True))(state)
    want = nnx.to_pure_dict(want)
    for i, name in ((0, "kernel"), (1, "kernel"), (1, "bias")):
        got = grads["layers"][i][name].get_value()
        assert float(jnp.abs(got).max()) > 0
        np.testing.assert_array_equal(got, want["layers"][i][name])


def test_learned_scales_are_params(net):
    """`wrt=nnx.Param` reaches them, with the gradients of the plain function; what was learned is what is converted."""
    _, x = net
    learned = qjax.Recipe([qjax.Rule(".*", weight=qjax.estimators.lsq(W8), input=qjax.estimators.lsq(A8))])
    q = prepare(Net(nnx.Rngs(0)), learned, x)
    q.calibrate()
    call(q, x)
    graphdef, state = nnx.split(q.module)
    plain, qvars = qjax.prepare(lambda state, x: nnx.merge(graphdef, state)(x), learned), q.qvars()
    q.set_attributes(mode="train")  # the quantizers alone

    @nnx.jit
    def step(q, optimizer, x):
        grads = nnx.grad(lambda q: (q(x) ** 2).mean())(q)
        optimizer.update(q, grads)
        return grads

    @jax.jit
    def plain_grads(params, state, x):
        return jax.grad(lambda params: (plain(qvars._replace(params=params), state, x)[0] ** 2).mean())(params)

    want = plain_grads(qvars.params, state, x)
    grads = step(q, nnx.Optimizer(q, optax.sgd(0.1), wrt=nnx.Param), x)["quant_params"]
    assert sorted(grads) == sorted(f"layers/{i}/{role}/scale" for i in (0, 1) for role in ("input", "weight"))
    for name, gradient in grads.items():
        quantizer = name.removesuffix("/scale")
        assert isinstance(q.quant_params[name], qjax.flax.nnx.QuantParam)
        np.testing.assert_array_equal(gradient.get_value(), want[quantizer]["scale"])
        assert (gradient.get_value() != 0).any()
        np.testing.assert_allclose(
            q.quant_params[name].get_value(),
            qvars.params[quantizer]["scale"] - 0.1 * want[quantizer]["scale"],
            rtol=1e-6,
        )
    q.eval()
    program = q.convert(x)
    np.testing.assert_array_equal(jitted(program, x), call(q, x))
    np.testing.assert_array_equal(
        program.weights["layers/1"].scale, q.quant_params["layers/1/weight/scale"].get_value()
    )


@pytest.mark.long
@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_a_saved_program(rng, tmp_path, kind):
    """It needs neither the module nor the adapter, and no key of a dropout that inference leaves out."""
    x = normal(rng, 16, 5)
    if kind == "nnx":
        q = prepare(Net(nnx.Rngs(0)), INPUTS, x)
        q.calibrate()
        call(q, x)
        program = q.convert(x)
    else:
        model = qjax.flax.linen.prepare(nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(3)]), INPUTS)
        variables = jitted(lambda x: model.calibrate(model.init(jax.random.key(0), x), x), x)
        program = model.convert(variables, x)
    program.save(tmp_path / "program.zip")
    loaded = qjax.load_integer(tmp_path / "program.zip")
    np.testing.assert_array_equal(loaded(x), jitted(program, x))


@pytest.mark.long
def test_folded_batch_norms(rng):
    """Running averages are no weights, and still go into the weight that is quantized; they move as in the float module."""

    class Normed(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(4, momentum=0.5, rngs=rngs)

        def __call__(self, x):
            return nnx.relu(self.norm(self.conv(x)))

    recipe = qjax.Recipe([qjax.Rule("conv", weight=W8, input=qjax.observers.min_max(A8), batch_norm="fold")])
    x = normal(rng, 4, 6, 6, 2)
    q = prepare(Normed(nnx.Rngs(0)), recipe, x)
    assert [op.epilogue for op in q.ops(x)] == ["batch_norm, relu"]
    for _ in range(3):
        call(q, x)
    mean = q.module.norm.mean.get_value()
    np.testing.assert_allclose(mean, 0.875 * jitted(lambda x: q.module.conv(x).mean((0, 1, 2)), x), atol=0.01)
    q.eval()
    want = call(q, x)
    np.testing.assert_array_equal(jitted(q.convert(x), x), want)
    np.testing.assert_allclose(want, nnx.jit(lambda m, x: m(x))(q.module, x), atol=0.05)


def test_conversion(net, rng):
    q, x = net
    call(q, x)  # a training step, so that running averages are no longer 0 and 1
    program = q.convert(x)  # also in mode "train": what is converted is inference
    explicit = qjax.convert(q.function(), q.qvars(), q.variables(), x)
    assert (q.mode, q.module.dropout.deterministic) == ("train", False)
    q.eval()
    for count in (16, 3):
        new = 1.5 * normal(rng, count, 5)
        want = call(q, new)
        np.testing.assert_array_equal(jitted(program, new), want)
        np.testing.assert_array_equal(jitted(explicit, new), want)
    assert program.weights["layers/0"].codes.dtype == jnp.int8


def test_keywords(net):
    q, x = net
    q.calibrate()
    call(q, x)
    q.eval()
    out = call(q, x)
    np.testing.assert_array_equal(call(q, x, scale=jnp.float32(3)), out * 3)
    np.testing.assert_array_equal(jitted(q.convert(x, scale=3.0), x), out * 3)
    with pytest.raises(TypeError, match=r"keyword argument 'scale' holds an array.*Wrap the module"):
        q.convert(x, scale=jnp.float32(3))


def test_tied_weights_are_one_variable(rng):
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 4, rngs=rngs)
            self.second = nnx.Linear(4, 4, rngs=rngs)
            self.second.kernel = self.first.kernel

        def __call__(self, x):
            return self.second(self.first(x))

    q = prepare(Tied(nnx.Rngs(0)), INPUTS, x := normal(rng, 2, 4))
    assert [op.name for op in q.ops(x)] == ["first", "first:1"]
    grads = nnx.jit(nnx.grad(lambda q: q(x).sum()))(q)["module"]
    assert sorted(grads["first"]) == ["bias", "kernel"]
    assert sorted(grads["second"]) == ["bias"]


def test_only_params_are_weights(rng):
    class Codebook(nnx.Module):
        def __init__(self, rngs):
            self.dense, self.book = nnx.Linear(3, 5, rngs=rngs), nnx.BatchStat(jnp.ones((5, 4)))

        def __call__(self, x):
            return self.dense(x) @ self.book[...]

    x = normal(rng, 2, 3)
    ops = prepare(Codebook(nnx.Rngs(0)), INPUTS, x).ops(x)
    assert [(op.name, op.weight) for op in ops] == [("dense", "rhs"), ("dot", None)]


def test_a_field_called_value_is_a_part_of_the_name(rng):
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Layer:
        value: jax.Array

    params = {"layer": Layer(normal(rng, 4, 3))}
    ops = qjax.prepare(lambda p, x: x @ p["layer"].value, INPUTS).ops(params, normal(rng, 2, 4))
    assert [op.name for op in ops] == ["layer"]
    held = {"layer": nnx.Param({"w": normal(rng, 4, 3)})}  # a Variable that holds a tree
    ops = qjax.prepare(lambda p, x: x @ p["layer"].get_value()["w"], INPUTS).ops(held, normal(rng, 2, 4))
    assert [op.name for op in ops] == ["layer"]


def test_errors(net):
    q, x = net
    with pytest.raises(TypeError, match=r"must be a flax\.nnx\.Module, got function.*qjax\.prepare"):
        prepare(lambda x: x, INPUTS, x)
    with pytest.raises(TypeError, match=r"recipe must be a qjax\.Recipe"):
        prepare(Net(nnx.Rngs(0)), None, x)
    with pytest.raises(ValueError, match="compute must be one of"):
        prepare(Net(nnx.Rngs(0)), INPUTS, x, compute="int")
    with pytest.raises(qjax.RecipeError, match="layers/0"):
        prepare(Net(nnx.Rngs(0)), qjax.Recipe([qjax.Rule("layers", weight=W8)]), x)
    q.eval()
    with pytest.raises(ValueError, match="has observed nothing"):
        nnx.jit(lambda x: q(x))(x)
    q.mode = "test"
    with pytest.raises(ValueError, match="unknown mode 'test'; the modes are calibrate, train, eval"):
        q(x)
