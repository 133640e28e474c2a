"""Each family of cases builds and runs once, at sizes that say nothing about time."""

import itertools
import math

import jax
import pytest

from benchmarks._case import FAMILIES, all_cases, make

pytestmark = pytest.mark.filterwarnings("ignore")  # what the peers warn of is theirs


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


def test_an_observer_is_updated():
    made, _ = run("observers/per_tensor/1M")
    assert {"x + 1", "min_max", "histogram", "entropy"} <= made.keys()


def test_compiling_is_measured_in_its_parts():
    made, _ = run("compile/mlp24")
    parts = made["qjax"].run()
    assert parts["seconds"] == pytest.approx(sum(parts[f"seconds, {part}"] for part in ("trace", "lower", "compile")))


def test_a_converted_program_is_near_the_float_one():
    made, _ = run("inference/decode")
    programs = {name: contender.facts for name, contender in made.items() if contender.facts}
    assert programs["float"]["differs"] == 0
    assert all(0 < facts["differs"] < 0.2 for name, facts in programs.items() if name != "float")
    assert (
        programs["qjax int4 weights"]["bytes"] < programs["qjax int8 weights"]["bytes"] < programs["float"]["bytes"] / 3
    )


def test_a_kernel_is_compared_with_its_plain_op():
    made, _ = run("kernels/blocks/mxfp4")
    assert made["Pallas"].facts == made["plain"].facts == {"equal": 1.0}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="kernels are measured here")
def test_kernels_are_not_measured_interpreted():
    made, skipped = make(all_cases()["kernels/histogram"].build(False))
    assert not made
    assert "a GPU or a TPU" in skipped["x + 1"]


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["kernels/observe_quantize", "kernels/packed/int4_g128/decode", "kernels/int8/int8_tokens/decode"]
)
def test_other_kernels_run(name):
    made, _ = run(name)
    assert made["Pallas"].facts["equal"] > 0.5


@pytest.mark.long
def test_every_reader_reads_the_same():
    for peer in ("torch", "safetensors"):
        pytest.importorskip(peer, reason="writes the files, and is installed for Python 3.11 only")
    made, skipped = run("files/1GiB")  # 1 MiB here
    assert not skipped
    parts = made["qjax, .pt"].run()
    assert parts["seconds"] > 0
    assert parts["peak MiB"] > 0


@pytest.mark.long
@pytest.mark.parametrize("name", ["steps/cnn", "steps/transformer", "ops/group_128/bf16/1M", "ops/nvfp4/f32/1M"])
def test_the_others_run(name):
    run(name)


@pytest.mark.parametrize(("peer", "name"), [("qwix", "Qwix, found"), ("aqt", "AQT, found"), ("torch", "torch, given")])
def test_a_peer_is_measured_where_it_is_installed(peer, name):
    pytest.importorskip(peer, reason="a peer of the benchmarks, installed for Python 3.11 only (make bench)")
    made, skipped = run("ops/channel_first/f32/1M")
    assert name in made, skipped
