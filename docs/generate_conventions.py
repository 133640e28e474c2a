"""Writes docs/conventions.md from the table of conventions and from what the library does: `make docs`."""

from __future__ import annotations

import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from qjax._conventions import TABLE, Row, ScaleRule
from qjax._granularity import Granularity, statistic_shape

PAGE = Path(__file__).with_name("conventions.md")
SCALE = np.float32(0.1)
POINT = 3
INTRO = """\
# Conventions

Every library agrees that `x ≈ (q - zero_point) · scale`. They disagree on how `q`, `scale` and the gradient are computed,
and two that disagree give other codes on ties, on infinities or by a rounding of the scale. In qjax whose arithmetic it is
is a field of the spec, `QuantSpec(qjax.int8, convention="torch_real")`, and the default is torch's fake-quant. Each row
gives the library's codes bit for bit, on ties, their neighbours, infinities and NaN, but for what "To be known" says.

Tests compare with the libraries themselves; AIMET and ModelOpt with their formulas, which were run against AIMET 2.42 and
ModelOpt 0.47 once. Codes of floats are the nearest number to `x · (1/s)`, but to `x / s` by the conventions that divide and
by torchao, and to `x · ((1/amax) · quant_max)` by modelopt.

This page is generated from the table in `qjax/_conventions.py` by `make docs`; a test compares.
"""
GRANULARITIES: dict[str, Granularity] = {
    "tensor": qjax.PerTensor(),
    "channel": qjax.PerChannel(0),
    "token": qjax.PerToken(),
    "group": qjax.PerGroup(-1, 1),
}


class Case(typing.NamedTuple):
    """One line of the tables: a convention, the granularities for which its row holds, and a spec of it."""

    convention: str
    where: str
    spec: qjax.QuantSpec


def cases() -> list[Case]:
    """Each different row of the table once."""
    found = []
    for convention in TABLE:
        signed = convention == "modelopt"
        by_row: dict[Row, tuple[list[str], qjax.QuantSpec]] = {}
        for name, granularity in GRANULARITIES.items():
            spec = qjax.QuantSpec(qjax.int8, symmetric=signed, granularity=granularity, convention=convention)
            by_row.setdefault(spec.row, ([], spec))[0].append(name)
        found += [Case(convention, ", ".join(names), spec) for names, spec in by_row.values()]
        if TABLE[convention].float_zero_point is not None:
            spec = qjax.QuantSpec(
                qjax.int8, granularity=qjax.PerChannel(0), convention=convention, float_zero_point=True
            )
            found.append(Case(convention, "float zero_point", spec))
    return found


def formula(row: Row) -> str:
    """The code as the row computes it."""
    scaled = {"reciprocal": "x · (1/s)", "division": "x / s", "amax": "x · (quant_max / amax)"}[str(row.scaling)]
    if row.zero_point == "after":
        inside = f"rint({scaled})" + (" + z" if row.scaling != "amax" else "")
        return f"clamp({inside})"
    total = "fma(x, 1/s, z)" if row.fused else f"{scaled} + z"
    return f"rint(clamp({total}))" if row.clamp == "before" else f"clamp(rint({total}))"


def code(x: float | np.floating, case: Case, scale: np.floating = SCALE, point: int = POINT) -> int:
    """The code of one number."""
    spec = case.spec
    shape = statistic_shape((1, 1), spec.granularity)
    zero_point = jnp.full(shape, 0 if spec.symmetric else point, jnp.float32 if spec.float_zero_point else jnp.int32)
    qparams = qjax.QParams(jnp.full(shape, scale, jnp.float32), zero_point)
    return int(qjax.quantize(jnp.full((1, 1), x, jnp.float32), qparams, spec).codes.reshape(()))


def passes(x: float, case: Case) -> bool:
    """Whether the gradient of x passes at s = 0.5, z = 0, codes -4 … 3."""
    spec = case.spec.replace(format=qjax.Int(3), granularity=qjax.PerTensor(), float_zero_point=False)
    qparams = qjax.QParams(jnp.float32(0.5), jnp.int32(0))
    return bool(jax.grad(lambda x: qjax.fake_quantize(x, qparams, spec))(jnp.float32(x)))


