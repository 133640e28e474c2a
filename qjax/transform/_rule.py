"""Rules: which ops, by name and kind, and what becomes of their tensors."""

from __future__ import annotations

import dataclasses
import re
from typing import Literal, get_args

from qjax import observers
from qjax._granularity import is_named
from qjax._spec import QuantSpec
from qjax.transform._elementwise import ELEMENTWISE
from qjax.transform._quantizer import Quantizer

Role = QuantSpec | Quantizer | None
BatchNormChoice = Literal["fold", "fold_if_present"]
ROLES = ("weight", "input", "lhs", "rhs", "output")


class RecipeError(ValueError):
    """A recipe that does not fit the function (the message lists the ops that there are), or a text that is no recipe."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the ops whose name and kind match are quantized.

    Each role takes a `QuantSpec`, an observer or an estimator such as `qjax.estimators.lsq` (which bring their spec along), or
    None to leave that tensor in float. A granularity may follow the op instead of an index: `PerChannel("output")` has a
    scale for each output channel of a weight whatever its layout, `PerGroup("contracted", 32)` groups along the axis that is
    summed over.

    The weight of an embedding is its table, and it has no input. `PerChannel("output")` gives each of its rows a scale, as
    torch's quantized embeddings have it, and `PerGroup("contracted", 32)` cuts each row into groups; an index means what it
    says, so `PerChannel(-1)` gives each feature a scale. A rule without a kind takes embeddings, too.

    Of an elementwise op only the output can be quantized, and only by a rule that asks for its kind:

    | kind                                  | output                                                                        |
    |---------------------------------------|-------------------------------------------------------------------------------|
    | `"add"`, `"mul"`                      | of two activations, as in a residual or a gate; no bias, no constant factor   |
    | `"softmax"`, `"log_softmax"`          | as `jax.nn` has them                                                          |
    | `"norm"`                              | `x · rsqrt(…)` or `x / sqrt(…)`, with the scale and shift that follow it      |
    | `"tanh"`, `"logistic"`, `"gelu"`      | these functions                                                               |
    | `"silu"`, `"elu"`, `"leaky_relu"`, …  | functions of `jax.nn` that are calls of that name in the jaxpr                |

    A ReLU that alone follows belongs to it. What a softmax, a norm or a GELU consists of is no op of its own. They are
    named after the scope and the kind, such as `"Block_0/add"`, and listed by `prepared.ops` where a rule asks for them.

    Args:
      pattern: A regular expression that has to match the whole name of the op, such as `"Dense_2"` or `"Conv_.*"`.
      kind: The kind that the op has to be of, as `prepared.ops` prints it: `"dot"`, `"conv"`, `"ragged_dot"`, `"embedding"`, or
        a tuple of kinds; None takes every kind.
      weight: For the operand that comes from the parameters. A spec is observed by `observers.dynamic`: the range is that
        of the weight as it is.
      input: For the other operand, and for both operands of an op between two activations. A spec is observed by
        `observers.moving_average_min_max`. A value that another op's `output` has already quantized is taken as it is.
      lhs: For the left operand of an op between two activations, such as a query or attention weights; `"input"` does as
        `input` says.
      rhs: For the right operand of such an op, such as keys or values.
      output: For what the op gives out: its result with its bias added and, if that is all that happens to it, its ReLU
        applied, as torch's fused modules have it. A spec is observed by `observers.moving_average_min_max`.
      batch_norm: `"fold"`: the batch normalization behind the op goes into its weight and bias, and the folded weight is
        what is quantized, in training too (see `prepare`); an op that has none which can be folded is a `RecipeError`.
        `"fold_if_present"` leaves such an op as it is, and `prepared.ops` says why. None leaves all in float behind the op.

      tied: Whether ops that use the same parameter, such as an embedding and the output layer that shares its table, share
        one quantizer of it: one range, one set of qparams, and in the integer program one tensor of codes. The parameter is
        quantized as it is, before it is transposed or cast; of an op whose parameter no other op uses this changes nothing.
        The quantizer is named after the first of the ops.

    Raises:
      TypeError: A role is neither a spec nor an observer nor an estimator nor None, pattern or kind is no str, or tied is no
        bool.
      ValueError: The pattern is not a regular expression, an output's granularity follows an op, or batch_norm is another word.

    Examples:
      >>> import qjax
      >>> w8 = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=qjax.PerChannel("output"))
      >>> a8 = qjax.observers.min_max(qjax.QuantSpec(qjax.uint8))
      >>> rule = qjax.Rule("Dense_.*", weight=w8, input=a8)
      >>> rule.matches("Dense_0"), rule.matches("MyDense_0")
      (True, False)
      >>> weights_only_in_attention = qjax.Rule(".*", kind="dot", weight=w8, input=a8, lhs=None, rhs=None)
      >>> weights_only_in_attention.matches("Conv_0", "conv")
      False
    """

    pattern: str
    _: dataclasses.KW_ONLY
    kind: str | tuple[str, ...] | None = None
    weight: Role = None
    input: Role = None
    lhs: Role | Literal["input"] = "input"
    rhs: Role | Literal["input"] = "input"
    output: Role = None
    batch_norm: BatchNormChoice | None = None
    tied: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise TypeError(f"Rule: pattern must be a str, got {self.pattern!r} of type {type(self.pattern).__name__}.")
        try:
            re.compile(self.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"Rule: pattern {self.pattern!r} is not a regular expression: {error}.") from error
        if isinstance(self.kind, tuple | list) and self.kind and all(isinstance(kind, str) for kind in self.kind):
            object.__setattr__(self, "kind", self.kind[0] if len(self.kind) == 1 else tuple(self.kind))
        elif self.kind is not None and not isinstance(self.kind, str):
            raise TypeError(
                f"Rule({self.pattern!r}): kind must be a str such as 'dot', a tuple of such, or None for every kind, got "
                f"{self.kind!r} of type {type(self.kind).__name__}."
            )
        if self.kinds is not None and ELEMENTWISE.issuperset(self.kinds) and (self.weight, self.input) != (None, None):
            raise ValueError(
                f"{self.selects}: of elementwise ops only the output can be quantized. Drop weight and input, or give them to "
                "a rule for the ops that take this output."
            )
        for role in ROLES:
            value = getattr(self, role)
            if role in ("lhs", "rhs") and isinstance(value, str) and value == "input":
                continue
            if not isinstance(value, QuantSpec | Quantizer | None):
                raise TypeError(
                    f"Rule({self.pattern!r}): {role} must be a QuantSpec, an observer, an estimator or None, got {value!r} of "
                    f"type {type(value).__name__}."
                )
        if not isinstance(self.tied, bool):
            raise TypeError(f"Rule({self.pattern!r}): tied must be True or False, got {self.tied!r}.")
        if self.batch_norm not in (None, *get_args(BatchNormChoice)):
            raise ValueError(
                f"Rule({self.pattern!r}): batch_norm must be one of {', '.join(map(repr, get_args(BatchNormChoice)))} or None, "
                f"got {self.batch_norm!r}."
            )
        if self.output is not None and is_named(self.output_spec.granularity):
            raise ValueError(
                f"Rule({self.pattern!r}): output is quantized {self.output_spec.granularity}, which names an axis of an "
                "operand. Give the index of the axis, as in PerChannel(-1)."
            )

    @property
    def kinds(self) -> tuple[str, ...] | None:
        """The kinds that the rule asks for; None where it asks for none."""
        return (self.kind,) if isinstance(self.kind, str) else self.kind

    @property
    def output_spec(self) -> QuantSpec:
        """The spec of the output, which is not None."""
        assert self.output is not None
        return self.output if isinstance(self.output, QuantSpec) else self.output.spec

    @property
    def selects(self) -> str:
        """The rule by what it selects, as one writes it: `Rule('.*', kind='dot')`."""
        return f"Rule({self.pattern!r}" + ("" if self.kind is None else f", kind={self.kind!r}") + ")"

    def matches(self, name: str, kind: str | None = None) -> bool:
        """Whether the rule takes the op of this name and kind; without a kind, no rule that asks for one does."""
        asked = kind not in ELEMENTWISE if self.kinds is None else kind in self.kinds
        return asked and re.fullmatch(self.pattern, name) is not None

    def observer(self, role: str) -> Quantizer | None:
        """What quantizes a role: "weight", "input", "output", or "lhs" and "rhs" of an op between two activations."""
        value = self.input if role in ("lhs", "rhs") and getattr(self, role) == "input" else getattr(self, role)
        if not isinstance(value, QuantSpec):
            return value
        return observers.dynamic(value) if role == "weight" else observers.moving_average_min_max(value)

    @property
    def weight_observer(self) -> Quantizer | None:
        """The observer of the weight."""
        return self.observer("weight")

    @property
    def input_observer(self) -> Quantizer | None:
        """The observer of the input."""
        return self.observer("input")

    @property
    def output_observer(self) -> Quantizer | None:
        """The observer of the output."""
        return self.observer("output")
