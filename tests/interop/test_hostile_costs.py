"""Small files that would cost much, or lose an entry without a word: bounded by processor time and memory."""

import json
import time
import tracemalloc
from contextlib import contextmanager

import numpy as np
import pytest

import qjax
from qjax import containers
from tests.interop.programs import qtensor


@contextmanager
def cheap(seconds=2.0, size=2**25):
    """Bound the processor time and the memory of what runs within."""
    tracemalloc.start()
    start = time.process_time()
    try:
        yield
        assert time.process_time() - start < seconds
        assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()


def loaded(place, state):
    qjax.interop.save(place / "a.pt", state)
    return qjax.interop.load(place / "a.pt")


@pytest.mark.parametrize("name", ["a." * 120_000 + "w", "a" * 240_000, "a." * 300 + "w"])
def test_a_name_that_no_model_has(tmp_path, name):
    with (
        cheap(),
        pytest.raises(containers.FormatError, match=r"a name of .* characters, .* parts; expected at most 4096"),
    ):
        loaded(tmp_path, {name: qtensor()})


def test_many_long_names_are_put_in_order(tmp_path):
    q = qtensor()
    checkpoint = loaded(tmp_path, {f"m{i}" + f".{'a' * 15}" * 250 + ".weight": q for i in range(60)})
    with cheap(size=2**24):
        table = qjax.interop.points(checkpoint)
    assert [point.op.partition(".")[0] for point in table] == [f"m{i}" for i in range(60)]


def test_names_that_grow_as_they_are_joined(tmp_path):
    containers.write_torch_zip(tmp_path / "a.pt", {"a" * 4000: dict.fromkeys(map(str, range(40_000)), 0)})
    with cheap(size=2**28), pytest.raises(containers.FormatError, match="names of more than 134217728 characters"):
        qjax.interop.load(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "state",
    [
        {"a.b": np.ones(2), "a": {"b": np.zeros(2)}},
        {"fc._packed_params._packed_params": (qtensor(), None), "fc.weight": np.zeros((4, 3))},
        {"fc.weight": np.zeros((4, 3)), "fc._packed_params._packed_params": (qtensor(), None)},
        {"a": [1], "a.0": 2},
    ],
)
def test_entries_of_one_name(tmp_path, state):
    with pytest.raises(
        containers.FormatError, match=r"tensor '(a\.b|fc\.weight|a\.0)': found two entries of this name"
    ):
        loaded(tmp_path, state)


def test_keys_of_one_text(tmp_path):
    containers.write_torch_zip(tmp_path / "a.pt", {"m": {0: 1, "0": 2}})
    with pytest.raises(containers.FormatError, match=r"tensor 'm\.0': found two entries of this name"):
        qjax.interop.load(tmp_path / "a.pt")


@pytest.mark.parametrize("shape", [(2**33, 0), (2**20, 0, 2**20)])
def test_an_empty_tensor_of_more_rows_than_any(tmp_path, shape):
    entry = {"w": {"dtype": "I8", "shape": shape, "data_offsets": [0, 0]}}
    header = json.dumps(entry).encode()
    with pytest.raises(containers.FormatError, match="an empty tensor of sizes whose product without the 0 is"):
        qjax.interop.load(len(header).to_bytes(8, "little") + header)


def test_an_empty_weight_of_many_rows_costs_nothing(tmp_path):
    spec = qjax.QuantSpec(qjax.int8, symmetric=True)
    q = qjax.QTensor(np.zeros((2**24, 0), np.int8), np.float32(0.1), np.int32(0), spec)
    checkpoint = loaded(tmp_path, {"m.weight": q})
    with cheap():
        explanation = qjax.interop.explain(checkpoint)
    assert (explanation.points[0].shape, explanation.points[0].dead_channels) == ((2**24, 0), ())
    assert "16777216x0" in str(explanation).replace("\n", "")
