"""What a process with four devices checks of `shard_map`; `test_shard_map.py` starts it, since devices are counted once."""

import re
import sys
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import qjax
from qjax import PerToken, Recipe, Rule, observers
from tests.transform.models import A8, W8, assert_trees_close, mismatches, mlp, mlp_params, normal

RNG = np.random.default_rng(0)
PARAMS, X = mlp_params(RNG), normal(RNG, 16, 6) * jnp.arange(1.0, 17.0)[:, None]  # shards of different ranges


@cache
def mesh():
    """Made when it is asked for: who only imports this file may have one device."""
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def recurrent(params, x):
    """A layer, and another one twice."""

    def dense(layer, x):
        return x @ layer["w"] + layer["b"][None]

    x = jax.nn.relu(dense(params["first"], x))
    second = params["second"]
    x, _ = lax.scan(lambda x, _: (x + 0.1 * dense(second, x) @ second["w"].T, None), x, None, length=2)
    return dense(second, x)


def sharded(fn, axes, check_vma=True):
    specs = {"in_specs": (P(), P(axes)), "out_specs": P(axes), "axis_names": set(axes), "check_vma": check_vma}
    return jax.shard_map(fn, mesh=mesh(), **specs)


def check_equals_the_whole(fn, axes, check_vma, rule, same_state):
    """A batch in parts: outputs, states, gradients and codes of the function that sees it whole."""
    whole = qjax.prepare(fn, Recipe([rule]))
    parts = qjax.prepare(sharded(fn, axes, check_vma), Recipe([rule]))
    assert [op.name for op in parts.ops(PARAMS, X)] == [op.name for op in whole.ops(PARAMS, X)]

    @partial(jax.jit, static_argnums=0)
    def everything(prepared, params, x):
        qvars = prepared(prepared.init(params, x), params, x, mode="calibrate")[1]

        def loss(params, mode):
            out, after = prepared(qvars, params, 0.9 * x, mode=mode)
            return (out**2).sum(), (out, after)

        (_, (_, after)), grads = jax.value_and_grad(loss, has_aux=True)(params, "train")
        return qvars, after, grads, prepared(after, params, x, mode="eval")[0]

    got, want = everything(parts, PARAMS, X), everything(whole, PARAMS, X)
    if same_state:
        assert_trees_close(got, want, 1e-5)
        for key, state in want[0].state.items():
            first = all(np.array_equal(a, b) for a, b in zip(got[0].state[key], state, strict=True))
            assert first or not key.startswith("first"), key
    program = qjax.convert(parts, got[1], PARAMS, X)
    assert [op.name for op in program.ops] == [op.name for op in whole.ops(PARAMS, X)]
    np.testing.assert_array_equal(jax.jit(program)(X), got[3])
    predicted, computed = jax.jit(partial(parts.codes, got[1]))(PARAMS, X), jax.jit(program.codes)(X)
    different, total = mismatches(predicted, computed)
    assert different == 0
    assert total > 0
    shards = predicted["first/input"].codes
    assert shards.shape == (4 if len(axes) == 2 else 2, 16 // (4 if len(axes) == 2 else 2), 6)
    if same_state:
        np.testing.assert_array_equal(shards.reshape(16, 6), whole.codes(want[1], PARAMS, X)["first/input"].codes)


def rule_of(observer):
    return Rule(".*", weight=W8, input=observer)


def check_sharded_weights():
    """Tensor parallelism: a layer of which each shard has some columns is left in float, and why is said."""

    def fn(params, x):
        third = params["third"]
        params = {name: params[name] for name in ("first", "second")}

        def body(params, x):
            x = jax.nn.relu(x @ params["first"]["w"])
            return lax.psum(x @ params["second"]["w"], "model")

        specs = {"first": {"w": P(None, "model"), "b": P()}, "second": {"w": P("model"), "b": P()}}
        return jax.shard_map(body, mesh=mesh(), in_specs=(specs, P()), out_specs=P())(params, x) @ third

    params = PARAMS | {"third": normal(RNG, 5, 3)}
    prepared = qjax.prepare(fn, Recipe([rule_of(observers.min_max(A8))]))
    ops = prepared.ops(params, X)
    assert [op.name for op in ops if not op.why] == ["third"]
    why = "inside shard_map each shard has a part of its weight, whose range no shard knows"
    assert [op.why for op in ops if op.why] == [why] * 2


def check_errors():
    for observer, message in (
        (observers.min_max(A8.replace(granularity=qjax.PerChannel(-1))), "quantized per_channel(-1) by static ranges"),
        (qjax.estimators.lsq(qjax.QuantSpec(qjax.int8, symmetric=True)), "inside shard_map no estimator is calibrated"),
    ):
        prepared = qjax.prepare(sharded(mlp, ("data",)), Recipe([Rule("first", weight=W8, input=observer)]))
        with pytest.raises(ValueError, match=re.escape(message)):
            prepared(prepared.init(PARAMS, X), PARAMS, X, mode="calibrate")


if __name__ == "__main__":
    both, data = ("data", "model"), ("data",)
    average = observers.moving_average_min_max(A8, averaging_constant=0.25)
    check_equals_the_whole(mlp, data, True, rule_of(average), True)
    check_sharded_weights()
    check_errors()
    if "long" in sys.argv:
        check_equals_the_whole(recurrent, both, True, rule_of(observers.min_max(A8)), True)
        check_equals_the_whole(mlp, data, False, rule_of(observers.min_max(A8)), True)
        check_equals_the_whole(mlp, data, True, rule_of(observers.histogram(A8)), True)
        per_token = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=PerToken())
        check_equals_the_whole(mlp, data, True, Rule(".*", weight=W8, input=observers.dynamic(per_token)), False)
    print("checked")
