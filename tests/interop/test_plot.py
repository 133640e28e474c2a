"""The picture of a checkpoint: that it is drawn, of what, and what is said where it cannot be."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import _cli
from qjax.interop._explain import plot
from tests.interop.programs import affine, qtensor

figure = pytest.importorskip("matplotlib.figure", reason="draws with matplotlib, an optional extra")


def drawn(monkeypatch, tmp_path, state, name="a.png", **options):
    """The texts of the picture, by what they are."""
    kept = []
    save = figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, *args, **kw: kept.append(self) or save(self, *args, **kw)
    )
    qjax.interop.save(tmp_path / "a.pt", state)
    qjax.interop.plot(qjax.interop.load(tmp_path / "a.pt"), tmp_path / name, **options)
    return kept[-1]


def titles(axes):
    return [axes.get_title(loc=place) for place in ("left", "right")]


def grouped():
    spec = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=qjax.PerChannel(0))
    codes = np.zeros((3, 5), np.int8)
    codes[1], codes[2, 0] = 127, -5
    return qjax.QTensor(codes, np.float32([0.5, 0.25, 1]), np.zeros(3, np.int32), spec)


STATE = {
    "conv.weight": grouped(), "conv.scale": np.float32(0.25), "conv.zero_point": np.int64(3),
    "fc.weight": qtensor((4, 6)), "fc.scale": np.float32(0.5), "fc.zero_point": np.int64(0),
}  # fmt: skip


def test_weights_and_activations_are_drawn(monkeypatch, tmp_path):
    page = drawn(monkeypatch, tmp_path, STATE)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    conv, scales, fc, use, ranges = page.axes
    assert titles(conv) == ["conv.weight\nqint8 3x5", "33.33 % at the limits"]
    heights = [bar.get_height() for bar in conv.patches]
    assert len(heights) == 256
    assert (heights[128], heights[255], heights[128 - 5]) == (9, 5, 1)
    np.testing.assert_array_equal(scales.lines[0].get_ydata(), [0.5, 0.25, 1])
    np.testing.assert_array_equal(scales.lines[1].get_xdata(), [0])
    assert titles(scales) == ["scale of each channel", "1 dead (x)"]
    assert titles(use)[0] == "largest |q - zero_point| of each channel"
    codes = np.asarray(STATE["fc.weight"].codes, int)
    np.testing.assert_array_equal(use.lines[0].get_ydata(), np.abs(codes).max(1))
    widths = [bar.get_width() for bar in ranges.patches]
    assert widths == pytest.approx([0.25 * 255, 0.5 * 255])
    texts = [text.get_text() for text in ranges.texts]
    assert texts == ["-0.75 .. 63   zero_point 3", "conv output", "0 .. 128   zero_point 0", "fc output"]
    assert fc is not None


def test_ops_are_chosen_and_what_is_left_out_is_said(monkeypatch, tmp_path):
    page = drawn(monkeypatch, tmp_path, STATE, ops="fc")
    assert page.axes[0].get_title(loc="left").startswith("fc.weight\n")
    monkeypatch.setattr(plot, "_WEIGHTS", 1)
    monkeypatch.setattr(plot, "_RANGES", 1)
    page = drawn(monkeypatch, tmp_path, STATE)
    assert len(page.axes) == 3
    assert page.get_supxlabel() == "Not drawn: 1 more weights and 1 more activations; choose by --op REGEX"


@pytest.mark.parametrize("ending", ["svg", pytest.param("pdf", marks=pytest.mark.long)])
def test_other_endings(monkeypatch, tmp_path, ending):
    drawn(monkeypatch, tmp_path, {"w": affine((4, 3))}, f"a.{ending}")
    start = (tmp_path / f"a.{ending}").read_bytes()[:5]
    assert start in (b"%PDF-", b"<?xml")


def test_names_are_no_formulas_and_do_not_act(monkeypatch, tmp_path):
    page = drawn(monkeypatch, tmp_path, {"$\\frac{\x1b.weight": affine((4, 3))})
    assert page.axes[0].get_title(loc="left").startswith("$\\frac{\\x1b.weight\n")


def test_float_weights_of_observed_models(monkeypatch, tmp_path):
    observer = "fc.activation_post_process"
    state = {
        "fc.weight": np.float32([[0.5, -1], [2, np.nan]]), f"{observer}.eps": np.float32([2.0**-23]),
        f"{observer}.min_val": np.float32(-1), f"{observer}.max_val": np.float32(3),
    }  # fmt: skip
    page = drawn(monkeypatch, tmp_path, state)
    assert page.axes[0].get_title(loc="left") == "what activations can represent (orange: inputs)"
    state["fc.weight"] = np.float32([[0.5, -1], [2, 0]])
    page = drawn(monkeypatch, tmp_path, state)
    assert titles(page.axes[0])[0] == "fc.weight\nqint8 2x2"
    assert titles(page.axes[1])[0] == "largest |w| / scale of each channel"


def test_four_bits_in_groups(monkeypatch, tmp_path):
    spec = qjax.QuantSpec(qjax.int4, symmetric=True, granularity=qjax.PerGroup(-1, 2))
    x = jnp.arange(24.0).reshape(4, 6) - 11
    observer = qjax.observers.min_max(spec)
    q = qjax.quantize(x, observer.qparams(observer.update(observer.init(x), x)), spec)
    explained = qjax.interop.explain(_checkpoint(tmp_path, q))
    page = figure.Figure()
    left, right = page.subplots(1, 2)
    plot._codes(left, explained.points[0], q)
    plot._scales(right, explained.points[0], None, q)
    assert len(left.patches) == 16
    assert titles(right)[0] == "scales, 3 a row: median, range"
    np.testing.assert_allclose(right.lines[0].get_ydata(), np.median(np.asarray(q.scale), axis=1))


def _checkpoint(place, q):
    """Torch's files have no such tensor."""
    qjax.interop.save(place / "g.pt", {"w": qtensor()})
    checkpoint = qjax.interop.load(place / "g.pt")
    checkpoint._tensors["w"] = q
    return checkpoint


