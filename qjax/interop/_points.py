"""The typed table of quantization points: where a model is quantized, by which numbers, and where each came from."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qjax._granularity import PerChannel
from qjax._quantize import QTensor
from qjax._spec import QuantSpec
from qjax.interop._deferred import Deferred
from qjax.interop._text import printable, span
from qjax.interop._torch_tensors import torch_dtype

Role = Literal["weight", "input", "output"]
Kind = Literal["file", "graph", "observer", "run_time", "fixed", "assumed", "unknown"]


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a number came from.

    Args:
      kind: `"file"`: it stands there. `"graph"`: a literal of the program in the file. `"observer"`: recomputed from an
        observer's statistics, as torch does. `"run_time"`: found anew from each input. `"fixed"`: torch's class says so.
        `"assumed"`: the file does not hold it, and this is what torch's defaults would be. `"unknown"`.
      detail: The key, the node, the formula, or the reason.
    """

    kind: Kind
    detail: str


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class QuantPoint:
    """One place where a model is quantized: `real = scale · (q - zero_point)`, q in `quant_min … quant_max`.

    A weight under fake-quantization has two points of the same op and role: by the buffers that training uses, and by the
    qparams that torch's `convert` would give.
    """

    op: str  # the module's path, "" for the model itself
    role: Role
    dtype: (
        str | None
    )  # torch's name of the codes, such as "qint8"; "float16" where values are rounded and have no codes
    scheme: str | None  # torch's name, such as "per_channel_symmetric"; None where there is no scale
    quant_min: float | None  # a whole number but for some floats
    quant_max: float | None
    axis: int | None  # of the channels; None per tensor
    scale: np.ndarray | None  # floats, (), (channels,), or one a block; None where not known
    zero_point: np.ndarray | None  # the same shape; integers but for float_qparams
    qparams_from: Origin  # where scale and zero_point came from
    codes_from: Origin  # where dtype, scheme and range came from
    tensor: str | None = None  # the name of the tensor in the checkpoint that is quantized so
    spec: QuantSpec | None = None  # `choose_qparams(min_val, max_val, spec)` finds the qparams from a range

    def __post_init__(self) -> None:
        if (self.scale is None) != (self.zero_point is None):
            raise ValueError(f"QuantPoint: {self.op} has a scale without a zero_point, or the other way around.")
        if self.scale is not None and self.zero_point is not None and self.scale.shape != self.zero_point.shape:
            raise ValueError(
                f"QuantPoint: {self.op} has a scale of shape {self.scale.shape}, a zero_point of {self.zero_point.shape}."
            )

    @property
    def valid(self) -> bool:
        """Whether there are qparams and every scale is positive and finite."""
        return self.scale is not None and bool(np.all(np.isfinite(self.scale) & (self.scale > 0)))

    @property
    def has_law(self) -> bool:
        """Whether its codes mean something: as `valid`, but some scales may be 0, as of rows that hold nothing but zeros."""
        if self.scale is None:
            return False
        return bool(
            np.all(np.isfinite(self.scale) & (self.scale >= 0)) and (np.any(self.scale > 0) or not self.scale.size)
        )


@dataclasses.dataclass(frozen=True)
class PointTable(Sequence[QuantPoint]):
    """The points of a checkpoint, in the order of its modules; prints as a table of 80 columns."""

    path: str
    dialect: str
    points: tuple[QuantPoint, ...]

    def __getitem__(self, index: Any) -> Any:
        return self.points[index]

    def __len__(self) -> int:
        return len(self.points)

    def __iter__(self) -> Iterator[QuantPoint]:
        return iter(self.points)

    def of(self, op: str, role: Role | None = None) -> tuple[QuantPoint, ...]:
        """The points of an op; of one role where that is given."""
        return tuple(point for point in self.points if point.op == op and role in (None, point.role))

    def to_json(self) -> str:
        """The same as JSON text; what is no number (inf, NaN) is a string."""

        def plain(value: Any) -> Any:
            if dataclasses.is_dataclass(value) and not isinstance(value, type | QuantSpec):
                names = [field.name for field in dataclasses.fields(value)]
                return {name: plain(getattr(value, name)) for name in names}
            if isinstance(value, np.ndarray):
                return plain(value.tolist())
            if isinstance(value, tuple | list):
                return [plain(item) for item in value]
            if isinstance(value, QuantSpec) or (isinstance(value, float) and not math.isfinite(value)):
                return str(value)
            return value

        return json.dumps(plain(self), indent=2, allow_nan=False)

    def render(self, *, width: int = 80, color: bool = False) -> str:
        """The table as text."""
        out = io.StringIO()
        console = Console(file=out, width=width, force_terminal=color, color_system="auto" if color else None)
        count = f"{len(self.points)} quantization point{'' if len(self.points) == 1 else 's'}"
        console.print(Text(printable(f"{self.path}: {self.dialect}, {count}")))
        known = [point for point in self.points if point.qparams_from.kind != "unknown"]
        if known:
            notes: dict[str, int] = {}
            console.print("real = scale · (q - zero_point)")
            console.print(_table(known, notes))
            for note, number in notes.items():
                console.print(Text(printable(f"[{number}] {note}")))
        for reason, ops in _unknown(self.points).items():
            console.print(Text(printable(f"Unknown: {', '.join(ops)}: {reason}.")))
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"

    def __str__(self) -> str:
        return self.render()


