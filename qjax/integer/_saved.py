"""Integer programs as files: arrays, StableHLO and JSON in a ZIP archive, called without the Python that they were made of."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from qjax._qparams import QParams
from qjax._quantize import QTensor
from qjax._spec import QuantSpec
from qjax.containers import FormatError, Limits
from qjax.containers._atomic import replace_file
from qjax.containers._errors import quoted
from qjax.containers._source import Source, label, open_source
from qjax.containers._zip_reader import ZipRecords, read_directory
from qjax.containers._zip_writer import ZipWriter
from qjax.integer import _tree
from qjax.integer._held import held, read_held
from qjax.transform._prepare import shapes_of
from qjax.transform._recipe_json import read_spec, write_spec

_SCHEMA, _VERSION = "qjax.integer_program", 1
_JSON_BYTES, _PROGRAM_BYTES = 2**24, 2**28
_INTEGERS = ("int4", "uint4", "int8", "uint8", "int16", "uint16", "int32", "uint32")
_FLOATS = ("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32")
_DTYPES = frozenset(("bool", *_INTEGERS, *_FLOATS))
#: Calls out of StableHLO that a program may make: shape checks and annotations. Others run code that the file names.
_CUSTOM_CALLS = frozenset({"shape_assertion", "Sharding", "annotate_device_placement"})


def save(program: Any, path: str | os.PathLike[str], args: Sequence[Any], platforms: Sequence[str] | None) -> None:
    """See `IntegerProgram.save`."""
    arrays, structure = jax.tree.flatten(program.arrays())
    inputs = _tree.describe(tuple(args), "an argument")
    shapes = shapes_of(list(_tree.arrays_of(tuple(args), inputs, "args")))
    results: dict[str, Any] = {}

    def flat(name: str, call: Callable[..., Any]) -> Callable[..., list[jax.Array]]:
        def fn(arrays: list[jax.Array], leaves: list[jax.Array]) -> list[jax.Array]:
            rest = iter(leaves)
            whole = _tree.rebuild(inputs, lambda: next(rest))
            out = call(program.with_arrays(jax.tree.unflatten(structure, arrays)), whole)
            results[name] = _tree.describe(out, "a result")
            return list(_tree.arrays_of(out, results[name], "result"))

        return fn

    specs: dict[str, QuantSpec] = {}

    def codes(program: Any, args: Any) -> Any:
        found = program.codes(*args)
        specs.update({key: q.spec for key, q in found.items()})
        return {key: [_fields(q)[name] for name in _fields(q)] for key, q in found.items()}

    given = shapes_of(arrays)
    calls = {"program": lambda program, args: program(*args), "codes": codes}
    exported = {name: _export(flat(name, call), given, shapes, platforms) for name, call in calls.items()}
    header = {
        "schema": _SCHEMA,
        "version": _VERSION,
        "jax": jax.__version__,
        "arrays": [_write_shape(shape) for shape in given],
        "inputs": [inputs, [_write_shape(shape) for shape in shapes]],
        "specs": {key: write_spec(spec) for key, spec in specs.items()},
        "fields": list(_FIELDS),
        "held": held(program),
        **{
            name: {
                "results": [results[name], [_write_shape(shape) for shape in one.out_avals]],
                "platforms": list(one.platforms),
                "calling_convention": one.calling_convention_version,
            }
            for name, one in exported.items()
        },
    }

    def write(file: IO[bytes]) -> None:
        archive = ZipWriter(file)
        archive.add("program.json", json.dumps(header, indent=1).encode())
        for name, one in exported.items():
            archive.add(f"{name}.stablehlo", bytes(one.mlir_module_serialized))
        for index, array in enumerate(arrays):
            archive.add(f"arrays/{index}", np.ascontiguousarray(np.asarray(array)).tobytes())
        archive.finish()

    replace_file(path, write)


def load_integer(source: Source, *, limits: Limits | None = None) -> SavedProgram:
    """Load a program that `IntegerProgram.save` wrote: a function of arrays, without the Python it was made of.

    The file may come from anyone: it is data of bounded size, with no pickle in it. Whatever is wrong with its records is a
    `FormatError`, and so is StableHLO that calls out of XLA. What is left is a computation on arrays; how long it takes and
    how much memory it wants is as its author wished.

    Args:
      source: A path, or the bytes of a file.
      limits: Bounds on the size of the file; `Limits()` when None.

    Returns:
      A `SavedProgram`.

    Raises:
      FormatError: The file is damaged, hostile, or something else.
      OSError: The file cannot be opened.

    Examples:
      >>> import os, tempfile
      >>> import jax.numpy as jnp, qjax
      >>> w8 = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=qjax.PerChannel(-1))
      >>> recipe = qjax.Recipe([qjax.Rule(".*", weight=w8, input=qjax.QuantSpec(qjax.uint8))])
      >>> prepared = qjax.prepare(lambda params, x: x @ params["dense"]["w"], recipe)
      >>> params, x = {"dense": {"w": jnp.eye(2)}}, jnp.array([[0.1, 1.0]])
      >>> _, qvars = prepared(prepared.init(params, x), params, x, mode="calibrate")
      >>> integer = qjax.convert(prepared, qvars, params)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "model.qjax")
      ...     integer.save(path)
      ...     loaded = qjax.load_integer(path)
      >>> print(loaded(x).round(3), loaded.codes(x)["dense/input"].codes)
      [[0.098 0.996]] [[ 25 255]]
    """
    limits = limits or Limits()
    try:
        return _load(open_source(source, limits), limits)
    except FormatError as error:
        error.locate(file=label(source))
        raise


class SavedProgram:
    """A loaded integer program; made by `load_integer`. Calling it is pure, so it can be jitted, and vmapped where JAX can."""

    def __init__(self, header: dict[str, Any], arrays: list[jax.Array], exported: dict[str, Any]) -> None:
        self._header = header
        self._arrays = arrays
        self._exported = exported
        self._specs = {key: read_spec(value, f"specs[{key!r}]") for key, value in header["specs"].items()}
        self._held = read_held(header.get("held"), arrays)

    def __call__(self, *args: Any) -> Any:
        """Evaluate the program on arguments of the shapes that it was saved for."""
        return self._call("program", args)

    def codes(self, *args: Any) -> dict[str, QTensor]:
        """Return the integer codes of every quantized tensor, as `IntegerProgram.codes` does."""
        found = self._call("codes", args)
        return {
            key: QTensor(spec=self._specs[key], **dict(zip(_FIELDS, fields, strict=True)))
            for key, fields in found.items()
        }

    @property
    def weights(self) -> dict[str, QTensor]:
        """The codes of each weight, unpacked, as `IntegerProgram.weights` has them."""
        return {name: weight.tensor() for name, weight in self._held.weights.items()}

    @property
    def points(self) -> dict[str, tuple[QuantSpec, QParams]]:
        """Spec and qparams of each quantization point, as `IntegerProgram.points` has them."""
        return dict(self._held.points)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that the program holds."""
        return sum(array.nbytes for array in self._arrays)

    def _call(self, name: str, args: Sequence[Any]) -> Any:
        inputs, shapes = self._header["inputs"]
        leaves = [jnp.asarray(leaf) for leaf in _tree.arrays_of(tuple(args), inputs, "args")]
        for leaf, shape in zip(leaves, shapes, strict=True):
            if str(leaf.dtype) != shape["dtype"] or leaf.ndim != len(shape["shape"]):
                wanted = f"{shape['dtype']}[{', '.join(map(str, shape['shape']))}]"
                raise TypeError(
                    f"saved program: an argument was {wanted} when it was saved, got {leaf.dtype}{list(leaf.shape)}. Cast or "
                    "reshape it."
                )
        outputs = iter(self._exported[name].call(self._arrays, leaves))
        return _tree.rebuild(self._header[name]["results"][0], lambda: next(outputs))


