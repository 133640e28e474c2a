"""The table fits the code, and the runner tells a kill from what only looks like one."""

import ast
import textwrap

import pytest

from tests.mutants import __main__ as program
from tests.mutants import report
from tests.mutants.automatic import mutants_of
from tests.mutants.catalogue import COVERED, REPOSITORY, table, without_mutant
from tests.mutants.mutant import KINDS, Mutant, StaleMutantError
from tests.mutants.workshop import Outcome, RedBaselineError, Session, Workshop, WrongTreeError, classify

TABLE = table()


@pytest.mark.parametrize("mutant", TABLE, ids=lambda mutant: mutant.name)
def test_entry_fits_the_code(mutant):
    """A stale entry fails here: `old` has to occur once, and `new` to mean something else."""
    mutant.apply((REPOSITORY / mutant.file).read_text(encoding="utf-8"))
    assert mutant.kind in KINDS
    assert "→" in mutant.flips
    assert mutant.tests
    for test in mutant.tests:
        path, _, name = test.partition("::")
        assert (REPOSITORY / path).exists(), f"no {path}"
        name = name.partition("[")[0]  # a parameter may be named, too
        if name:
            tree = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
            assert name in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, f"no {name} in {path}"


def test_names_are_unique():
    names = [mutant.name for mutant in TABLE]
    assert len(names) == len(set(names))


def test_every_covered_file_has_a_mutant():
    assert set(COVERED) <= {mutant.file for mutant in TABLE}
    assert without_mutant([m for m in TABLE if m.file != COVERED[0]]).count(COVERED[0]) == 1


SUM = """
    def total(a, b):
        return a + b  # a + b


    class Counter:
        def total(self, a, b):
            return a + b
"""
SOURCE = textwrap.dedent(SUM).lstrip()


def mutant(new="a - b", *, old="return a + b", within="total", file="qjax/sums.py", **fields):
    fields = {"name": "total/it", "kind": "rounding", "flips": "is → is not", "tests": ("tests/test_sums.py",)} | fields
    return Mutant(file=file, old=old, new=new if old != "return a + b" else f"return {new}", within=within, **fields)


def test_apply_within():
    assert mutant().apply(SOURCE) == SOURCE.replace("return a + b  #", "return a - b  #")
    method = mutant(within="Counter.total").apply(SOURCE)
    assert method == SOURCE[: SOURCE.rindex("+")] + "-" + SOURCE[SOURCE.rindex("+") + 1 :]


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (mutant(within=None), "occurs 2 times in all of qjax/sums.py"),
        (mutant(old="a * b"), "occurs 0 times in total"),
        (mutant(within="nothing"), "0 definitions of nothing"),
        (mutant(within="Counter.count"), "0 definitions of Counter.count"),
        (mutant("(a + b)"), "means the same"),
        (mutant(old="# a + b", new="# a - b"), "means the same"),
        (mutant("a +"), "does not parse"),
    ],
)
def test_stale_mutants(wrong, complaint):
    with pytest.raises(StaleMutantError, match=complaint):
        wrong.apply(SOURCE)


def session(tree, returncode=1, *, failures=(), errors=(), passed=1, file="qjax/sums.py"):
    failures = [
        {"test": "tests/test_a.py::test_a", "when": "call", "error": "AssertionError", "message": "no"} | f
        for f in failures
    ]
    modules = {"qjax.sums": str((tree / file).resolve())}
    found = {"passed": passed, "failures": failures, "collection_errors": list(errors), "modules": modules}
    return Session(returncode, found, 1.5, "the log")


def test_classify(tmp_path):
    def status(session, mutated="qjax/sums.py"):
        return classify(session, tmp_path, mutated).status

    killed = Outcome("killed", "tests/test_a.py::test_a", "AssertionError", 1.5)
    assert classify(session(tmp_path, failures=[{}]), tmp_path, "qjax/sums.py") == killed
    assert status(session(tmp_path, failures=[{"error": "XPASS"}])) == "killed"
    assert status(session(tmp_path, 0)) == "survived"
    assert status(session(tmp_path, None)) == "timed out"
    # What is no kill: the mutant stumbles over itself, a fixture does, a file cannot be imported, …
    assert status(session(tmp_path, failures=[{"error": "NameError"}])) == "broken"
    assert status(session(tmp_path, failures=[{"when": "setup"}])) == "broken"
    assert status(session(tmp_path, 2, errors=[{"test": "tests/test_a.py", "message": "boom"}])) == "broken"
    # … and what is no survival: no test ran, pytest fell over, or the file was never looked at.
    assert status(session(tmp_path, 0, passed=0)) == "broken"
    assert status(session(tmp_path, 3)) == "broken"
    assert status(Session(-11, None, 1.5, "Segmentation fault")) == "broken"
    assert status(session(tmp_path, 0), mutated="qjax/products.py") == "broken"
    with pytest.raises(WrongTreeError, match=r"elsewhere.*not in the copy"):
        status(session(tmp_path.with_name("elsewhere"), 0, failures=[{}]))


