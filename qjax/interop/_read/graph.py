"""The graph of a `.pt2` file: its nodes, who uses whose result, and which of its inputs are tensors of the file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from qjax.containers import FormatError
from qjax.containers._errors import quoted

# A module of one of these files is one op to a reader, however many nodes it is made of.
_LEAF = re.compile(
    r"torch\.(ao\.)?nn\..*modules\."
    r"(linear|conv|batchnorm|instancenorm|normalization|activation|sparse|pooling|padding|dropout|flatten|upsampling)\."
    r"(?!MultiheadAttention)"
)
_MEND = "The file is damaged or forged, or of a version of torch.export that is not known here."


class Node(NamedTuple):
    """One call of the graph."""

    name: str
    target: str  # such as "torch.ops.aten.conv2d.default"
    inputs: Mapping[str, Mapping[str, Any]]  # the argument's name → its value as JSON has it
    outputs: tuple[str, ...]
    module: str  # path of the module whose code made the call; "" for the root
    leaf: bool  # whether that module is one op

    @property
    def op(self) -> str:
        """What to call it: the module where that is one op, else the node within the module."""
        if self.leaf and self.module:
            return self.module
        return f"{self.module}.{self.name}" if self.module else self.name

    def tensor(self, argument: str) -> str | None:
        """The name of the value that is a tensor argument; None where it is no tensor."""
        found = _names(self.inputs.get(argument, {}))
        return found[0] if len(found) == 1 else None

    def number(self, argument: str) -> int | float | None:
        """A literal argument; None where it is something else."""
        for kind, value in self.inputs.get(argument, {}).items():
            if kind in ("as_int", "as_float", "as_scalar_type") and type(value) in (int, float):
                return value
        return None


class Graph:
    """The nodes of a program, and how they hang together.

    Attributes:
      nodes: In the order of execution.
      producer: The name of a value → the node whose result it is.
      users: The name of a value → the nodes that take it, with the name of the argument.
      keys: The name of a value → the key of the tensor in the file that it is.
    """

    def __init__(self, program: Any) -> None:
        module = _part(program, "graph_module")
        graph = _part(module, "graph")
        self.nodes = tuple(_node(entry, index) for index, entry in enumerate(_list(graph, "nodes")))
        self.producer = _producers(self.nodes)
        self.users: dict[str, list[tuple[Node, str]]] = {}
        for node in self.nodes:
            for argument, value in node.inputs.items():
                for name in _names(value):
                    self.users.setdefault(name, []).append((node, argument))
        self.keys = dict(_keys(_list(_part(module, "signature"), "input_specs")))


def _part(value: Any, name: str) -> dict[str, Any]:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, dict):
        raise FormatError(
            f"a program without {name}",
            expected="a graph as torch.export.save writes it",
            mend=_MEND,
            place="the program",
        )
    return found


def _list(value: dict[str, Any], name: str) -> list[Any]:
    found = value.get(name)
    if not isinstance(found, list):
        raise FormatError(f"{name} that are no list", expected="a list", mend=_MEND, place="the program")
    return found


def _node(entry: Any, index: int) -> Node:
    inputs = entry.get("inputs") if isinstance(entry, dict) else None
    outputs = entry.get("outputs") if isinstance(entry, dict) else None
    target = entry.get("target") if isinstance(entry, dict) else None
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not isinstance(target, str):
        raise FormatError(
            "a node without target, inputs or outputs", expected="all three", mend=_MEND, place=f"node {index}"
        )
    arguments = {
        item["name"]: item["arg"]
        for item in inputs
        if isinstance(item, dict) and isinstance(item.get("name"), str) and isinstance(item.get("arg"), dict)
    }
    results = tuple(name for value in outputs if isinstance(value, dict) for name in _names(value))
    name = entry.get("name")
    if not isinstance(name, str) or not name:  # files before torch 2.8 have none
        name = results[0] if results else f"node {index}"
    metadata = entry.get("metadata")
    stack = metadata.get("nn_module_stack") if isinstance(metadata, dict) else None
    # "key,path,class" of each module, from the root inwards.
    last = stack.rpartition(";")[2].split(",") if isinstance(stack, str) else []
    path, kind = (last[1], last[2]) if len(last) == 3 else ("", "")
    return Node(name, target, arguments, results, path, _LEAF.match(kind) is not None)


def _producers(nodes: Iterable[Node]) -> dict[str, Node]:
    found: dict[str, Node] = {}
    for node in nodes:
        for name in node.outputs:
            if name in found:
                raise FormatError(
                    f"a second result called {quoted(name)}",
                    expected="a name of its own for each result",
                    mend=_MEND,
                    place=at_node(node.name),
                )
            found[name] = node
    return found


def _names(value: Mapping[str, Any]) -> list[str]:
    """The names of the tensors in an argument."""
    found: list[str] = []
    for kind, content in value.items():
        if kind == "as_tensor":
            content = [content]
        elif kind == "as_optional_tensors" and isinstance(content, list):
            content = [item.get("as_tensor") for item in content if isinstance(item, dict)]
        elif kind == "as_optional_tensor" and isinstance(content, dict):
            content = [content.get("as_tensor")]
        elif kind != "as_tensors":
            continue
        if isinstance(content, list):
            names = (item.get("name") for item in content if isinstance(item, dict))
            found += [name for name in names if isinstance(name, str)]
    return found


def _keys(specs: list[Any]) -> Iterator[tuple[str, str]]:
    for spec in specs:
        for kind in ("parameter", "buffer", "tensor_constant"):
            entry = spec.get(kind) if isinstance(spec, dict) else None
            if not isinstance(entry, dict):
                continue
            argument, key = entry.get("arg"), entry.get(f"{kind}_name")
            name = argument.get("name") if isinstance(argument, dict) else None
            if not isinstance(name, str) or not isinstance(key, str):
                raise FormatError(
                    f"a {kind} without a name",
                    expected="the name of a tensor of the file",
                    mend=_MEND,
                    place="the signature",
                )
            yield name, key


def at_node(name: str) -> str:
    """A node as a place in an error message."""
    return f"node {quoted(name)}"