_FIELDS = ("codes", "scale", "zero_point", "tensor_scale", "amax")


def _fields(q: QTensor) -> dict[str, jax.Array | None]:
    return {name: getattr(q, name) for name in _FIELDS}


def _write_shape(shape: Any) -> dict[str, Any]:
    dtype = str(shape.dtype)
    if dtype not in _DTYPES:
        raise TypeError(f"save: arrays of dtype {dtype} cannot be saved; accepted are {', '.join(sorted(_DTYPES))}.")
    return {"dtype": dtype, "shape": [size if isinstance(size, int) else str(size) for size in shape.shape]}


def _export(fn: Callable[..., Any], arrays: Any, leaves: Any, platforms: Sequence[str] | None) -> Any:
    try:
        with _no_source_paths():
            exported = jax.export.export(jax.jit(fn, keep_unused=True), platforms=platforms)(arrays, leaves)
    except NotImplementedError as error:
        raise ValueError(f"save: the program has a part that jax.export cannot write: {error}.") from error
    calls = _foreign_calls(exported)
    if calls or exported.ordered_effects or exported.unordered_effects or exported.nr_devices != 1:
        raise ValueError(
            f"save: the program {'calls ' + ', '.join(calls) if calls else 'has effects or runs on several devices'}, which a "
            "file cannot hold. Such parts (callbacks, FFI, linear algebra libraries, sharding) have to stay outside."
        )
    return exported


