"""Configs of compressed-tensors, small and made to keep a reader busy: an answer or an error in bounded processor time."""

import json
import time
import tracemalloc

import numpy as np
import pytest

from qjax import containers, interop
from qjax.containers import FormatError
from qjax.interop._read.compressed_config import Targets, find_config
from qjax.interop._read.match import Budget, Pattern
from tests.interop.compressed_folder import hand_made

W8 = {"num_bits": 8, "strategy": "channel"}


def targets_of(groups, ignore=()):
    said = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": list(ignore)}
    return Targets(find_config({"config": {"quantization_config": said}}))


def one_group(*targets):
    return {"g": {"targets": list(targets), "weights": W8}}


def taken(work):
    """Seconds of the processor, and whether the work was refused."""
    start, found = time.process_time(), ""
    try:
        work()
    except FormatError as error:
        found = str(error)
    return time.process_time() - start, "take too long" in found


@pytest.mark.parametrize("levels", [60, 240])
def test_groups_within_groups_are_refused_before_pythons_stack_ends(levels):
    with pytest.raises(FormatError, match="more than 100 deep"):
        Pattern("(" * levels + "m" + ")*" * levels).matches("m", Budget(10**6))
    assert Pattern("(" * 40 + "m" + ")*" * 40).matches("m", Budget(10**6))


def test_what_a_pattern_asks_of_a_long_name_is_asked_once():
    targets = targets_of(one_group(*["re:" + r"\b" * 450 + f"x{i}" for i in range(20)]))
    names = [f"{i}" + "a b." * 240 for i in range(30)]
    seconds, refused = taken(lambda: [targets.scheme(name, lambda scheme: True) for name in names])
    assert seconds < 3
    assert not refused


def test_many_patterns_on_many_long_names_are_bounded():
    targets = targets_of(one_group("Linear"), [f"re:[^{chr(0x4E00 + i)}].*[a-f]x{i}" for i in range(300)])
    distinct = "".join(map(chr, range(0x5000, 0x5000 + 980)))
    seconds, refused = taken(lambda: [targets.scheme(f"{i}{distinct}", lambda scheme: True) for i in range(300)])
    assert refused
    assert seconds < 15
    targets = targets_of(one_group("Linear"), [f"re:model.{i}" for i in range(300)])
    seconds, refused = taken(lambda: [targets.scheme(f"{i}" + "a" * 980, lambda scheme: True) for i in range(300)])
    assert not refused
    assert seconds < 3


def test_empty_groups_that_are_repeated_are_bounded():
    with pytest.raises(FormatError, match="take too long"):
        Pattern("(?:(?:(?:a|){1000}){1000}){1000}").matches("b", Budget(10**5))
    with pytest.raises(FormatError, match="take too long"):
        Pattern("(?:(?:(?:){1000}){1000}){1000}").matches("b", Budget(10**5))


@pytest.mark.parametrize("where", ["ignore", "names", "classes"])
def test_many_modules_and_many_targets_are_bounded(tmp_path, where):
    many = [f"{'L' if where == 'classes' else 'l'}{i}" for i in range(20000)]
    groups = one_group("Linear") if where == "ignore" else one_group(*many)
    said = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": many * (where == "ignore")}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": said}))
    tensors = {}
    for i in range(1000):
        tensors |= {f"m{i}.weight": np.zeros((1, 1), np.int8), f"m{i}.weight_scale": np.ones((1, 1), np.float32)}
    containers.write_safetensors(tmp_path / "model.safetensors", tensors)
    start = time.process_time()
    checkpoint = interop.load(tmp_path)
    assert time.process_time() - start < 5
    assert len(checkpoint.compressed.modules) == (0 if where == "names" else 1000)


def test_many_schemes_of_which_none_fits_are_bounded():
    groups = {f"g{i}": {"targets": [f"L{i}"], "weights": W8} for i in range(5000)}
    targets = targets_of(groups)

    def fits(scheme):
        return False

    seconds, refused = taken(lambda: [targets.scheme(f"m{i}", fits) for i in range(2000)])
    assert refused
    assert seconds < 5


def test_an_embedding_takes_the_class_of_its_own_and_else_the_first_in_the_alphabet():
    groups = {name: {"targets": [name], "weights": W8} for name in ("Linear", "Embedding", "Conv2d")}
    targets = targets_of(groups)
    assert targets.scheme("a.embed_tokens", lambda scheme: True).name == "Embedding"
    assert targets.scheme("a.fc", lambda scheme: True).name == "Conv2d"
    assert targets.scheme("a.fc", lambda scheme: scheme.name != "Conv2d").name == "Linear"
    assert targets.scheme("a.fc", lambda scheme: False).name == "Conv2d"


def test_a_block_larger_than_its_weight_takes_no_memory(tmp_path):
    args = {"num_bits": 8, "strategy": "block", "block_structure": [2**30, 1]}
    folder = hand_made(tmp_path / "a", args, weight=np.int8([[1, 2]]), weight_scale=np.float32([[0.5, 0.25]]))
    checkpoint = interop.load(folder)
    wanted = np.float32([[0.5, 0.5]])
    np.testing.assert_array_equal(np.asarray(checkpoint["fc.weight"].dequantize()), wanted)
    (point,) = interop.points(checkpoint)
    tracemalloc.start()
    np.testing.assert_array_equal(interop.interpret(np.int8([[1, 2]]), point), wanted)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert "fc" in str(interop.explain(checkpoint))
