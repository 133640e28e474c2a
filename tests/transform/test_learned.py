"""LSQ through a prepared function, against the same network written by hand with `lsq_fake_quantize`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax import Recipe, RecipeError, Rule
from qjax.estimators import LSQState, lsq, lsq_fake_quantize
from tests.transform.loops import layers, rnn, rnn_params, stacked_params, weighted_sum
from tests.transform.models import (
    INPUTS,
    add_bias,
    assert_trees_close,
    calibrated,
    cnn_params,
    conv,
    dense,
    jitted,
    mismatches,
    mlp,
    mlp_params,
    normal,
    trained,
)

W3 = qjax.QuantSpec(qjax.Int(3), symmetric=True, granularity=qjax.PerChannel(-1))
A3 = qjax.QuantSpec(qjax.Int(3, signed=False))
O4 = qjax.QuantSpec(qjax.int4, symmetric=True)
WEIGHT, INPUT, OUTPUT = lsq(W3), lsq(A3, batch_axes=(0,)), lsq(O4, gradient_scale="lsq_net")
LSQ3 = Recipe([Rule(".*", weight=WEIGHT, input=INPUT)])
WITH_OUTPUTS = Recipe([Rule(".*", weight=WEIGHT, input=lsq(O4), output=OUTPUT)])


def fake(estimator, params, key, x):
    options = {"gradient_scale": estimator.gradient_scale, "batch_axes": estimator.batch_axes}
    return lsq_fake_quantize(x, params[key]["scale"], estimator.spec, **options)


def mlp_by_hand(params, learned, x, recipe):
    rule, h = recipe.rules[0], x
    for name in ("first", "second"):
        if not (rule.output and name == "second"):  # which takes what the output of the first has quantized
            h = fake(rule.input, learned, f"{name}/input", h)
        h = dense({**params[name], "w": fake(rule.weight, learned, f"{name}/weight", params[name]["w"])}, h)
        h = jax.nn.relu(h) if name == "first" else h
        h = fake(rule.output, learned, f"{name}/output", h) if rule.output else h
    return h


def assert_gradients_close(got, want):
    """Of (value, (of params, of scales, …)). That of a scale is a sum of terms that cancel: to the largest of all scales."""
    flat = [
        (value, (params, jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(scales)]), *rest))
        for value, (params, scales, *rest) in (got, want)
    ]
    assert_trees_close(*flat, 1e-5)


def perturbed(rng, learned):
    """Scales that no rule would choose, so that values are clipped at both ends; of both signs, as an optimizer may have it."""
    return jax.tree.map(lambda s: s * jnp.asarray(rng.choice([0.6, 0.9, -0.8], s.shape), jnp.float32), learned)


@pytest.mark.parametrize(
    ("recipe", "compute", "mode"),
    [
        pytest.param(LSQ3, "codes", "train", id="weight, input-codes-train"),
        pytest.param(WITH_OUTPUTS, "codes", "train", id="outputs, too-codes-train"),
        pytest.param(WITH_OUTPUTS, "codes", "eval", id="outputs, too-codes-eval", marks=pytest.mark.long),
        pytest.param(WITH_OUTPUTS, "dequantized", "train", id="outputs, too-dequantized-train", marks=pytest.mark.long),
    ],
)
def test_gradients_are_those_of_the_network_by_hand(rng, recipe, compute, mode):
    params, x = mlp_params(rng), normal(rng, 16, 6)
    prepared = qjax.prepare(mlp, recipe, compute=compute)
    qvars = calibrated(prepared, params, x)
    learned = perturbed(rng, qvars.params)

    def quantized(params, learned, x):
        return weighted_sum(prepared(qvars._replace(params=learned), params, x, mode=mode)[0])

    def by_hand(params, learned, x):
        return weighted_sum(mlp_by_hand(params, learned, x, recipe))

    got = jax.jit(jax.value_and_grad(quantized, argnums=(0, 1, 2)))(params, learned, x)
    want = jax.jit(jax.value_and_grad(by_hand, argnums=(0, 1, 2)))(params, learned, x)
    assert_gradients_close(got, want)
    used = {key: leaf for key, leaf in want[1][1].items() if not (recipe is WITH_OUTPUTS and key == "second/input")}
    assert all((np.abs(leaf["scale"]) > 1e-4).any() for leaf in used.values())  # or the comparison proves nothing


def test_a_convolution_under_remat(rng):
    def network(params, x):
        return jax.nn.relu(add_bias(conv(x, params["conv"]["w"]), params["conv"]["b"]))

    params, x = cnn_params(rng), normal(rng, 4, 6, 6, 2)
    prepared = qjax.prepare(jax.checkpoint(network), Recipe([Rule("conv", weight=WEIGHT, input=lsq(O4))]))
    qvars = calibrated(prepared, params, x)

    def by_hand(params, learned, x):
        w = fake(WEIGHT, learned, "conv/weight", params["conv"]["w"])
        return network({"conv": {**params["conv"], "w": w}}, fake(lsq(O4), learned, "conv/input", x))

    def quantized(params, learned, x):
        return prepared(qvars._replace(params=learned), params, x, mode="train")[0]

    got, want = (
        jax.jit(jax.value_and_grad(lambda *args, fn=fn: weighted_sum(fn(*args)), (0, 1)))(params, qvars.params, x)
        for fn in (quantized, by_hand)
    )
    assert_gradients_close(got, want)


def test_a_layer_in_a_scan_has_a_scale_of_its_own(rng):
    params, x = {"layers": stacked_params(rng, 3, 6)}, normal(rng, 16, 6)
    prepared = qjax.prepare(layers, Recipe([Rule(".*", weight=WEIGHT, input=lsq(O4))]))
    qvars = calibrated(prepared, params, x)
    assert qvars.params["layers/weight"]["scale"].shape == (3, 6)
    assert qvars.params["layers/input"]["scale"].shape == (3,)
    h, own = x, lsq(O4)  # calibration sets the scale of each step from what that step saw, in float
    scale_of = jax.jit(lambda h: own.update(own.init(h), h).params["scale"])
    for i in range(3):
        np.testing.assert_allclose(qvars.params["layers/input"]["scale"][i], scale_of(h), rtol=1e-6)
        h = jnp.tanh(dense(jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]), h))

    def by_hand(params, learned, h):
        sums = []
        for i in range(3):
            layer, own = jax.tree.map(lambda leaf, i=i: leaf[i], (params["layers"], learned))
            h = fake(lsq(O4), own, "layers/input", h)
            h = jnp.tanh(dense({**layer, "w": fake(WEIGHT, own, "layers/weight", layer["w"])}, h))
            sums.append(h.sum(axis=-1))
        return h, jnp.stack(sums)

    check_loop(prepared, qvars, by_hand, params, x)


@pytest.mark.long
def test_a_cell_over_time_has_one_scale_and_the_sum_of_its_gradients(rng):
    params, x = rnn_params(rng, 6), normal(rng, 4, 16, 6)
    prepared = qjax.prepare(rnn, Recipe([Rule(".*", weight=WEIGHT, input=lsq(O4))]))
    qvars = calibrated(prepared, params, x)
    assert qvars.params["cell/rec/input"]["scale"].shape == ()

    def by_hand(params, learned, xs):
        def dot(name, x, w):
            return fake(lsq(O4), learned, f"cell/{name}/input", x) @ fake(WEIGHT, learned, f"cell/{name}/weight", w)

        h, out = jnp.broadcast_to(params["start"][None], xs.shape[1:]), []
        for x in xs:
            cell = params["cell"]
            out.append(h := jnp.tanh(dot("in", x, cell["in"]["w"]) + dot("rec", h, cell["rec"]["w"])))
        return h, jnp.stack(out)

    check_loop(prepared, qvars, by_hand, params, x)


def check_loop(prepared, qvars, by_hand, params, x):
    def quantized(params, learned, x):
        out, new = prepared(qvars._replace(params=learned), params, x, mode="train")
        return weighted_sum(out), new

    (value, new), got = jax.jit(jax.value_and_grad(quantized, (0, 1), has_aux=True))(params, qvars.params, x)
    want = jax.jit(jax.value_and_grad(lambda *args: weighted_sum(by_hand(*args)), (0, 1)))(params, qvars.params, x)
    assert_gradients_close((value, got), want)
    assert all((np.abs(leaf) > 1e-5).any() for leaf in jax.tree.leaves(got[1]))
    assert_trees_close(new, qvars, 0)  # training leaves both halves as they are
    integer = qjax.convert(prepared, qvars, params, x)
    assert mismatches(jitted(prepared.codes, qvars, params, x), jitted(integer.codes, x))[0] == 0


def test_the_branch_that_is_taken_is_trained(rng):
    def branch(params, x, flag):
        return lax.cond(flag, lambda x: x @ params["a"]["w"], lambda x: jnp.tanh(x) @ params["b"]["w"], x)

    params, x = {"a": {"w": normal(rng, 6, 5)}, "b": {"w": normal(rng, 6, 5)}}, normal(rng, 8, 6)
    prepared = qjax.prepare(branch, Recipe([Rule(".*", weight=WEIGHT, input=lsq(O4))]))
    qvars = prepared.init(params, x, jnp.bool_(True))
    calibrate = jax.jit(lambda qvars, flag: prepared(qvars, params, x, flag, mode="calibrate")[1])
    qvars = calibrate(qvars, jnp.bool_(True))
    assert float(qvars.params["b/input"]["scale"]) == 1  # the placeholder: that branch was not taken
    qvars = calibrate(qvars, jnp.bool_(False))

    @jax.jit
    def gradient(learned, flag):
        return jax.grad(lambda p: weighted_sum(prepared(qvars._replace(params=p), params, x, flag, mode="train")[0]))(
            learned
        )

    def by_hand(learned):
        return weighted_sum(fake(lsq(O4), learned, "a/input", x) @ fake(WEIGHT, learned, "a/weight", params["a"]["w"]))

    got = gradient(qvars.params, jnp.bool_(True))
    assert_trees_close(got, jitted(jax.grad(by_hand), qvars.params), 1e-5)
    assert not np.any(got["b/weight"]["scale"])
    assert np.any(gradient(qvars.params, jnp.bool_(False))["b/weight"]["scale"])


def test_a_while_is_evaluated_with_the_scales(rng):
    def repeated(params, x, times):
        return lax.fori_loop(0, times, lambda _, h: jnp.tanh(h @ params["w"]), x)

    x, square = normal(rng, 8, 6), {"w": normal(rng, 6, 6)}
    prepared = qjax.prepare(repeated, Recipe([Rule(".*", weight=WEIGHT, input=lsq(O4))]))
    qvars = calibrated(prepared, square, x, jnp.int32(2))

    def by_hand(learned, w, h):
        for _ in range(2):
            h = jnp.tanh(fake(lsq(O4), learned, "w/input", h) @ fake(WEIGHT, learned, "w/weight", w))
        return h

    got, after = trained(prepared, qvars, square, x, jnp.int32(2))
    assert_trees_close(got, jitted(by_hand, qvars.params, square["w"], x), 1e-5)
    assert_trees_close(after, qvars, 0)


def test_params_are_a_tree_for_an_optimizer_and_calibration_sets_them(rng):
    params, x = mlp_params(rng), normal(rng, 16, 6)
    prepared = qjax.prepare(mlp, Recipe([*WITH_OUTPUTS.rules, Rule("second", weight=W3)]))
    empty = prepared.init(params, x)
    assert set(empty.params) == {"first/weight", "first/input", "first/output"}  # none for observers
    assert empty.state.keys() == {*empty.params, "second/weight"}
    qvars = calibrated(prepared, params, x)
    assert jax.tree.structure(qvars) == jax.tree.structure(empty)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(qvars.params))
    assert isinstance(qvars.state["first/weight"], LSQState)
    np.testing.assert_allclose(
        qvars.params["first/weight"]["scale"],
        2 * np.abs(params["first"]["w"]).mean(axis=0) / np.sqrt(3),
        rtol=1e-6,
    )
    # A second batch: the scale is that of all data. Then training moves nothing; calibrating again forgets what was trained.
    other = 3 * normal(rng, 32, 6)
    calibrate = jax.jit(lambda qvars, x: prepared(qvars, params, x, mode="calibrate")[1])
    both = calibrate(qvars, other)
    mean = np.abs(np.concatenate([x, other])).mean()
    np.testing.assert_allclose(both.params["first/input"]["scale"], 2 * mean / np.sqrt(7), rtol=1e-6)
    moved = both._replace(params=jax.tree.map(lambda s: 2 * s, both.params))
    after = trained(prepared, moved, params, x)[1]
    assert_trees_close(after.params, moved.params, 0)
    assert_trees_close(after.state["first/input"], both.state["first/input"], 0)
    again = calibrate(after, other)
    assert float(again.params["first/input"]["scale"]) < 1.5 * float(both.params["first/input"]["scale"])


def test_nothing_is_trained_from_placeholders_unnoticed(rng):
    params, x = {"w": normal(rng, 6, 5)}, normal(rng, 16, 6)
    prepared = qjax.prepare(lambda p, x: x @ p["w"], LSQ3)
    empty = prepared.init(params, x)
    for mode in ("train", "eval"):
        with pytest.raises(ValueError, match=r"observed nothing, .* Run some batches with mode=\"calibrate\" first"):
            prepared(empty, params, x, mode=mode)
    with pytest.raises(ValueError, match="observed nothing"):
        qjax.convert(prepared, empty, params)
    out, new = jax.jit(lambda q: prepared(q, params, x, mode="train"))(empty)
    assert np.isnan(out).all()
    assert_trees_close(new.params, empty.params, 0)


def test_variables_of_another_recipe_are_refused(rng):
    params, x = mlp_params(rng), normal(rng, 16, 6)
    learned, observed = qjax.prepare(mlp, LSQ3), qjax.prepare(mlp, INPUTS)
    with pytest.raises(ValueError, match=r"'first/input' is quantized by LSQ; LSQ wants params, and .* has none"):
        learned(observed.init(params, x), params, x)
    with pytest.raises(
        ValueError, match=r"'first/input' is quantized by MinMax; MinMax has no params, and .* has some"
    ):
        observed(calibrated(learned, params, x), params, x)


def test_eval_and_the_integer_program_use_the_trained_scales(rng):
    params, x = mlp_params(rng), normal(rng, 64, 6)
    prepared = qjax.prepare(mlp, WITH_OUTPUTS)
    qvars = calibrated(prepared, params, x)
    qvars = qvars._replace(params=perturbed(rng, qvars.params))
    codes = jitted(prepared.codes, qvars, params, x)
    integer = qjax.convert(prepared, qvars, params)
    assert mismatches(codes, jitted(integer.codes, x)) == (0, sum(q.codes.size for q in codes.values()))
    np.testing.assert_array_equal(
        jitted(lambda *a, p=prepared: p(*a, mode="eval")[0], qvars, params, x), jitted(integer, x)
    )
    taken = {"second/input": "first/output"}
    for key, q in codes.items():
        scale = qvars.params[taken.get(key, key)]["scale"]
        np.testing.assert_array_equal(q.scale, np.abs(scale), err_msg=key)
    want = qjax.quantize(params["first"]["w"], codes["first/weight"].qparams, W3)
    np.testing.assert_array_equal(codes["first/weight"].codes, want.codes)


def test_a_recipe_with_estimators_prints_and_survives_json(rng):
    recipe = Recipe(
        [Rule(".*", weight=W3, input=lsq(A3, batch_axes=(0, 1)), output=lsq(O4, init_scale="max", zero_point=0))]
    )
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert "lsq(batch_axes=(0," in str(recipe)
    assert "lsq" in str(qjax.prepare(mlp, LSQ3).ops(mlp_params(rng), normal(rng, 16, 6)))
    text = recipe.to_json()
    with pytest.raises(RecipeError, match=r"estimator: expected an estimator, which is one of lsq, got .*mean 'lsq'"):
        Recipe.from_json(text.replace('"lsq"', '"lsp"', 1))


def test_a_mask_is_also_that_of_a_requantized_output(rng):
    """Far outside the range "none" passes the gradient, and the others do not."""
    params, x = {"w": normal(rng, 6, 5)}, normal(rng, 8, 6)
    for mask, passes in (("after_rounding", False), ("before_rounding", False), ("none", True)):
        output = qjax.observers.fixed(O4.replace(mask=mask), scale=1e-3)
        prepared = qjax.prepare(lambda p, x: x @ p["w"], Recipe([Rule(".*", weight=W3, input=O4, output=output)]))
        qvars = calibrated(prepared, params, x)
        gradient = jitted(jax.grad(lambda x, p=prepared, q=qvars: p(q, params, x, mode="eval")[0].sum()), x)
        assert np.any(gradient) == passes


def test_a_rule_of_its_own_reaches_no_scale_inside(rng):
    """The author's derivative is evaluated in float, so what is inside stays as calibrated; what is outside is trained."""

    @jax.custom_jvp
    def inner(x, w):
        return x @ w

    inner.defjvp(lambda primals, tangents: (inner(*primals), tangents[0] @ primals[1] + primals[0] @ tangents[1]))
    params, x = {"a": {"w": normal(rng, 6, 6)}, "b": {"w": normal(rng, 6, 5)}}, normal(rng, 8, 6)
    prepared = qjax.prepare(
        lambda p, x: inner(x, p["a"]["w"]) @ p["b"]["w"], Recipe([Rule(".*", weight=WEIGHT, input=lsq(O4))])
    )
    qvars = calibrated(prepared, params, x)
    gradient = jitted(
        jax.grad(lambda p: weighted_sum(prepared(qvars._replace(params=p), params, x, mode="train")[0])), qvars.params
    )
    reached = {key: bool(np.any(leaf["scale"])) for key, leaf in gradient.items()}
    assert reached == {"a/input": False, "a/weight": False, "b/input": True, "b/weight": True}


@pytest.mark.long
def test_vmap_over_examples_and_over_ensembles_of_scales(rng):
    params, x = {"w": normal(rng, 6, 5)}, normal(rng, 4, 8, 6)
    prepared = qjax.prepare(lambda p, x: x @ p["w"], Recipe([Rule(".*", weight=WEIGHT, input=lsq(O4))]))
    qvars = calibrated(prepared, params, x[0])
    many = jax.tree.map(lambda s: jnp.stack([s, 2 * s, 0.7 * s, 1.3 * s]), qvars.params)

    def gradient(learned, x):
        return jax.grad(lambda p: weighted_sum(prepared(qvars._replace(params=p), params, x, mode="train")[0]))(learned)

    got = jax.jit(jax.vmap(gradient))(many, x)
    for i in range(4):
        own, want = jax.tree.map(lambda s, i=i: s[i], (got, many))
        assert_trees_close(own, jitted(gradient, want, x[i]), 1e-5)
