"""Generated pages say what the code does now."""

from docs import generate_conventions


def test_the_page_of_conventions_is_up_to_date():
    written = generate_conventions.PAGE.read_text(encoding="utf-8")
    assert written == generate_conventions.page(), "docs/conventions.md is out of date: run `make docs`"


def test_the_page_tells_conventions_apart():
    """The numbers on the page are chosen so that arithmetics differ: none of the columns is the same all the way down."""
    rows = [line.split(" | ") for line in generate_conventions.behaviour().splitlines()[2:]]
    for column in range(2, len(rows[0])):
        assert len({row[column] for row in rows}) > 1