def _unknown(points: Sequence[QuantPoint]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for point in points:
        if point.qparams_from.kind == "unknown":
            found.setdefault(point.qparams_from.detail, []).append(f"{point.role} of {point.op or 'the model'}")
    return found


def _from(point: QuantPoint, origin: Origin, notes: dict[str, int]) -> str:
    """A key of the module itself in short; a reason as the number of a note, which several points share."""
    kind = origin.kind.replace("_", " ")
    if origin.kind == "file" and " " not in origin.detail:
        own = origin.detail.removeprefix(f"{point.op}.") if point.op else origin.detail
        return f"{kind}: {own}"
    return f"{kind} [{notes.setdefault(origin.detail, len(notes) + 1)}]"


def _table(points: Sequence[QuantPoint], notes: dict[str, int]) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1))
    for header in ("op\nrole", "codes", "scale", "zero\npoint", "from"):
        justify = "right" if header in ("scale", "zero\npoint") else "left"
        # Long names and reasons fold; numbers stay whole.
        whole = header in ("codes", "scale", "zero\npoint")
        table.add_column(header, justify=justify, overflow="fold", no_wrap=whole)
    for point in points:
        axis = "" if point.axis is None else f"({point.axis})"
        limits = "" if point.quant_min is None else f" {point.quant_min}..{point.quant_max}"
        sources = [_from(point, point.qparams_from, notes)]
        if point.codes_from.kind in ("assumed", "observer"):
            sources.append(f"codes {_from(point, point.codes_from, notes)}")
        scheme = "" if point.scheme is None else point.scheme.replace("_float_qparams", "") + axis
        table.add_row(
            Text(printable(point.op or "the model") + f"\n{point.role}"),
            f"{point.dtype or ''}{limits}\n{scheme}",
            "" if point.scale is None else span(point.scale),
            "" if point.zero_point is None else span(point.zero_point),
            Text("\n".join(map(printable, sources))),
        )
    return table


def tensor_point(op: str, name: str, q: QTensor | Deferred, *, role: Role = "weight") -> QuantPoint:
    """The point of a quantized tensor that the file holds."""
    granularity = q.spec.granularity
    axis = granularity.axes[0] if isinstance(granularity, PerChannel) else None
    return QuantPoint(
        op=op,
        role=role,
        dtype=torch_dtype(q.spec),
        scheme=scheme_of(q.spec),
        quant_min=_whole(q.spec.format.quant_min),
        quant_max=_whole(q.spec.format.quant_max),
        axis=axis,
        scale=np.asarray(q.scale),
        zero_point=np.asarray(q.zero_point),
        qparams_from=Origin("file", name),
        codes_from=Origin("file", name),
        tensor=name,
        spec=q.spec,
    )


def range_point(op: str, role: Role, spec: QuantSpec, **fields: Any) -> QuantPoint:
    """A point whose dtype, scheme, range and axis are those of a spec."""
    axis = spec.granularity.axes[0] if isinstance(spec.granularity, PerChannel) else None
    if fields.get("scale") is not None:
        shape = () if axis is None else (-1,)  # torch's observers hold one number as an array of one
        fields["scale"], fields["zero_point"] = (
            np.asarray(fields[name]).reshape(shape) for name in ("scale", "zero_point")
        )
    return QuantPoint(
        op=op,
        role=role,
        dtype=torch_dtype(spec),
        scheme=scheme_of(spec),
        quant_min=_whole(spec.quant_min),
        quant_max=_whole(spec.quant_max),
        axis=axis,
        **{"scale": None, "zero_point": None, **fields},
        spec=spec,
    )


def _whole(limit: float) -> float:
    return int(limit) if limit == int(limit) else limit


def scheme_of(spec: QuantSpec) -> str:
    """Torch's name of a scheme; after its pattern where torch has none, such as `per_group_symmetric`."""
    where = str(spec.granularity).partition("(")[0]
    return f"{where}_{'symmetric' if spec.symmetric else 'affine'}{'_float_qparams' if spec.float_zero_point else ''}"
