"""Recipes: rules in order, as a table, as JSON, and bound to the ops of one function."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from qjax._granularity import is_named, resolve
from qjax.transform import _recipe_json, _tied
from qjax.transform._elementwise import ELEMENTWISE
from qjax.transform._quantizer import Quantizer
from qjax.transform._rule import ROLES, RecipeError, Rule
from qjax.transform._search import KINDS
from qjax.transform._table import Table, TableLike
from qjax.transform._tied import Tied
from qjax.transform._trace import Op, Trace, operand_role


@dataclasses.dataclass(frozen=True)
class Recipe(TableLike):
    """Rules in order; the last one that matches an op decides all of its roles.

    Recipes are values: they compare equal when their rules do, hash, and are static under `jit`. `print(recipe)` shows a table
    of 80 columns, a notebook and `rich` one of their own. `to_json` and `from_json` carry one between programs. `recipe +
    [rule]` adds rules behind those there are, which is how one departs from a ready-made recipe of `qjax.recipes`.

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
      >>> print(recipe)
      rule     kind  role    spec                            observer
      ───────  ────  ──────  ──────────────────────────────  ────────
      .*       any   weight  int8 symmetric per_channel(-1)  dynamic
                     input   float
                     output  float
      Dense_2  any   all     float
      >>> qjax.Recipe.from_json(recipe.to_json()) == recipe
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

    def __add__(self, other: Recipe | Iterable[Rule]) -> Recipe:
        """The rules of both, those of other last, so that they decide."""
        if isinstance(other, Rule) or not isinstance(other, Iterable | Recipe):
            return NotImplemented
        return Recipe((*self.rules, *(other.rules if isinstance(other, Recipe) else other)))

    def rule_for(self, name: str, kind: str | None = None) -> Rule | None:
        """The rule that takes the op of this name and kind; without a kind, of the rules that ask for none."""
        return next((rule for rule in reversed(self.rules) if rule.matches(name, kind)), None)

    @property
    def elementwise(self) -> frozenset[str]:
        """The kinds of elementwise ops that rules ask for."""
        return ELEMENTWISE.intersection(kind for rule in self.rules for kind in rule.kinds or ())

    def to_json(self) -> str:
        """Return the recipe as JSON text that `from_json` reads back to an equal one.

        Formats go by their names (`"int8"`, `"nf4"`) or, where they have none, by their fields; an observer goes by the name
        of its function in `qjax.observers` and all of its fields. A field of a spec that has its default is left out.

        Raises:
          TypeError: An observer, or a value of one, that is not qjax's own.
        """
        return _recipe_json.write(self.rules)

    @staticmethod
    def from_json(text: str) -> Recipe:
        """Read a recipe from the text that `to_json` made, or that was written by hand.

        The text may come from anyone: it is data, of bounded size, and whatever is wrong with it is a `RecipeError`.

        Raises:
          TypeError: text is not a str.
          RecipeError: The text is no recipe; says what came, where, what was expected and the likely mend.

        Examples:
          >>> import qjax
          >>> qjax.Recipe.from_json('{"schema": "qjax.recipe", "version": 1, "rules": [{"pattern": ".*", "wieght": null}]}')
          Traceback (most recent call last):
          qjax.transform._rule.RecipeError: Recipe.from_json: rules[0]: unknown field 'wieght'; the fields are pattern, kind,
          weight, input, lhs, rhs, output, batch_norm, tied. Did you mean 'weight'?
        """
        return Recipe(_recipe_json.read(text))

    def check(self, ops: Sequence[tuple[str, str]], unquantized: Sequence[tuple[str, str, str]]) -> None:
        """Raise `RecipeError` when a rule matches none of the ops, (name, kind), that can be quantized."""
        for rule in self.rules:
            if any(rule.matches(name, kind) for name, kind in ops):
                continue
            kinds = " or ".join(map(repr, rule.kinds or ()))
            asked = "" if rule.kind is None else f", and the op has to be of kind {kinds}"
            lines = [f"  {name}" if rule.kind is None else f"  {name} ({kind})" for name, kind in ops] or ["  (none)"]
            if rule.kinds is not None and not any(kind in rule.kinds for _, kind in ops):
                lines.append(
                    f"The kinds are {', '.join(KINDS)}; and, of outputs alone, {', '.join(sorted(ELEMENTWISE))}."
                )
            if unquantized:
                lines += ["These are left in float:", *(f"  {name}: {why}" for name, _, why in unquantized)]
            raise RecipeError(
                f"{rule.selects} matches no op. A pattern has to match the whole name{asked}. The ops are:\n"
                + "\n".join(lines)
            )

    def bind(self, traced: Trace) -> BoundRecipe:
        """Return the rule of each op of a function; `check` says whether every rule has one."""
        found = {op.name: self.rule_for(op.name, op.kind) for op in traced.graph.ops()}
        bound = BoundRecipe({name: rule for name, rule in found.items() if rule is not None})
        return dataclasses.replace(bound, tied=_tied.find(traced.graph, bound.rules, bound.observer))

    def _table(self) -> Table:
        rows: list[tuple[str, ...]] = []
        for rule in self.rules:
            start = (rule.pattern, ", ".join(rule.kinds or ("any",)))
            same = [role for role in ("lhs", "rhs") if getattr(rule, role) == "input"]
            roles: Sequence[str] = [role for role in ROLES if role not in same]
            if all(rule.observer(role) is None for role in ROLES):
                rows.append((*start, "all", "float", ""))
                roles, start = (), ("", "")
            for role in roles:
                observer = rule.observer(role)
                spec, name = ("float", "") if observer is None else (str(observer.spec), describe(observer))
                rows.append((*start, role, spec, name))
                start = ("", "")
            if rule.batch_norm is not None:
                rows.append(("", "", "batch_norm", rule.batch_norm, ""))
            if rule.tied:
                rows.append(("", "", "weight", "tied", ""))
        return Table(("rule", "kind", "role", "spec", "observer"), tuple(rows), () if rows else ("no rules",))


def describe(observer: Quantizer) -> str:
    """An observer or estimator by its public name, with the fields that are not their defaults."""
    fields = [field for field in dataclasses.fields(observer) if field.name != "spec"]
    set_fields = [f for f in fields if getattr(observer, f.name) != f.default]
    arguments = ", ".join(f"{f.name}={getattr(observer, f.name)!r}" for f in set_fields)
    name = _recipe_json.observer_name(type(observer)) or type(observer).__name__
    return f"{name}({arguments})" if arguments else name


@dataclasses.dataclass(frozen=True)
class BoundRecipe:
    """A recipe that has met the ops of one function: the rule of each."""

    rules: Mapping[str, Rule]
    tied: Mapping[int, Tied] = dataclasses.field(default_factory=dict)  # by value of the graph

    @property
    def owners(self) -> dict[str, str]:
        """The quantizer of the weight of each tied op."""
        return {name: tied.key for tied in self.tied.values() for name in tied.ops}

    def rule_for(self, name: str) -> Rule | None:
        """The rule that takes the op of this name."""
        return self.rules.get(name)

    def observer(self, op: Op, index: int) -> Quantizer | None:
        """The observer of an operand, with the axes that its spec names after the op in place."""
        rule = self.rules.get(op.name)
        role = operand_role(op, index)
        observer = None if rule is None else rule.observer(role)
        if observer is None or not is_named(observer.spec.granularity):
            return observer
        caller = f"prepare ({op.name}/{role})"
        output, contracted = op.named_axes(index)
        granularity = resolve(observer.spec.granularity, output, contracted, caller)
        return dataclasses.replace(observer, spec=observer.spec.replace(granularity=granularity))
