"""Which value is a weight, what the ops are called, and which of them are left in float and why."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.experimental import pallas as pl

import qjax
from tests.transform.models import INPUTS, conv, mlp, mlp_params, normal, op_names


def table(fn, *args, **options):
    """(name, which operand is a weight, why it is left in float) of every op."""
    ops = qjax.prepare(fn, qjax.Recipe([]), **options).ops(*args)
    return [(op.name, op.weight, op.why) for op in ops]


@pytest.mark.parametrize(
    ("params", "fn", "name"),
    [
        ({"a": {"w": 0}}, lambda p, x: x @ p["a"]["w"], "a"),
        ({"params": {"Dense_0": {"kernel": 0}}}, lambda p, x: x @ p["params"]["Dense_0"]["kernel"], "Dense_0"),
        ({"w": 0}, lambda p, x: x @ p["w"], "w"),
        ([0], lambda p, x: x @ p[0], "0"),
        (({"w": 0},), lambda p, x: x @ p[0]["w"], "0"),
        (0, lambda p, x: x @ p, "dot"),
    ],
)
def test_a_weight_is_found_and_named_in_every_container(rng, params, fn, name):
    params = jax.tree.map(lambda _: normal(rng, 4, 3), params)
    assert table(fn, params, normal(rng, 2, 4)) == [(name, "rhs", "")]


def test_names_of_linen_modules(rng):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(6)(x))
            return nn.Dense(4)(x)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
            return nn.Dense(2, name="head")(Block()(x.reshape(x.shape[0], -1)))

    x = normal(rng, 2, 4, 4, 1)
    with jax.numpy_rank_promotion("allow"):
        variables = Net().init(jax.random.key(0), x)
        names = ["Conv_0", "Block_0/Dense_0", "Block_0/Dense_1", "head"]
        assert op_names(Net().apply, variables, x) == names
        assert op_names(lambda p, x: Net().apply({"params": p}, x), variables["params"], x) == names


def test_names_of_an_nnx_module(rng):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(1, 2, (3, 3), rngs=rngs)
            self.out = nnx.Linear(2, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.conv(x)))

    graphdef, state = nnx.split(Net(nnx.Rngs(0)))
    with jax.numpy_rank_promotion("allow"):
        ops = qjax.prepare(lambda s, x: nnx.merge(graphdef, s)(x), INPUTS).ops(state, normal(rng, 2, 4, 4, 1))
    assert [(op.weight, op.epilogue) for op in ops] == [("rhs", "bias, relu"), ("rhs", "bias")]
    assert [op.name for op in ops] == ["conv", "out"]  # not "conv/kernel", although the path ends in "kernel", "value"


def test_names_of_equinox_modules(rng):
    eqx = pytest.importorskip("equinox", reason="equinox is an optional neighbour; only this test needs it")
    net = eqx.nn.MLP(4, 3, 5, 1, key=jax.random.key(0))  # holds its activation function as a leaf
    prepared = qjax.prepare(lambda net, x: jax.vmap(net)(x), INPUTS)
    x = normal(rng, 2, 4)
    assert [(op.name, op.weight) for op in prepared.ops(net, x)] == [("layers/0", "lhs"), ("layers/1", "lhs")]
    _, qvars = prepared(prepared.init(net, x), net, x, mode="calibrate")
    out, _ = prepared(qvars, net, x, mode="eval")
    assert (qjax.convert(prepared, qvars, net)(x) == out).all()


def test_ops_between_activations_are_named_after_the_scope(rng):
    x = normal(rng, 2, 5, 8)
    with jax.numpy_rank_promotion("allow"):
        net = nn.MultiHeadDotProductAttention(num_heads=2)
        variables = net.init(jax.random.key(0), x)
        ops = qjax.prepare(net.apply, INPUTS).ops(variables, x)
    by_weight = {op.name: op.weight for op in ops}
    assert [name for name, weight in by_weight.items() if weight] == ["query", "key", "value", "out"]
    between = [name for name, weight in by_weight.items() if weight is None]
    assert len(between) == 2
    assert all("MultiHeadDotProductAttention" in name for name in between)
    assert all({"lhs", "rhs"} == set(op.quantizers) for op in ops if op.weight is None)


MOVES = {
    "transpose": lambda w: w.T,
    "reshape": lambda w: w.reshape(2, 2, 5).reshape(4, 5),
    "astype": lambda w: w.astype(jnp.bfloat16).astype(jnp.float32).T,
    "squeeze": lambda w: jnp.squeeze(w[:, :, None], 2).T,
    "broadcast": lambda w: jnp.broadcast_to(w[None], (3, 5, 4))[1].T,
    "concatenate": lambda w: jnp.concatenate([w[1:], w[:1]]).T,
    "slice": lambda w: w[:3, 1:].T,
    "index": lambda w: w[None, 0].T,
    "rev": lambda w: w[::-1].T,
    "jnp.flip": lambda w: jnp.flip(w).T,
    "jnp.moveaxis": lambda w: jnp.moveaxis(w, 0, 1),
    "jnp.split": lambda w: jnp.split(w.T, [2], axis=1)[1],
    "jnp.roll": lambda w: jnp.roll(w, 1, 0).T,
    "jnp.hstack": lambda w: jnp.hstack([w, w]).T[:4],
    "einsum": lambda w: jnp.einsum("ab->ba", w),
    "jit": jax.jit(lambda w: w.T),
    "nested jit": jax.jit(lambda w: jax.jit(jnp.transpose)(w)),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_moved_weight_is_still_that_weight(rng, name):
    move, shape = MOVES[name], (4, 5) if name == "reshape" else (5, 4)
    params = {"a": {"w": normal(rng, *shape)}}
    inner = move(params["a"]["w"]).shape[0]
    assert table(lambda p, x: x @ move(p["a"]["w"]), params, normal(rng, 2, inner)) == [("a", "rhs", "")]


@pytest.mark.parametrize("change", [lambda w: 2 * w, jnp.tanh, lambda w: w - w.mean(), lambda w: jax.nn.relu(w)])
def test_a_computed_weight_is_an_activation(rng, change):
    ((name, weight, _),) = table(
        lambda p, x: x @ change(p["a"]["w"]), {"a": {"w": normal(rng, 4, 4)}}, normal(rng, 2, 4)
    )
    assert (name, weight) == ("dot", None)


def test_concatenated_weights_are_named_after_what_they_share(rng):
    params = {"cell": {"hi": {"w": normal(rng, 4, 2)}, "hf": {"w": normal(rng, 4, 2)}}}

    def fn(p, x):
        return x @ jnp.concatenate([p["cell"]["hi"]["w"], p["cell"]["hf"]["w"]], axis=1)

    assert table(fn, params, normal(rng, 3, 4)) == [("cell", "rhs", "")]


def test_names_are_unique_and_in_program_order(rng):
    layer = jax.jit(lambda w, x: jnp.tanh(x @ w))

    def fn(p, x):
        x = layer(p["a"]["w"], layer(p["a"]["w"], x))  # one trace of the layer, called twice
        return (x @ p["b"]["w"]) @ (x @ x.T).T

    params = {"a": {"w": normal(rng, 4, 4)}, "b": {"w": normal(rng, 4, 2)}}
    x = normal(rng, 2, 4)
    names = op_names(fn, params, x)
    assert names == ["a", "a:1", "b", "dot", "dot:1"]
    state = qjax.prepare(fn, INPUTS).init(params, x).state
    assert set(state) >= {"a/input", "a/weight", "a:1/input", "a:1/weight", "dot/lhs", "dot/rhs"}


def test_ops_inside_jit_remat_and_custom_jvp_are_quantized(rng):
    @jax.custom_jvp
    def custom(w, x):
        return x @ w

    custom.defjvps(lambda t, out, w, x: x @ t, lambda t, out, w, x: t @ w)

    def fn(p, x):
        x = jax.jit(jax.jit(lambda w, x: x @ w))(p["jit"]["w"], x)
        x = jax.checkpoint(lambda w, x: jax.jit(jnp.matmul)(x, w))(p["remat"]["w"], x)
        return custom(p["custom"]["w"], x)

    params = {name: {"w": normal(rng, 4, 4)} for name in ("jit", "remat", "custom")}
    x = normal(rng, 2, 4)
    ops = qjax.prepare(fn, INPUTS).ops(params, x)
    assert [(op.name, op.weight, op.compute) for op in ops] == [
        (name, "rhs", "codes") for name in ("jit", "remat", "custom")
    ]


def test_ops_under_other_calls_are_left_in_float_and_listed(rng):
    def kernel(x_ref, w_ref, out_ref):
        out_ref[...] = x_ref[...] @ w_ref[...]

    def pallas(w, x):
        return pl.pallas_call(kernel, jax.ShapeDtypeStruct((2, 4), jnp.float32), interpret=True)(x, w)

    not_rewritten, opaque = "inside {}, which is not rewritten", "an opaque call: what it computes is not known"
    calls = {
        "custom_linear_solve/dot": (
            lambda w, x: lax.custom_linear_solve(lambda v: v @ w, x, lambda _, b: b),
            not_rewritten,
        ),
        "pallas_call": (pallas, opaque),
        "jit/pallas_call": (jax.jit(pallas), opaque),
        "pure_callback": (lambda w, x: jax.pure_callback(lambda w, x: x, x, w, x), opaque),
    }
    w, x = normal(rng, 4, 4), normal(rng, 2, 4)
    for name, (call, why) in calls.items():

        def fn(p, x, call=call):
            return call(p["inner"]["w"], x) @ p["outer"]["w"]

        params = {"inner": {"w": w}, "outer": {"w": w}}
        prepared = qjax.prepare(fn, INPUTS)
        outer, inner = prepared.ops(params, x)
        assert (outer.name, outer.compute) == ("outer", "codes")
        assert (inner.name, inner.compute) == (name, "float")
        assert inner.kind == ("dot" if "dot" in name else name.removeprefix("jit/"))
        assert inner.why == why.format(name.split("/")[0])
        out, _ = prepared(prepared.init(params, x), params, x, mode="calibrate")
        assert (out == fn(params, x)).all()


def test_ops_that_cannot_be_quantized_say_why(rng):
    def fn(p, x, n, z):
        integers, complexes = n @ n, z @ z
        return x @ p["a"]["w"], x @ (p["a"]["w"] @ p["b"]["w"]), integers, complexes

    params = {"a": {"w": normal(rng, 4, 4)}, "b": {"w": normal(rng, 4, 4)}}
    n, z = jnp.arange(4).reshape(2, 2), jnp.full((2, 2), 1j)
    prepared = qjax.prepare(fn, INPUTS)
    args = (params, normal(rng, 2, 4), n, z)
    ops = {op.why: op.name for op in prepared.ops(*args)}
    assert {
        "operands are int32 and int32",
        "operands are complex64 and complex64",
        "both operands are weights",
    } < ops.keys()
    out, _ = prepared(prepared.init(*args), *args, mode="train")
    assert (out[2] == n @ n).all()
    assert (out[3] == z @ z).all()


def test_arguments_that_are_not_arrays_are_passed_on(rng):
    def fn(params, x, flag, word, nothing, times, factor, key):
        assert word == "tanh"
        assert nothing is None
        for _ in range(times):
            x = x @ params["w"]
        x = x * factor + jax.random.normal(key, x.shape)
        return jnp.tanh(x) if flag else x

    params, x = {"w": normal(rng, 4, 4)}, normal(rng, 2, 4)
    prepared = qjax.prepare(fn, INPUTS)
    args = (params, x, True, "tanh", None, 2, 0.5, jax.random.key(0))
    qvars = prepared.init(*args)
    assert [op.name for op in prepared.ops(*args)] == ["w", "w:1"]
    out, qvars = prepared(qvars, *args, mode="calibrate")
    assert (out == fn(*args)).all()
    out, _ = prepared(qvars, *args, mode="eval")
    assert (qjax.convert(prepared, qvars, params)(*args[1:]) == out).all()


def test_numpy_arguments_are_taken_as_jax_takes_them(rng):
    params, x = {"w": rng.normal(size=(4, 3))}, rng.normal(size=(2, 4))  # float64
    fn = lambda p, x: jnp.matmul(x, p["w"])  # noqa: E731
    prepared = qjax.prepare(fn, INPUTS)
    qvars = prepared.init(params, x)
    for mode in ("calibrate", "train", "eval"):
        out, qvars = prepared(qvars, params, x, mode=mode)
        assert out.dtype == jnp.float32
    in_jax = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, x))
    assert (out == prepared(qvars, *in_jax, mode="eval")[0]).all()
    assert (out == qjax.convert(prepared, qvars, params)(x)).all()


def test_params_argnum(rng):
    params, x = mlp_params(rng), normal(rng, 3, 6)
    first, second = qjax.prepare(mlp, INPUTS), qjax.prepare(lambda x, p: mlp(p, x), INPUTS, params_argnum=1)
    assert (
        op_names(mlp, params, x) == op_names(lambda x, p: mlp(p, x), x, params, params_argnum=1) == ["first", "second"]
    )
    out = first(first.init(params, x), params, x)[0]
    assert (out == second(second.init(x, params), x, params)[0]).all()
    with pytest.raises(TypeError, match="params_argnum is 1, but the function got 1 argument"):
        second.init(x)


def test_a_closed_over_constant_is_an_activation(rng):
    w = normal(rng, 4, 3)
    assert table(lambda p, x: x @ w, {}, normal(rng, 2, 4)) == [("dot", None, "")]


def test_an_array_leaf_that_is_not_used_and_one_that_is_returned(rng):
    params = {"w": normal(rng, 4, 3), "unused": normal(rng, 2)}
    prepared = qjax.prepare(lambda p, x: (x @ p["w"], p["w"], x, None, 3.0), INPUTS)
    x = normal(rng, 2, 4)
    out, _ = prepared(prepared.init(params, x), params, x)
    assert out[1] is params["w"]
    assert out[2] is x
    assert out[3] is None
    assert float(out[4]) == 3.0


def test_convolutions(rng):
    params = {"c": {"w": normal(rng, 3, 3, 2, 4)}}
    ((name, weight, why),) = table(lambda p, x: conv(x, p["c"]["w"]), params, normal(rng, 1, 5, 5, 2))
    assert (name, weight, why) == ("c", "rhs", "")


def test_of_variables_in_collections_those_in_params_are_weights(rng):
    variables, x = (
        {"params": {"a": {"w": normal(rng, 4, 4)}}, "lora": {"a": {"w": normal(rng, 4, 4)}}},
        normal(rng, 2, 4),
    )
    prepared = qjax.prepare(lambda v, x: x @ v["params"]["a"]["w"] + x @ v["lora"]["a"]["w"], INPUTS)
    assert [(op.name, op.weight) for op in prepared.ops(variables, x)] == [("a", "rhs"), ("dot", None)]
