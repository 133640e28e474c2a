"""convert: what it refuses, what the program holds, and that it is a plain function of its arguments."""

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
    calibrated,
    cnn,
    cnn_params,
    conv,
    evaluated,
    jitted,
    mlp,
    mlp_params,
    normal,
)

FULL = Recipe([Rule(".*", weight=W8, input=observers.min_max(A8), output=observers.min_max(A8))])


def program_of(fn, recipe, params, *args, **options):
    prepared = qjax.prepare(fn, recipe, **options)
    whole = list(args)
    whole.insert(prepared.params_argnum, params)
    qvars = calibrated(prepared, *whole)
    return prepared, qvars, qjax.convert(prepared, qvars, params)


def test_only_prepared_functions():
    with pytest.raises(TypeError, match=r"prepared must come from qjax.prepare, got function"):
        qjax.convert(mlp, None, None)


def test_uncalibrated(rng):
    params, x = mlp_params(rng), normal(rng, 2, 6)
    prepared = qjax.prepare(mlp, FULL)
    with pytest.raises(ValueError, match=r"the (input|output) of first has observed nothing"):
        qjax.convert(prepared, prepared.init(params, x), params)


@pytest.mark.parametrize("role", ["input", "output"])
def test_activations_without_one_static_range(rng, role):
    observer = observers.min_max(A8.replace(granularity=qjax.PerChannel(-1)))
    params, x = mlp_params(rng), normal(rng, 2, 6)
    prepared = qjax.prepare(mlp, Recipe([Rule("second", weight=W8, **{role: observer})]))
    qvars = calibrated(prepared, params, x)
    with pytest.raises(ValueError, match=f"the {role} of second is quantized per_channel.*one static range"):
        qjax.convert(prepared, qvars, params)


def test_unknown_shapes(rng):
    params, x = mlp_params(rng), normal(rng, 2, 6)
    qvars = calibrated(qjax.prepare(mlp, INPUTS), params, x)
    fresh = qjax.prepare(mlp, INPUTS)
    with pytest.raises(ValueError, match="shapes of the other arguments are not known"):
        qjax.convert(fresh, qvars, params)
    from_values = qjax.convert(fresh, qvars, params, x)
    from_shapes = qjax.convert(qjax.prepare(mlp, INPUTS), qvars, params, jax.ShapeDtypeStruct((9, 6), jnp.float32))
    assert (jitted(from_values, x) == jitted(from_shapes, x)).all()


def test_variables_of_another_recipe(rng):
    params, x = mlp_params(rng), normal(rng, 2, 6)
    prepared, other = qjax.prepare(mlp, INPUTS), qjax.prepare(mlp, FULL)
    qvars = calibrated(other, params, x)
    calibrated(prepared, params, x)
    with pytest.raises(ValueError, match="the input of second has observed nothing"):
        qjax.convert(prepared, qvars, params)
    one = qjax.prepare(mlp, Recipe([Rule("first", weight=W8, input=A8)]))
    with pytest.raises(ValueError, match=r"convert: qvars has no state for 'second/(input|weight)'"):
        qjax.convert(prepared, one.init(params, x), params)


def test_every_batch_size(rng):
    prepared, qvars, program = program_of(cnn, INPUTS, (params := cnn_params(rng)), normal(rng, 2, 6, 6, 2))
    x = normal(rng, 5, 6, 6, 2)
    for batch in (1, 2, 5):
        np.testing.assert_array_equal(jax.jit(program)(x[:batch]), evaluated(prepared, qvars, params, x[:batch]))


def test_the_fields_of_an_op(rng):
    params, x = cnn_params(rng), normal(rng, 2, 6, 6, 2)
    prepared, qvars, program = program_of(cnn, INPUTS, params, x)
    conv_op, head = program.ops
    assert (conv_op.name, conv_op.kind, conv_op.relu) == ("conv", "conv", True)
    assert (head.name, head.kind, head.relu) == ("head", "dot", False)
    for op, layer in ((conv_op, "conv"), (head, "head")):
        np.testing.assert_array_equal(np.ravel(op.bias), params[layer]["b"])
        assert op.weight.codes.shape == params[layer]["w"].shape
        np.testing.assert_array_equal(op.weight.codes, prepared.codes(qvars, params, x)[f"{layer}/weight"].codes)
        spec, qparams = op.input
        assert spec == A8
        assert qparams == observers.min_max(A8).qparams(qvars.state[f"{layer}/input"])
    # all uses of what conv gives out end at head's input, which is where the deployed kernel requantizes to
    assert conv_op.output == program.points["head/input"]
    assert head.output is None
    assert conv_op.contraction.padding == ((1, 1), (1, 1))
    assert conv_op.contraction.window_strides == (1, 1)


