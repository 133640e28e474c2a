"""Generated pages say what the code does now, and the code on the others runs and prints what they say."""

import contextlib
import io
import re
from pathlib import Path

import jax
import pytest

import qjax
from docs import generate_conventions
from qjax import _cli
from qjax.interop._dialects.all import DIALECTS

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_of_conventions_is_up_to_date():
    written = generate_conventions.PAGE.read_text(encoding="utf-8")
    assert written == generate_conventions.page(), "docs/conventions.md is out of date: run `make docs`"


def test_the_page_tells_conventions_apart():
    """The numbers on the page are chosen so that arithmetics differ: none of the columns is the same all the way down."""
    rows = [line.split(" | ") for line in generate_conventions.behaviour().splitlines()[2:]]
    for column in range(2, len(rows[0])):
        assert len({row[column] for row in rows}) > 1


@pytest.mark.parametrize(
    "name",
    [
        "learned_quantizers.md",
        "integer_programs.md",
        "pytorch_outputs.md",
        "qat_round_trip.md",
        "checkpoints.md",
        "kernels.md",
    ],
)
def test_the_code_on_a_page_runs_and_prints_what_it_says(name, monkeypatch):
    monkeypatch.chdir(DOCS.parent)  # pages name files as a reader in the repository does
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


def test_the_page_of_checkpoints_has_every_dialect_and_writer():
    page = (DOCS / "checkpoints.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)", page, flags=re.MULTILINE)
    dialects = [dialect.name for dialect in DIALECTS] + ["plain"]
    writers = [name for name in qjax.interop.__all__ if name.startswith("save_") or name in STATE_DICTS]
    assert sorted(rows) == sorted(["dialect", *dialects, *writers])


def test_the_page_of_kernels_has_every_kernel():
    page = (DOCS / "kernels.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)", page, flags=re.MULTILINE)
    assert sorted(rows) == sorted(set(qjax.kernels.__all__) - {"Observed", "Support", "supports"})


STATE_DICTS = ("eager_dynamic", "eager_static", "fx_reference", "ptq_prepared", "qat_prepared")


@pytest.mark.parametrize("name", ["pytorch_outputs.md"])
def test_the_commands_on_a_page_print_what_it_says(name, monkeypatch, capsys):
    monkeypatch.chdir(DOCS.parent)
    blocks = re.findall(
        r"```console\n\$ qjax ([^\n]*)\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), flags=re.DOTALL
    )
    assert blocks
    for command, printed in blocks:
        _cli.main(command.split())
        assert capsys.readouterr().out == printed, command


def test_the_samples_of_the_page_are_what_torch_makes(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")
    from docs.samples import make_samples
    from tests.torch_engine import torch_engine

    monkeypatch.setattr(make_samples, "HERE", tmp_path)
    with torch_engine("fbgemm"):
        make_samples.main()
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == sorted(path.name for path in (DOCS / "samples").glob("*.*") if path.suffix in (".pt", ".npy"))
    for name in made:
        if name.endswith(".pt"):
            assert qjax.interop.compare(DOCS / "samples" / name, tmp_path / name).equal, name
        else:
            assert (DOCS / "samples" / name).read_bytes() == (tmp_path / name).read_bytes()
