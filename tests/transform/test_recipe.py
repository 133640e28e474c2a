"""Rules and recipes, and the table of ops that a recipe is written from."""

import re

import jax
import jax.numpy as jnp
import pytest

import qjax
from qjax import Recipe, RecipeError, Rule, observers
from tests.transform.models import A7, A8, INPUTS, W8, calibrated, cnn, cnn_params, mlp, mlp_params, normal


def test_a_pattern_has_to_match_the_whole_name():
    rule = Rule("Dense_.*", weight=W8)
    assert rule.matches("Dense_0")
    assert not rule.matches("MyDense_0")
    assert not Rule("Dense_1").matches("Dense_10")


def test_the_last_match_decides_all_roles():
    first, last = Rule(".*", weight=W8, input=A8), Rule("b", weight=W8)
    recipe = Recipe([first, last])
    assert recipe.rule_for("a") is first
    assert recipe.rule_for("b") is last
    assert recipe.rule_for("b").input is None
    assert Recipe([last]).rule_for("a") is None


def test_a_rule_of_nones_leaves_its_op_in_float(rng):
    params, x = mlp_params(rng), normal(rng, 3, 6)
    prepared = qjax.prepare(mlp, Recipe([Rule(".*", weight=W8, input=A8), Rule("second")]))
    assert set(prepared.init(params, x).state) == {"first/weight", "first/input"}
    assert [(op.name, op.compute, op.rule) for op in prepared.ops(params, x)] == [
        ("first", "codes", ".*"),
        ("second", "float", "second"),
    ]


def test_a_role_takes_a_spec_or_an_observer():
    rule = Rule(".*", weight=W8, input=A8, output=observers.min_max(A8))
    assert rule.weight_observer == observers.dynamic(W8)
    assert rule.input_observer == observers.moving_average_min_max(A8)
    assert rule.output_observer == observers.min_max(A8)
    assert Rule(".*").weight_observer is Rule(".*").input_observer is Rule(".*").output_observer is None
    assert [rule.observer(role).spec for role in ("weight", "input", "lhs", "rhs", "output")] == [W8, A8, A8, A8, A8]


def test_lhs_and_rhs_do_as_input_says_unless_they_are_given():
    attention = Rule(".*", input=A8, lhs=observers.min_max(W8), rhs=None)
    assert attention.observer("lhs") == observers.min_max(W8)
    assert attention.observer("rhs") is None
    assert attention.observer("input") == observers.moving_average_min_max(A8)
    assert Rule(".*", input=None, rhs=A8).observer("rhs") == observers.moving_average_min_max(A8)
    with pytest.raises(
        TypeError, match=r"Rule\('a'\): weight must be a QuantSpec, an observer, an estimator or None, got 'input'"
    ):
        Rule("a", weight="input")


def test_the_two_operands_of_an_op_between_activations(rng):
    params, x = {"q": {"w": normal(rng, 4, 4)}}, normal(rng, 3, 4)
    rules = [Rule(".*", weight=W8, input=A8), Rule("dot", input=A8, lhs=None, rhs=observers.dynamic(A7))]
    prepared = qjax.prepare(lambda p, x: (x @ p["q"]["w"]) @ x.T, Recipe(rules))
    assert set(prepared.init(params, x).state) == {"q/weight", "q/input", "dot/rhs"}
    assert prepared.ops(params, x)[1].quantizers == {"rhs": str(A7)}


def test_a_rule_may_ask_for_a_kind(rng):
    rule = Rule(".*", kind="dot", weight=W8)
    assert rule.matches("a", "dot")
    assert not rule.matches("a", "conv")
    assert not rule.matches("a")  # of unknown kind
    params, x = cnn_params(rng), normal(rng, 2, 6, 6, 2)
    recipe = Recipe([Rule(".*", weight=W8, input=A8), Rule(".*", kind="conv", weight=W8)])
    assert recipe.rule_for("conv", "conv") is recipe.rules[1]
    prepared = qjax.prepare(cnn, recipe)
    assert set(prepared.init(params, x).state) == {"conv/weight", "head/weight", "head/input"}
    qvars = calibrated(prepared, params, x)
    integer = jax.jit(lambda qvars: qjax.convert(prepared, qvars, params).codes(x))(qvars)
    assert set(integer) == {"conv/weight", "head/weight", "head/input"}  # the integer program goes by kind, too


