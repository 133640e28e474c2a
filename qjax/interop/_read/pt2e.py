"""PT2E, what torchao.quantization.pt2e makes of a model: `.pt2` files, whose graph holds the qparams of activations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from qjax._granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from qjax._quantize import QTensor
from qjax.containers import FormatError, Object, Parameter, RawTensor
from qjax.containers._errors import quoted
from qjax.interop._points import Origin, QuantPoint, Role
from qjax.interop._read.graph import Graph, Node, at_node
from qjax.interop._read.program import Program, program_point, qtensor

_OPS = re.compile(r"torch\.ops\.quantized_decomposed\.(de)?quantize_(per_\w+?)\.(default|tensor2?)")
_CHOOSE = re.compile(r"torch\.ops\.quantized_decomposed\.choose_qparams(_\w+)?\.(default|tensor)")
_OTHER = re.compile(r"torch\.ops\.\w+\.\w*(quantize|choose_qparams)\w*\.\w+")
# schema.ScalarType: integers alone are codes
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 28: "uint16"}
_WHOLE = (
    "{scale}, not below eps = {eps:g}; zero_point = {point}; of x, the whole input (qjax.choose_qparams computes it)"
)
_TOKEN = "scale = max(max|x|, 1e-5) / {half} of each row of x, zero_point = 0 (quantized_decomposed.choose_qparams_per_token)"
_TOKEN_AFFINE = (
    "scale = max((max(x, 0) - min(x, 0)) / 255, 2^-23) of each row of x, zero_point from the end of the range with the smaller "
    "error (quantized_decomposed.choose_qparams_per_token_asymmetric)"
)
_MEND = "The file is damaged or forged."


class _QParams(NamedTuple):
    """What one node says."""

    granularity: Granularity
    dtype: str
    limits: tuple[int, int]
    scale: np.ndarray | None
    zero_point: np.ndarray | None
    symmetric: bool
    origin: Origin
    eps: float | None = None


def read_models(tree: Mapping[str, Any]) -> tuple[dict[str, Any], Program]:
    """The tensors of a `.pt2` file, codes as QTensors, and what its graphs say.

    Args:
      tree: Of a container: model name → program, state_dict and constants.

    Returns:
      name → QTensor, array or whatever else the file has; of several models, the name of the model comes first.

    Raises:
      FormatError: A graph that contradicts itself or its tensors.
    """
    tensors: dict[str, Any] = {}
    points: list[QuantPoint] = []
    claimed: set[str] = set()
    for model, parts in tree.items():
        prefix = "" if len(tree) == 1 else f"{model}."
        values = {
            key: value.array if isinstance(value, Parameter) else value
            for part in ("constants", "state_dict")
            for key, value in parts[part].items()
        }
        reader = _Reader(Graph(parts["program"]), values, prefix)
        points += reader.points()
        reader.leave_out_originals()
        claimed |= {prefix + key for key in reader.claimed}
        found = {prefix + key: reader.qtensors.get(key, parts_of(parts, key)) for key in values}
        for name in found.keys() & tensors.keys():
            raise FormatError("two tensors of this name", expected="one", mend=_MEND, place=f"tensor {quoted(name)}")
        tensors |= found
    return tensors, Program("pt2e" if points else "plain", tuple(points), frozenset(claimed))


def parts_of(parts: Mapping[str, Any], key: str) -> Any:
    """A tensor of the model as the file has it: a parameter is still called so."""
    return parts["state_dict"][key] if key in parts["state_dict"] else parts["constants"][key]


class _Reader:
    def __init__(self, graph: Graph, values: Mapping[str, Any], prefix: str) -> None:
        self._graph = graph
        self._values = values
        self._prefix = prefix
        self._has_subclasses = any(isinstance(v, Object) and v.name.startswith("torchao.") for v in values.values())
        self.qtensors: dict[str, QTensor] = {}
        self.claimed: set[str] = set()
        self._frozen: list[tuple[str, str]] = []  # ops and the keys of their codes

    def points(self) -> Iterator[QuantPoint]:
        """In the order of the graph: of each quantization what it quantizes, of each dequantization what it is for."""
        for node in self._graph.nodes:
            match = _OPS.fullmatch(node.target)
            if match is None:
                if _OTHER.fullmatch(node.target) and not _CHOOSE.fullmatch(node.target) and not self._in_subclass(node):
                    yield self._unknown(node)
                continue
            said = self._qparams(node, match[2])
            if match[1]:
                yield from self._dequantized(node, said)
            else:
                yield from self._quantized(node, said)

    def leave_out_originals(self) -> None:
        """Claim the float weights that frozen codes replaced: they are in the file, and the graph has no use for them."""
        unused = {key for name, key in self._graph.keys.items() if not self._graph.users.get(name)}
        unused |= self._values.keys() - set(self._graph.keys.values())
        for op, key in self._frozen:
            original = f"{op}.weight"
            if original in unused and np.shape(self._values[original]) == self._values[key].shape:
                self.claimed.add(original)

    def _quantized(self, node: Node, said: _QParams) -> Iterator[QuantPoint]:
        source = node.tensor("input")
        producer = None if source is None else self._graph.producer.get(source)
        if producer is not None and said.origin.kind == "run_time":
            return  # the quantization belongs to what takes its result
        if producer is not None:
            yield self._point(producer.op, "output", node, said)
        elif not any(self._graph.users.get(name) for name in node.outputs):
            yield self._point(source or node.name, "input", node, said)
        # Else it is an input of the model, or one of its weights: the dequantization says what for.

    def _dequantized(self, node: Node, said: _QParams) -> Iterator[QuantPoint]:
        source = node.tensor("input")
        key = None if source is None else self._graph.keys.get(source)
        if key is not None:
            self._claim(key, node, said)
        else:
            before = None if source is None else self._graph.producer.get(source)
            root = before.tensor("input") if before is not None and _OPS.fullmatch(before.target) else None
            key = None if root is None else self._graph.keys.get(root)
            if key is not None:
                self._check(key, node, said)
        role: Role = "input" if key is None else "weight"
        users = [user for name in node.outputs for user, _ in self._graph.users.get(name, ())]
        ops = dict.fromkeys(user.op for user in users if not _OPS.fullmatch(user.target))
        if not ops and role == "weight":
            ops = {node.name: None}
        held = key is not None and isinstance(self._values.get(key), np.ndarray | RawTensor)
        if key in self.qtensors:
            self._frozen += [(op, key) for op in ops]
        for op in ops:
            yield self._point(op, role, node, said, f"{self._prefix}{key}" if held else None)

    def _point(self, op: str, role: Role, node: Node, said: _QParams, tensor: str | None = None) -> QuantPoint:
        return program_point(
            self._prefix + op,
            role,
            dtype=said.dtype,
            limits=said.limits,
            granularity=said.granularity,
            symmetric=said.symmetric,
            scale=said.scale,
            zero_point=said.zero_point,
            qparams_from=said.origin,
            codes_from=Origin("graph", node.name),
            tensor=tensor,
            eps=said.eps,
        )

    def _in_subclass(self, node: Node) -> bool:
        """Whether torchao's tensor subclasses are in the file: they say what their nodes do."""
        return node.target.startswith("torch.ops.torchao.") and self._has_subclasses

    def _unknown(self, node: Node) -> QuantPoint:
        return QuantPoint(
            op=self._prefix + node.op, role="input", dtype=None, scheme=None, quant_min=None, quant_max=None, axis=None,
            scale=None, zero_point=None, codes_from=Origin("graph", node.name),
            qparams_from=Origin("unknown", f"{node.target} is not known here"),
        )  # fmt: skip

    def _check(self, key: str, node: Node, said: _QParams) -> None:
        """A weight that the graph quantizes has the axis, and as many channels as there are scales."""
        value = self._values.get(key)
        if isinstance(value, np.ndarray | RawTensor):
            wanted = _scale_shape(value.shape, said, node)
            if said.scale is not None and said.scale.shape != wanted:
                raise FormatError(
                    f"a scale of shape {said.scale.shape} for a weight of shape {value.shape}",
                    expected=f"shape {wanted}",
                    mend=_MEND,
                    place=at_node(node.name),
                )

    def _claim(self, key: str, node: Node, said: _QParams) -> None:
        """Put the codes of a tensor and what the graph says about them together."""
        codes = self._values.get(key)
        if key in self.qtensors or not isinstance(codes, np.ndarray):
            return
        point = self._point("", "weight", node, said)
        made = qtensor(codes, point, said.granularity, _scale_shape(codes.shape, said, node), at_node(node.name))
        if made is not None:
            self.qtensors[key] = made
            self.claimed.add(key)
            for argument in ("scale", "scales", "zero_point", "zero_points"):
                name = node.tensor(argument)
                if name in self._graph.keys:
                    self.claimed.add(self._graph.keys[name])

    def _qparams(self, node: Node, kind: str) -> _QParams:
        """What a node says; a dequantization of a run-time value is what its quantization is."""
        dtype = _DTYPES.get(_whole(node, "dtype"))
        if dtype is None:
            raise FormatError(
                f"codes of ScalarType {node.number('dtype')}",
                expected="an integer type",
                mend=_MEND,
                place=at_node(node.name),
            )
        limits = _whole(node, "quant_min"), _whole(node, "quant_max")
        if not -(2**31) <= limits[0] < limits[1] < 2**31:
            raise FormatError(
                f"codes in {limits[0]}..{limits[1]}", expected="a range of int32", mend=_MEND, place=at_node(node.name)
            )
        scale, zero_point, choice = self._numbers(node)
        granularity = _granularity(node, kind)
        if choice is not None:
            symmetric, formula, eps = _formula(choice, limits)
            return _QParams(granularity, dtype, limits, None, None, symmetric, Origin("run_time", formula), eps)
        if scale is None or zero_point is None:
            why = f"{node.name} takes its scale from another op of the graph"
            return _QParams(granularity, dtype, limits, None, None, False, Origin("unknown", why))
        if scale.shape != zero_point.shape:
            raise FormatError(
                f"a scale of shape {scale.shape} and a zero_point of {zero_point.shape}",
                expected="the same shape",
                mend=_MEND,
                place=at_node(node.name),
            )
        if isinstance(granularity, PerTensor) and scale.size == 1:
            scale, zero_point = scale.reshape(()), zero_point.reshape(())
        symmetric = limits[0] < 0 and not bool(np.any(zero_point))
        return _QParams(granularity, dtype, limits, scale, zero_point, symmetric, Origin("graph", node.name))

    def _numbers(self, node: Node) -> tuple[np.ndarray | None, np.ndarray | None, Node | None]:
        """Scale and zero_point as literals or from the file; or the node that chooses them."""
        literal, point = node.number("scale"), node.number("zero_point")
        if literal is not None and point is not None:
            if type(point) is not int or not -(2**31) <= point < 2**31:
                raise FormatError("a zero_point that is no int32", expected="one", mend=_MEND, place=at_node(node.name))
            if type(literal) is int and abs(literal) >= 2**63:
                raise FormatError("a scale of many digits", expected="a float", mend=_MEND, place=at_node(node.name))
            with np.errstate(over="ignore"):  # torch multiplies by the float32
                return np.asarray(literal).astype(np.float32), np.asarray(int(point), np.int64), None
        name, point_name = (node.tensor(each) or node.tensor(f"{each}s") for each in ("scale", "zero_point"))
        producer = self._graph.producer.get(name) if name is not None else None
        if producer is not None and _CHOOSE.fullmatch(producer.target):
            return None, None, producer
        scale = self._array(name, "f")
        if scale is not None and point_name is None:  # zero_points are optional
            return scale, np.zeros(scale.shape, np.int64), None
        return scale, self._array(point_name, "iu"), None

    def _array(self, name: str | None, kinds: str) -> np.ndarray | None:
        value = self._values.get(self._graph.keys.get(name, "")) if name is not None else None
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds or value.ndim > 2:
            return None
        return value


