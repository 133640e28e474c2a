"""The demo end to end, cut down to seconds."""

import warnings

import jax
import numpy as np
import pytest

from experiments.demo import data, results
from experiments.demo.__main__ import main
from experiments.demo.model import CHANNELS, CLASSES, HIDDEN
from experiments.demo.recipes import SETTINGS
from tests.torch_engine import torch_engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    # Compiling is most of a run this short, and what is checked here has to hold however XLA optimizes.
    unoptimized = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):  # for optax.adam
            patch.setenv("COLUMNS", "80")
            main(["--smoke", "--out", str(out)])
    finally:
        jax.config.update("jax_disable_most_optimizations", unoptimized)
    return out


@pytest.fixture(scope="module")
def found(folder):
    return results.read(folder / "results.json")


def test_every_file_is_there(folder):
    names = {"results.json", "demo.png", "digits_float32.npz", "digits_int8.pt"}
    assert {file.name for file in folder.iterdir()} == names


def test_every_point_was_compared_and_no_code_differs(found):
    images, codes = found["images"]["test"], found["codes"]
    assert codes["Conv_0/input"] == {"compared": images * 8 * 8, "differ": 0}
    assert codes["Conv_0/output"]["compared"] == images * 8 * 8 * CHANNELS[0]
    assert codes["Dense_1/weight"]["compared"] == HIDDEN * CLASSES
    assert len(codes) == 12
    assert sum(counts["differ"] for counts in codes.values()) == 0
    assert found["integer_accuracy"] == found["simulated_accuracy"]


def test_two_epochs_learn_something(found):
    assert found["float_accuracy"][0] > 20.0  # a guess is right once in ten
    for setting in SETTINGS:
        assert found["accuracy"][setting.name]["qat"][0] > 20.0


def test_eight_bits_are_quieter_than_four(found):
    noise = found["sqnr_db"]
    for op, decibels in noise["W8A8"].items():
        assert decibels > noise["W4A4"][op] + 5.0
    # The first op sees the same image in both, so that it differs by its own bits alone.
    assert 30.0 < noise["W8A8"]["Conv_0"] < 60.0


def test_torch_runs_the_checkpoint_to_the_same_accuracy(folder, found):
    torch = pytest.importorskip("torch")
    quantized, fused = torch.ao.nn.quantized, torch.ao.nn.intrinsic.quantized
    with torch_engine("fbgemm"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates all of its quantized modules
        model = torch.nn.ModuleDict(
            {
                "quant": quantized.Quantize(1.0, 0, torch.quint8),
                "conv1": fused.ConvReLU2d(1, CHANNELS[0], 3, padding=1),
                "conv2": fused.ConvReLU2d(CHANNELS[0], CHANNELS[1], 3, padding=1),
                "fc1": fused.LinearReLU(4 * CHANNELS[1], HIDDEN),
                "fc2": quantized.Linear(HIDDEN, CLASSES),
            }
        )
        model.load_state_dict(torch.load(folder / "digits_int8.pt", weights_only=True))
        _, test = data.load(0.4)
        x = model["quant"](torch.from_numpy(np.ascontiguousarray(test.images.transpose(0, 3, 1, 2))))
        for name in ("conv1", "conv2"):
            x = torch.nn.functional.max_pool2d(model[name](x), 2)
        logits = model["fc2"](model["fc1"](x.flatten(1))).dequantize().numpy()
    correct = int(np.sum(logits.argmax(-1) == test.labels))
    assert 100.0 * correct / len(test.labels) == found["integer_accuracy"]
