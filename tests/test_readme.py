"""The README's code runs, and prints what the README says."""

import contextlib
import io
import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_first_ten_lines_print_what_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 4, "one for each promise"
    promised = re.findall(r"# → (.*)", "\n".join(blocks))
    printed = io.StringIO()
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(printed):
        for block in blocks:
            exec(compile(block, str(README), "exec"), names)
    assert printed.getvalue().splitlines() == promised
    (table,) = re.findall(r"```text\n(.*?)\n```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert str(names["prepared"].ops(names["params"], names["x"])) == table  # type: ignore[attr-defined]