def telling_numbers() -> dict[str, np.float32]:
    """Three numbers in which the arithmetics differ at s = 0.1f and z = 3: the first of each kind, searched for."""
    inv = np.float32(1) / SCALE
    near = ((np.arange(0, 120) + 0.5) * np.float64(SCALE)).astype(np.float32)
    bits = near.view(np.uint32)
    near = np.concatenate([(bits + step).view(np.float32) for step in range(3)] + [(bits - 1).view(np.float32)])
    product, quotient = near * inv, near / SCALE
    by_division = np.rint(product) != np.rint(quotient)
    z = np.float32(POINT)
    separate = np.rint(product + z)
    fused = np.rint((near.astype(np.float64) * np.float64(inv) + POINT).astype(np.float32))
    return {"division": near[by_division][0], "fma": near[(separate != fused) & ~by_division][0]}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def arithmetic() -> str:
    """How the code, the scale and the mask are computed."""
    rows = []
    for name, where, spec in cases():
        row = spec.row
        narrow = {
            "never": "float32",
            "shared": "that of x and s",
            "quotient": "that of x and s; x / s alone",
            "own": "that of x",
            "enough": "that of x, if precise enough",
        }[row.per_op_rounding]
        rule = spec.replace(symmetric=not spec.float_zero_point, convention=spec.convention).effective_scale_rule
        rows.append([f"`{name}`", where, f"`{formula(row)}`", narrow, f"`{rule}`", f"`{row.mask}`"])
    return table(["convention", "granularity", "code", "rounds to", "symmetric scale", "mask"], rows)


def behaviour() -> str:
    """What each does on ties, infinities and at the edge of the range."""
    numbers = telling_numbers()
    half = np.float32(0.125)
    heads = [
        "convention",
        "granularity",
        "0.125, s = 0.25, z = 1: x/s + z = 1.5",
        f"{numbers['division']:.9g}, s = 0.1f, z = 3: x·(1/s) is a tie, x/s is not",
        f"{numbers['fma']:.9g}, s = 0.1f, z = 3: x·(1/s) + z, rounded once or twice",
        "+inf",
        "-inf",
        "NaN",
        "dx at 1.74, s = 0.5, codes -4 … 3",
        "dx at 1.76",
    ]
    rows = []
    for case in cases():
        codes = [code(half, case, np.float32(0.25), 1), code(numbers["division"], case), code(numbers["fma"], case)]
        codes += [code(x, case) for x in (np.inf, -np.inf, np.nan)]
        mask = [f"{int(passes(x, case))}" for x in (1.74, 1.76)]
        name = f"`{case.convention}`" + (" (z = 0)" if case.spec.symmetric else "")
        rows.append([name, case.where, *map(str, codes), *mask])
    return table(heads, rows)


def scale_rules() -> str:
    """One range, and the scale and zero_point that each rule takes for it."""
    low, high = jnp.float32(-1.99), jnp.float32(0.75)
    rows = []
    for rule in typing.get_args(ScaleRule):
        spec = qjax.QuantSpec(qjax.int8, symmetric=True, scale_rule=rule)
        qparams = qjax.choose_qparams(low, high, spec)
        rows.append([f"`{rule}`", f"{float(qparams.step):.9g}", f"{1 / float(qparams.step):.6g}"])
    return table(["scale_rule", "scale of int8 for [-1.99, 0.75]", "codes per unit"], rows)


def eps() -> str:
    """What an empty range leads to, and what eps applies to."""
    rows = []
    for name, where, spec in cases():
        if spec.float_zero_point:
            continue
        scales = []
        for symmetric in (True, False):
            if not symmetric and name == "modelopt":
                scales.append("-")
                continue
            zero = jnp.zeros(statistic_shape((1, 1), spec.granularity), jnp.float32)
            qparams = qjax.choose_qparams(zero, zero, spec.replace(symmetric=symmetric))
            scales.append(f"{float(qparams.scale.reshape(())):.6g} (z = {int(qparams.zero_point.reshape(()))})")
        rows.append([f"`{name}`", where, *scales, spec.row.eps_replaces])
    return table(["convention", "granularity", "symmetric", "affine", "eps replaces"], rows)


def page() -> str:
    """The whole page."""
    sources = [[f"`{name}`", f"{rows.default.source}", rows.note] for name, rows in TABLE.items()]
    parts = [
        INTRO,
        "## The arithmetic\n\n`s` is scale, `z` zero_point, `rint` rounds halves to even, `fma` rounds once. All in float32;"
        ' where "rounds to"\nnames another dtype, each operation rounds to it when the tensors have it.\n',
        arithmetic(),
        "## What each does\n\nCodes of int8. The first three numbers are ties, or next to one; the last two columns are the"
        " gradient of a number that\nlies beyond the largest code before it is rounded but not after (1.74 / 0.5 = 3.48), and"
        " of one that does after, too.\n",
        behaviour(),
        "## Scale rules\n\n`QuantSpec(..., scale_rule=...)`; None takes the convention's. `qjax.choose_qparams` has the"
        " formulas.\n",
        scale_rules(),
        "## An empty range\n\nThe int8 scale for `[0, 0]`, and whether eps replaces every smaller scale, only a scale of zero,"
        " or a smaller range.\n",
        eps(),
        "## Sources, and what is to be known\n",
        table(["convention", "source", "to be known"], sources),
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