def test_the_output_point_of_an_op(rng):
    params, x = cnn_params(rng), normal(rng, 2, 6, 6, 2)
    _, _, program = program_of(cnn, FULL, params, x)
    assert program.ops[0].output == program.points["conv/output"]
    assert program.ops[1].input == program.points["conv/output"]
    assert program.ops[1].output == program.points["head/output"]
    assert set(program.points) == {"conv/input", "conv/output", "head/output"}


def test_an_op_whose_result_is_used_twice_gives_out_floats(rng):
    params = {name: {"w": normal(rng, 4, 4)} for name in "ab"}
    _, _, program = program_of(lambda p, x: (h := x @ p["a"]["w"]) + h @ p["b"]["w"], INPUTS, params, normal(rng, 3, 4))
    assert program.ops[0].output is None


@pytest.mark.parametrize("shape", [(1, 4), (), (3, 4)], ids=["channel", "scalar", "full"])
@pytest.mark.parametrize("granularity", [qjax.PerTensor(), qjax.PerChannel(-1)], ids=str)
def test_every_shape_of_a_bias_is_added_in_the_accumulator(rng, shape, granularity):
    params, x = {"a": {"w": normal(rng, 5, 4), "b": normal(rng, *shape)}}, normal(rng, 3, 5)
    weight = W8.replace(granularity=granularity)
    recipe = Recipe([Rule(".*", weight=weight, input=observers.min_max(A8), output=observers.min_max(A8))])
    prepared, qvars, program = program_of(lambda p, x: x @ p["a"]["w"] + p["a"]["b"], recipe, params, x)
    np.testing.assert_array_equal(program.ops[0].bias, params["a"]["b"])
    codes = jax.jit(program.codes)(x)
    sums = (np.asarray(codes["a/input"].codes, np.int64) - int(codes["a/input"].zero_point)) @ np.asarray(
        codes["a/weight"].codes, np.int64
    )
    unit = np.asarray(codes["a/input"].scale * codes["a/weight"].scale)
    exact = (sums + np.asarray(params["a"]["b"], np.float64) / unit) * (
        unit / np.asarray(codes["a/output"].scale, np.float64)
    )
    near_tie = np.abs(exact - np.floor(exact) - 0.5) < 1e-4
    assert near_tie.mean() < 0.2
    want = np.clip(np.rint(exact) + int(codes["a/output"].zero_point), 0, 255)
    np.testing.assert_array_equal(np.asarray(codes["a/output"].codes)[~near_tie], want[~near_tie])
    assert (evaluated(prepared, qvars, params, x) == jitted(program, x)).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kind", ["dot", "conv"])
def test_a_weight_with_a_float_input_is_dequantized_when_it_is_used(rng, dtype, kind):
    fn = (lambda p, x: x @ p["a"]["w"]) if kind == "dot" else (lambda p, x: conv(x, p["a"]["w"]))
    params = {"a": {"w": normal(rng, *((4, 3) if kind == "dot" else (3, 3, 2, 3)), dtype=dtype)}}
    x = normal(rng, *((5, 4) if kind == "dot" else (2, 5, 5, 2)), dtype=dtype)
    prepared, qvars, program = program_of(fn, Recipe([Rule(".*", weight=W8)]), params, x)
    out = jitted(program, x)
    assert out.dtype == dtype
    assert (out == evaluated(prepared, qvars, params, x)).all()
    assert program.ops[0].input is None
    assert program.ops[0].output is None
    w = {"a": {"w": program.weights["a"].dequantize(dtype)}}
    assert (out == jax.jit(fn)(w, x)).all()
    assert program.nbytes < params["a"]["w"].nbytes + 4 * 3 * 2


