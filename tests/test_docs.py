"""Generated pages say what the code does now, and the code on the others runs and prints what they say."""

import contextlib
import io
import re
from pathlib import Path

import jax
import pytest

from docs import generate_conventions

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_of_conventions_is_up_to_date():
    written = generate_conventions.PAGE.read_text(encoding="utf-8")
    assert written == generate_conventions.page(), "docs/conventions.md is out of date: run `make docs`"


def test_the_page_tells_conventions_apart():
    """The numbers on the page are chosen so that arithmetics differ: none of the columns is the same all the way down."""
    rows = [line.split(" | ") for line in generate_conventions.behaviour().splitlines()[2:]]
    for column in range(2, len(rows[0])):
        assert len({row[column] for row in rows}) > 1


@pytest.mark.parametrize("name", ["learned_quantizers.md", "integer_programs.md"])
def test_the_code_on_a_page_runs_and_prints_what_it_says(name):
    page = (DOCS / name).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    printed, names = io.StringIO(), {}
    with (
        contextlib.redirect_stdout(printed),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):  # as a reader has it; optax wants it
        for block in blocks:
            exec(compile(block, name, "exec"), names)
    assert printed.getvalue().splitlines() == re.findall(r"# → (.*)", page)
