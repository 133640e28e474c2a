"""The one line that users look for: what do the model's integer outputs mean?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from qjax.interop._checkpoint import Checkpoint
from qjax.interop._dialects.all import points as points_of
from qjax.interop._points import PointTable, QuantPoint
from qjax.interop._text import minus, some

_FLOAT = "No module stores the qparams of an output: activations are float, or quantized at run time and turned back at once."


_NO_GRAPH = (
    "What integer outputs mean cannot be known from this file: PT2E holds the qparams of activations in its graph, which a "
    "state dict has not. Save the program with torch.export.save. As PT2E makes it, it returns floats."
)


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """What the model's integer outputs mean.

    Args:
      text: In a sentence or two; also where it cannot be known, and why.
      point: By which `interpret` reads them; None where they are floats or it cannot be known.
    """

    text: str
    point: QuantPoint | None = None


NO_ANSWER = Answer("")


def answer(points: Sequence[QuantPoint], dialect: str) -> Answer:
    """The answer that a table of points gives.

    Args:
      points: In file order.
      dialect: As `recognise` calls it.
    """
    if not points:
        return Answer(
            "No quantization was recognised in this file: as far as it says, what the model returns is float."
        )
    outputs = [index for index, point in enumerate(points) if point.role == "output" and point.valid]
    broken = [
        i for i, p in enumerate(points) if p.role == "output" and not p.valid and p.qparams_from.kind != "run_time"
    ]
    last = outputs[-1] if outputs else -1
    if broken and broken[-1] > last and points[broken[-1]].op not in {points[i].op for i in outputs}:
        return Answer(_unknown(points[broken[-1]]))
    if dialect == "pt2e" and not outputs:
        return Answer(_NO_GRAPH)
    if not outputs:
        return Answer(f"{_FLOAT} What the model returns is float.")
    point = points[last]
    law = f"real = {law_of(point)}"
    which = _which(points, last)
    if dialect in ("prepared", "qat_prepared"):
        text = f"Until convert() the model computes in floats, and returns floats. After it, {which} means: {law}"
        return Answer(f"{text}, where it is the last to run.", point)
    if dialect == "pt2e":
        text = f"A graph of PT2E turns codes into floats before it returns them. Those of {which} mean: {law}."
        return Answer(text, point)
    if dialect.startswith("fx"):
        end = "An FX graph turns what it returns back into these reals, unless it was converted with output_quantized_idxs."
        return Answer(f"{which[0].upper()}{which[1:]} means: {law}, where it is the last to run. {end}", point)
    return Answer(
        f"{which[0].upper()}{which[1:]} means: {law}, where it is the last to run. A model that ends in a DeQuantStub returns "
        "these reals already; one that returns codes (int_repr) has the same argmax.",
        point,
    )


def answer_of(checkpoint: Checkpoint, table: PointTable) -> Answer:
    """The answer of a checkpoint; a graph of PT2E says in which order its ops run, other files in which they were made."""
    in_order = checkpoint.program is not None and table.dialect == "pt2e"
    return answer(checkpoint.program.points if in_order and checkpoint.program else table.points, table.dialect)


def output_point(checkpoint: Checkpoint, op: str | None = None) -> QuantPoint:
    """The point by which a model's integer outputs are read.

    Of QAT, where an output has two, it is the one that convert() gives.

    Args:
      checkpoint: From `load`.
      op: The module whose output they are; None takes the last in the file that has qparams of its own.

    Returns:
      The point, for `interpret`.

    Raises:
      ValueError: There is no such op, or it has no output (or, for the model's entry, input) with qparams of its own.
    """
    table = points_of(checkpoint)
    if op is None:
        found = answer_of(checkpoint, table)
        if found.point is None:
            raise ValueError(f"{checkpoint.path}: {found.text} Name another module's output by op.")
        return found.point
    # A Quantize module's point is an input: of the model, which is the module's output.
    candidates = [point for role in ("output", "input") for point in table.of(op, role) if point.scale is not None]
    if not candidates:
        names = list(dict.fromkeys(p.op for p in table if p.role == "output" and p.scale is not None))
        raise ValueError(
            f"{checkpoint.path}: no output of {op!r} has qparams in the file; those that have: {some(names, 20) or 'none'}."
        )
    role = candidates[0].role
    return [point for point in candidates if point.role == role][-1]


def law_of(point: QuantPoint) -> str:
    """The law with its numbers filled in; of the first channel where there are several."""
    if point.scale is None or point.zero_point is None or not point.scale.size:
        return point.qparams_from.detail
    return f"{point.scale.reshape(-1)[0]:.6g} · (q {minus(point.zero_point.reshape(-1)[0])})"


def _which(points: Sequence[QuantPoint], last: int) -> str:
    point = points[last]
    name = point.op or "the model itself"
    if any(other.op != point.op for other in points[last + 1 :]):
        return f"the last module in the file with qparams of its own, {name},"
    return f"the last module in the file, {name},"


def _unknown(point: QuantPoint) -> str:
    name = point.op or "the model"
    if point.scale is not None:
        bad = point.scale.reshape(-1)
        return f"What integer outputs mean cannot be known: {name}, the last module in the file, has a scale of {bad[0]:g}."
    return f"What integer outputs mean cannot be known: of {name}, the last module in the file: {point.qparams_from.detail}."