def test_a_rule_of_a_kind_that_no_op_has_says_which_there_are(rng):
    params, x = cnn_params(rng), normal(rng, 2, 6, 6, 2)
    prepared = qjax.prepare(cnn, Recipe([Rule("head", kind="conv")]))
    message = (
        "Rule('head', kind='conv') matches no op. A pattern has to match the whole name, and the op has to be of kind 'conv'. "
        "The ops are:\n  conv (conv)\n  head (dot)"
    )
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}$"):
        prepared.init(params, x)
    several = qjax.prepare(cnn, Recipe([Rule("body", kind=("conv", "dot"))]))
    with pytest.raises(RecipeError, match=r"Rule\('body', kind=\('conv', 'dot'\)\).* of kind 'conv' or 'dot'\."):
        several.init(params, x)
    assert Rule("head", kind=("dot",)) == Rule("head", kind="dot")
    for bad in (("dot", 1), (), 1):
        with pytest.raises(
            TypeError, match=r"kind must be a str such as 'dot', a tuple of such, or None for every kind"
        ):
            Rule("head", kind=bad)


def test_recipes_add_up():
    first, last = Rule(".*", weight=W8), Rule("head")
    recipe, more = Recipe([first]), [last]
    assert recipe + more == recipe + Recipe(more) == Recipe([first, last])
    with pytest.raises(TypeError, match="unsupported operand"):
        recipe + last


@pytest.mark.parametrize("bad", ["int8", qjax.int8, 8, lambda spec: spec])
def test_an_invalid_role_is_refused(bad):
    with pytest.raises(
        TypeError, match=r"Rule\('\.\*'\): input must be a QuantSpec, an observer, an estimator or None, got .* of type"
    ):
        Rule(".*", input=bad)


def test_an_invalid_pattern_is_refused():
    with pytest.raises(ValueError, match=r"pattern '\(' is not a regular expression"):
        Rule("(")


def test_a_recipe_takes_rules_only(rng):
    with pytest.raises(TypeError, match="expected Rule objects"):
        Recipe([W8])
    with pytest.raises(TypeError, match=r"recipe must be a qjax.Recipe, got list"):
        qjax.prepare(mlp, [Rule(".*")])


def test_a_rule_without_an_op_lists_the_ops(rng):
    params, x = mlp_params(rng), normal(rng, 3, 6)
    prepared = qjax.prepare(mlp, Recipe([Rule(".*", weight=W8), Rule("Dense_0", weight=W8)]))
    for use in (prepared.init, prepared.ops):
        with pytest.raises(RecipeError, match=r"Rule\('Dense_0'\) matches no op.*\n  first\n  second"):
            use(params, x)
    with pytest.raises(RecipeError, match=r"The ops are:\n  \(none\)$"):
        qjax.prepare(lambda p, x: x, INPUTS).init(params, x)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"compute": "int8"}, ValueError, r"compute must be one of \('codes', 'dequantized'\), got 'int8'"),
        ({"params_argnum": -1}, ValueError, "params_argnum must be an int >= 0, got -1"),
        ({"params_argnum": True}, ValueError, "params_argnum must be an int >= 0, got True"),
    ],
)
def test_invalid_options_of_prepare(options, error, message):
    with pytest.raises(error, match=message):
        qjax.prepare(mlp, INPUTS, **options)


def test_prepare_takes_a_function():
    with pytest.raises(TypeError, match="fn must be callable"):
        qjax.prepare({"w": 1}, INPUTS)


