"""Weights without elements: there are no scales to show, and everything that is printed is printed."""

import numpy as np
import pytest

import qjax
from tests.interop.compressed_folder import hand_made

INT8 = {"num_bits": 8, "strategy": "channel"}
MX4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
EMPTY = np.zeros((0, 3), np.int8)
ONE = np.ones((1, 1), np.int8)


@pytest.mark.parametrize(
    ("weights", "inputs", "tensors"),
    [
        (INT8, None, {"weight": EMPTY, "weight_scale": np.ones((0, 1), np.float32)}),
        (MX4, None, {"weight_packed": np.zeros((2, 0), np.uint8), "weight_scale": np.zeros((2, 0), np.uint8)}),
        (INT8, INT8, {"weight": ONE, "weight_scale": np.float32([[1]]), "input_scale": np.ones(0, np.float32)}),
    ],
    ids=["no rows", "no columns", "no scale of an input"],
)
def test_a_compressed_weight(tmp_path, weights, inputs, tensors):
    shown(qjax.interop.load(hand_made(tmp_path / "a", weights, group={"input_activations": inputs}, **tensors)))


def test_a_weight_of_no_channels(tmp_path):
    spec = qjax.QuantSpec(qjax.int8, granularity=qjax.PerChannel(0))
    q = qjax.QTensor(EMPTY, np.ones(0, np.float32), np.zeros(0, np.int32), spec)
    qjax.interop.save(tmp_path / "a.pt", {"fc.weight": q})
    shown(qjax.interop.load(tmp_path / "a.pt"))


def shown(checkpoint):
    explanation = qjax.interop.explain(checkpoint)
    for text in (str(qjax.interop.points(checkpoint)), str(explanation), explanation.render(width=160)):
        assert "none" in text
    assert '"scales": 0' in explanation.to_json()
    assert qjax.interop.compare(checkpoint, checkpoint).equal
