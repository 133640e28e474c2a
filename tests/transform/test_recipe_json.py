"""Recipes as JSON: what can be said comes back equal, what is wrong is said with its place, nothing gets past the reader."""

import dataclasses
import inspect
import json

import hypothesis
import pytest
from hypothesis import strategies as st

import qjax
from qjax import Recipe, RecipeError, Rule, observers
from tests.transform.models import A8, W8
from tests.transform.recipe_strategies import FORMATS, GRANULARITIES, observers_of, recipes, specs

GOLDEN = """\
{
  "schema": "qjax.recipe",
  "version": 1,
  "rules": [
    {
      "pattern": "Dense_.*",
      "kind": "dot",
      "weight": {
        "spec": {
          "format": "int8",
          "symmetric": true,
          "granularity": {
            "per_channel": {
              "axis": "output"
            }
          },
          "convention": "torch_fake"
        }
      },
      "input": {
        "observer": {
          "moving_average_min_max": {
            "averaging_constant": 0.01
          }
        },
        "spec": {
          "format": {
            "int": {
              "bits": 7,
              "signed": false
            }
          },
          "symmetric": false,
          "granularity": "per_tensor",
          "convention": "torch_real",
          "eps": 0.0001
        }
      },
      "rhs": null,
      "output": {
        "observer": "min_max",
        "spec": {
          "format": "nf4",
          "symmetric": true,
          "granularity": "per_tensor",
          "convention": "torch_fake"
        }
      }
    }
  ]
}
"""


def test_the_text_of_version_1_stays_readable():
    """Golden: if this fails, a text that somebody has stored has changed its meaning. Raise the version, and read both."""
    u7 = qjax.QuantSpec(qjax.Int(7, signed=False), convention="torch_real", eps=1e-4)
    rule = Rule(
        "Dense_.*",
        kind="dot",
        weight=W8.replace(granularity=qjax.PerChannel("output")),
        input=observers.moving_average_min_max(u7),
        rhs=None,
        output=observers.min_max(qjax.QuantSpec(qjax.nf4)),
    )
    assert Recipe([rule]).to_json() == GOLDEN
    assert Recipe.from_json(GOLDEN) == Recipe([rule])


@hypothesis.given(recipes())
@hypothesis.settings(max_examples=150)
def test_a_recipe_comes_back_equal(recipe):
    text = recipe.to_json()
    again = Recipe.from_json(text)
    assert again == recipe
    assert hash(again) == hash(recipe)
    assert again.to_json() == text
    assert str(again) == str(recipe)


@pytest.mark.parametrize("value", [*FORMATS, *GRANULARITIES], ids=repr)
def test_every_format_and_granularity_comes_back(value):
    is_format = value in FORMATS
    spec = qjax.QuantSpec(value) if is_format else qjax.QuantSpec(qjax.int8, granularity=value)
    recipe = Recipe([Rule(".*", input=spec)])
    (rule,) = Recipe.from_json(recipe.to_json()).rules
    got = rule.input.format if is_format else rule.input.granularity
    assert got == value
    assert type(got) is type(value)


def test_every_public_observer_comes_back():
    made = [name for name in observers.__all__ if inspect.isfunction(getattr(observers, name))]
    assert {"min_max", "dynamic", "moving_average_min_max"} <= set(made)
    for name in made:
        for observer in observers_of(name, A8):
            (rule,) = Recipe.from_json(Recipe([Rule(".*", input=observer)]).to_json()).rules
            assert rule.input == observer, name
            assert type(rule.input) is type(observer)


def test_presets_go_by_name():
    def written(spec):
        return json.loads(Recipe([Rule(".*", weight=spec)]).to_json())["rules"][0]["weight"]["spec"]

    assert written(qjax.QuantSpec(qjax.Float(4, 3, special="fn")))["format"] == "e4m3"
    assert written(qjax.QuantSpec(qjax.Int(8, narrow=True)))["format"] == {"int": {"bits": 8, "narrow": True}}
    assert written(qjax.nvfp4)["granularity"] == {"per_group": {"axis": -1, "size": 16}}


def test_an_observer_of_ones_own_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Mine(observers.MinMax):
        pass

    with pytest.raises(
        TypeError, match=r"Rule\('a'\), input: a Mine is made by no function of qjax.observers.*min_max"
    ):
        Recipe([Rule("a", input=Mine(A8))]).to_json()


def document(**rule):
    return {"schema": "qjax.recipe", "version": 1, "rules": [{"pattern": ".*"} | rule]}


def weight(**spec):
    return document(weight={"spec": {"format": "int8"} | spec})


