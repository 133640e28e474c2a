"""The steps of training and what is measured on their results."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from experiments.demo import data, measure, train
from experiments.demo.model import OPS, forward, init, op_outputs
from experiments.demo.recipes import SETTINGS

W4A4 = SETTINGS[-1]


@pytest.fixture(scope="module")
def batch():
    images, labels = data.load(0.4)[0]
    return data.Split(images[:32], labels[:32])


def losses(step, state, batch, **static):
    found = []
    # optax.adam raises a float to an int32 power.
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(60):
            state, loss = step(state, batch.images, batch.labels, **static)
            found.append(float(loss))
    return found, state


def test_float_steps_lower_the_loss(batch):
    opt = train.optimizer(1e-2, 60)
    params = init(0)
    found, state = losses(train.float_step, train.TrainState(params, opt.init(params)), batch, forward=forward, opt=opt)
    assert found[0] == pytest.approx(np.log(10), rel=0.2)  # before the first step: a guess among ten
    assert found[-1] < 0.5 * found[0]
    assert state.qvars == qjax.QuantVars({}, {})


def test_qat_steps_lower_the_loss_and_observe(batch):
    # From random weights the ranges grow fast; with torch's constant of 0.01 they would lag behind for 60 steps.
    follow = functools.partial(qjax.observers.moving_average_min_max, averaging_constant=0.3)
    prepared = qjax.prepare(forward, W4A4.recipe(follow))
    opt = train.optimizer(1e-2, 60)
    params = init(0)
    state = train.TrainState(params, opt.init(params), prepared.init(params, batch.images))
    compiled = train.qat_step._cache_size()
    found, state = losses(train.qat_step, state, batch, prepared=prepared, opt=opt)
    assert found[-1] < 0.5 * found[0]
    assert state.qvars.state["Conv_0/input"].count == 60
    assert train.qat_step._cache_size() == compiled + 1


def test_calibration_remembers_the_extremes_of_all_batches(batch):
    prepared = qjax.prepare(forward, W4A4.recipe(qjax.observers.min_max))
    params = init(0)
    halves = [data.Split(batch.images[part], batch.labels[part]) for part in (slice(16), slice(16, 32))]
    state = train.calibrate(prepared, params, halves).state
    assert state["Conv_0/input"].max_val == batch.images.max()
    expected = op_outputs(params, jnp.asarray(batch.images))
    for op in OPS:
        np.testing.assert_allclose(state[f"{op}/output"].max_val, expected[op].max(), rtol=1e-5)
        np.testing.assert_allclose(state[f"{op}/output"].min_val, expected[op].min(), rtol=1e-5)


def test_calibration_without_data_is_refused():
    prepared = qjax.prepare(forward, W4A4.recipe(qjax.observers.min_max))
    with pytest.raises(ValueError, match="no batch"):
        train.calibrate(prepared, init(0), [])


def test_accuracy_counts():
    logits = jnp.array([[1.0, 2.0], [2.0, 1.0], [0.0, 3.0], [5.0, 4.0]])
    assert train.accuracy(logits, np.array([1, 0, 0, 0])) == 75.0
    with pytest.raises(ValueError, match="labels of shape"):
        train.accuracy(logits, np.array([1, 0]))


def test_op_outputs_are_what_the_next_op_takes(batch):
    params = init(3)
    x = jnp.asarray(batch.images)
    outputs = op_outputs(params, x)
    np.testing.assert_array_equal(outputs["Dense_1"], forward(params, x))
    by_hand = np.asarray(outputs["Dense_0"]) @ np.asarray(params["Dense_1"]["kernel"])
    np.testing.assert_allclose(
        outputs["Dense_1"], by_hand + np.asarray(params["Dense_1"]["bias"]), rtol=1e-4, atol=1e-5
    )
    assert all(float(outputs[op].min()) == 0.0 for op in OPS[:-1])
    assert float(outputs[OPS[-1]].min()) < 0.0


def test_recipes_keep_the_two_ends_at_eight_bits():
    recipe = W4A4.recipe(qjax.observers.min_max)
    rules = {op: recipe.rule_for(op) for op in OPS}
    assert str(rules["Conv_0"].input.spec.format) == "uint8"
    assert rules["Conv_0"].input.spec.convention == "torch_real"
    assert [str(rules[op].output.spec.format) for op in OPS] == ["uint4", "uint4", "uint4", "uint8"]
    assert {str(rules[op].weight.format) for op in OPS} == {"int4"}
    assert all(rules[op].input is None for op in OPS[1:])


# -- measure ---------------------------------------------------------------------------------------------------------


def q(codes):
    return qjax.QTensor(jnp.array(codes, jnp.int8), jnp.float32(0.5), jnp.int32(0), qjax.QuantSpec(qjax.int8))


def test_codes_that_differ_are_counted_and_end_the_run():
    simulated = {"a/input": q([1, 2, 3]), "a/output": q([4, 5])}
    same = measure.compare_codes(simulated, dict(simulated))
    assert same == {"a/input": {"compared": 3, "differ": 0}, "a/output": {"compared": 2, "differ": 0}}
    measure.check_equal(same)
    other = measure.compare_codes(simulated, {"a/input": q([1, 2, 3]), "a/output": q([4, 6])})
    with pytest.raises(SystemExit, match="a/output: 1 of 2"):
        measure.check_equal(other)


def test_points_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="b/input"):
        measure.compare_codes({"a/input": q([1])}, {"a/input": q([1]), "b/input": q([1])})
    with pytest.raises(ValueError, match="shapes"):
        measure.compare_codes({"a/input": q([1])}, {"a/input": q([1, 1])})


def test_sqnr_of_a_number_worked_out_by_hand():
    assert float(measure.sqnr_db(jnp.array([3.0, 4.0]), jnp.array([3.0, 4.5]))) == pytest.approx(20.0)  # 25 / 0.25
    assert float(measure.sqnr_db(jnp.array([1.0]), jnp.array([1.0]))) == float("inf")


def test_weight_histogram_counts_in_steps_of_each_channel():
    spec = qjax.QuantSpec(qjax.int4, symmetric=True, granularity=qjax.PerChannel(-1))
    kernel = jnp.array([[0.3, 30.0], [-0.75, -75.0]]).reshape(2, 1, 1, 2)
    codes = qjax.quantize(kernel, qjax.QParams(jnp.array([0.1, 10.0]), jnp.zeros(2, jnp.int32)), spec)
    found = measure.weight_histogram("Conv_0", "W4A4", kernel, codes)
    assert dict(zip(found["codes"], found["code_counts"], strict=True)) == {
        **dict.fromkeys(range(-8, 8), 0),
        3: 2,
        -8: 2,  # -7.5 steps: a tie, to even
    }
    assert sum(found["float_counts"]) == 4
    centers = (np.array(found["edges"][1:]) + np.array(found["edges"][:-1])) / 2
    occupied = centers[np.array(found["float_counts"]) > 0]
    assert all(min(abs(center - 3.0), abs(center + 7.5)) <= 0.126 for center in occupied)
