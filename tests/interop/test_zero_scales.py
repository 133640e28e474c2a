"""Weights some of whose rows have a scale of 0: files put together by hand, as the libraries write them."""

import json

import ml_dtypes
import numpy as np

import qjax
from qjax import containers
from qjax.containers import RawTensor
from tests.interop.compressed_folder import hand_made


def test_a_row_of_zeros_leaves_the_other_rows_their_meaning(tmp_path):
    """torchao's Float8Tensor has a scale of 0 and codes of NaN for it, compressed-tensors may have a scale of 0."""
    codes = np.float32([[1, -2], [np.nan, np.nan]]).astype(ml_dtypes.float8_e4m3fn)
    said = {"_type": "Float8Tensor", "_data": {"block_size": [1, 2]}, "_tensor_data_names": ["qdata", "scale"]}
    containers.write_safetensors(
        tmp_path / "a.safetensors",
        {
            "fc._weight_qdata": RawTensor("float8_e4m3fn", codes.view(np.uint8)),
            "fc._weight_scale": np.float32([[0.5], [0]]),
        },
        metadata={"fc.weight": json.dumps(said)},
    )
    folder = hand_made(
        tmp_path / "b",
        {"num_bits": 8, "strategy": "channel"},
        weight=np.int8([[1, -2], [3, 4]]),
        weight_scale=np.float32([[0.5], [0]]),
    )
    for place, row in ((tmp_path / "a.safetensors", [np.nan, np.nan]), (folder, [0, 0])):
        checkpoint = qjax.interop.load(place)
        wanted = np.float32([[0.5, -1], row])
        weight = checkpoint["fc.weight"]
        np.testing.assert_array_equal(np.asarray(weight.dequantize()), wanted)
        (point,) = qjax.interop.points(checkpoint)
        np.testing.assert_array_equal(qjax.interop.interpret(np.asarray(weight.codes), point), wanted)
        found = qjax.interop.explain(checkpoint)
        assert [(each.name, each.quant.scale.size) for each in found.points] == [("fc.weight", 2)]
        assert found.findings[0].places == (("fc.weight", "1 of 2 scales (1)"),)
        assert found.findings[0].kind == "zero_scale"
        assert "1 of 2 scales" in str(found)
        assert qjax.interop.compare(checkpoint, checkpoint).equal
