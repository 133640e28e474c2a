"""Recipes and ops as tables: within 80 columns, nothing lost, nothing that acts on a terminal."""

import io
import re

import hypothesis
import jax
import jax.numpy as jnp
import pytest
import rich.console
from hypothesis import strategies as st

import qjax
from qjax import Recipe, Rule, observers
from qjax.transform._table import Table
from tests.transform.models import A7, A8, INPUTS, W8, cnn, cnn_params, mlp, mlp_params, normal
from tests.transform.recipe_strategies import recipes

OUTPUT = W8.replace(granularity=qjax.PerChannel("output"))


def lines_of(table):
    lines = str(table).splitlines()
    assert max(map(len, lines)) <= 80
    assert not any(line != line.rstrip() for line in lines)
    return lines


def cells(line):
    return re.split(r"  +", line.strip())


def test_the_ops_of_a_network_print_as_a_table(rng):
    params, x = cnn_params(rng), normal(rng, 2, 6, 6, 2)
    recipe = Recipe(
        [Rule(".*", weight=OUTPUT, input=observers.min_max(A7), output=A7), Rule("head", weight=W8, input=A8)]
    )
    table = qjax.prepare(cnn, recipe).ops(params, x)
    assert str(table) == repr(table)
    assert lines_of(table) == [
        "op    kind  operands              input   weight  output   compute",
        "────  ────  ────────────────────  ──────  ──────  ───────  ───────",
        "conv  conv  2x6x6x2 · 3x3x2x4(w)  uint8   int8    uint8#2  codes",
        "head  dot   2x36 · 36x5(w)        ← conv  int8#2  float    codes",
        "",
        "uint8    uint8 affine per_tensor 0..127, min_max",
        "int8     int8 symmetric per_channel(output), dynamic",
        "uint8#2  uint8 affine per_tensor 0..127, moving_average_min_max",
        "int8#2   int8 symmetric per_channel(-1), dynamic",
    ]


def test_the_table_says_what_was_left_in_float_and_why(rng):
    def fn(p, x, n):
        attention = jnp.einsum("ij,kj->ik", x, x)
        return x @ p["a"]["w"], x @ p["b"]["w"], x @ (p["a"]["w"] @ p["b"]["w"]), n @ n, attention

    params = {"a": {"w": normal(rng, 4, 4)}, "b": {"w": normal(rng, 4, 4)}}
    recipe = Recipe([Rule("a|dot.*|.*ij.*", weight=W8, input=A8), Rule("a", output=A8)])
    table = qjax.prepare(fn, recipe).ops(params, normal(rng, 2, 4), jnp.ones((2, 2), jnp.int32))
    text = "\n".join(lines_of(table))
    left = {why: names for names, why in re.findall(r"^  (.+?): (.+)$", text, re.MULTILINE)}
    assert left["the rule 'a' leaves input and weight in float"] == "a"
    assert left["no rule matches"] == "b"
    assert "both operands are weights" in left
    assert "operands are int32 and int32" in left
    by_name = {op.name: op for op in table}
    assert (by_name["b"].why, by_name["b"].why_float) == ("", "no rule matches")
    attention = [op for op in table if op.compute == "codes"]
    assert len(attention) == 2
    assert not any(op.why_float or f"{op.name}:" in text[text.index("left in float") :] for op in attention)


def test_two_operands_of_activations_show_both_specs(rng):
    prepared = qjax.prepare(lambda p, x: x @ x.T, Recipe([Rule(".*", lhs=A8, rhs=observers.dynamic(W8))]))
    line = lines_of(prepared.ops({}, normal(rng, 3, 4)))[2]
    assert cells(line) == ["dot", "dot", "3x4 · 4x3", "uint8 · int8", "float", "codes"]


def test_long_names_keep_their_rows_readable(rng):
    long = "encoder/layers_11/MultiHeadDotProductAttention_0/query_projection_of_the_decoder_as_well_as_of_the_encoder"
    params = {long: {"w": normal(rng, 4, 4)}, "a": {"w": normal(rng, 4, 4)}}
    table = qjax.prepare(lambda p, x: x @ p[long]["w"] @ p["a"]["w"], INPUTS).ops(params, normal(rng, 2, 4))
    lines = lines_of(table)
    start = next(i for i, line in enumerate(lines) if line.startswith("encoder"))
    assert lines[start] + lines[start + 1] == long  # by itself, whole
    assert cells(lines[start + 2]) == ["dot", "2x4 · 4x4(w)", "uint8", "int8", "float", "codes"]
    assert cells(lines[start + 3])[0] == "a"


