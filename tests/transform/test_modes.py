"""What a prepared function computes in each mode, against the same network quantized by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import Recipe, Rule, observers
from tests.transform.models import (
    A8,
    INPUTS,
    W8,
    assert_trees_close,
    assert_trees_equal,
    binary_case,
    calibrated,
    cnn,
    cnn_params,
    fake_dense,
    mismatches,
    mlp,
    mlp_params,
    normal,
    trained,
    with_range,
)

COMPUTES = ("codes", "dequantized")


@pytest.mark.parametrize(("network", "dtype"), [("mlp", jnp.float32), ("mlp", jnp.bfloat16), ("cnn", jnp.float32)])
def test_calibrate_computes_the_function_itself(rng, network, dtype):
    fn, params, x = (
        (mlp, mlp_params(rng), normal(rng, 4, 6))
        if network == "mlp"
        else (cnn, cnn_params(rng), normal(rng, 2, 6, 6, 2))
    )
    params, x = jax.tree.map(lambda a: a.astype(dtype), (params, x))
    prepared = qjax.prepare(fn, INPUTS)
    out, _ = prepared(prepared.init(params, x), params, x, mode="calibrate")
    assert out.dtype == dtype
    assert (out == fn(params, x)).all()


@pytest.mark.parametrize("make", [observers.min_max, observers.moving_average_min_max, observers.dynamic])
def test_calibrate_updates_states_as_the_observer_by_hand(rng, make):
    activation, weight = make(A8), observers.min_max(W8)
    recipe = Recipe([Rule("first", weight=weight, input=activation, output=activation), Rule("second", weight=W8)])
    params, prepared = mlp_params(rng), qjax.prepare(mlp, recipe)
    batches = [normal(rng, 4, 6) for _ in range(3)]
    qvars = prepared.init(params, batches[0])
    by_hand = {
        "first/input": activation.init(batches[0]),
        "first/output": activation.init(jnp.zeros((4, 8))),
        "first/weight": weight.init(params["first"]["w"]),
    }
    for x in batches:
        hidden = jax.nn.relu(x @ params["first"]["w"] + params["first"]["b"][None])
        seen = {"first/input": x, "first/output": hidden, "first/weight": params["first"]["w"]}
        _, qvars = prepared(qvars, params, x, mode="calibrate")
        for key, value in seen.items():
            by_hand[key] = (weight if key == "first/weight" else activation).update(by_hand[key], value)
    by_hand["second/weight"] = observers.dynamic(W8).update(
        observers.dynamic(W8).init(params["second"]["w"]), params["second"]["w"]
    )
    assert_trees_equal(qvars.state, by_hand)


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize(("mode", "jit"), [("train", True), ("eval", True), ("train", False)])
def test_the_forward_pass_is_the_network_by_hand(rng, compute, mode, jit):
    qvars, params, x, by_hand = binary_case(rng)
    prepared = qjax.prepare(mlp, INPUTS, compute=compute)
    call = jax.jit(prepared, static_argnames="mode") if jit else prepared
    out, after = call(qvars, params, x, mode=mode)
    np.testing.assert_array_equal(out, by_hand(params, x))
    assert float(jnp.abs(out - mlp(params, x)).max()) > 1e-3  # or nothing was quantized
    assert_trees_equal(
        {key: value for key, value in after.state.items() if key.endswith("input")},
        {key: value for key, value in qvars.state.items() if key.endswith("input")},  # the data lie within the ranges
    )


def test_training_observes_before_it_quantizes(rng):
    params, x = mlp_params(rng), normal(rng, 16, 6)
    prepared = qjax.prepare(mlp, Recipe([Rule("first", weight=W8, input=observers.min_max(A8))]))
    out, qvars = trained(prepared, prepared.init(params, x), params, x)
    hidden = fake_dense(params["first"], x, qjax.choose_qparams(x.min(), x.max(), A8))
    by_hand = jax.nn.relu(hidden) @ params["second"]["w"] + params["second"]["b"][None]
    assert_trees_close(out, by_hand, 1e-6)
    assert (qvars.state["first/input"].min_val, qvars.state["first/input"].max_val) == (x.min(), x.max())


def test_random_scales_agree_with_the_network_by_hand(rng):
    """Here a code may land one step away, where float rounding decides a near tie; it has to stay rare."""
    params, x = mlp_params(rng), normal(rng, 512, 6)
    prepared = qjax.prepare(mlp, INPUTS)
    out, qvars = trained(prepared, prepared.init(params, x), params, x)
    qparams = [observers.min_max(A8).qparams(qvars.state[f"{name}/input"]) for name in ("first", "second")]
    by_hand = fake_dense(params["second"], jax.nn.relu(fake_dense(params["first"], x, qparams[0])), qparams[1])
    far = np.abs(np.asarray(out - by_hand)) > 1e-5
    assert far.mean() < 0.01
    step = float(qparams[1].scale) * float(jnp.abs(params["second"]["w"]).max())
    assert np.abs(np.asarray(out - by_hand)).max() < 1.01 * step


def test_eval_leaves_the_variables_alone_and_train_does_not(rng):
    params, x = mlp_params(rng), normal(rng, 8, 6)
    prepared = qjax.prepare(mlp, INPUTS)
    qvars = calibrated(prepared, params, x)
    assert prepared(qvars, params, 3 * x, mode="eval")[1] is qvars
    after = prepared(qvars, params, 3 * x, mode="train")[1]
    assert after.state["first/input"].max_val == 3 * x.max()
    assert jax.tree.structure(after) == jax.tree.structure(qvars)


@pytest.mark.long
@pytest.mark.parametrize(
    ("network", "recipe"),
    [("mlp", INPUTS), ("cnn", Recipe([Rule(".*", weight=W8, input=A8, output=A8)])), ("residual", INPUTS)],
    ids=["mlp", "cnn", "residual"],
)
def test_eval_is_the_same_bits_eager_jitted_and_vmapped(rng, recipe, network):
    def residual(params, x):
        hidden = jax.nn.relu(x @ params["first"]["w"] + params["first"]["b"][None])
        # A product of the network's own, such as 0.37 * hidden, jit would contract with this sum, as it does in float.
        return hidden + (hidden @ params["square"]["w"] + params["square"]["b"][None])

    params = {**mlp_params(rng), "square": {"w": normal(rng, 8, 8), "b": normal(rng, 8)}}
    fn, params, x = {
        "mlp": (mlp, params, normal(rng, 32, 6)),
        "cnn": (cnn, cnn_params(rng), normal(rng, 4, 6, 6, 2)),
        "residual": (residual, params, normal(rng, 32, 6)),
    }[network]
    prepared = qjax.prepare(fn, recipe)
    qvars = calibrated(prepared, params, x)
    eager, codes = prepared(qvars, params, x, mode="eval")[0], prepared.codes(qvars, params, x)
    jitted = jax.jit(lambda x: prepared(qvars, params, x, mode="eval")[0])(x)
    assert (eager == jitted).all()
    assert mismatches(codes, jax.jit(prepared.codes)(qvars, params, x))[0] == 0
    vmapped = jax.vmap(lambda x: prepared(qvars, params, x[None], mode="eval")[0][0])(x)
    assert (eager == vmapped).all()


def test_unknown_mode(rng):
    params, x = mlp_params(rng), normal(rng, 2, 6)
    prepared = qjax.prepare(mlp, INPUTS)
    qvars = prepared.init(params, x)
    for mode in ("test", "init", None):
        with pytest.raises(ValueError, match=r"unknown mode .* the modes are 'calibrate', 'train', 'eval'"):
            prepared(qvars, params, x, mode=mode)


def test_the_variables_come_first(rng):
    params, x = mlp_params(rng), normal(rng, 2, 6)
    with pytest.raises(TypeError, match="the first argument must be the QuantVars from init, got dict"):
        qjax.prepare(mlp, INPUTS)(params, x)


def test_eval_before_anything_was_observed(rng):
    params, x = mlp_params(rng), normal(rng, 2, 6)
    prepared = qjax.prepare(mlp, INPUTS)
    qvars = prepared.init(params, x)
    message = "the input of first has observed nothing"
    with pytest.raises(ValueError, match=message):
        prepared(qvars, params, x, mode="eval")
    with pytest.raises(ValueError, match=message):  # the variables are concrete, so jit can look at them
        jax.jit(lambda x: prepared(qvars, params, x, mode="eval")[0])(x)


def test_variables_of_another_recipe(rng):
    params, x = mlp_params(rng), normal(rng, 2, 6)
    one = qjax.prepare(mlp, Recipe([Rule("first", weight=W8, input=observers.min_max(A8))]))
    with pytest.raises(ValueError, match=r"no state for 'second/input'; it knows first/input, first/weight"):
        qjax.prepare(mlp, INPUTS)(one.init(params, x), params, x)


def test_state_is_free_of_the_batch_size(rng):
    params, prepared = cnn_params(rng), qjax.prepare(cnn, INPUTS)
    call = jax.jit(prepared, static_argnames="mode")
    _, qvars = call(prepared.init(params, normal(rng, 2, 6, 6, 2)), params, normal(rng, 2, 6, 6, 2), mode="calibrate")
    for batch in (1, 3):
        x = normal(rng, batch, 6, 6, 2)
        for mode in ("calibrate", "train", "eval"):
            out, after = call(qvars, params, x, mode=mode)
            assert out.shape == (batch, 5)
            assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, qvars)


def test_init_takes_shapes(rng):
    params, x = mlp_params(rng), normal(rng, 2, 6)
    prepared = qjax.prepare(mlp, INPUTS)
    shapes = jax.eval_shape(lambda: (params, x))
    assert_trees_equal(prepared.init(*shapes), prepared.init(params, x))
    assert_trees_equal(jax.jit(prepared.init)(params, x), prepared.init(params, x))


@pytest.mark.parametrize("spec", [qjax.uint8, qjax.int8, qjax.uint4, qjax.Int(8, narrow=True)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_one_dense_layer_of_every_activation_format(rng, spec, symmetric):
    a = qjax.QuantSpec(spec, symmetric=symmetric)
    w, x = normal(rng, 6, 5), normal(rng, 64, 6)
    prepared = qjax.prepare(lambda p, x: x @ p["w"], Recipe([Rule(".*", weight=W8, input=observers.min_max(a))]))
    out, _ = trained(prepared, prepared.init({"w": w}, x), {"w": w}, x)
    left = qjax.fake_quantize(x, qjax.choose_qparams(x.min(), x.max(), a), a)
    right = qjax.fake_quantize(w, qjax.choose_qparams(w.min(axis=0), w.max(axis=0), W8), W8)
    assert_trees_close(out, left @ right, 1e-6)


def test_values_outside_the_range_saturate(rng):
    qvars, params, x, by_hand = binary_case(rng)
    prepared = qjax.prepare(mlp, INPUTS)
    out, _ = prepared(qvars, params, 100 * x, mode="eval")
    np.testing.assert_array_equal(out, by_hand(params, 100 * x))
    codes = prepared.codes(qvars, params, 100 * x)["first/input"].codes
    assert {0, 255} <= set(np.unique(codes).tolist())


@pytest.mark.long
def test_attention_by_hand(rng):
    def attend(params, x):
        q, k, v = (x @ params[name]["w"] for name in "qkv")
        return jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2)) @ v

    params, x = {name: {"w": normal(rng, 4, 4)} for name in "qkv"}, normal(rng, 2, 5, 4)
    prepared = qjax.prepare(attend, INPUTS)
    out, qvars = trained(prepared, prepared.init(params, x), params, x)
    min_max = observers.min_max(A8)

    def fake(name, value):
        return qjax.fake_quantize(value, min_max.qparams(qvars.state[name]), A8)

    def project(name):
        w = params[name]["w"]
        w = qjax.fake_quantize(w, qjax.choose_qparams(w.min(axis=0), w.max(axis=0), W8), W8)
        return fake(f"{name}/input", x) @ w

    # A value of the name stack that einsum, matmul and JAX versions word differently: take the names from the table.
    dots = [op.name for op in prepared.ops(params, x) if op.weight is None]
    scores = fake(f"{dots[0]}/lhs", project("q")) @ fake(f"{dots[0]}/rhs", jnp.swapaxes(project("k"), -1, -2))
    by_hand = fake(f"{dots[1]}/lhs", jax.nn.softmax(scores)) @ fake(f"{dots[1]}/rhs", project("v"))
    assert_trees_close(out, by_hand, 0.02)
    assert float(jnp.abs(out - attend(params, x)).max()) > 1e-4


def test_a_layer_after_an_output_quantizer_takes_its_codes(rng):
    recipe = Recipe(
        [Rule("first", weight=W8, input=A8, output=observers.min_max(A8)), Rule("second", weight=W8, input=A8)]
    )
    params, x = mlp_params(rng), normal(rng, 8, 6)
    prepared = qjax.prepare(mlp, recipe)
    qvars = with_range(calibrated(prepared, params, x), "first/output", 0.02, 10, A8)
    assert int(qvars.state["second/input"].count) == 0  # there for arguments under which it is used, and idle here
    codes = prepared.codes(qvars, params, x)
    np.testing.assert_array_equal(codes["first/output"].codes, codes["second/input"].codes)
    assert codes["second/input"].scale == observers.min_max(A8).qparams(qvars.state["first/output"]).scale
    assert int(codes["first/output"].codes.min()) == 10  # the ReLU clamps at the zero_point
