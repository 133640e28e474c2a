"""load and save: a PyTorch checkpoint as a mapping from names to tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from qjax import containers
from qjax._quantize import QTensor
from qjax.containers._errors import quoted
from qjax.interop._deferred import Deferred
from qjax.interop._dialects.all import Contents, recognise
from qjax.interop._read.compressed import Compressed
from qjax.interop._read.compressed import join as join_compressed
from qjax.interop._read.frozen import join_frozen
from qjax.interop._read.module_tree import Modules, is_module, state_dict_of
from qjax.interop._read.packed import unpack_script
from qjax.interop._read.program import Program
from qjax.interop._read.pt2e import read_models
from qjax.interop._read.script import read_script, script_program
from qjax.interop._read.torchao import Torchao, from_object, join_safetensors
from qjax.interop._torch_tensors import from_node, to_node

_PACKED = "_packed_params._packed_params"
_PACKED_WEIGHT = "_packed_params._packed_weight"  # of an Embedding or an EmbeddingBag
_OLD_PACKED = ("_packed_params.weight", "_packed_params.bias")  # of a Linear, up to `_metadata` version 2
# Modules are found by the starts of names, of which a long name of many parts has many.
_LONGEST, _DEEPEST = 2**12, 2**8  # characters, dots
_NAMES = 2**27  # characters of all names: a short key of one dict stands before each of another
_TOO_LONG = "The file is damaged or forged."


class Checkpoint(Mapping[str, Any]):
    """What a checkpoint holds, by name: QTensor, numpy array or scalar. Read-only; made by `load`.

    Names are the file's own keys, except that a quantized Linear's packed tuple `fc._packed_params._packed_params` is
    unpacked to `fc.weight` and `fc.bias`, the script objects of a dynamic LSTM, GRU or cell to `weight_ih`, `weight_hh`,
    `bias_ih` and `bias_hh` of `lstm._all_weight_values.0` and so on, or of the cell; and that the parts of a weight of
    compressed-tensors or of torchao's safetensors are one tensor, `fc.weight`. Codes that compressed-tensors packs are unpacked
    when they are asked for, each time anew: opening a file reads none of them.

    Attributes:
      path: Where it was read from.
      metadata: Torch's `_metadata`: module path to `{"version": n}`.
      dialect: What wrote it, recognised by its keys: `"pt2e"`, `"torchscript"`, `"compressed_tensors"`, `"torchao"`,
        `"qat_prepared"` (fake-quantization), `"prepared"` (observers), `"fx_reference"`, `"fx_static"`, `"eager_static"`,
        `"eager_dynamic"` where all that is quantized is so at run time; or `"plain"` where nothing of quantization was
        recognised.
      packed: The modules whose weight and bias were unpacked.
      subclasses: Of torchao's tensor subclasses: the tensor's name to the class and how that quantizes activations.
      program: What the code in the file says of quantization; None where there is no code.
      compressed: What of compressed-tensors was found; None where nothing was.
    """

    def __init__(
        self,
        tensors: Mapping[str, Any],
        *,
        path: str,
        metadata: Mapping[str, Any],
        dialect: str,
        packed: Iterable[str] = (),
        subclasses: Mapping[str, tuple[str, Any]] | None = None,
        program: Program | None = None,
        compressed: Compressed | None = None,
    ) -> None:
        self._tensors = dict(tensors)
        self.path = path
        self.metadata = dict(metadata)
        self.dialect = dialect
        self.packed = frozenset(packed)
        self.subclasses = dict(subclasses or {})
        self.program = program
        self.compressed = compressed

    def __getitem__(self, name: str) -> Any:
        try:
            value = self._tensors[name]
        except KeyError:
            raise KeyError(f"{self.path} has no tensor {name!r}; it has {', '.join(self._tensors)}") from None
        if not isinstance(value, Deferred):
            return value
        try:
            return value.tensor()
        except containers.FormatError as error:
            error.locate(file=self.path, place=f"tensor {quoted(name)}")
            raise

    @property
    def contents(self) -> Contents:
        """What the dialects read; tensors that are unpacked when they are asked for are not."""
        return Contents(self._tensors, self.metadata, self.packed, self.subclasses, self.program, self.compressed)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Checkpoint({self.path!r}, {self.dialect}, {len(self)} tensors)"


def load(path: str | os.PathLike[str] | bytes, *, limits: containers.Limits | None = None) -> Checkpoint:
    """Read a PyTorch checkpoint without torch. Nothing in the file is imported or executed.

    Args:
      path: A file that `torch.save` wrote, or a safetensors file, or the index or the folder of a sharded checkpoint: a
        state dict, possibly nested, or a module that was saved whole. Or a `.pt2` file of `torch.export.save`, or a
        TorchScript archive. Or the bytes of a file. Of compressed-tensors give the folder: its config.json says what the
        tensors mean.
      limits: Bounds on what is read.

    Returns:
      A `Checkpoint`. Quantized tensors are `QTensor`s over the file's memory map; scales are float32, as torch's kernels use
      them. Of modules it has what their state dict would have, and the attributes that a state dict loses: the scale and
      zero_point of a Sigmoid, Softmax, ELU or PReLU. What is of another class stays an inert `containers.Object`.

    Raises:
      containers.FormatError: The file is no checkpoint, is cut short, contradicts itself, or names what no model is made of,
        such as `os.system`.
      OSError: The file cannot be opened.

    Examples:
      >>> import numpy as np, os, qjax, tempfile
      >>> path = os.path.join(tempfile.mkdtemp(), "model.pt")
      >>> qjax.interop.save(path, {"fc.bias": np.zeros(2, np.float32)})
      >>> qjax.interop.load(path)["fc.bias"]
      array([0., 0.], dtype=float32)

    References:
      PyTorch, `torch/serialization.py` and `torch/_utils.py`.
    """
    name = "<bytes>" if isinstance(path, bytes) else os.fspath(path)
    # Modules that were saved whole are looked into; nothing is imported or called for any name in them.
    container = containers.open_container(path, limits=limits, objects="inert")
    tree: Any = container.tree
    if not isinstance(tree, Mapping) and not is_module(tree):
        raise containers.FormatError(
            f"an object of type {tree.name if isinstance(tree, containers.Object) else type(tree).__name__}",
            expected="a state dict or a module",
            mend="Save model.state_dict() rather than a single tensor.",
            file=name,
        )
    tensors: dict[str, Any] = {}
    packed: set[str] = set()
    subclasses: dict[str, tuple[str, Any]] = {}
    program: Program | None = None
    try:
        metadata = tree.metadata if isinstance(tree, containers.Record) else {}
        modules: Modules | None = None
        if container.kind == "pt2":
            tree, program = read_models(tree)
        elif container.kind == "torchscript" and isinstance(tree, containers.Object):
            tree, modules = read_script(tree, container.metadata)
        elif isinstance(tree, containers.Object):
            modules = state_dict_of(tree)
            tree = modules.tensors
        if modules is not None:
            metadata = modules.versions
        _flatten(tree, "", _Flat(tensors, packed))
        if container.kind == "torchscript" and modules is not None:
            program = script_program(modules, container.metadata, tensors)
        program = program or join_frozen(tensors)
        for tensor, made in _subclasses(tensors, container.metadata).items():
            subclasses[tensor] = made.kind, made.activation
        compressed = join_compressed(tensors, container.metadata)
    except containers.FormatError as error:
        error.locate(file=name)
        raise
    return Checkpoint(
        tensors,
        path=name,
        metadata=metadata,
        dialect=recognise(Contents(tensors, metadata, frozenset(packed), subclasses, program, compressed)),
        packed=packed,
        subclasses=subclasses,
        program=program,
        compressed=compressed,
    )


def _subclasses(tensors: dict[str, Any], metadata: Mapping[str, Any]) -> dict[str, Torchao]:
    """Put QTensors in the place of torchao's subclasses, and of their parts in a safetensors file."""
    found = {
        name: made
        for name, value in tensors.items()
        if isinstance(value, containers.Object) and (made := from_object(value, name)) is not None
    }
    texts = metadata.get("safetensors")
    if isinstance(texts, Mapping):
        joined = join_safetensors(tensors, texts)
        for made in joined.values():
            for part in made.parts:
                tensors.pop(part, None)
        for name in joined.keys() & tensors.keys():
            raise containers.FormatError(
                "a tensor beside the parts of one of the same name",
                expected="one of the two",
                mend="The file is damaged or forged.",
                place=f"tensor {quoted(name)}",
            )
        found |= joined
    tensors |= {name: made.weight for name, made in found.items()}
    return found


