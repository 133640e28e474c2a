"""Files that lie: a slice of what the fuzzer does, and what would cost time without bound."""

import random
from pathlib import Path

import numpy as np
import pytest

import qjax
from qjax import containers
from tests.containers import fuzz as loop
from tests.interop import fuzz


def test_the_fuzzer_finds_what_is_there(monkeypatch, tmp_path, capsys):
    pytest.importorskip("resource")
    monkeypatch.setattr(loop, "BYTES", 2**40)  # address space of this process is that of a whole test run
    assert fuzz.main(["--inputs", "300", "--no-torch"]) == 0
    assert "300 inputs" in capsys.readouterr().out

    undamaged = len(fuzz.hand_made())
    seen = []

    def points(checkpoint, **options):
        seen.append(checkpoint)
        if len(seen) > undamaged:
            raise ZeroDivisionError
        return qjax.interop.points(checkpoint, **options)

    monkeypatch.setattr(fuzz, "points", points)
    assert fuzz.main(["--inputs", "100", "--no-torch", "--save", str(tmp_path / "found")]) == 1
    assert list((tmp_path / "found").iterdir())


def corpus():
    return sorted((Path(__file__).parent / "corpus").glob("*.bin"))


@pytest.mark.parametrize("path", corpus(), ids=lambda path: path.stem)
def test_what_the_fuzzer_found_before(path, tmp_path):
    # Inputs that `python -m tests.interop.fuzz --save` has kept, by sample, seed and number; each was mended.
    name = path.stem.partition("-")[0].replace("_", " ")
    assert fuzz.read(name, path.read_bytes(), tmp_path, random.Random(0)) in (True, False)


@pytest.mark.parametrize(("axis", "size"), [(2, 3), (-1, 3), (0, 4), (2**31, 3)])
def test_a_reference_weight_whose_axis_or_scales_do_not_fit_it(tmp_path, axis, size):
    reference = {
        "weight": np.ones((3, 4), np.float32),
        "weight_scale": np.ones(size, np.float32),
        "weight_zero_point": np.zeros(size, np.int64),
        "weight_qscheme": containers.Global("torch.per_channel_affine"),
        "weight_dtype": containers.Global("torch.qint8"),
    }
    columns = {
        "weight_axis": np.int64(1),
        "weight_scale": np.ones(4, np.float32),
        "weight_zero_point": np.zeros(4, np.int64),
    }
    qjax.interop.save(tmp_path / "good.pt", {"fc": reference | columns})
    assert len(qjax.interop.points(qjax.interop.load(tmp_path / "good.pt"))) == 1
    qjax.interop.save(tmp_path / "bad.pt", {"fc": reference | {"weight_axis": np.int64(axis)}})
    assert len(qjax.interop.points(qjax.interop.load(tmp_path / "bad.pt"))) == 0


def state(name: str, channels: int | None, **more: np.ndarray) -> dict[str, object]:
    shape = () if channels is None else (channels,)
    low, high = np.full(shape, -1, np.float32), np.full(shape, 2, np.float32)
    observer = {"eps": np.float32([2**-23]), "min_val": low, "max_val": high, **more}
    return {name: {"activation_post_process": observer}}


def test_histograms_of_many_sizes_are_refused(tmp_path):
    few, many = ({}, {})
    for bins in range(100, 109):
        many |= state(f"a{bins}", None, histogram=np.ones(bins, np.float32))
        few |= state(f"a{bins}", None, histogram=np.ones(100, np.float32))
    qjax.interop.save(tmp_path / "few.pt", few)
    assert len(qjax.interop.points(qjax.interop.load(tmp_path / "few.pt"))) == 9
    qjax.interop.save(tmp_path / "many.pt", many)
    with pytest.raises(containers.FormatError, match="histograms of 9 different sizes"):
        qjax.interop.points(qjax.interop.load(tmp_path / "many.pt"))


def test_a_histogram_of_many_bins_is_refused(tmp_path):
    """Of one number that is repeated: such a file is small."""
    bins = np.broadcast_to(np.float32(1), (2**16 + 1,))
    qjax.interop.save(tmp_path / "a.pt", state("a", None, histogram=bins))
    with pytest.raises(containers.FormatError, match="a histogram of 65537 bins; expected at most 65536") as error:
        qjax.interop.points(qjax.interop.load(tmp_path / "a.pt"))
    assert "a.pt" in str(error.value)


@pytest.mark.parametrize("count", [-1, np.inf, -np.inf, np.nan])
def test_a_histogram_of_counts_that_cannot_be(tmp_path, count):
    qjax.interop.save(tmp_path / "a.pt", state("a", None, histogram=np.array([3, count, 2], np.float32)))
    checkpoint = qjax.interop.load(tmp_path / "a.pt")
    (point,) = qjax.interop.points(checkpoint)
    assert (point.scale, point.qparams_from.kind) == (None, "unknown")
    assert "the file is damaged" in point.qparams_from.detail
    assert "the file is damaged" in str(qjax.interop.explain(checkpoint)).replace("\n", " ")


def test_ranges_of_many_numbers_of_channels_are_compiled_for_once(tmp_path, caplog):
    import logging

    import jax

    def compilations(*channels: int) -> int:
        jax.clear_caches()
        caplog.clear()
        tensors = {}
        for count in channels:
            tensors |= state(f"a{count}", count)
        qjax.interop.save(tmp_path / "a.pt", tensors)
        with jax.log_compiles(True), caplog.at_level(logging.WARNING, "jax"):
            table = qjax.interop.points(qjax.interop.load(tmp_path / "a.pt"))
        assert [point.scale.shape for point in table] == [(count,) for count in channels]
        assert all((point.scale == table[0].scale[0]).all() for point in table)
        return sum("Finished XLA compilation" in record.getMessage() for record in caplog.records)

    assert compilations(3, 5, 7, 16, 40, 63, 64) == compilations(3) > 0


def test_one_range_more_than_a_length(tmp_path):
    qjax.interop.save(tmp_path / "a.pt", state("a", 65) | state("b", 2**14 + 1))
    table = qjax.interop.points(qjax.interop.load(tmp_path / "a.pt"))
    assert [point.scale.shape for point in table] == [(65,), (2**14 + 1,)]