@contextlib.contextmanager
def _no_source_paths() -> Iterator[None]:
    """StableHLO says for each operation in which file of the author's machine it was written; a file for others should not."""
    config: Any = jax.config
    limit = config.jax_traceback_in_locations_limit
    config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        config.update("jax_traceback_in_locations_limit", limit)


def _foreign_calls(exported: Any) -> list[str]:
    """The calls out of StableHLO that are not known to be harmless, by whatever they are written as."""
    found = re.findall(r"custom_call(.{0,80})", exported.mlir_module())
    known = re.compile(rf" @({'|'.join(_CUSTOM_CALLS)})\(")
    return [rest.strip().split("(")[0][:60] or "a custom call" for rest in found if not known.match(rest)]


# -- reading -------------------------------------------------------------------------------------------------------------


def _load(buffer: memoryview, limits: Limits) -> SavedProgram:
    records = ZipRecords(buffer, read_directory(buffer, limits), limits)
    header = _header(_record(records, "program.json", _JSON_BYTES))
    try:
        arrays = [_array(records, f"arrays/{i}", shape, limits) for i, shape in enumerate(header["arrays"])]
        for description, shapes in (header["inputs"], header["program"]["results"], header["codes"]["results"]):
            _tree.check(description)
            if sum(1 for _ in _leaves(description)) != len(shapes):
                raise ValueError("a structure with another number of arrays")
        specs = {key: read_spec(value, f"specs[{key!r:.40}]") for key, value in header["specs"].items()}
        keys = header["codes"]["results"][0]["dict"]
        if keys.keys() != specs.keys() or any(len(each["list"]) != len(_FIELDS) for each in keys.values()):
            raise ValueError("codes without a spec, or with other fields")
        exported = {name: _exported(records, name, header, arrays) for name in ("program", "codes")}
        return SavedProgram(header, [jnp.asarray(array) for array in arrays], exported)
    except FormatError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        _fail(f"{type(error).__name__}: {error}"[:200], "program.json")


def _record(records: ZipRecords, name: str, most: int) -> bytes:
    if name not in records:
        raise FormatError(f"no record {name!r}", expected="a program that IntegerProgram.save wrote")
    return bytes(records.read(name, most))


def _header(data: bytes) -> dict[str, Any]:
    try:
        header = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        _fail("no JSON", "program.json")
    if not isinstance(header, dict) or header.get("schema") != _SCHEMA:
        _fail("JSON of something else", "program.json")
    if header.get("version") != _VERSION:
        raise FormatError(
            f"version {header.get('version')!r:.20}", expected=str(_VERSION), mend="Save it again, or use a newer qjax."
        )
    return header


