"""The one line that users look for: what do the model's integer outputs mean?"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence

from qjax.interop._checkpoint import Checkpoint
from qjax.interop._dialects.all import points as points_of
from qjax.interop._dialects.fx import is_graph_buffer
from qjax.interop._dialects.prepared import OBSERVER
from qjax.interop._dialects.protocol import split
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


def answer(points: Sequence[QuantPoint], dialect: str, keys: Collection[str] = ()) -> Answer:
    """The answer that a table of points gives.

    Args:
      points: In file order.
      dialect: As `recognise` calls it.
      keys: Of the file, in its order.
    """
    if not points:
        return Answer(
            "No quantization was recognised in this file: as far as it says, what the model returns is float."
        )
    ends = [i for i, p in enumerate(points) if p.role == "output" and (p.valid or p.qparams_from.kind != "run_time")]
    of_graph = bool(ends) and all(_is_buffer(points[i]) for i in ends)
    if (
        of_graph
    ):  # a graph module has its buffers in the order of its graph, wherever the modules are that they are named by
        place = {key: index for index, key in enumerate(keys)}
        ends.sort(key=lambda i: place.get(points[i].qparams_from.detail, -1))
    outputs = [i for i in ends if points[i].valid]
    if ends and not points[ends[-1]].valid and points[ends[-1]].op not in {points[i].op for i in outputs}:
        return Answer(_unknown(points[ends[-1]]))
    if dialect == "pt2e" and not outputs:
        return Answer(_NO_GRAPH)
    if not outputs:
        return Answer(f"{_FLOAT} What the model returns is float.")
    last = outputs[-1]
    point = points[last]
    if not of_graph and dialect != "pt2e":
        others = _may_run_last([points[i] for i in outputs], points, {split(key)[0] for key in keys})
        if others:
            return Answer(_no_order(others))
    law = f"real = {law_of(point)}"
    which = f"the last quantization of the graph, {point.op}," if of_graph else _which(points, last)
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
    points = checkpoint.program.points if in_order and checkpoint.program else table.points
    return answer(points, table.dialect, list(checkpoint))


def output_point(checkpoint: Checkpoint, op: str | None = None) -> QuantPoint:
    """The point by which a model's integer outputs are read.

    Of QAT, where an output has two, it is the one that convert() gives.

    Args:
      checkpoint: From `load`.
      op: The module whose output they are; None takes the last in the file that has qparams of its own, where the file can
        tell which that is.

    Returns:
      The point, for `interpret`.

    Raises:
      ValueError: The file does not say which module is the last, there is no such op, or it has no output (or, for the
        model's entry, input) with qparams of its own.
    """
    table = points_of(checkpoint)
    if op is None:
        found = answer_of(checkpoint, table)
        if found.point is None:
            raise ValueError(f"{checkpoint.path}: {found.text} Name the module's output by op.")
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


def _is_buffer(point: QuantPoint) -> bool:
    return point.qparams_from.kind == "file" and is_graph_buffer(point.qparams_from.detail)


def _may_run_last(
    outputs: Sequence[QuantPoint], points: Sequence[QuantPoint], modules: Collection[str]
) -> list[QuantPoint]:
    """The outputs of which one is the last, where the file does not tell which; else none.

    Modules stand in the order in which they were made. Functions have no place among them, and what adds (`FloatFunctional`)
    is made where it is convenient.
    """
    last: dict[str, QuantPoint] = {point.op: point for point in outputs}
    functions = [point for point in last.values() if _is_function(point, modules)]
    buffers = [point for point in functions if _is_buffer(point)]  # in the order of the graph
    functions = [point for point in functions if not _is_buffer(point)] + buffers[-1:]
    others = [point for point in last.values() if not _is_function(point, modules)]
    if functions and len(last) > 1:
        return [*others[-1:], *functions]
    weights = {point.op for point in points if point.role == "weight"}
    # Observers that are modules of their own are those of a graph, in its order.
    bare = outputs[-1].op not in weights and not split(outputs[-1].op)[1].startswith(OBSERVER)
    weighted = [point for point in others if point.op in weights]
    return [*weighted[-1:], outputs[-1]] if bare and weighted else []


def _is_function(point: QuantPoint, modules: Collection[str]) -> bool:
    if _is_buffer(point):
        return point.op not in modules
    call = point.qparams_from.detail.partition(" in the code of ")[0].rpartition(".")[2]
    return point.qparams_from.kind == "graph" and re.sub(r"_\d+$", "", split(point.op)[1]) == call


def _no_order(points: Sequence[QuantPoint]) -> str:
    laws = some([f"{point.op or 'the model itself'} (real = {law_of(point)})" for point in points], 6)
    return (
        f"What integer outputs mean cannot be known: the file does not say which of these is the last to run: {laws}."
    )


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
