"""Recipes as JSON text and back. The text may come from anyone, so it is read as data, with limits, and every error says where.

    {"schema": "qjax.recipe", "version": 1, "rules": [{"pattern": "Dense_.*", "weight": {"spec": …}, "input": …}, …]}

A role is null, or an object with a spec and, unless the role's own is wanted, an observer or an estimator; `"lhs"` and
`"rhs"` may be `"input"`. A format, a granularity, an observer and an estimator are each a name, or an object of one field: a
name and its arguments.

    "int8"    {"float": {"exponent": 4, "mantissa": 3, "special": "fn"}}    {"per_channel": {"axis": "output"}}
    "min_max"    {"moving_average_min_max": {"averaging_constant": 0.01}}

`kind` is a word or a list of words. `version` grows when a text of the old form would mean something else; a field that is new
and optional does not make it grow.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import json
import math
import reprlib
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from qjax import _formats, estimators, observers
from qjax._formats import Codebook, Float, Format, Int
from qjax._granularity import PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from qjax._spec import QuantSpec
from qjax.estimators import Estimator
from qjax.observers import Observer
from qjax.transform._quantizer import Quantizer
from qjax.transform._rule import ROLES, RecipeError, Role, Rule

SCHEMA = "qjax.recipe"
VERSION = 1
MAX_TEXT = 2**24  # characters; a codebook of 65,536 levels takes two million
_MAX_PATTERN = 10_000
_MAX_INT = 2**63
_MAX_MESSAGE = 1000

_Kinds = Mapping[str, type[Any]]
_GRANULARITIES: _Kinds = {
    "per_tensor": PerTensor,
    "per_channel": PerChannel,
    "per_group": PerGroup,
    "per_block": PerBlock,
    "per_token": PerToken,
}
_FORMATS: _Kinds = {"int": Int, "float": Float, "codebook": Codebook}
_PRESETS: Mapping[str, Format] = {k: v for k, v in vars(_formats).items() if isinstance(v, Int | Float | Codebook)}
#: Fields of a spec that are written also where they have their default.
_ALWAYS = ("format", "symmetric", "granularity", "convention")


@functools.cache
def _observers() -> _Kinds:
    return _made_by(observers, Observer)


@functools.cache
def _estimators() -> _Kinds:
    return _made_by(estimators, Estimator)


def _made_by(room: Any, base: type[Any]) -> _Kinds:
    """Each kind by the public function that makes it: the one whose annotation says that it returns it."""
    found: dict[str, type[Any]] = {}
    for name in room.__all__:
        member = getattr(room, name)
        made = typing.get_type_hints(member).get("return") if inspect.isfunction(member) else None
        if isinstance(made, type) and issubclass(made, base):
            found[name] = made
    return found


def observer_name(kind: type[Quantizer]) -> str | None:
    """The public function that makes an observer or an estimator of this type, if there is one."""
    return next((name for name, made in {**_observers(), **_estimators()}.items() if made is kind), None)


# -- write -----------------------------------------------------------------------------------------------------------


def write(rules: Iterable[Rule]) -> str:
    """Return the text."""
    document = {"schema": SCHEMA, "version": VERSION, "rules": [_write_rule(rule) for rule in rules]}
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _write_rule(rule: Rule) -> dict[str, Any]:
    written: dict[str, Any] = {"pattern": rule.pattern}
    if rule.kind is not None:
        written["kind"] = rule.kind if isinstance(rule.kind, str) else list(rule.kind)
    for role in ROLES:
        value = getattr(rule, role)
        if isinstance(value, str):  # lhs and rhs as input says
            continue
        written[role] = None if value is None else _write_role(value, f"{rule.selects}, {role}")
    if rule.batch_norm is not None:
        written["batch_norm"] = rule.batch_norm
    if rule.tied:
        written["tied"] = True
    return written


def _write_role(value: QuantSpec | Quantizer, where: str) -> dict[str, Any]:
    if isinstance(value, QuantSpec):
        return {"spec": write_spec(value)}
    name = observer_name(type(value))
    what, known = ("observer", _observers()) if isinstance(value, Observer) else ("estimator", _estimators())
    if name is None:
        raise TypeError(
            f"Recipe.to_json: {where}: a {type(value).__name__} is made by no function of qjax.{what}s, so it could not be "
            f"read back. Those that can are {', '.join(known)}."
        )
    fields = {f.name: _plain(getattr(value, f.name), where) for f in dataclasses.fields(value) if f.name != "spec"}
    return {what: {name: fields} if fields else name, "spec": write_spec(value.spec)}


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, tuple):
        return [_plain(item, where) for item in value]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise TypeError(f"Recipe.to_json: {where}: JSON has no {value!r} of type {type(value).__name__}.")


def write_spec(spec: QuantSpec) -> dict[str, Any]:
    written = {"format": _write_format(spec.format)}
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if field.name == "granularity":
            written["granularity"] = _write_named(value, _GRANULARITIES)
        elif field.name in _ALWAYS[1:] or (field.name != "format" and value != field.default):
            written[field.name] = value
    return written


def _write_format(format: Format) -> Any:
    preset = next((name for name, known in _PRESETS.items() if known == format), None)
    return preset or _write_named(format, _FORMATS)


def _write_named(value: Any, kinds: _Kinds) -> Any:
    name = next(name for name, kind in kinds.items() if kind is type(value))
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    set_fields = {
        f.name: _plain(fields[f.name], name) for f in dataclasses.fields(value) if fields[f.name] != f.default
    }
    return {name: set_fields} if set_fields else name


# -- read ------------------------------------------------------------------------------------------------------------


def read(text: str) -> list[Rule]:
    """Return the rules, or raise `RecipeError`."""
    if not isinstance(text, str):
        mend = (
            "Path.read_text() gives one"
            if isinstance(text, bytes)
            else "json.dumps makes one of Python's lists and dicts"
        )
        raise TypeError(f"Recipe.from_json: text must be a str, got {type(text).__name__}; {mend}.")
    if len(text) > MAX_TEXT:
        _fail("the text", f"has {len(text)} characters, and {MAX_TEXT} is the limit. Is it a recipe?")
    try:
        document = json.loads(text, object_pairs_hook=_without_twins, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        _fail("the text", f"is no JSON: {error.msg} at line {error.lineno}, column {error.colno}.")
    except (ValueError, RecursionError) as error:
        reason = "it nests too deeply" if isinstance(error, RecursionError) else str(error)
        _fail("the text", f"is no JSON that a recipe would be: {reason}.")
    top = _object(document, "the text", required=("schema", "version", "rules"))
    if top["schema"] != SCHEMA:
        _fail("schema", f"expected {SCHEMA!r}, got {_short(top['schema'])}. Is it the text of another program?")
    if top["version"] != VERSION or isinstance(top["version"], bool):
        newer = isinstance(top["version"], int) and top["version"] > VERSION
        mend = "It was written by a newer qjax; upgrade to read it." if newer else "Was it written by hand? Write 1."
        _fail("version", f"this qjax reads version {VERSION}, got {_short(top['version'])}. {mend}")
    if not isinstance(top["rules"], list):
        _fail("rules", f"expected a list of rules, got {_short(top['rules'])}.")
    return [_read_rule(value, f"rules[{i}]") for i, value in enumerate(top["rules"])]


def _without_twins(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for name, value in pairs:
        if name in seen:
            raise ValueError(f"an object has the field {_short(name)} twice")
        seen[name] = value
    return seen


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is no JSON number")


def _fail(path: str, message: str) -> NoReturn:
    text = f"Recipe.from_json: {path}: {message}"
    raise RecipeError(text if len(text) <= _MAX_MESSAGE else text[: _MAX_MESSAGE - 1] + "…") from None


def _short(value: Any) -> str:
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = shortener.maxlong = 60
    shortener.maxlevel, shortener.maxdict, shortener.maxlist = 2, 3, 3
    return shortener.repr(value)


def _meant(name: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name[:100], list(known), n=1) if isinstance(name, str) else []
    return f" Did you mean {close[0]!r}?" if close else ""


def _object(value: Any, path: str, *, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    fields = (*required, *optional)
    if not isinstance(value, dict):
        _fail(path, f"expected an object with the fields {', '.join(fields)}, got {_short(value)}.")
    for name in value:
        if name not in fields:
            known = f"the fields are {', '.join(fields)}" if fields else "it takes none"
            _fail(path, f"unknown field {_short(name)}; {known}.{_meant(name, fields)}")
    for name in required:
        if name not in value:
            _fail(path, f"the field {name!r} is missing. Add it; the fields are {', '.join(fields)}.")
    return value


def _read_rule(value: Any, path: str) -> Rule:
    fields = dict(_object(value, path, required=("pattern",), optional=("kind", *ROLES, "batch_norm", "tied")))
    if isinstance(fields["pattern"], str) and len(fields["pattern"]) > _MAX_PATTERN:
        _fail(f"{path}.pattern", f"has {len(fields['pattern'])} characters, and {_MAX_PATTERN} is the limit.")
    for role in ROLES:
        if role in fields and not (fields[role] == "input" and role in ("lhs", "rhs")):
            fields[role] = _read_role(fields[role], f"{path}.{role}")
    return _make(path, Rule, fields)


def _read_role(value: Any, path: str) -> Role:
    if value is None:
        return None
    fields = _object(value, path, required=("spec",), optional=("observer", "estimator"))
    spec = read_spec(fields["spec"], f"{path}.spec")
    given = [what for what in ("observer", "estimator") if what in fields]
    if not given:
        return spec
    if len(given) == 2:
        _fail(
            path,
            "has an observer and an estimator, of which a role takes one. An estimator observes, too: drop the observer.",
        )
    kinds = _observers() if given == ["observer"] else _estimators()
    kind, arguments, path = _named(fields[given[0]], f"{path}.{given[0]}", f"an {given[0]}", kinds, leave=("spec",))
    return _make(path, kind, arguments | {"spec": spec})


def read_spec(value: Any, path: str) -> QuantSpec:
    optional = [field.name for field in dataclasses.fields(QuantSpec) if field.name != "format"]
    fields = dict(_object(value, path, required=("format",), optional=optional))
    fields["format"] = _read_format(fields["format"], f"{path}.format")
    if "granularity" in fields:
        kind, arguments, where = _named(fields["granularity"], f"{path}.granularity", "a granularity", _GRANULARITIES)
        fields["granularity"] = _make(where, kind, arguments)
    return _make(path, QuantSpec, {name: _value(item, f"{path}.{name}") for name, item in fields.items()})


def _read_format(value: Any, path: str) -> Format:
    if isinstance(value, str) and value in _PRESETS:
        return _PRESETS[value]
    kind, arguments, path = _named(value, path, "a format", _FORMATS, presets=_PRESETS)
    if kind is Codebook:
        levels = arguments.get("levels")
        if not (
            isinstance(levels, tuple) and all(isinstance(x, int | float) and not isinstance(x, bool) for x in levels)
        ):
            _fail(f"{path}.levels", f"expected a list of numbers, got {_short(levels)}.")
        if not isinstance(arguments.get("name", ""), str):
            _fail(f"{path}.name", f"expected a str, got {_short(arguments['name'])}.")
    return _make(path, kind, arguments)


def _named(
    value: Any, path: str, what: str, kinds: _Kinds, *, presets: Iterable[str] = (), leave: Sequence[str] = ()
) -> tuple[type[Any], dict[str, Any], str]:
    """A name, or an object of one field that is a name, with arguments; the type, the arguments, and where they are."""
    names = (*presets, *kinds)
    arguments: Any = {}
    name = value
    if isinstance(value, dict) and len(value) == 1:
        ((name, arguments),) = value.items()
    if not isinstance(name, str) or name not in names:
        _fail(path, f"expected {what}, which is one of {', '.join(names)}, got {_short(value)}.{_meant(name, names)}")
    if name not in kinds:
        _fail(path, f"{name!r} takes no arguments. Write {name!r} alone, or {what} of another name with them.")
    path = path if name == value else f"{path}.{name}"
    fields = [field for field in dataclasses.fields(kinds[name]) if field.init and field.name not in leave]
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    optional = [field.name for field in fields if field.name not in required]
    arguments = _object(arguments, path, required=required, optional=optional)
    return kinds[name], {key: _value(item, f"{path}.{key}") for key, item in arguments.items()}, path


def _value(value: Any, path: str) -> Any:
    """A number, a word or a list of such, which becomes a tuple; what was read already is left as it is."""
    if isinstance(value, list):
        if any(isinstance(item, list | dict) for item in value):
            _fail(path, f"expected a number, a word or a list of such, got {_short(value)}.")
        return tuple(_value(item, f"{path}[{i}]") for i, item in enumerate(value))
    if isinstance(value, dict):
        _fail(path, f"expected a number, a word or a list of such, got {_short(value)}.")
    if (isinstance(value, float) and not math.isfinite(value)) or (isinstance(value, int) and abs(value) >= _MAX_INT):
        _fail(path, f"the number {_short(value)} is too large.")
    return value


def _make(path: str, kind: Callable[..., Any], fields: Mapping[str, Any]) -> Any:
    """Call what validates its own arguments, and say where they came from."""
    try:
        return kind(**fields)
    except RecipeError:
        raise
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
        _fail(path, str(error))
