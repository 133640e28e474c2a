"""The arithmetic of the benchmarks, by numbers computed by hand. No test here asserts how long anything takes."""

import pytest

from benchmarks._measure import Contender, Parts, compare, interleave, ratios, summary


def test_a_summary_is_the_median_and_the_span_of_the_middle_eight_tenths():
    assert summary([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.2, "high": 2.8}
    assert summary([float(value) for value in range(11)]) == {"median": 5.0, "low": 1.0, "high": 9.0}
    assert summary([1 / 3]) == {"median": 0.3333, "low": 0.3333, "high": 0.3333}


def test_ratios_are_paired_by_round():
    """A round in which all are four times slower changes no ratio; the ratio of the medians would be 10 / 4."""
    assert ratios([2.0, 8.0, 10.0], [1.0, 4.0, 10.0]) == [2.0, 2.0, 1.0]


def test_ratios_refuse_rounds_without_a_partner():
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])


def test_each_contender_is_measured_in_each_round_in_changing_order():
    calls = []

    def call(name):
        calls.append(name)
        return Parts({"seconds": 1.0, "bytes": float(len(calls))})

    samples = interleave({name: lambda name=name: call(name) for name in "abc"}, rounds=6, seconds=1e9, warmup=1)
    assert {name: len(each) for name, each in samples.items()} == {"a": 6, "b": 6, "c": 6}
    rounds = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(rounds) == 7
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1


def test_rounds_end_when_the_time_is_up_but_not_before_the_least():
    assert len(interleave({"a": lambda: None}, rounds=100, seconds=0.0, least=3)["a"]) == 3


def test_a_base_beside_is_measured_right_before_or_after():
    calls = []

    def call(name):
        calls.append(name)
        return Parts({"seconds": float(len(calls))})

    samples = interleave(
        {name: lambda name=name: call(name) for name in "abc"},
        {"a": "a", "b": "a", "c": "missing"},
        rounds=8,
        seconds=1e9,
        warmup=1,
        beside=True,
    )
    assert len(calls) == 3 + 8 * 4  # a twice in each round: for itself, and beside b
    differences = {own["seconds"] - other["seconds"] for own, other in samples["b"]}
    assert differences == {-1.0, 1.0}
    assert all(own is other for own, other in samples["a"])
    assert all(other is None for _, other in samples["c"])


def test_a_comparison_names_the_base_of_each_contender():
    def runs(*values):
        left = iter(values)
        return lambda: Parts({"seconds": next(left)})

    found = compare(
        {
            "float": Contender(runs(9.0, 1.0, 2.0, 4.0)),
            "mine": Contender(runs(9.0, 2.0, 4.0, 4.0), memory=5, facts={"differs": 0.123456789}),
            "other": Contender(runs(9.0, 6.0, 4.0, 2.0), base="mine"),
            "orphan": Contender(runs(9.0, 1.0, 1.0, 1.0), base="missing"),
        },
        "float",
        rounds=3,
        seconds=1e9,
        warmup=1,
    )
    contenders = found["contenders"]
    assert (found["base"], found["rounds"]) == ("float", 3)
    assert contenders["float"]["ratios"]["seconds"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert contenders["mine"] == {
        "base": "float",
        "metrics": {"seconds": {"median": 4.0, "low": 2.4, "high": 4.0}},
        "ratios": {"seconds": {"median": 2.0, "low": 1.2, "high": 2.0}},  # of 2, 2, 1
        "memory": 5,
        "facts": {"differs": 0.1234568},
    }
    assert contenders["other"]["ratios"]["seconds"]["median"] == 1.0  # of 3, 1, 0.5
    assert "ratios" not in contenders["orphan"]