BAD = {
    "no object": ([1], "the text: expected an object with the fields schema, version, rules, got [1]"),
    "another schema": (document() | {"schema": "onnx"}, "schema: expected 'qjax.recipe', got 'onnx'. Is it"),
    "newer": (document() | {"version": 2}, "version: this qjax reads version 1, got 2. It was written by a newer qjax"),
    "version of truth": (document() | {"version": True}, "version: this qjax reads version 1, got True"),
    "no version": ({"schema": "qjax.recipe", "rules": []}, "the text: the field 'version' is missing. Add it"),
    "rules": (document() | {"rules": {}}, "rules: expected a list of rules, got {}"),
    "rule": (document() | {"rules": [None]}, "rules[0]: expected an object with the fields pattern, kind"),
    "pattern": (document(pattern="("), "rules[0]: Rule: pattern '(' is not a regular expression"),
    "pattern of nesting": (document(pattern="(" * 9000), "rules[0]: Rule: pattern"),
    "pattern of repeats": (document(pattern="a{99999999999}"), "is not a regular expression: the repetition number"),
    "pattern too long": (document(pattern="a" * 10_001), "rules[0].pattern: has 10001 characters, and 10000 is"),
    "pattern of a number": (document(pattern=3), "rules[0]: Rule: pattern must be a str, got 3 of type int"),
    "kind": (document(kind=["dot", 1]), "rules[0]: Rule('.*'): kind must be a str such as 'dot'"),
    "misspelt role": (document(wieght=None), "rules[0]: unknown field 'wieght'; the fields are pattern, kind, weight"),
    "role": (
        document(weight="int8"),
        "rules[0].weight: expected an object with the fields spec, observer, estimator, got 'int8'",
    ),
    "input as itself": (document(input="input"), "rules[0].input: expected an object"),
    "no spec": (document(lhs={"observer": "min_max"}), "rules[0].lhs: the field 'spec' is missing"),
    "estimator": (document(lhs={"spec": {"format": "int8"}, "estimator": "lsp"}), "Did you mean 'lsq'?"),
    "zero_point of an estimator": (
        document(lhs={"spec": {"format": "int8"}, "estimator": {"lsq": {"zero_point": 999}}}),
        "rules[0].lhs.estimator.lsq: lsq: zero_point",
    ),
    "observer and estimator": (
        document(lhs={"spec": {"format": "int8"}, "observer": "min_max", "estimator": "lsq"}),
        "rules[0].lhs: has an observer and an estimator",
    ),
    "format": (weight(format="int9"), "rules[0].weight.spec.format: expected a format, which is one of"),
    "near format": (weight(format="itn8"), "Did you mean 'int8'?"),
    "preset with arguments": (weight(format={"int8": {}}), "'int8' takes no arguments. Write 'int8' alone"),
    "two formats": (weight(format={"int": {}, "float": {}}), "spec.format: expected a format"),
    "bits": (
        weight(format={"int": {"bits": 99}}),
        "spec.format.int: Int: bits must be an integer from 1 to 16, got 99",
    ),
    "no bits": (weight(format={"int": {}}), "spec.format.int: the field 'bits' is missing"),
    "bits by name": (weight(format="int"), "spec.format: the field 'bits' is missing"),
    "float": (weight(format={"float": {"exponent": 4, "mantissa": 3, "special": "no"}}), "special must be one of ieee"),
    "bias": (weight(format={"float": {"exponent": 4, "mantissa": 3, "bias": 10**18}}), "Choose a bias nearer to 7"),
    "levels": (weight(format={"codebook": {"levels": ["0", "1"]}}), "codebook.levels: expected a list of numbers"),
    "truths for levels": (weight(format={"codebook": {"levels": [False, True]}}), "levels: expected a list of numbers"),
    "levels in levels": (weight(format={"codebook": {"levels": [[0], 1]}}), "levels: expected a number, a word or"),
    "name of a codebook": (weight(format={"codebook": {"levels": [0, 1], "name": 5}}), "codebook.name: expected a str"),
    "descending": (weight(format={"codebook": {"levels": [1, 0]}}), "levels must be finite and ascending"),
    "huge codebook": (weight(format={"codebook": {"levels": list(range(70_000))}}), "2 to 65536 levels"),
    "granularity": (weight(granularity="per_row"), "granularity: expected a granularity, which is one of per_tensor"),
    "granularity of a number": (weight(granularity=7), "spec.granularity: expected a granularity"),
    "axis": (
        weight(granularity={"per_channel": {"axis": 1.5}}),
        "granularity.per_channel: PerChannel: axis must be an",
    ),
    "no axis": (weight(granularity="per_channel"), "spec.granularity: the field 'axis' is missing"),
    "size": (weight(granularity={"per_group": {"axis": 0, "size": 0}}), "PerGroup: size must be 1 or more, got 0"),
    "axes": (weight(granularity={"per_channel": {"axis": [[0]]}}), "per_channel.axis: expected a number, a word or"),
    "symmetric": (weight(symmetric=1), "rules[0].weight.spec: QuantSpec: symmetric must be True or False, got 1"),
    "convention": (weight(convention="torch"), "unknown convention 'torch'; expected one of 'torch_fake'"),
    "convention of objects": (weight(convention={}), "spec.convention: expected a number, a word or a list of such"),
    "rule of scales": (weight(scale_rule=[1]), "unknown scale_rule (1,)"),
    "eps": (weight(eps=0), "eps must be positive and finite"),
    "huge eps": (weight(eps=10**400), "rules[0].weight.spec.eps: the number 1000"),
    "contradiction": (weight(symmetric=True, float_zero_point=True), "a symmetric spec has a fixed zero_point"),
    "observer": (document(input={"spec": {"format": "int8"}, "observer": "minmax"}), "Did you mean 'min_max'?"),
    "private": (document(input={"spec": {"format": "int8"}, "observer": "Observer"}), "expected an observer, which"),
    "dunder": (document(input={"spec": {"format": "int8"}, "observer": "__class__"}), "expected an observer, which"),
    "spec of an observer": (
        document(input={"spec": {"format": "int8"}, "observer": {"min_max": {"spec": 1}}}),
        "rules[0].input.observer.min_max: unknown field 'spec'; it takes none",
    ),
    "constant": (
        document(input={"spec": {"format": "int8"}, "observer": {"moving_average_min_max": {"averaging_constant": 2}}}),
        "rules[0].input.observer.moving_average_min_max: moving_average_min_max: averaging_constant must lie in",
    ),
    "output that follows the op": (
        document(output={"spec": {"format": "int8", "granularity": {"per_channel": {"axis": "output"}}}}),
        "rules[0]: Rule('.*'): output is quantized per_channel(output)",
    ),
}


