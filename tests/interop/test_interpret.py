"""interpret, and `qjax inspect --outputs`, without torch."""

import numpy as np
import pytest

import qjax
from qjax import _cli
from qjax.interop import Origin, QuantPoint, interpret, output_point
from tests.interop.programs import MODULES, program, qtensor

HERE = Origin("file", "here")


def point(dtype="quint8", scale=0.25, zero_point=3, *, axis=None, kind="file", role="output"):
    known = scale is not None
    return QuantPoint(
        op="fc", role=role, dtype=dtype, scheme="per_tensor_affine", quant_min=0, quant_max=127, axis=axis,
        scale=np.asarray(scale) if known else None, zero_point=np.asarray(zero_point) if known else None,
        qparams_from=Origin(kind, "scale = whatever"), codes_from=HERE,
    )  # fmt: skip


def test_the_law():
    codes = np.array([[0, 3], [127, 255]], np.uint8)  # torch's kernels saturate at 255 where an observer says 127, too
    reals = interpret(codes, point())
    assert reals.dtype == np.float32
    np.testing.assert_array_equal(reals, [[-0.75, 0], [31, 63]])
    np.testing.assert_array_equal(interpret(codes.astype(np.int64), point()), reals)
    np.testing.assert_array_equal(interpret([3, 4], point()), [0, 0.25])
    assert interpret(np.uint8(4), point()) == np.float32(0.25)
    assert interpret(np.zeros((0, 3), np.uint8), point()).shape == (0, 3)


def test_per_channel_along_its_axis():
    p = point("qint8", [1.0, 0.5, 0.125], [0, 1, -2], axis=1)
    reals = interpret(np.array([[4, 4, 4], [-8, 0, 0]], np.int8), p)
    np.testing.assert_array_equal(reals, [[4, 1.5, 0.75], [-8, -0.5, 0.25]])


def test_every_granularity_of_a_qtensor(rng):
    for granularity in (qjax.PerTensor(), qjax.PerChannel(1), qjax.PerGroup(-1, 2), qjax.PerBlock((2, 3))):
        for number_format in (qjax.uint4, qjax.e4m3):
            spec = qjax.QuantSpec(number_format, granularity=granularity)
            x = rng.normal(size=(4, 6)).astype(np.float32)
            observer = qjax.observers.min_max(spec)
            q = qjax.quantize(x, observer.qparams(observer.update(observer.init(x), x)), spec)
            p = QuantPoint(
                op="w", role="weight", dtype=None if number_format == qjax.e4m3 else str(number_format), scheme=None,
                quant_min=int(spec.quant_min), quant_max=int(spec.quant_max), axis=1 if "channel" in str(granularity) else None,
                scale=np.asarray(q.scale), zero_point=np.asarray(q.zero_point), qparams_from=HERE, codes_from=HERE, spec=spec,
            )  # fmt: skip
            np.testing.assert_array_equal(interpret(np.asarray(q.codes), p), q.dequantize())


@pytest.mark.parametrize(
    ("codes", "p", "error", "message"),
    [
        (np.zeros(3, np.float32), point(), TypeError, r"codes must be integers, got dtype float32.*int_repr"),
        (np.zeros(3, bool), point(), TypeError, "got dtype bool"),
        (
            np.array([-1, 5]),
            point(),
            ValueError,
            r"codes of quint8, which are 0 … 255; got -1 … 5.*another integer type",
        ),
        (np.array([0, 1000]), point(), ValueError, "got 0 … 1000. They are of another point, or sums"),
        (np.array([128]), point("qint8"), ValueError, r"-128 … 127"),
        (np.array([16]), point("quint4x2"), ValueError, r"0 … 15"),
        (np.array([2**31]), point("qint32"), ValueError, r"-2147483648 … 2147483647"),
        (
            np.zeros((3, 2), np.uint8),
            point(scale=[1.0, 2.0], zero_point=[0, 0], axis=0),
            ValueError,
            "2 channels along axis 0",
        ),
        (
            np.zeros(2, np.uint8),
            point(scale=[1.0, 2.0], zero_point=[0, 0], axis=1),
            ValueError,
            r"codes of shape \(2,\)",
        ),
        (np.zeros(2, np.uint8), point(scale=[1.0, 2.0], zero_point=[0, 0]), ValueError, r"scales of shape \(2,\)"),
        (
            np.zeros(2, np.uint8),
            point(scale=None, kind="run_time"),
            ValueError,
            r"no qparams in the file \(run time\)",
        ),
        (np.zeros(2, np.uint8), point(scale=np.nan), ValueError, "a scale of nan"),
        (np.zeros(2, np.uint8), point(scale=-1.0), ValueError, r"a scale of -1.0; it must be positive"),
        (np.zeros(2, np.uint8), "fc", TypeError, "point must be a QuantPoint, got str"),
    ],
)
def test_what_is_no_code_of_the_point_is_refused(codes, p, error, message):
    with pytest.raises(error, match=message):
        interpret(codes, p)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    place = tmp_path_factory.mktemp("interpret") / "net.pt"
    qjax.interop.save(place, qjax.interop.eager_static(program(), MODULES))
    return place