@pytest.fixture
def tree(tmp_path):
    """A small project that looks like this one."""
    root = tmp_path / "project"
    files = {
        "pyproject.toml": '[tool.pytest]\npythonpath = ["."]\naddopts = ["--import-mode=importlib"]\n',
        "qjax/__init__.py": "from qjax.sums import total",
        "qjax/sums.py": SOURCE,
        "tests/test_sums.py": """
            from qjax.sums import total

            def test_commutes():
                assert total(2, 1) == total(1, 2)

            def test_total():
                assert total(2, 1) == 3
        """,
        "tests/test_fails.py": "import qjax\n\ndef test_fails():\n    assert qjax.total(1, 1) == 3, 'so it is'",
        ".venv/left_out.py": "",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(textwrap.dedent(text))
    return root


def test_a_workshop(tree, tmp_path):
    """Real runs of pytest: what the mutants of one tree come to, and that each leaves no trace."""
    workshop = Workshop(tree, tmp_path / "work", jobs=1)
    assert not (workshop.snapshot / ".venv").exists()
    assert workshop.baseline(["tests/test_sums.py"]) > 0

    def trial(new, timeout=60, **fields):
        return workshop.trial(mutant(new, **fields), timeout=timeout)

    total_first = ("tests/test_sums.py::test_total", "tests/test_sums.py")
    assert trial("a - b").test == "tests/test_sums.py::test_commutes"
    assert trial("a - b", tests=total_first).test == "tests/test_sums.py::test_total"
    assert trial("a - b", select="total").test == "tests/test_sums.py::test_total"
    assert "NameError" in trial("a + c").error
    assert "cannot be collected" in trial(old="def total(a, b):", new="import nowhere\ndef total(a, b):").error
    assert trial("next(i for i in iter(int, 1) if i)", timeout=3).status == "timed out"
    assert trial("b + a").status == "survived"
    with pytest.raises(RedBaselineError, match=r"test_fails\n.*AssertionError: so it is"):
        workshop.baseline(["tests/test_fails.py", "tests/test_sums.py"])


def test_another_qjax_is_noticed(tree, tmp_path):
    """As if the installed package came first on the path."""
    (tree / "tests/conftest.py").write_text(f"import sys\nsys.path.insert(0, {str(tree)!r})\n")
    with pytest.raises(WrongTreeError, match="project/qjax"):
        Workshop(tree, tmp_path / "work", jobs=1).baseline(["tests/test_sums.py"])


def test_the_program(tree, tmp_path, monkeypatch, capsys):
    """From the command line to the exit status, the JSON and the Markdown."""
    caught, missed = mutant(name="total/caught"), mutant("b + a", name="total/missed")
    reasons = {"equivalent": "a sum commutes"}
    json, markdown = tmp_path / "out.json", tmp_path / "out.md"

    def run(mutants, *options):
        monkeypatch.setattr(program, "table", lambda: mutants)
        return program.main(["--tree", str(tree), *options])

    assert run([caught, missed], "--json", str(json)) == program.SOMETHING_LEFT
    assert "no test fails: it needs one" in capsys.readouterr().out
    assert report.outcomes_in(json)["total/caught"].status == "killed"
    # With a reason the survivor is fine; what was good before is not run again.
    explained = mutant("b + a", name="total/missed", **reasons)
    options = ["--json", str(json), "--rerun-survivors", "--report", str(markdown)]
    assert run([caught, explained], *options) == 0
    assert "2 mutants" not in capsys.readouterr().out
    text = markdown.read_text()
    assert "1 killed, 1 equivalent." in text
    assert "| `total/caught` | is → is not | rounding | `test_sums.py::test_commutes` |" in text
    assert "none can: a sum commutes" in text
    # A reason that does not hold.
    assert run([mutant(**reasons)]) == program.SOMETHING_LEFT
    assert "unreasonable" in capsys.readouterr().out
    assert run([mutant(tests=("tests/test_fails.py",))]) == program.CANNOT_SAY


def test_a_wide_table_fits_80_columns():
    wide = mutant(name="a" * 45)
    outcome = Outcome("killed", "tests/numerics/test_a.py::" + "test_" * 30, "AssertionError", 3.0)
    assert report.line(wide, outcome, name_width=45, width=80).cell_len <= 80


def test_automatic_mutants():
    source = textwrap.dedent(
        '''
        def f(x: int, high=-1):
            """Returns 1 + 1."""
            if x < 2:
                raise ValueError(f"{x + 1}")
            y = jnp.where(x > 0, jnp.minimum(x, 1), x)  # σ
            return clip(y + x, 0, high), clip(y + x, 0, high)
        '''
    )
    found = mutants_of("qjax/f.py", source, ("tests/test_f.py",))
    assert len({m.name for m in found}) == len(found)
    words = [m.flips for m in found]
    for expected in (
        "x < 2 → x <= 2",
        "y + x → y - x",
        "-1 → 1",
        "jnp.minimum → jnp.maximum",
        "clip(y + x, 0, high) → y + x",
    ):
        assert expected in words
    assert sum(w.startswith("y + x →") for w in words) == 2  # the same text twice, each by itself
    assert not any("ValueError" in m.new and "x + 1" not in m.new for m in found)
    assert len({m.apply(source) for m in found}) == len(found)
