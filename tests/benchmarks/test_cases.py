"""Each family of cases builds and runs once, at sizes that say nothing about time."""

import itertools
import math

import jax
import pytest

from benchmarks._case import FAMILIES, all_cases, make


@pytest.fixture(autouse=True)
def _as_users_have_it():
    """The peers want JAX's ordinary promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def run(name):
    """Make the contenders of a case and call each; returns those that there are, and why others are not."""
    case = all_cases()[name]
    made, skipped = make(case.build(True))
    assert case.base in made, skipped
    for contender in made.values():
        contender.run()
        assert all(math.isfinite(value) for value in contender.facts.values())
        assert contender.base is None or contender.base in made
    return made, skipped


def test_names_are_unique_and_begin_with_their_family():
    cases = all_cases()
    assert list(dict.fromkeys(name.partition("/")[0] for name in cases)) == list(FAMILIES)
    assert len(cases) == sum(
        len(list(group)) for _, group in itertools.groupby(cases, lambda name: name.partition("/")[0])
    )
    assert any(case.quick for case in cases.values())


def test_cases_that_share_a_process_follow_one_another_and_have_one_allocator():
    processes = [(case.process or case.name, case.allocator) for case in all_cases().values()]
    runs = [key for key, _ in itertools.groupby(processes)]
    assert len(runs) == len({process for process, _ in runs})


def test_an_op_is_quantized_by_all():
    made, _ = run("ops/per_tensor/f32/1M")
    assert all(contender.facts["changed"] > 0.5 for contender in made.values())
    assert {"x + 1", "qjax, given", "qjax, found", "qjax, given + vjp", "qjax, found + vjp"} <= made.keys()


def test_a_step_trains_and_its_loss_is_not_that_of_float():
    made, _ = run("steps/mlp")
    losses = {name: contender.facts["first loss"] for name, contender in made.items() if contender.base is None}
    assert losses["qjax"] != losses["float"] == pytest.approx(losses["qjax"], rel=0.05)
    assert made["qjax"].memory > 0


@pytest.mark.long
@pytest.mark.parametrize("name", ["steps/cnn", "steps/transformer", "ops/group_128/bf16/1M", "ops/nvfp4/f32/1M"])
def test_the_others_run(name):
    run(name)


@pytest.mark.parametrize(("peer", "name"), [("qwix", "Qwix, found"), ("aqt", "AQT, found"), ("torch", "torch, given")])
def test_a_peer_is_measured_where_it_is_installed(peer, name):
    pytest.importorskip(peer, reason="a peer of the benchmarks, installed for Python 3.11 only (make bench)")
    made, skipped = run("ops/channel_first/f32/1M")
    assert name in made, skipped