def test_what_the_program_holds(rng):
    """Weights as codes; of the floats, the biases, and the weight of the op that no rule takes."""
    params, x = mlp_params(rng), normal(rng, 4, 6)
    recipe = Recipe([Rule("first", weight=W8, input=observers.min_max(A8))])
    _, _, program = program_of(mlp, recipe, params, x)
    assert set(program.weights) == {"first"}
    assert [op.name for op in program.ops] == ["first"]
    kept = sorted(leaf.shape for leaf in program._floats.values())
    assert kept == sorted([params["first"]["b"].shape, params["second"]["b"].shape, params["second"]["w"].shape])
    codes_and_qparams = 6 * 8 + 8 * (4 + 4) + (4 + 4)
    assert program.nbytes == codes_and_qparams + 4 * (8 + 5 + 8 * 5)
    _, _, everything = program_of(mlp, INPUTS, params, x)
    assert sorted(leaf.shape for leaf in everything._floats.values()) == [(5,), (8,)]


def test_a_weight_that_is_also_used_as_a_float_is_kept(rng):
    params, x = {"w": normal(rng, 4, 4)}, normal(rng, 3, 4)
    prepared, qvars, program = program_of(lambda p, x: (x @ p["w"], jnp.tanh(p["w"])), INPUTS, params, x)
    assert len(program._floats) == 1
    for got, want in zip(program(x), prepared(qvars, params, x, mode="eval")[0], strict=True):
        np.testing.assert_array_equal(got, want)


def test_the_program_does_not_read_the_parameters_again(rng):
    params, x = jax.tree.map(np.array, mlp_params(rng)), normal(rng, 4, 6)
    _, _, program = program_of(mlp, INPUTS, params, x)
    before = jitted(program, x)
    for leaf in jax.tree.leaves(params):
        leaf[...] = 0
    assert (before == jitted(program, x)).all()


def test_params_argnum_and_static_leaves(rng):
    """Parameters in the second place, with leaves that are no arrays among them, and arguments around them."""

    def fn(shift, params, x, *, scale=2.0):
        out = (x + shift) @ params["layer"]["w"] * scale
        return jax.nn.relu(out) if params["act"] == "relu" else out.reshape(-1, params["columns"])

    params = {"act": "none", "columns": 2, "layer": {"w": normal(rng, 4, 6)}, "unused": normal(rng, 3)}
    shift, x = normal(rng, 1, 4), normal(rng, 5, 4)
    prepared, qvars, program = program_of(fn, INPUTS, params, shift, x, params_argnum=1)
    want = evaluated(prepared, qvars, shift, params, x)
    assert want.shape == (15, 2)
    assert (jitted(program, shift, x) == want).all()
    assert len(program._floats) == 0


def test_trained_variables_and_frozen_weights(rng):
    """A weight observer that is not dynamic keeps its range when the weights change."""
    params, x = {"a": {"w": normal(rng, 4, 3)}}, normal(rng, 8, 4)
    fn = lambda p, x: x @ p["a"]["w"]  # noqa: E731
    for observer in (observers.min_max(W8), observers.dynamic(W8)):
        prepared = qjax.prepare(fn, Recipe([Rule(".*", weight=observer, input=A8)]))
        qvars = prepared(prepared.init(params, x), params, x, mode="train")[1]
        grown = jax.tree.map(lambda w: 2 * w, params)
        program = qjax.convert(prepared, qvars, grown)
        same = program.weights["a"].scale == qjax.convert(prepared, qvars, params).weights["a"].scale
        assert bool(same.all()) == (not observer.dynamic)
        assert (jitted(program, x) == evaluated(prepared, qvars, grown, x)).all()


def test_tied_weights(rng):
    params, x = {"e": {"w": normal(rng, 4, 6)}}, normal(rng, 3, 4)
    fn = lambda p, x: (x @ p["e"]["w"]) @ p["e"]["w"].T  # noqa: E731
    prepared, qvars, program = program_of(fn, INPUTS, params, x)
    assert [op.name for op in program.ops] == ["e", "e:1"]
    assert program.weights["e:1"].codes.shape == (6, 4)
    assert (jitted(program, x) == evaluated(prepared, qvars, params, x)).all()


def test_convert_inside_jit(rng):
    params, x = mlp_params(rng), normal(rng, 4, 6)
    prepared, qvars, program = program_of(mlp, INPUTS, params, x)
    inside = jax.jit(lambda params, x: qjax.convert(prepared, qvars, params)(x))(params, x)
    assert (inside == jitted(program, x)).all()


def test_a_function_without_quantized_ops(rng):
    params, x = mlp_params(rng), normal(rng, 4, 6)
    _, _, program = program_of(mlp, Recipe([]), params, x)
    assert program.ops == ()
    assert (jitted(program, x) == jax.jit(mlp)(params, x)).all()
