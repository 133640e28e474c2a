"""All dialects: which one a file speaks is recognised, not asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qjax import containers
from qjax._spec import QuantSpec
from qjax.interop._dialects.compressed import CompressedTensors
from qjax.interop._dialects.dynamic import EagerDynamic
from qjax.interop._dialects.fx import FxReference, FxStatic
from qjax.interop._dialects.prepared import Prepared
from qjax.interop._dialects.program import FromProgram
from qjax.interop._dialects.protocol import Assumptions, Contents, Dialect, split
from qjax.interop._dialects.qat import QatPrepared
from qjax.interop._dialects.static import EagerStatic
from qjax.interop._dialects.torchao import Torchao
from qjax.interop._points import PointTable, QuantPoint
from qjax.recipes._torch import Engine, scheme_of_engine

if TYPE_CHECKING:
    from qjax.interop._checkpoint import Checkpoint

# A file of several dialects is called by the first.
DIALECTS: tuple[Dialect, ...] = (
    FromProgram("pt2e"),
    FromProgram("torchscript"),
    CompressedTensors(),
    Torchao(),
    QatPrepared(),
    Prepared(),
    FxReference(),
    FxStatic(),
    EagerStatic(),
    EagerDynamic(),
)


def recognise(contents: Contents) -> str:
    """The name of the dialect; `"plain"` where there is none."""
    return next((dialect.name for dialect in DIALECTS if dialect.recognises(contents)), "plain")


def points(
    checkpoint: Checkpoint,
    *,
    engine: Engine = "x86",
    activation: QuantSpec | None = None,
    weight: QuantSpec | None = None,
) -> PointTable:
    """List where a checkpoint is quantized, by which numbers, and where each came from.

    What a file does not hold is not made up: it is marked `"assumed"` or `"unknown"`, with the reason.

    Args:
      checkpoint: From `load`.
      engine: Of files of observers, which hold ranges and neither dtype nor scheme: whose default qconfig to assume.
      activation: What to assume of activations in the place of the engine's.
      weight: What to assume of weights.

    Returns:
      A `PointTable`: print it, or look at its `QuantPoint`s.

    Raises:
      ValueError: Torch has no such engine.
      containers.FormatError: The file contradicts itself.

    Examples:
      >>> import jax.numpy as jnp, numpy as np, os, qjax, tempfile
      >>> spec = qjax.QuantSpec(qjax.int8, symmetric=True)
      >>> q = qjax.quantize(jnp.array([[0.5, -1.0]]), qjax.QParams(jnp.float32(0.125), jnp.int32(0)), spec)
      >>> path = os.path.join(tempfile.mkdtemp(), "model.pt")
      >>> state = {"conv.weight": q, "conv.scale": np.float32(0.25), "conv.zero_point": np.int64(3)}
      >>> qjax.interop.save(path, state)
      >>> table = qjax.interop.points(qjax.interop.load(path))
      >>> [(point.role, str(point.scale), point.qparams_from.kind) for point in table]
      [('weight', '0.125', 'file'), ('input', 'None', 'unknown'), ('output', '0.25', 'file')]
    """
    scheme_of_engine(engine, "points")
    contents = checkpoint.contents
    assume = Assumptions(engine=engine, activation=activation, weight=weight)
    found: list[QuantPoint] = []
    try:
        _check_histograms(contents)
        for dialect in DIALECTS:
            found += dialect.points(contents, assume)
    except containers.FormatError as error:
        error.locate(file=checkpoint.path)
        raise
    known = {(point.op, point.role) for point in found if point.qparams_from.kind != "unknown"}
    found = [p for p in found if p.qparams_from.kind != "unknown" or p.role != "input" or (p.op, p.role) not in known]
    return PointTable(checkpoint.path, checkpoint.dialect, tuple(_in_file_order(found, contents)))


def _check_histograms(contents: Contents) -> None:
    """Each number of bins is compiled for; a model has one or two, and a file may not ask for a thousand."""
    sizes = {np.size(value) for key, value in contents.tensors.items() if split(key)[1] == "histogram"}
    if len(sizes) > _MOST_HISTOGRAMS:
        raise containers.FormatError(
            f"histograms of {len(sizes)} different sizes",
            expected=f"at most {_MOST_HISTOGRAMS}; torch's have 2048 bins",
        )
    if max(sizes, default=0) > _MOST_BINS:
        raise containers.FormatError(
            f"a histogram of {max(sizes)} bins",
            expected=f"at most {_MOST_BINS}; torch's have 2048 bins",
            mend="The file is damaged or forged.",
        )


_MOST_HISTOGRAMS = 8
_MOST_BINS = 2**16  # the search among more takes seconds
_ROLES = {"weight": 0, "input": 1, "output": 2}


def _in_file_order(found: list[QuantPoint], contents: Contents) -> list[QuantPoint]:
    """By the first key of each module, then those of no module as they come; weight, input, output."""
    come = {op: index for index, op in enumerate(dict.fromkeys(point.op for point in found))}
    first: dict[str, int] = {}
    for index, key in enumerate(contents.tensors):
        module = key
        while module:
            module = module.rpartition(".")[0]
            if module in come:
                first.setdefault(module, index)
    last = len(contents.tensors)
    return sorted(found, key=lambda point: (first.get(point.op, last), come[point.op], _ROLES[point.role]))
