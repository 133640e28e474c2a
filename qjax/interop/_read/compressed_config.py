"""The quantization_config of compressed-tensors: which modules are quantized, and how.

Source: compressed-tensors, `quantization/quant_config.py`, `quant_scheme.py`, `quant_args.py`, `utils/match.py`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from qjax.containers import FormatError
from qjax.containers._errors import quoted
from qjax.interop._read.match import Budget, Name, Pattern

METHOD = "compressed-tensors"
_STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
_MOST_STEPS = 10**7  # of matching patterns with names, and schemes with tensors: some seconds
_STEPS_TO_FIT = 20  # what finding out whether a scheme fits takes, in these


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    """How one tensor is quantized: `QuantizationArgs`."""

    bits: int
    kind: Literal["int", "float"]
    symmetric: bool
    strategy: str
    group_size: int | None
    block: tuple[int, int] | None
    dynamic: bool | Literal["local"]
    exponents: bool  # whether scales are powers of two, as in the MX formats


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """What the modules of some targets have in common: `QuantizationScheme`."""

    name: str  # of the group in the config
    targets: tuple[str, ...]
    format: str
    weights: Args | None
    input: Args | None
    output: Args | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """`QuantizationConfig`."""

    place: str  # where it stands
    version: tuple[int, int] | None  # of compressed-tensors, as far as it matters
    schemes: tuple[Scheme, ...]
    ignore: tuple[str, ...]
    kv_cache: Args | None


def find_config(metadata: Mapping[str, Any]) -> Config | None:
    """The config in what a container says besides its tensors; None where there is none of compressed-tensors.

    Raises:
      FormatError: There is one, and it is not as compressed-tensors writes it.
    """
    config = metadata.get("config")
    if isinstance(config, dict):
        text = config.get("text_config")
        for place, holder in (("config.json", config), ("config.json, text_config", text)):
            for key in ("quantization_config", "compression_config"):
                data = holder.get(key) if isinstance(holder, dict) else None
                if isinstance(data, dict):
                    return _read(data, f"{place}, {key}")
    texts = metadata.get("safetensors")
    text = texts.get("quantization_config") if isinstance(texts, Mapping) else None
    if isinstance(text, str):
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if isinstance(data, dict):
            return _read(data, "__metadata__, quantization_config")
    return None


def _read(data: dict[str, Any], place: str) -> Config | None:
    method = data.get("quant_method")
    if method is None and isinstance(data.get("quantization_config"), dict):  # as older releases nested it
        data, place = data["quantization_config"], f"{place}.quantization_config"
        method = data.get("quant_method", METHOD)
    groups = data.get("config_groups")
    if method != METHOD and not (method is None and isinstance(groups, dict)):
        return None
    groups = {} if groups is None else _typed(groups, dict, f"{place}.config_groups")
    overall = _typed(data.get("format") or "", str, f"{place}.format")
    return Config(
        place=place,
        version=_version(data.get("version")),
        schemes=tuple(_scheme(name, each, overall, f"{place}.config_groups.{name}") for name, each in groups.items()),
        ignore=_names(data.get("ignore") or [], f"{place}.ignore"),
        kv_cache=_args(data.get("kv_cache_scheme"), f"{place}.kv_cache_scheme"),
    )


def _scheme(name: str, data: Any, overall: str, place: str) -> Scheme:
    if isinstance(data, list):
        raise FormatError(
            f"the preset {quoted(name, 40)}, which names settings that are not in the file",
            expected="the settings",
            mend="Save the model with compressed-tensors, which writes them out.",
            place=place,
        )
    data = _typed(data, dict, place)
    return Scheme(
        name=name,
        targets=_names(data.get("targets"), f"{place}.targets"),
        format=_typed(data.get("format") or overall, str, f"{place}.format"),
        weights=_args(data.get("weights"), f"{place}.weights"),
        input=_args(data.get("input_activations"), f"{place}.input_activations"),
        output=_args(data.get("output_activations"), f"{place}.output_activations"),
    )


def _args(data: Any, place: str) -> Args | None:
    if data is None:
        return None
    data = _typed(data, dict, place)
    bits = _typed(data.get("num_bits", 8), int, f"{place}.num_bits")
    kind = _typed(data.get("type", "int"), str, f"{place}.type").lower()
    if not 1 <= bits <= 64 or kind not in ("int", "float"):
        raise _wrong(f"{bits} bits of type {quoted(kind, 40)}", "1 to 64 bits of type int or float", place)
    size = data.get("group_size")
    if size is not None and (type(size) is not int or not (size > 0 or size == -1)):
        raise _wrong(f"a group_size of {quoted(str(size), 40)}", "a positive int, -1 or null", f"{place}.group_size")
    strategy = data.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = _typed(strategy, str, f"{place}.strategy").lower()
    block = _block(data.get("block_structure"), f"{place}.block_structure")
    if strategy not in _STRATEGIES:
        raise _wrong(f"the strategy {quoted(strategy, 40)}", f"one of {', '.join(_STRATEGIES)}", place)
    if strategy in ("group", "tensor_group") and (size is None or size < 1):
        raise _wrong(f"the strategy {strategy} without a group_size", "a positive group_size", place)
    if strategy == "block" and block is None:
        raise _wrong("the strategy block without a block_structure", "a block_structure such as [128, 128]", place)
    dynamic = data.get("dynamic", False)
    if dynamic != "local" and type(dynamic) is not bool:
        raise _wrong(f"dynamic: {quoted(str(dynamic), 40)}", "true, false or 'local'", place)
    return Args(
        bits=bits,
        kind=kind,  # type: ignore[arg-type]  # one of the two, as checked above
        symmetric=_typed(data.get("symmetric", True), bool, f"{place}.symmetric"),
        strategy=strategy,
        group_size=size if size is not None and size > 0 else None,
        block=block,
        dynamic=dynamic,
        exponents=kind == "float" and size == 32 and data.get("scale_dtype") in ("torch.uint8", "uint8"),
    )


def _block(data: Any, place: str) -> tuple[int, int] | None:
    if data is None:
        return None
    if isinstance(data, str) and re.fullmatch(r"[0-9]{1,9}x[0-9]{1,9}", data):  # as older releases wrote it
        data = [int(part) for part in data.split("x")]
    if not isinstance(data, list) or len(data) != 2 or not all(type(n) is int and 0 < n < 2**31 for n in data):
        raise _wrong(quoted(str(data), 40), "two positive ints", place)
    return data[0], data[1]


def _names(data: Any, place: str) -> tuple[str, ...]:
    if not isinstance(data, list) or not all(isinstance(each, str) for each in data):
        raise _wrong("something else", "a list of names and patterns", place)
    return tuple(data)


def _version(data: Any) -> tuple[int, int] | None:
    found = re.match(r"([0-9]{1,6})\.([0-9]{1,6})", data) if isinstance(data, str) else None
    return None if found is None else (int(found[1]), int(found[2]))


def _typed(value: Any, kind: type, place: str) -> Any:
    if type(value) is not kind:
        raise _wrong(f"a {type(value).__name__}", f"a {kind.__name__}", place)
    return value


def _wrong(found: str, expected: str, place: str) -> FormatError:
    mend = "The config was edited, or is of a newer release of compressed-tensors."
    return FormatError(found, expected=expected, mend=mend, place=place[:300])


class Targets:
    """Which scheme a module has, as compressed-tensors decides it.

    A module whose name a target says goes before one whose name a pattern matches, and that before one whose class a target
    says; of equals, the target that comes first in the alphabet decides. A file does not say of what class a module is, so of
    several classes the first is taken whose scheme fits the module's tensors.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._budget = Budget(_MOST_STEPS)
        self._ignored = {text for text in config.ignore if not _is_pattern(text)}
        self._ignoring = [_pattern(text) for text in dict.fromkeys(config.ignore) if _is_pattern(text)]
        schemes = {target: scheme for scheme in config.schemes for target in scheme.targets}
        self._named = {target: scheme for target, scheme in schemes.items() if not _is_pattern(target)}
        self._matching = [(_pattern(text), schemes[text]) for text in sorted(schemes) if _is_pattern(text)]
        # Names of classes begin with a capital letter, those of modules do not. Of classes with one scheme one will do.
        classes: dict[tuple[bool, int], Scheme] = {}
        for target in sorted(self._named):
            if target[:1].isupper() and target.isidentifier():
                scheme = schemes[target]
                classes.setdefault(("embedding" in target.lower(), id(scheme)), scheme)
        tables, others = (
            [scheme for (is_table, _), scheme in classes.items() if is_table == wanted] for wanted in (True, False)
        )
        self._classes = {True: tables + others, False: others + tables}  # for a module that is a table, and for another

    def scheme(self, module: str, fits: Callable[[Scheme], bool]) -> Scheme | str:
        """The scheme of a module, or why it has none."""
        try:
            return self._scheme(module, fits)
        except FormatError as error:
            error.locate(place=self._config.place)
            raise

    def _scheme(self, module: str, fits: Callable[[Scheme], bool]) -> Scheme | str:
        name = Name(module, self._budget)
        if module in self._ignored or any(pattern.matches(name, self._budget) for pattern in self._ignoring):
            return f"{self._config.place} ignores it, and it has a scale all the same"
        if module in self._named:
            return self._named[module]
        for pattern, scheme in self._matching:
            if pattern.matches(name, self._budget):
                return scheme
        is_table = any(word in module.rpartition(".")[2].lower() for word in ("emb", "wte", "wpe"))
        classes = self._classes[is_table]
        for scheme in classes:
            self._budget.spend(_STEPS_TO_FIT)
            if fits(scheme):
                return scheme
        return classes[0] if classes else f"no target of {self._config.place} says its name"


def _is_pattern(target: str) -> bool:
    return target.startswith("re:")


def _pattern(text: str) -> Pattern:
    return Pattern(text.removeprefix("re:"))
