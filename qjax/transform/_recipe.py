"""What to do: rules that match op names, and the recipe that holds them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

from qjax import observers
from qjax._spec import QuantSpec
from qjax.observers import Observer

Role = QuantSpec | Observer | None


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the ops whose name matches are quantized.

    Each role takes a `QuantSpec`, an observer (which brings its spec along), or None to leave that tensor in float.

    Args:
      pattern: A regular expression that has to match the whole name of the op, such as `"Dense_2"` or `"Conv_.*"`.
      weight: For the operand that comes from the parameters. A spec is observed by `observers.dynamic`: the range is that
        of the weight as it is.
      input: For the other operand, and for both operands of an op between two activations. A spec is observed by
        `observers.moving_average_min_max`. A value that another op's `output` has already quantized is taken as it is.
      output: For what the op gives out: its result with its bias added and, if that is all that happens to it, its ReLU
        applied, as torch's fused modules have it. A spec is observed by `observers.moving_average_min_max`.

    Raises:
      TypeError: A role is neither a spec nor an observer nor None.
      ValueError: The pattern is not a regular expression.

    Examples:
      >>> import qjax
      >>> w8 = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=qjax.PerChannel(-1))
      >>> a8 = qjax.observers.min_max(qjax.QuantSpec(qjax.uint8))
      >>> rule = qjax.Rule("Dense_.*", weight=w8, input=a8)
      >>> rule.matches("Dense_0"), rule.matches("MyDense_0")
      (True, False)
    """

    pattern: str
    _: dataclasses.KW_ONLY
    weight: Role = None
    input: Role = None
    output: Role = None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise TypeError(f"Rule: pattern must be a str, got {self.pattern!r} of type {type(self.pattern).__name__}.")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"Rule: pattern {self.pattern!r} is not a regular expression: {error}.") from error
        for role in ("weight", "input", "output"):
            value = getattr(self, role)
            if not isinstance(value, QuantSpec | Observer | None):
                raise TypeError(
                    f"Rule({self.pattern!r}): {role} must be a QuantSpec, an observer or None, got {value!r} of type "
                    f"{type(value).__name__}."
                )

    def matches(self, name: str) -> bool:
        """Whether the rule takes the op of this name."""
        return re.fullmatch(self.pattern, name) is not None

    def observer(self, role: str) -> Observer | None:
        """The observer of a role: "weight", "output", or "input", which "lhs" and "rhs" share."""
        if role == "weight":
            return self.weight_observer
        return self.output_observer if role == "output" else self.input_observer

    @property
    def weight_observer(self) -> Observer | None:
        """The observer of the weight."""
        return observers.dynamic(self.weight) if isinstance(self.weight, QuantSpec) else self.weight

    @property
    def input_observer(self) -> Observer | None:
        """The observer of the input."""
        return observers.moving_average_min_max(self.input) if isinstance(self.input, QuantSpec) else self.input

    @property
    def output_observer(self) -> Observer | None:
        """The observer of the output."""
        return observers.moving_average_min_max(self.output) if isinstance(self.output, QuantSpec) else self.output


class RecipeError(ValueError):
    """A recipe that does not fit the function; the message lists the ops that there are."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Rules in order; the last one that matches an op decides all of its roles.

    Args:
      rules: The rules. Each must match at least one op of the function that is prepared.

    Raises:
      TypeError: Something in rules is not a `Rule`.

    Examples:
      >>> import qjax
      >>> w8 = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=qjax.PerChannel(-1))
      >>> recipe = qjax.Recipe([qjax.Rule(".*", weight=w8), qjax.Rule("Dense_2", weight=None)])
      >>> recipe.rule_for("Dense_2").weight is None
      True
    """

    rules: tuple[Rule, ...]

    def __init__(self, rules: Iterable[Rule]) -> None:
        if isinstance(rules, Rule) or not isinstance(rules, Iterable):
            raise TypeError(f"Recipe: expected a list of Rule objects, got {rules!r}. Write qjax.Recipe([rule, ...]).")
        object.__setattr__(self, "rules", tuple(rules))
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise TypeError(f"Recipe: expected Rule objects, got {rule!r} of type {type(rule).__name__}.")

    def rule_for(self, name: str) -> Rule | None:
        """The rule that takes the op of this name."""
        return next((rule for rule in reversed(self.rules) if rule.matches(name)), None)

    def check(self, names: Sequence[str], unquantized: Sequence[tuple[str, str, str]]) -> None:
        """Raise `RecipeError` when a rule matches none of the ops that can be quantized."""
        for rule in self.rules:
            if any(rule.matches(name) for name in names):
                continue
            lines = [f"  {name}" for name in names] or ["  (none)"]
            if unquantized:
                lines += ["These are left in float:", *(f"  {name}: {why}" for name, _, why in unquantized)]
            raise RecipeError(
                f"Rule({rule.pattern!r}) matches no op. A pattern has to match the whole name. The ops are:\n"
                + "\n".join(lines)
            )