def _whole(node: Node, argument: str) -> int:
    value = node.number(argument)
    if type(value) is not int:
        raise FormatError(
            f"a node without {argument}", expected="an int as literal", mend=_MEND, place=at_node(node.name)
        )
    return value


def _granularity(node: Node, kind: str) -> Granularity:
    if kind == "per_tensor":
        return PerTensor()
    if kind == "per_token":
        return PerToken()
    if kind == "per_channel":
        axis = _whole(node, "axis")
        if not -64 <= axis < 64:
            raise FormatError(f"axis {axis}", expected="an axis", mend=_MEND, place=at_node(node.name))
        return PerChannel(axis)
    if kind == "per_channel_group":
        size = _whole(node, "group_size")
        if not 0 < size < 2**31:
            raise FormatError(f"groups of {size}", expected="1 or more", mend=_MEND, place=at_node(node.name))
        return PerGroup(-1, size)
    raise FormatError(f"a quantization {kind}", expected="one that is known here", mend=_MEND, place=at_node(node.name))


def _scale_shape(shape: tuple[int, ...], said: _QParams, node: Node) -> tuple[int, ...]:
    """The shape that scales must have for these codes."""
    where = said.granularity
    if isinstance(where, PerTensor):
        return ()
    if isinstance(where, PerToken):
        return shape[:-1]
    axis = where.axes[0] if isinstance(where, PerChannel) else -1
    if not -len(shape) <= axis < len(shape):
        raise FormatError(
            f"axis {axis} of a tensor of shape {shape}",
            expected="one of its axes",
            mend=_MEND,
            place=at_node(node.name),
        )
    if isinstance(where, PerChannel):
        return (shape[axis],)
    size = where.size if isinstance(where, PerGroup) else 1
    if shape[-1] % size:
        raise FormatError(
            f"groups of {size} in rows of {shape[-1]}",
            expected="whole groups",
            mend=_MEND,
            place=at_node(node.name),
        )
    return (*shape[:-1], shape[-1] // size)


def _formula(node: Node, limits: tuple[int, int]) -> tuple[bool, str, float | None]:
    """Whether the choice is symmetric, how it is made, and its smallest scale."""
    match = _CHOOSE.fullmatch(node.target)
    kind = match[1] if match is not None else None
    if kind == "_per_token":
        return True, _TOKEN.format(half=limits[1]), None
    if kind == "_per_token_asymmetric":
        return False, _TOKEN_AFFINE, None
    eps = node.number("eps")
    eps = float(eps) if eps is not None and 2.0**-126 <= eps < 2.0**64 else None
    shown = float("nan") if eps is None else eps
    low, high = limits
    if kind == "_symmetric":
        text = _WHOLE.format(scale=f"scale = max|x| / {(high - low) / 2:g}", eps=shown, point="0")
        return True, text, eps
    scale = f"scale = (max(x, 0) - min(x, 0)) / {high - low}"
    return False, _WHOLE.format(scale=scale, eps=shown, point=f"{low} - rint(min(x, 0) / scale)"), eps