class _Flat:
    """A flat state dict in the making: each name once, and none that costs more than its tensor to look up."""

    def __init__(self, tensors: dict[str, Any], packed: set[str]) -> None:
        self._tensors = tensors
        self.packed = packed
        self._characters = 0

    def put(self, name: str, node: Any, place: str = "") -> None:
        """Add what is read of a node."""
        self._characters += len(name)
        if self._characters > _NAMES:
            raise containers.FormatError(
                f"names of more than {_NAMES} characters", expected="fewer, all names together", mend=_TOO_LONG
            )
        if name in self._tensors:
            raise containers.FormatError(
                "two entries of this name, once keys are joined by dots and packed weights are unpacked",
                expected="one",
                mend="Give one of them another key: which is meant cannot be known.",
                place=f"tensor {quoted(name)}",
            )
        self._tensors[name] = from_node(node, place or name)


def _flatten(node: Any, name: str, into: _Flat) -> None:
    if len(name) > _LONGEST or name.count(".") > _DEEPEST:
        raise containers.FormatError(
            f"a name of {len(name)} characters, {name.count('.') + 1} parts",
            expected=f"at most {_LONGEST} characters, {_DEEPEST + 1} parts",
            mend=_TOO_LONG,
            place=f"tensor {quoted(name)}",
        )
    if isinstance(node, containers.Object) and is_module(node):
        node = state_dict_of(node).tensors
    if isinstance(node, Mapping):
        for key, value in node.items():
            _flatten(value, f"{name}.{key}" if name else str(key), into)
    elif name.endswith(_PACKED) and isinstance(node, tuple) and len(node) == 2:
        module = name[: -len(_PACKED)]
        into.packed.add(module.removesuffix("."))
        for part, value in zip(("weight", "bias"), node, strict=True):
            if value is not None:
                into.put(module + part, value)
    elif isinstance(node, containers.Object) and (unpacked := unpack_script(name, node)) is not None:
        for part, value in unpacked.values.items():
            into.put(part, value)
        into.packed.add(unpacked.module)
    elif isinstance(node, tuple | list):
        for index, value in enumerate(node):
            _flatten(value, f"{name}.{index}", into)
    elif name.endswith((_PACKED_WEIGHT, *_OLD_PACKED)):
        start, _, last = name.rpartition("_packed_params.")
        into.packed.add(start.removesuffix("."))
        # An old Linear without a bias says so by a None.
        if node is not None:
            into.put(start + last.removeprefix("_packed_"), node, name)
    else:
        into.put(name, node)


