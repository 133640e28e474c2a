"""What `qjax inspect --outputs` does: a file of integer outputs, read with care, and turned to floats in pieces."""

from __future__ import annotations

import os
from typing import IO

import numpy as np

from qjax.containers._atomic import replace_file
from qjax.interop._explain.answer import law_of
from qjax.interop._explain.code_statistics import pieces
from qjax.interop._interpret import check_codes, check_point, interpret
from qjax.interop._points import QuantPoint
from qjax.interop._text import printable

_MAGIC = b"\x93NUMPY"
_ROWS = 4


def read_codes(path: str | os.PathLike[str]) -> np.ndarray:
    """The integers in a .npy file, memory-mapped. Pickles are refused.

    Raises:
      ValueError: It is no .npy file, or one of objects, or shorter than its header says.
      OSError: It cannot be opened.
    """
    with open(path, "rb") as file:
        start = file.read(len(_MAGIC))
    if start != _MAGIC:
        kind = "an archive of several arrays (.npz)" if start[:2] == b"PK" else "no .npy file"
        raise ValueError(f"{os.fspath(path)}: found {kind}; expected one array. Write it with np.save(path, codes).")
    try:
        # Mapped, so that a header that promises more than there is costs nothing.
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # of a damaged header, whatever Python's own parser raises
        raise ValueError(
            f"{os.fspath(path)}: found no array that can be read ({printable(str(error))[:200]}). Write it anew with "
            "np.save(path, codes)."
        ) from error


def describe_outputs(codes: np.ndarray, point: QuantPoint, path: str) -> str:
    """What integer outputs mean, in a few lines of at most 80 columns."""
    check_point(point, "interpret")
    check_codes(codes, point, "interpret")
    name = printable(point.op or "the model")
    shape = "x".join(map(str, codes.shape)) or "one"
    lines = [
        f"{printable(path)}: {shape} codes ({codes.dtype})",
        f"read as the {point.role} of {name}: real = {law_of(point)}",
    ]
    if not codes.size:
        return "\n".join([*lines, "There are none."]) + "\n"
    low, high = np.inf, -np.inf
    total = 0.0
    limits = 0
    for piece in pieces(codes.shape):
        part = codes[piece]
        reals = interpret(part, point)
        low, high = min(low, float(reals.min())), max(high, float(reals.max()))
        total += float(reals.sum(dtype=np.float64))
        limits += int(np.count_nonzero((part == point.quant_min) | (part == point.quant_max)))
    lines.append(f"reals from {low:.6g} to {high:.6g}, mean {total / codes.size:.6g}")
    lines.append(
        f"{limits} of {codes.size} ({100 * limits / codes.size:.2f} %) at the limits, where they may be clipped"
    )
    if codes.ndim == 2 and codes.shape[1] > 1:
        lines.append("argmax of the first rows: " + ", ".join(str(int(row.argmax())) for row in codes[:10]))
    first = interpret(codes[:_ROWS] if codes.ndim > 1 else codes[:8], point) if codes.ndim else interpret(codes, point)
    shown = np.array2string(first, precision=6, threshold=48, edgeitems=3, max_line_width=78, suppress_small=True)
    return "\n".join([*lines, "the first:", shown]) + "\n"


def save_floats(path: str | os.PathLike[str], codes: np.ndarray, point: QuantPoint) -> None:
    """Write the reals as a .npy file, in pieces; it takes its place in one step."""
    check_point(point, "interpret")
    check_codes(codes, point, "interpret")

    def write(file: IO[bytes]) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)),
            "fortran_order": False,
            "shape": codes.shape,
        }
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces(codes.shape):
            file.write(np.ascontiguousarray(interpret(codes[piece], point)).tobytes())

    replace_file(path, write)