def test_a_recipe_prints_its_roles():
    recipe = Recipe(
        [
            Rule(".*", weight=OUTPUT, input=observers.moving_average_min_max(A7, 0.05), rhs=None),
            Rule("head", kind="dot"),
        ]
    )
    assert [cells(line) for line in lines_of(recipe)[2:] if not line.startswith(" " * 60)] == [
        [".*", "any", "weight", "int8 symmetric", "dynamic"],
        ["per_channel(output)"],
        ["input", "uint8 affine per_tensor", "moving_average_min_max("],
        ["0..127", "averaging_constant=0.05)"],
        ["rhs", "float"],
        ["output", "float"],
        ["head", "dot", "all", "float"],
    ]
    assert "no rules" in str(Recipe([]))


@hypothesis.given(recipes())
@hypothesis.settings(max_examples=60)
def test_every_recipe_fits(recipe):
    lines_of(recipe)
    assert recipe._repr_html_().startswith("<table>")


@hypothesis.given(
    st.lists(st.tuples(*[st.text(st.characters(codec="ascii"), max_size=40)] * 4), max_size=4), st.integers(40, 100)
)
def test_no_character_of_a_cell_is_lost(rows, width):
    """Whatever is folded: all letters of all cells are in the text."""
    rows = [(f"n{i}", *map(str.strip, row)) for i, row in enumerate(rows)]
    text = Table(("a", "b", "c", "d", "e"), tuple(rows)).plain(width)
    letters = re.sub(r"\s", "", text)
    assert all(line == line.rstrip() and len(line) <= width for line in text.splitlines())
    for character in {c for row in rows for cell in row for c in cell if c.isalnum()}:
        wanted = sum(cell.count(character) for row in rows for cell in row)
        assert letters.count(character) >= wanted


@pytest.mark.parametrize("hostile", ["\x1b[31mred", "a\rb", "<script>alert(1)</script>", "[bold]x[/bold]"])
def test_a_name_does_not_act_on_what_shows_it(hostile):
    recipe = Recipe([Rule(re.escape(hostile), weight=W8)])
    assert str(recipe).isprintable() or set(str(recipe)) - {"\n"} == {c for c in str(recipe) if c.isprintable()}
    assert "<script>" not in recipe._repr_html_()
    shown = terminal(recipe)
    assert "\x1b" not in shown
    if hostile.startswith("[bold]"):
        assert "bold" in shown  # it is text, and no markup


def terminal(table, width=80):
    out = io.StringIO()
    rich.console.Console(file=out, width=width).print(table)
    return out.getvalue()


def test_rich_shows_it_as_wide_as_the_terminal(rng):
    params, x = mlp_params(rng), normal(rng, 3, 6)
    table = qjax.prepare(mlp, INPUTS).ops(params, x)
    assert [line.rstrip() for line in terminal(table).splitlines()] == str(table).splitlines()
    narrow = terminal(table, width=60)
    assert max(len(line.rstrip()) for line in narrow.splitlines()) <= 60
    out = io.StringIO()
    rich.console.Console(file=out, width=80, force_terminal=True, color_system="standard").print(table)
    assert out.getvalue().startswith("\x1b[1mop")  # a bold header


def test_a_notebook_shows_html(rng):
    params, x = mlp_params(rng), normal(rng, 3, 6)
    html = qjax.prepare(mlp, Recipe([Rule("first", weight=W8, input=A8)])).ops(params, x)._repr_html_()
    assert html.count("<tr>") == 3
    assert "<td style='text-align:left'>first</td>" in html
    assert "second: no rule matches" in html


def test_the_table_is_made_under_jit_as_outside(rng):
    """Shapes alone matter, so tracers will do."""
    params, x = mlp_params(rng), normal(rng, 3, 6)
    prepared = qjax.prepare(mlp, INPUTS)
    inside = []
    jax.eval_shape(lambda params, x: inside.append(str(prepared.ops(params, x))), params, x)
    assert inside == [str(prepared.ops(params, x))]


def test_a_function_without_ops_says_so():
    assert lines_of(qjax.prepare(lambda p, x: x, Recipe([])).ops({}, jnp.ones(3)))[-1] == "no ops"
