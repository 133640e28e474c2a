"""The table of a function's ops, as a person reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import overload

from qjax.transform._interpret import Interpreter
from qjax.transform._recipe import Recipe
from qjax.transform._trace import Trace, operand_role

_HEADER = ("op", "kind", "lhs", "rhs", "weight", "compute", "rule")


@dataclasses.dataclass(frozen=True)
class OpInfo:
    """One dot or convolution of a prepared function."""

    name: str  # what a rule has to match
    kind: str  # "dot" or "conv"
    lhs_shape: tuple[int, ...] | None  # None for an op that cannot be quantized
    rhs_shape: tuple[int, ...] | None
    out_shape: tuple[int, ...] | None
    weight: str | None  # which operand is a weight: "lhs", "rhs" or None
    path: tuple[str, ...] | None  # of the parameter that the weight is
    rule: str | None  # pattern of the rule that took it; None where no rule did
    quantizers: dict[str, str]  # role -> spec, or the quantizer that the value comes from
    compute: str  # "codes", "dequantized" or "float"
    epilogue: str  # what belongs to its output: "", "bias", "relu" or "bias, relu"
    why: str  # why it was left in float, where it cannot be quantized
    steps: tuple[int, ...] = ()  # lengths of the scans whose every step has quantizers of its own, outermost first


class OpTable(Sequence[OpInfo]):
    """The ops in program order; prints as a table."""

    def __init__(self, ops: Sequence[OpInfo]) -> None:
        self._ops = tuple(ops)

    @overload
    def __getitem__(self, index: int) -> OpInfo: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[OpInfo]: ...
    def __getitem__(self, index: int | slice) -> OpInfo | Sequence[OpInfo]:
        return self._ops[index]

    def __len__(self) -> int:
        return len(self._ops)

    def __iter__(self) -> Iterator[OpInfo]:
        return iter(self._ops)

    def __repr__(self) -> str:
        rows = [_HEADER] + [_row(op) for op in self._ops]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        for op in self._ops:
            if op.quantizers:
                lines.append(f"{op.name}: " + "; ".join(f"{role} {spec}" for role, spec in op.quantizers.items()))
            if op.steps:
                lines.append(f"{op.name}: quantizers for each of {' x '.join(map(str, op.steps))} steps of a scan")
            if op.why:
                lines.append(f"{op.name}: left in float: {op.why}")
        return "\n".join(lines)


def _row(op: OpInfo) -> tuple[str, ...]:
    def shape(dims: tuple[int, ...] | None) -> str:
        return "" if dims is None else "x".join(map(str, dims)) or "()"

    return (
        op.name,
        op.kind,
        shape(op.lhs_shape),
        shape(op.rhs_shape),
        op.weight or "-",
        op.compute,
        op.rule or "-",
    )


def op_table(traced: Trace, recipe: Recipe, interpreter: Interpreter) -> OpTable:
    """Put together what tracing, the recipe and an abstract evaluation know of each op."""
    rows: list[OpInfo] = []
    epilogues, steps = _epilogues(traced), traced.graph.steps()
    for op in traced.graph.ops():
        rule = recipe.rule_for(op.name)
        quantizers: dict[str, str] = {}
        for index in (0, 1):
            role = operand_role(op, index)
            origin = interpreter.inputs[op.name][index]
            own = interpreter.observed.get(f"{op.name}/{role}")
            if own is not None:
                quantizers[role] = str(own[0].spec)
            elif origin != "float":
                quantizers[role] = f"from {origin}"
        output = interpreter.observed.get(f"{op.name}/output")
        if output is not None:
            quantizers["output"] = str(output[0].spec)
        rows.append(
            OpInfo(
                name=op.name,
                kind=op.kind,
                lhs_shape=op.shapes[0],
                rhs_shape=op.shapes[1],
                out_shape=op.shapes[2],
                weight=None if op.weight is None else ("lhs", "rhs")[op.weight],
                path=op.path,
                rule=None if rule is None else rule.pattern,
                quantizers=quantizers,
                compute=interpreter.computed[op.name],
                epilogue=epilogues.get(op.name, ""),
                why="",
                steps=steps[op.name],
            )
        )
    for name, kind, why in traced.unquantized:
        rows.append(OpInfo(name, kind, None, None, None, None, None, None, {}, "float", "", why))
    return OpTable(rows)


def _epilogues(traced: Trace) -> dict[str, str]:
    found: dict[str, str] = {}
    for graph in traced.graph.all():
        for name, epilogue in graph.epilogues.items():
            words = ["bias"] * (epilogue.bias is not None) + ["relu"] * epilogue.relu
            found[name] = ", ".join(words)
    return found