@pytest.mark.parametrize(("value", "message"), BAD.values(), ids=list(BAD))
def test_what_is_wrong_is_said_with_its_place(value, message):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_json(json.dumps(value))
    text = str(caught.value)
    assert text.startswith("Recipe.from_json: ")
    assert message in text
    assert len(text) <= 1000
    assert caught.value.__suppress_context__  # or a traceback would show the whole value after all


TEXTS = {
    "": "the text: is no JSON: Expecting value at line 1, column 1",
    '{"schema": ': "is no JSON: Expecting value at line 1, column 12",
    "[" * 100_000: "is no JSON that a recipe would be: it nests too deeply",
    '{"rules": NaN}': "it holds NaN, which is no JSON number",
    '{"rules": -Infinity}': "it holds -Infinity",
    '{"rules": [], "rules": []}': "an object has the field 'rules' twice",
    '{"version": 1' + "0" * 5000 + "}": "is no JSON that a recipe would be: Exceeds the limit",
    json.dumps(weight()).replace(
        '"int8"', '"int8", "eps": 1e999'
    ): "rules[0].weight.spec.eps: the number inf is too large",
    " " * (2**24 + 1): "the text: has 16777217 characters, and 16777216 is the limit",
}


@pytest.mark.parametrize(("text", "message"), TEXTS.items(), ids=range(len(TEXTS)))
def test_hostile_text(text, message):
    with pytest.raises(RecipeError) as caught:
        Recipe.from_json(text)
    assert message in str(caught.value)
    assert len(str(caught.value)) <= 1000


@pytest.mark.parametrize(("text", "mend"), [(b"{}", "Path.read_text"), ({"schema": 1}, "json.dumps")])
def test_a_text_is_a_str(text, mend):
    with pytest.raises(TypeError, match=rf"text must be a str, got \w+; {mend}"):
        Recipe.from_json(text)


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["int8", "input", "min_max", "per_token", ""]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["spec", "int", "axis", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@hypothesis.given(recipes(), st.data())
@hypothesis.settings(max_examples=150)
def test_a_recipe_with_a_part_replaced_by_junk_is_read_or_refused(recipe, data):
    """Never another exception, whatever stands in the place of a part."""
    value = json.loads(recipe.to_json())
    here = value
    for _ in range(data.draw(st.integers(0, 6))):
        keys = list(here) if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else ()
        deeper = [key for key in keys if isinstance(here[key], dict | list) and here[key]]
        if not deeper:
            break
        here = here[data.draw(st.sampled_from(deeper))]
    here[data.draw(st.sampled_from(list(here) if isinstance(here, dict) else range(len(here))))] = data.draw(JUNK)
    try:
        message = str(Recipe.from_json(json.dumps(value)).rules)[:0]
    except RecipeError as error:
        message = str(error)
    assert len(message) <= 1000


@hypothesis.given(specs())
@hypothesis.settings(max_examples=100)
def test_specs_that_differ_print_differently(spec):
    """What a table calls a spec tells it from its neighbours: each field that is changed changes the words."""
    for change in ({"eps": 2.0**-9}, {"eps": 0.3}, {"granularity": qjax.PerGroup("contracted", 7)}, {"mask": "none"}):
        other = spec.replace(**change)
        assert (str(other) == str(spec)) == (other == spec)