def test_the_output_of_a_program_is_read_from_its_file(path):
    """What the integer program returns as floats is what its last codes mean by the file."""
    from tests.interop.programs import images

    integer, x = program(), images(5, 7)
    codes = np.asarray(integer.codes(x)["Dense_1/output"].codes)
    found = output_point(qjax.interop.load(path))
    assert (found.op, found.role) == ("fc2", "output")
    np.testing.assert_array_equal(interpret(codes, found), integer(x))


def test_output_point(path, tmp_path):
    checkpoint = qjax.interop.load(path)
    assert output_point(checkpoint, "conv1").op == "conv1"
    assert output_point(checkpoint, "quant").role == "input"
    with pytest.raises(ValueError, match="no output of 'relu' has qparams in the file; those that have: conv1, conv2"):
        output_point(checkpoint, "relu")
    qjax.interop.save(tmp_path / "w.pt", {"fc.weight": qtensor()})
    with pytest.raises(ValueError, match="What the model returns is float"):
        output_point(qjax.interop.load(tmp_path / "w.pt"))


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_shell_turns_codes_into_floats(path, tmp_path, capsys, rng, order):
    codes = np.asarray(rng.integers(0, 256, (50, 3)), np.uint8, order=order)
    np.save(tmp_path / "codes.npy", codes)
    found = output_point(qjax.interop.load(path))
    arguments = ["inspect", str(path), "--outputs", str(tmp_path / "codes.npy"), "--save", str(tmp_path / "floats.npy")]
    assert _cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "50x3 codes (uint8)" in text
    assert "read as the output of fc2: real = " in text
    assert f"argmax of the first rows: {codes[0].argmax()}" in text
    reals = np.load(tmp_path / "floats.npy")
    np.testing.assert_array_equal(reals, interpret(codes, found))
    assert f"reals from {reals.min():.6g} to {reals.max():.6g}" in text
    assert _cli.main([*arguments[:4], "--op", "conv1"]) == 0
    text = capsys.readouterr().out
    assert "read as the output of conv1" in text
    assert max(map(len, text.splitlines()[1:])) <= 80


def _write_header(place, header):
    with open(place, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)


def test_files_that_are_no_codes(path, tmp_path, capsys):
    file = tmp_path / "codes.npy"

    def written(write):
        write()
        assert _cli.main(["inspect", str(path), "--outputs", str(file), "--save", str(tmp_path / "floats.npy")]) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("qjax inspect: ")
        assert not (tmp_path / "floats.npy").exists()
        return printed.err

    assert "No such file" in written(lambda: None)
    assert "found no .npy file" in written(lambda: file.write_bytes(b"junk"))
    assert "got dtype float32" in written(lambda: np.save(file, np.zeros(3, np.float32)))
    assert "got 0 … 300" in written(lambda: np.save(file, np.array([0, 300])))
    objects = np.array([{}], object)
    assert "Python objects" in written(lambda: np.save(file, objects, allow_pickle=True))
    lie = {"descr": "|u1", "fortran_order": False, "shape": (10**13,)}
    assert "no array that can be read" in written(lambda: _write_header(file, lie))
    damaged = b"\x93NUMPY\x01\x00" + (9000).to_bytes(2, "little") + b"(" * 9000
    assert "no array that can be read" in written(lambda: file.write_bytes(damaged))

    def several():
        np.savez(tmp_path / "a.npz", a=np.zeros(3, np.uint8))
        (tmp_path / "a.npz").rename(file)

    assert "several arrays" in written(several)
