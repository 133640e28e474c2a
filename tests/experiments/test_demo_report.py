"""Results on disk, tables and the picture."""

import copy
import io
import json

import pytest
from rich.console import Console

from experiments.demo import check, plot, report, results
from experiments.demo.progress import Display

FOUND: results.Results = {
    "config": {},
    "versions": {},
    "images": {"train": 1078, "test": 719},
    "float_accuracy": [98.0, 97.0, 99.0],
    "accuracy": {
        "W8A8": {"ptq": [98.0, 97.0, 99.0], "qat": [98.1, 97.1, 99.1]},
        "W4A8": {"ptq": [95.0, 96.0, 94.0], "qat": [98.0, 97.0, 98.0]},
        "W4A4": {"ptq": [90.0, 100.0, 50.0], "qat": [97.0, 98.0, 96.0]},
    },
    "simulated_accuracy": 98.1,
    "integer_accuracy": 98.1,
    "codes": {
        "Conv_0/input": {"compared": 46_016, "differ": 0},
        "Conv_0/output": {"compared": 123_456_789, "differ": 0},
    },
    "sqnr_db": {
        "W8A8": {"Conv_0": 42.0, "Conv_1": 40.0, "Dense_0": 39.0, "Dense_1": 34.0},
        "W4A4": {"Conv_0": 21.0, "Conv_1": 18.0, "Dense_0": 17.0, "Dense_1": 16.0},
    },
    "weights": {
        "op": "Conv_1",
        "setting": "W4A4",
        "edges": [-1.5, -0.5, 0.5, 1.5],
        "float_counts": [1, 4, 2],
        "codes": [-1, 0, 1],
        "code_counts": [1, 4, 2],
    },
    "parameters": 3058,
    "held_bytes": {"digits_float32.npz": 12_232, "digits_int8.pt": 3_736},
    "file_bytes": {"digits_float32.npz": 14_310, "digits_int8.pt": 11_935},
    "seconds": {"float": 1.0},
}


def printed(found) -> str:
    out = io.StringIO()
    report.print_report(Console(file=out, width=80, highlight=False), found)
    return out.getvalue()


def test_tables_fit_eighty_columns_whole():
    text = printed(FOUND)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    # Mean and sample standard deviation of 90, 100 and 50.
    (row,) = [line for line in text.splitlines() if line.strip().startswith("W4A4 ") and "±" in line]
    assert row.split() == ["W4A4", "98.00", "±", "1.00", "80.00", "±", "26.46", "97.00", "±", "1.00", "-18.00", "-1.00"]
    assert "123,456,789" in text
    assert "123,502,805" in text  # the sum
    assert "cost 18.0 points with PTQ and 1.0 with QAT" in text


def test_by_seed_every_gain_has_its_sign():
    lines = printed(FOUND).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("W4A4 by seed"))
    assert [line.split()[-1] for line in lines[start + 4 : start + 7]] == ["+7.00", "-2.00", "+46.00"]


def test_the_conclusion_follows_the_numbers():
    better = copy.deepcopy(FOUND)
    better["accuracy"]["W4A4"]["qat"] = [99.0, 98.0, 100.0]
    assert results.conclusion(better).endswith("change accuracy by -18.0 points with PTQ and +1.0 with QAT")


def test_each_claim_can_fail(tmp_path, capsys):
    def verdicts(change) -> list[bool]:
        found = copy.deepcopy(FOUND)
        found["accuracy"]["W4A4"]["ptq"] = [90.0, 97.9, 50.0]
        change(found)
        results.write(tmp_path / "results.json", found)
        holds = list(results.claims(found).values())
        assert check.main(str(tmp_path / "results.json")) == (0 if all(holds) else 1)
        assert capsys.readouterr().out.count(": NO") == holds.count(False)
        return holds

    assert verdicts(lambda found: None) == [True, True, True]
    assert verdicts(lambda found: found["accuracy"]["W8A8"].update(qat=[97.4] * 3)) == [False, True, True]
    assert verdicts(lambda found: found["accuracy"]["W4A4"].update(ptq=[90.0, 98.0, 50.0])) == [True, False, True]
    assert verdicts(lambda found: found["codes"]["Conv_0/input"].update(differ=1)) == [True, True, False]


def test_spread_of_a_single_seed():
    assert results.spread([98.0]) == (98.0, 0.0)


def test_results_survive_the_disk(tmp_path):
    path = tmp_path / "results.json"
    results.write(path, FOUND)
    assert results.read(path) == FOUND
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_an_interrupted_write_leaves_the_older_file(tmp_path):
    path = tmp_path / "results.json"
    results.write(path, FOUND)
    broken = {**FOUND, "seconds": object()}
    with pytest.raises(TypeError):
        results.write(path, broken)  # type: ignore[arg-type]
    assert results.read(path) == FOUND
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_picture_is_drawn_from_the_file_alone(tmp_path, seeds):
    found = json.loads(json.dumps(FOUND))
    found["float_accuracy"] = found["float_accuracy"][:seeds]
    for methods in found["accuracy"].values():
        for method in methods:
            methods[method] = methods[method][:seeds]
    results.write(tmp_path / "results.json", found)
    plot.draw(tmp_path / "results.json", tmp_path / "demo.png")
    image = (tmp_path / "demo.png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert len(image) > 20_000


def test_where_there_is_no_terminal_a_stage_is_a_line():
    out = io.StringIO()
    with Display(Console(file=out, width=80), total=1000) as display:
        display.doing("float")
        for _ in range(1000):
            display.advance()
        display.done("float", "98.00 %")
    assert len(out.getvalue().splitlines()) == 1
    assert out.getvalue().startswith("float    98.00 %")
    assert len(out.getvalue().rstrip("\n")) <= 80
    assert display.seconds.keys() == {"float"}