def test_equal_recipes_are_equal_and_hash_alike():
    def make(pattern):
        return Recipe([Rule(pattern, weight=W8, input=observers.min_max(A8))])

    assert make(".*") == make(".*")
    assert hash(make(".*")) == hash(make(".*"))
    assert make(".*") != make("a")
    assert len({make(".*"), make(".*"), make("a")}) == 2
    assert make(".*") != Recipe([Rule(".*", weight=W8, input=observers.dynamic(A8))])


def test_the_table_of_ops(rng):
    params, x = cnn_params(rng), normal(rng, 2, 6, 6, 2)
    recipe = Recipe([Rule("conv", weight=W8, input=A8, output=A8), Rule("head", weight=W8, input=A8)])
    table = qjax.prepare(cnn, recipe).ops(params, x)
    conv, head = table
    assert (conv.kind, conv.lhs_shape, conv.rhs_shape, conv.out_shape) == (
        "conv",
        (2, 6, 6, 2),
        (3, 3, 2, 4),
        (2, 6, 6, 4),
    )
    assert (conv.weight, conv.path, conv.epilogue) == ("rhs", ("conv", "w"), "bias, relu")
    assert conv.quantizers == {"input": str(A8), "weight": str(W8), "output": str(A8)}
    # what conv gives out stays in codes through the pool and the reshape, and head takes it as it is
    assert head.quantizers == {"input": "from conv/output", "weight": str(W8)}
    assert (head.epilogue, head.compute, head.why) == ("bias", "codes", "")
    assert len(table) == 2
    assert table[1] == head
    assert list(table[:1]) == [conv]


def test_the_table_says_which_ops_are_dequantized_or_float(rng):
    per_input = W8.replace(granularity=qjax.PerChannel(0))  # a scale along the contracted axis cannot leave the sum
    params, x = mlp_params(rng), normal(rng, 3, 6)
    recipe = Recipe([Rule("first", weight=per_input, input=A8), Rule("second", weight=W8)])
    assert [op.compute for op in qjax.prepare(mlp, recipe).ops(params, x)] == ["dequantized", "dequantized"]
    assert [op.compute for op in qjax.prepare(mlp, INPUTS, compute="dequantized").ops(params, x)] == ["dequantized"] * 2
    assert [op.compute for op in qjax.prepare(mlp, INPUTS).ops(params, x)] == ["codes"] * 2


def test_epilogues(rng):
    b = normal(rng, 1, 4)
    params = {name: {"w": normal(rng, 4, 4), "b": b} for name in "abcdef"}

    def fn(p, x):
        shared = x @ p["d"]["w"]
        return (
            jax.nn.relu(x @ p["a"]["w"] + p["a"]["b"]),
            jnp.maximum(x @ p["b"]["w"], 0.0),
            jax.nn.relu(x @ p["c"]["w"]) + p["c"]["b"],  # what is added after the ReLU is no bias of the op
            (shared + p["d"]["b"], shared),  # used twice: nothing belongs to it
            jnp.tanh(p["e"]["b"] + x @ p["e"]["w"]),
            (x @ p["f"]["w"]).astype(jnp.bfloat16) + p["f"]["b"].astype(jnp.bfloat16),
        )

    table = qjax.prepare(fn, Recipe([])).ops(params, jnp.broadcast_to(b, (1, 4)))
    found = {op.name: op.epilogue for op in table}
    assert found == {"a": "bias, relu", "b": "relu", "c": "relu", "d": "", "e": "bias", "f": "bias"}


def test_the_message_of_a_recipe_error_is_exact(rng):
    params, x = {"a": {"w": normal(rng, 4, 4)}}, normal(rng, 2, 4)
    message = "Rule('b') matches no op. A pattern has to match the whole name. The ops are:\n  a"
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}$"):
        qjax.prepare(lambda p, x: x @ p["a"]["w"], Recipe([Rule("b")])).init(params, x)
