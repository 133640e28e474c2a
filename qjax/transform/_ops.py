"""The table of a function's ops, as a person reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import overload

from qjax.transform._elementwise import ELEMENTWISE
from qjax.transform._interpret import Interpreter
from qjax.transform._recipe import Recipe, describe
from qjax.transform._table import Table, TableLike
from qjax.transform._trace import Trace, operand_role

_FROM = "from "


@dataclasses.dataclass(frozen=True)
class OpInfo:
    """One op of a prepared function."""

    name: str  # what a rule has to match
    kind: str  # "dot", "conv", "ragged_dot", "embedding", …
    lhs_shape: tuple[int, ...] | None  # None for an op that cannot be quantized
    rhs_shape: tuple[int, ...] | None  # of an embedding, that of the indices; None where there is one operand
    out_shape: tuple[int, ...] | None
    weight: str | None  # which operand is a weight: "lhs", "rhs" or None
    path: tuple[str, ...] | None  # of the parameter that the weight is
    rule: str | None  # pattern of the rule that took it; None where no rule did
    quantizers: dict[str, str]  # role -> spec, or the quantizer that the value comes from
    compute: str  # "codes", "dequantized" or "float"
    epilogue: str  # what belongs to its output: "", "bias", "batch_norm" (its bias included), "relu", "bias, relu", …
    why: str  # why it was left in float, where it cannot be quantized
    observers: dict[str, str] = dataclasses.field(default_factory=dict)  # role -> observer

    steps: tuple[int, ...] = ()  # lengths of the scans whose every step has quantizers of its own, outermost first
    batch_norm: str = ""  # "folded"; or, where the rule asks for it, why not

    @property
    def why_float(self) -> str:
        """Why it is computed in float, whether it has to be or the recipe says so; empty where it is not."""
        if self.why or self.compute != "float" or (self.kind in ELEMENTWISE and "output" in self.quantizers):
            return self.why
        if self.rule is None:
            return "no rule matches"
        roles = "input and weight" if self.weight else "lhs and rhs"
        roles = "weight" if self.kind == "embedding" else "output" if self.kind in ELEMENTWISE else roles
        return f"the rule {self.rule!r} leaves {roles} in float"


class OpTable(Sequence[OpInfo], TableLike):
    """The ops in program order; prints as a table of 80 columns, and as HTML in a notebook."""

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
        return str(self)

    def _table(self) -> Table:
        legend = _Legend()
        rows: list[tuple[str, ...]] = []
        for op in self._ops:
            operands = {legend.word(op, role): None for role in ("input", "lhs", "rhs") if _has(op, role)}
            weight, output = (legend.word(op, role) for role in ("weight", "output"))
            rows.append((op.name, op.kind, _operands(op), " · ".join(operands), weight, output, op.compute))
        if not rows:
            return Table(_HEADER, (), ("no ops",))
        return Table(
            _HEADER, tuple(rows), (*legend.notes(), *_steps(self._ops), *_norms(self._ops), *_reasons(self._ops))
        )


_HEADER = ("op", "kind", "operands", "input", "weight", "output", "compute")


class _Legend:
    """Short words for specs, which are too long for a column, and below the table what they stand for."""

    def __init__(self) -> None:
        self._words: dict[str, str] = {}  # spec and observer -> word

    def word(self, op: OpInfo, role: str) -> str:
        """What a cell says: the word of a spec, where the value comes from, or nothing."""
        spec = op.quantizers.get(role)
        if spec is None:
            return "float" if _has(op, role) else ""
        if spec.startswith(_FROM):
            return "← " + spec.removeprefix(_FROM).removesuffix("/output")
        meaning = spec + (f", {op.observers[role]}" if role in op.observers else "")
        if meaning not in self._words:
            format = spec.split()[0]
            same = sum(word.split("#")[0] == format for word in self._words.values())
            self._words[meaning] = f"{format}#{same + 1}" if same else format
        return self._words[meaning]

    def notes(self) -> list[str]:
        """One line for each word."""
        width = max(map(len, self._words.values()), default=0)
        lines = [f"{word.ljust(width)}  {meaning}" for meaning, word in self._words.items()]
        return ["", *lines] if lines else []


def _has(op: OpInfo, role: str) -> bool:
    """Whether the op has this role for a spec: those that cannot be quantized have none."""
    if op.lhs_shape is None:
        return False
    if op.kind in ELEMENTWISE:
        return role == "output"
    if op.kind == "embedding":
        return role in ("weight", "output")
    return role in (("weight", "input", "output") if op.weight else ("lhs", "rhs", "output"))


def _operands(op: OpInfo) -> str:
    given = [shape for shape in (op.lhs_shape, op.rhs_shape) if shape is not None]
    shapes = ["x".join(map(str, shape)) or "()" for shape in given]
    if op.weight is not None:
        shapes[("lhs", "rhs").index(op.weight)] += "(w)"
    return " · ".join(shapes)


def _steps(ops: Sequence[OpInfo]) -> list[str]:
    by_steps: dict[tuple[int, ...], list[str]] = {}
    for op in ops:
        if op.steps and op.quantizers:
            by_steps.setdefault(op.steps, []).append(op.name)
    lines = [f"  {', '.join(names)}: each of {' x '.join(map(str, steps))} steps" for steps, names in by_steps.items()]
    return ["", "quantizers of their own for each step of a scan", *lines] if lines else []


def _norms(ops: Sequence[OpInfo]) -> list[str]:
    folded = [op.name for op in ops if op.batch_norm == "folded"]
    whys: dict[str, list[str]] = {}
    for op in ops:
        if op.batch_norm not in ("", "folded"):
            whys.setdefault(op.batch_norm, []).append(op.name)
    lines = ["", "batch norm folded into the weight", f"  {', '.join(folded)}"] if folded else []
    lines += ["", "no batch norm folded"] if whys else []
    return lines + [f"  {', '.join(names)}: {why}" for why, names in whys.items()]


def _reasons(ops: Sequence[OpInfo]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for op in ops:
        if op.why_float:
            reasons.setdefault(op.why_float, []).append(op.name)
    return (["", "left in float"] if reasons else []) + [
        f"  {', '.join(names)}: {why}" for why, names in reasons.items()
    ]


def op_table(traced: Trace, recipe: Recipe, interpreter: Interpreter) -> OpTable:
    """Put together what tracing, the recipe and an abstract evaluation know of each op."""
    rows: list[OpInfo] = []
    epilogues, steps = _epilogues(traced), traced.graph.steps()
    for op in traced.graph.ops():
        rule = recipe.rule_for(op.name, op.kind)
        quantizers: dict[str, str] = {}
        observers: dict[str, str] = {}
        for index in op.operands:
            role = operand_role(op, index)
            origin = interpreter.inputs[op.name][index]
            own = None if rule is None else rule.observer(role)
            if own is not None and f"{op.name}/{role}" in interpreter.observed:
                quantizers[role] = str(own.spec)  # in the words of the rule, the same for every layout
                observers[role] = describe(own)
            elif origin != "float":
                quantizers[role] = f"from {origin}"
        output = None if rule is None else rule.output_observer
        if output is not None and f"{op.name}/output" in interpreter.observed:
            quantizers["output"] = str(output.spec)
            observers["output"] = describe(output)
        rows.append(
            OpInfo(
                name=op.name,
                kind=op.kind,
                lhs_shape=op.shapes[0],
                rhs_shape=None if op.is_elementwise and op.kind not in ("add", "mul") else op.shapes[1],
                out_shape=op.shapes[2],
                weight=None if op.weight is None else ("lhs", "rhs")[op.weight],
                path=op.path,
                rule=None if rule is None else rule.pattern,
                quantizers=quantizers,
                compute=interpreter.computed[op.name],
                epilogue=epilogues.get(op.name, ""),
                why="",
                observers=observers,
                steps=steps[op.name],
                batch_norm="folded" if "batch_norm" in epilogues.get(op.name, "") else traced.unfolded.get(op.name, ""),
            )
        )
    for name, kind, why in traced.unquantized:
        rows.append(OpInfo(name, kind, None, None, None, None, None, None, {}, "float", "", why))
    return OpTable(rows)


def _epilogues(traced: Trace) -> dict[str, str]:
    found: dict[str, str] = {}
    for graph in traced.graph.all():
        for name, epilogue in graph.epilogues.items():
            added = "batch_norm" if epilogue.batch_norm else "bias" if epilogue.bias is not None else ""
            words = [*filter(None, [added]), *["relu"] * epilogue.relu]
            found[name] = ", ".join(words)
    return found