def _array(records: ZipRecords, name: str, shape: Any, limits: Limits) -> np.ndarray:
    dtype, sizes = _dtype(shape["dtype"]), shape["shape"]
    if not isinstance(sizes, list) or not all(type(size) is int and 0 <= size <= limits.max_elements for size in sizes):
        raise ValueError(f"a shape of {name} that is none")
    count = 1
    for size in sizes:
        count = min(count * size, limits.max_elements + 1)
    if name not in records or count > limits.max_elements:
        raise FormatError("no record, or a shape of more elements than Limits allows", place=f"record {name!r}")
    data = records.read(name, count * dtype.itemsize)
    if len(data) != count * dtype.itemsize:
        raise FormatError("fewer bytes than its shape says", place=f"record {name!r}")
    return np.frombuffer(data, dtype).reshape(sizes)


def _dtype(name: Any) -> np.dtype:
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"the dtype {name!r:.40}")
    return jnp.dtype(name)


def _leaves(description: Any) -> Any:
    if description == "array":
        yield description
    else:
        ((kind, inner),) = description.items()
        for each in () if kind == "value" else (inner.values() if kind == "dict" else inner):
            yield from _leaves(each)


def _exported(records: ZipRecords, name: str, header: dict[str, Any], arrays: Sequence[np.ndarray]) -> Any:
    """A `jax.export.Exported` of the signature in the header, with the StableHLO of the file in it."""
    about, scope = header[name], jax.export.SymbolicScope()

    def shape(value: Any) -> jax.ShapeDtypeStruct:
        sizes = value["shape"]
        if not isinstance(sizes, list) or not all(type(size) is int or _is_expression(size) for size in sizes):
            raise ValueError("a shape that is none")
        symbolic = jax.export.symbolic_shape(", ".join(map(str, sizes)), scope=scope) if sizes else ()
        return jax.ShapeDtypeStruct(symbolic, _dtype(value["dtype"]))

    inputs = [shape(value) for value in header["inputs"][1]]
    outputs = [shape(value) for value in about["results"][1]]
    stand_in = jax.jit(lambda arrays, leaves: [jnp.zeros(out.shape, out.dtype) for out in outputs], keep_unused=True)
    try:
        template = jax.export.export(stand_in)(shapes_of(list(arrays)), inputs)
    except Exception as error:  # of a result with a symbol that no argument has, JAX raises an error of its own
        raise ValueError(f"shapes that are none: {error}") from error
    platforms, convention = about["platforms"], about["calling_convention"]
    if (
        not isinstance(platforms, list)
        or not platforms
        or not set(platforms) <= {"cpu", "cuda", "rocm", "tpu"}
        or type(convention) is not int
    ):
        raise ValueError("platforms or a calling convention that are none")
    exported = dataclasses.replace(
        template,
        mlir_module_serialized=_record(records, f"{name}.stablehlo", _PROGRAM_BYTES),
        platforms=tuple(platforms),
        calling_convention_version=convention,
    )
    try:
        calls = _foreign_calls(exported)
    except Exception as error:  # whatever MLIR's parser raises
        raise FormatError(
            f"no StableHLO that this JAX reads ({type(error).__name__})",
            place=f"record '{name}.stablehlo'",
            mend=f"It was saved with JAX {header.get('jax')!r:.20}; JAX reads programs that are at most six months older.",
        ) from error
    if calls:
        raise FormatError(
            f"a call of {quoted(calls[0])}",
            expected="StableHLO alone",
            place=f"record '{name}.stablehlo'",
            mend="Such a call runs code that the file names; it is not loaded.",
        )
    return exported


def _is_expression(size: Any) -> bool:
    """Sizes such as `b` or `2*b + 1`."""
    return isinstance(size, str) and re.fullmatch(r"[A-Za-z0-9_+*\- ]{1,64}", size) is not None


def _fail(found: str, record: str) -> NoReturn:
    raise FormatError(quoted(found), expected="a program that IntegerProgram.save wrote", place=f"record {record!r}")