def save(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], *, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a checkpoint that `torch.load(path, weights_only=True)` reads. Torch is not needed.

    The file is written beside its place and renamed into it, so that an interrupted write leaves the old one whole.

    Args:
      path: Where to; torch users expect `.pt`.
      tensors: name → QTensor (8 bits; per tensor or per channel), array, bool, int, float, str, None, or a tuple, list or
        dict of these. A mapping from `eager_static` brings its own metadata.
      metadata: Torch's `_metadata`, module path → `{"version": n}`; by default what `tensors` brings along.

    Raises:
      ValueError: A quantized tensor that torch has no dtype for, or whose scale is not positive and finite.
      TypeError: tensors is no mapping, a key in it is no str, or a value is none that torch's weights_only loader reads.
      OSError: The file cannot be written.

    Examples:
      >>> import jax.numpy as jnp, os, qjax, tempfile
      >>> spec = qjax.QuantSpec(qjax.int8, symmetric=True)
      >>> q = qjax.quantize(jnp.array([0.5, -1.0]), qjax.choose_qparams(-1.0, 0.5, spec), spec)
      >>> path = os.path.join(tempfile.mkdtemp(), "model.pt")
      >>> qjax.interop.save(path, {"weight": q})
      >>> print(qjax.interop.load(path)["weight"].codes)
      [  64 -127]
    """
    if not isinstance(tensors, Mapping):
        raise TypeError(
            f"save: tensors must be a mapping from names to tensors, got {type(tensors).__name__}. Give each a name, such as "
            '{"fc.weight": weight}.'
        )
    if metadata is None:
        metadata = tensors.metadata if isinstance(tensors, containers.Record) else {}
    tree = containers.Record(_named_nodes(tensors, ""), metadata=metadata)
    try:
        containers.write_torch_zip(path, tree)
    except OSError as error:
        if error.errno is None:
            raise
        # The trouble is with the place that was asked for, not with the temporary file beside it.
        raise OSError(error.errno, error.strerror, os.fspath(path)) from None


def _named_nodes(values: Mapping[Any, Any], prefix: str) -> dict[str, Any]:
    for key in values:
        if not isinstance(key, str):
            where = f" in {prefix.removesuffix('.')}" if prefix else ""
            raise TypeError(f"save: the key {key!r}{where} is of type {type(key).__name__}; names must be str.")
    return {key: _node(value, prefix + key) for key, value in values.items()}


def _node(value: Any, name: str) -> Any:
    if isinstance(value, QTensor):
        return to_node(value, name)
    if isinstance(value, containers.Global | containers.Call | containers.Parameter | containers.RawTensor):
        return value
    if isinstance(value, Mapping):
        return _named_nodes(value, f"{name}.")
    if isinstance(value, tuple | list):
        return type(value)(_node(item, f"{name}.{index}") for index, item in enumerate(value))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    array = np.asarray(value)
    if array.dtype.name == "bfloat16":
        return containers.RawTensor("bfloat16", array.view(np.uint16))
    return array
