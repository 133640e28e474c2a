"""Say what a checkpoint means: the law with its numbers filled in, for every tensor and every module's output."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qjax import containers
from qjax._formats import Int, uint8
from qjax._granularity import PerChannel
from qjax._quantize import QTensor
from qjax._spec import QuantSpec
from qjax.interop._checkpoint import Checkpoint
from qjax.interop._outputs import is_dynamic, module_outputs
from qjax.interop._text import printable, span
from qjax.interop._torch_tensors import kind_of, torch_dtype

_DYNAMIC = "dynamic (or never calibrated): scale and zero_point are found at run time"
_NO_LAW = "the model was converted before its observers saw data, or the file is damaged"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One place where a model is quantized: `real = scale · (q - zero_point)`.

    Per channel, scale, zero_point and the reals have one entry a channel; per tensor one in all.
    """

    name: str
    role: str  # "weight", "output" (of a module) or "input" (of the model)
    dtype: str  # torch's name of the codes: "qint8", "quint8"
    scheme: str  # "per_tensor symmetric", "per_channel affine", …
    axis: int | None  # of the channels; None per tensor
    shape: tuple[int, ...] | None  # None for an activation, whose shape the file does not know
    quant_min: int
    quant_max: int
    scale: tuple[float, ...]
    zero_point: tuple[float, ...]  # whole numbers but for float_qparams
    real_min: float  # smallest real that some code represents
    real_max: float
    share_at_limits: float | None  # of the codes that are quant_min or quant_max; None for an activation
    source: str  # the key of the file that says so

    @property
    def law(self) -> str:
        """The law with its numbers filled in; of the first channel where there are several."""
        return f"{self.scale[0]:.6g} · (q {_minus(self.zero_point[0])})"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found; prints as a table of 80 columns."""

    path: str
    dialect: str
    points: tuple[Point, ...]
    floats: tuple[tuple[str, tuple[int, ...], str], ...]  # (name, shape, dtype) of what is not quantized
    unread: tuple[tuple[str, str], ...]  # (name, what it is) of entries that have no meaning here
    notes: tuple[tuple[str, str], ...] = ()  # (module, why) of outputs whose scale and zero_point are no law

    def to_json(self) -> str:
        """The same as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def render(self, *, width: int = 80, color: bool = False) -> str:
        """The table as text."""
        out = io.StringIO()
        console = Console(file=out, width=width, force_terminal=color, color_system="auto" if color else None)
        summary = f"{self.dialect}, {len(self.points)} quantized, {len(self.floats)} float"
        console.print(Text(printable(f"{self.path}: {summary}")))
        if self.points:
            console.print("real = scale · (q - zero_point)")
            console.print(_table(self.points))
            console.print(_last_output(self.points, bool(self.notes)))
        for module, why in self.notes:
            console.print(Text(printable(f"The output of {module}: {why}.")))
        if self.floats:
            listed = ", ".join(f"{name} {dtype}{list(shape)}" for name, shape, dtype in self.floats)
            console.print(Text(printable(f"Not quantized: {listed}")))
        for name, what in self.unread:
            console.print(Text(printable(f"Not interpreted: {name}: {what}")))
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"

    def __str__(self) -> str:
        return self.render()


def _table(points: Sequence[Point]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1))
    for header in ("tensor", "codes", "scale\n= step", "zero\npoint", "reals", "at\nlimits"):
        justify = "left" if header in ("tensor", "codes") else "right"
        # A long name folds; numbers stay whole.
        table.add_column(header, justify=justify, overflow="fold", no_wrap=header != "tensor")
    for point in points:
        shape = "" if point.shape is None else " " + "x".join(map(str, point.shape))
        granularity, symmetry = point.scheme.split()
        axis = "" if point.axis is None else f"({point.axis})"
        table.add_row(
            Text(printable(point.name) + f"\n{point.role}{shape}"),
            f"{point.dtype} {granularity}{axis}\n{point.quant_min}..{point.quant_max} {symmetry}",
            span(point.scale),
            span(point.zero_point),
            f"{point.real_min:.4g}\n.. {point.real_max:.4g}",
            "" if point.share_at_limits is None else f"{100 * point.share_at_limits:.2f} %",
        )
    return table


def _minus(zero_point: float) -> str:
    return f"- {zero_point:.6g}" if zero_point >= 0 else f"+ {-zero_point:.6g}"


def _last_output(points: Sequence[Point], others: bool) -> Text:
    outputs = [point for point in points if point.role == "output"]
    if not outputs:
        return Text("No module stores the qparams of an output: activations are float, or quantized at run time.")
    last = outputs[-1]
    which = "the last module in the file" + (" with qparams of its own" if others else "")
    return Text(printable(f"{which.capitalize()}, {last.name}, means: real = {last.law}"))