@pytest.mark.parametrize(
    ("state", "name", "message"),
    [
        ({"bias": np.ones(3, np.float32)}, "a.png", "has no quantized weight and no range"),
        ({"w": affine((4, 3))}, "a.gif", r"ends in 'gif'; expected \.png, \.pdf or \.svg"),
        ({"w": affine((4, 3))}, "a", "ends in 'nothing'"),
    ],
)
def test_what_cannot_be_drawn(tmp_path, state, name, message):
    qjax.interop.save(tmp_path / "a.pt", state)
    with pytest.raises(ValueError, match=message):
        qjax.interop.plot(qjax.interop.load(tmp_path / "a.pt"), tmp_path / name)
    assert not (tmp_path / name).exists()


def test_the_shell(tmp_path, capsys):
    qjax.interop.save(tmp_path / "a.pt", STATE)
    assert _cli.main(["inspect", str(tmp_path / "a.pt"), "--plot", str(tmp_path / "b.png")]) == 0
    assert capsys.readouterr().out == str(qjax.interop.explain(qjax.interop.load(tmp_path / "a.pt")))
    assert (tmp_path / "b.png").stat().st_size > 10_000
    assert _cli.main(["inspect", str(tmp_path / "a.pt"), "--plot", str(tmp_path / "none" / "b.png")]) == 1
    assert "qjax inspect: " in capsys.readouterr().err


def test_without_matplotlib_the_error_says_what_to_install(tmp_path):
    qjax.interop.save(tmp_path / "a.pt", STATE)
    code = (
        "import sys; sys.modules['matplotlib'] = None; from qjax._cli import main; "
        f"sys.exit(main(['inspect', {str(tmp_path / 'a.pt')!r}, '--plot', {str(tmp_path / 'b.png')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    wanted = "plot: matplotlib is not installed. Install it with: pip install 'qjax[plot]' (or: pip install matplotlib)"
    assert done.stderr.strip() == f"qjax inspect: {wanted}"