def explain(checkpoint: Checkpoint) -> Explanation:
    """Explain a checkpoint: what each tensor's codes stand for, and each module's output.

    Args:
      checkpoint: From `load`.

    Returns:
      An `Explanation`; print it, or look at its `points`.

    Examples:
      >>> import jax.numpy as jnp, os, qjax, tempfile
      >>> spec = qjax.QuantSpec(qjax.int8, symmetric=True)
      >>> q = qjax.quantize(jnp.array([0.5, -1.0]), qjax.QParams(jnp.float32(0.125), jnp.int32(0)), spec)
      >>> path = os.path.join(tempfile.mkdtemp(), "model.pt")
      >>> qjax.interop.save(path, {"weight": q})
      >>> point = qjax.interop.explain(qjax.interop.load(path)).points[0]
      >>> point.law, point.real_min, point.real_max
      ('0.125 · (q - 0)', -16.0, 15.875)
    """
    points: list[Point] = []
    floats: list[tuple[str, tuple[int, ...], str]] = []
    unread: list[tuple[str, str]] = []
    notes: list[tuple[str, str]] = []
    outputs = {} if checkpoint.dialect == "plain" else module_outputs(checkpoint)
    for name, value in checkpoint.items():
        module, _, last = name.rpartition(".")
        if isinstance(value, QTensor):
            points.append(_tensor_point(name, value))
        elif last == "scale" and module in outputs:
            scale, zero_point = outputs[module]
            if module in checkpoint.packed and is_dynamic(scale, zero_point):
                notes.append((module, _DYNAMIC))
            elif not (np.isfinite(scale).all() and (scale > 0).all()):
                notes.append((module, f"scale is {scale.item():g}: {_NO_LAW}"))
            else:
                points.append(_activation_point(module, scale, zero_point, name))
        elif last == "zero_point" and module in outputs:
            continue
        elif isinstance(value, np.ndarray):
            floats.append((name, value.shape, str(value.dtype)))
        elif not (last == "dtype" and isinstance(value, containers.Global)):
            unread.append((name, kind_of(value)))
    # A module's weight before its output, whatever the order of the file.
    order = {module: index for index, module in reversed(list(enumerate(map(_module, points))))}
    points.sort(key=lambda point: (order[_module(point)], point.role != "weight"))
    return Explanation(checkpoint.path, checkpoint.dialect, tuple(points), tuple(floats), tuple(unread), tuple(notes))


def _module(point: Point) -> str:
    return point.name.rpartition(".")[0] if point.role == "weight" else point.name


def _tensor_point(name: str, q: QTensor) -> Point:
    codes = np.asarray(q.codes)
    spec = q.spec
    low, high = int(spec.format.quant_min), int(spec.format.quant_max)
    share = float(np.mean((codes == low) | (codes == high))) if codes.size else 0.0
    share = share if isinstance(spec.format, Int) else None  # the codes of others are bit patterns
    return _point(name, "weight", spec, q.scale, q.zero_point, codes.shape, share, name)


def _activation_point(module: str, scale: Any, zero_point: Any, source: str) -> Point:
    # A Quantize module holds arrays of one element, where the others hold scalars.
    role = "input" if np.shape(scale) == (1,) else "output"
    return _point(module, role, QuantSpec(uint8), scale, zero_point, None, None, source)


def _point(
    name: str,
    role: str,
    spec: QuantSpec,
    scale: Any,
    zero_point: Any,
    shape: tuple[int, ...] | None,
    share: float | None,
    source: str,
) -> Point:
    scales = np.asarray(scale, np.float32).reshape(-1)
    # float_qparams, of embeddings, have real zero_points.
    points = np.asarray(zero_point, np.float32 if spec.float_zero_point else np.int64).reshape(-1)
    low, high = int(spec.format.quant_min), int(spec.format.quant_max)
    where = str(spec.granularity).partition("(")[0]
    symmetric = not points.any() and (not isinstance(spec.format, Int) or spec.format.signed)
    return Point(
        name=name,
        role=role,
        dtype=torch_dtype(spec),
        scheme=f"{where} {'symmetric' if symmetric else 'affine'}",
        axis=spec.granularity.axes[0] if isinstance(spec.granularity, PerChannel) else None,
        shape=shape,
        quant_min=low,
        quant_max=high,
        scale=tuple(float(value) for value in scales),
        zero_point=tuple(points.tolist()),
        real_min=float(np.min((low - points) * scales)),
        real_max=float(np.max((high - points) * scales)),
        share_at_limits=share,
        source=source,
    )
