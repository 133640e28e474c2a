"""Which parameter of a prepared function is which tensor of torch's prepared model, and which quantizer is which module."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax._granularity import PerChannel, PerTensor
from qjax.interop._dialects.prepared import OBSERVER
from qjax.interop._dialects.protocol import member
from qjax.interop._write.derive import torch_modules
from qjax.interop._write.layout import Layout, layout_of
from qjax.interop._write.modules import Conv1d, ConvModule, FloatFunctional, Linear, TorchModule
from qjax.interop._write.observed import Site, Stage, check_site
from qjax.interop._write.vectors import output_axes, outputs_of, places_of
from qjax.transform import Prepared
from qjax.transform._batch_norm import BatchNorm, Finder
from qjax.transform._calls import op_of
from qjax.transform._interpret import Interpreter, Plan
from qjax.transform._names import leaf_paths
from qjax.transform._trace import Graph, Node, Op, Operand, Trace
from qjax.transform._weights import Path

_VARIANCE = re.compile(r"var(iance)?$")


class Tensor(NamedTuple):
    """One tensor of the file and the leaf of the parameters that it is."""

    key: str
    leaf: int  # index among the leaves of the parameters
    path: str  # of the leaf, for messages
    order: tuple[int, ...]  # which axis of the leaf each axis is that the layout is given
    layout: Layout

    def to_torch(self, leaf: np.ndarray) -> np.ndarray:
        """The leaf in torch's layout."""
        return self.layout.array(leaf.transpose(self.order))

    def from_torch(self, tensor: np.ndarray) -> np.ndarray:
        """The tensor in the layout of the leaf."""
        return self.layout.inverse.array(tensor).transpose(np.argsort(self.order))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor in the file."""
        return self.layout.shape


class Vector(NamedTuple):
    """A tensor of the file with one number for each output, and the leaf of the parameters that it is."""

    key: str
    leaf: int  # index among the leaves of the parameters
    path: str  # of the leaf, for messages
    given: tuple[int, ...]  # the shape of the leaf
    places: np.ndarray  # which number of the leaf, counted through, each number is

    def to_torch(self, leaf: np.ndarray) -> np.ndarray:
        """The numbers in torch's order."""
        return leaf.reshape(-1)[self.places]

    def from_torch(self, tensor: np.ndarray) -> np.ndarray:
        """The numbers where the leaf has them."""
        return tensor[np.argsort(self.places)].reshape(self.given)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor in the file."""
        return self.places.shape


class Fixed(NamedTuple):
    """A tensor of the file for which the function has no parameter, such as the scale of a batch norm without one."""

    key: str
    value: float
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor in the file."""
        return (self.size,)


AnyTensor = Tensor | Vector | Fixed


@dataclasses.dataclass(frozen=True)
class Module:
    """What one op becomes, its tensors in torch's order."""

    name: str
    tensors: tuple[AnyTensor, ...]
    bn: str | None  # the path of its batch norm
    sites: tuple[Site, ...]
    version: int  # of its layout, in torch's `_metadata`


@dataclasses.dataclass(frozen=True)
class ModelPlan:
    """What a prepared function becomes in torch."""

    entry: Site | None  # the model's QuantStub
    modules: tuple[Module, ...]

    def sites(self) -> Iterator[Site]:
        """All of them, in torch's order."""
        if self.entry is not None:
            yield self.entry
        for module in self.modules:
            yield from module.sites

    def tensors(self) -> Iterator[AnyTensor]:
        """All of them, in torch's order."""
        for module in self.modules:
            yield from module.tensors


def check_arguments(prepared: Any, modules: Any, observers: Any, caller: str) -> None:
    """Raise TypeError where one is something else."""
    if not isinstance(prepared, Prepared):
        raise TypeError(f"{caller}: prepared must come from qjax.prepare, got {type(prepared).__name__}.")
    if modules is not None and (
        not isinstance(modules, Mapping)
        or not all(isinstance(name, str) and isinstance(module, TorchModule) for name, module in modules.items())
    ):
        raise TypeError(
            f"{caller}: modules must map the names of ops to Conv2d and Linear, such as "
            f"{{'Dense_0': qjax.interop.Linear('fc1')}}; got {modules!r}."
        )
    if observers is not None and (
        not isinstance(observers, Mapping)
        or not all(isinstance(key, str) and isinstance(path, str) for key, path in observers.items())
    ):
        raise TypeError(
            f"{caller}: observers must map quantizers to torch's modules, such as "
            f"{{'Dense_0/output': 'activation_post_process_1'}}; got {observers!r}."
        )


def plan_of(
    prepared: Prepared,
    args: Sequence[Any],
    modules: Mapping[str, TorchModule] | None,
    *,
    quantize: str | None,
    observers: Mapping[str, str] | None,
    stage: Stage,
    caller: str,
) -> ModelPlan:
    """What a function becomes, for arguments of these shapes.

    Raises:
      TypeError: prepared or modules is something else.
      ValueError: An op is missing in modules or unknown, or torch has no module for what it is or how it is quantized.
    """
    check_arguments(prepared, modules, observers, caller)
    if modules is None:
        modules = torch_modules(prepared, *args)
    return _Planner(prepared, args, modules, observers or {}, stage, caller).plan(quantize)


class _Planner:
    def __init__(
        self,
        prepared: Prepared,
        args: Sequence[Any],
        modules: Mapping[str, TorchModule],
        observers: Mapping[str, str],
        stage: Stage,
        caller: str,
    ) -> None:
        self._modules, self._observers, self._caller = modules, observers, caller
        self._stage: Stage = stage
        params = args[prepared.params_argnum]
        self._paths = leaf_paths([params], 0)
        self._leaves = {path: index for index, path in self._paths.items()}
        leaves = jax.tree.leaves(params)
        self._shapes = [np.shape(leaf) for leaf in leaves]
        self._dtypes = [jax.dtypes.result_type(leaf) for leaf in leaves]
        self._traced = prepared.trace(*args)
        folds = any(rule.batch_norm is not None for rule in prepared.recipe.rules)
        self._plain = prepared.trace(*args, fold=False) if folds else self._traced
        recipe = prepared.recipe.bind(self._traced)
        self._rules = recipe.rules
        interpreter = Interpreter(Plan(recipe, "init", prepared.compute), {})
        interpreter.run_abstractly(self._traced.graph, prepared.array_leaves(args))
        self._observed = interpreter.observed
        self._check()

    def _error(self, text: str) -> ValueError:
        return ValueError(f"{self._caller}: {text}")

    def _check(self) -> None:
        ops = {op.name: op for op in self._plain.graph.ops()}
        listed = ", ".join(ops) or "none"
        for name in self._modules.keys() - ops.keys():
            raise self._error(f"the function has no op {name!r}; its ops are {listed}.")
        for name, op in ops.items():
            if name not in self._modules and (not op.is_elementwise or f"{name}/output" in self._observed):
                kind = "FloatFunctional" if op.is_elementwise else "Conv2d or a Linear"
                raise self._error(f"modules does not say what op {name!r} becomes. Add a {kind} for it.")
            if isinstance(self._modules.get(name), FloatFunctional) != (op.is_elementwise and name in self._modules):
                raise self._error(f"{name} is a {op.kind}; {self._modules[name]} does not do that in torch.")
        names = [module.name for module in self._modules.values()]
        if len(set(names)) != len(names):
            raise self._error(f"two ops become the same torch module; the names are {', '.join(names)}.")
        for key in self._observers.keys() - self._observed.keys():
            raise self._error(f"observers has {key!r}, which quantizes nothing; there are {', '.join(self._observed)}.")
        for name, steps in self._traced.graph.steps().items():
            if steps:
                raise self._error(
                    f"op {name!r} stands for {' x '.join(map(str, steps))} layers, the steps of a scan, and a torch module is "
                    "one layer. Write the layers of the function out as a Python loop."
                )

    def plan(self, quantize: str | None) -> ModelPlan:
        found: dict[str, Module] = {}
        for graph in self._plain.graph.all():
            finder = Finder(graph)
            for node in graph.nodes:
                if node.op is not None and node.op.name in self._modules:
                    found[node.op.name] = self._module(graph, finder, node, node.op)
        self._check_covered(found.values())
        known = {key for module in found.values() for site in module.sites for key in site.keys}
        if self._stage == "prepared":  # torch observes weights when it converts
            known |= {f"{name}/weight" for name in found}
        rest = [key for key in self._observed if key not in known]
        entry = self._entry(rest, quantize)
        ordered = tuple(found[name] for name in self._modules)  # the order of modules is that of the torch model
        return ModelPlan(entry, ordered)

    def _check_covered(self, modules: Any) -> None:
        covered = {t.leaf for module in modules for t in module.tensors if not isinstance(t, Fixed)}
        floats = [i for i, dtype in enumerate(self._dtypes) if jnp.issubdtype(dtype, jnp.floating)]
        left = ["/".join(self._paths[index]) for index in floats if index not in covered]
        if left:
            raise self._error(
                f"the parameters {', '.join(left)} belong to no op that becomes a torch module. A batch norm does where its op "
                'has a rule with batch_norm="fold_if_present"; what else there is cannot be handed over.'
            )

    # -- one op ------------------------------------------------------------------------------------------------------

    def _module(self, graph: Graph, finder: Finder, node: Node, op: Op) -> Module:
        module, rule = self._modules[op.name], self._rules.get(op.name)
        if isinstance(module, FloatFunctional):
            return Module(module.name, (), None, tuple(self._sites(op, module, None)), 1)
        norm = None
        if rule is not None and rule.batch_norm is not None:
            found = finder.find(node)
            norm = found if isinstance(found, BatchNorm) else None
        self._check_is_module(op, module, norm)
        is_fused = self._stage == "prepared" and self._has_relu(op.name) and not _is_transposed(module)
        start = f"{module.name}.0" if is_fused else module.name
        weight = self._weight(op, module, member(start, "weight"))
        tensors: list[AnyTensor] = [weight]
        outputs = math.prod(op.shapes[2][axis] for axis in output_axes(op))
        bias = norm.op_bias if norm is not None else self._bias(graph, op.name)
        if bias is not None:
            # What a batch norm is made of lies along the channels, which finding it has checked.
            added_to = node if norm is None else None
            tensors.append(self._vector(graph, bias, member(start, "bias"), outputs, op.name, added_to))
        bn = None
        if norm is not None:
            if self._stage == "prepared":
                raise self._error(
                    f"op {op.name!r} has a batch norm behind it; torch folds it before it calibrates. Take "
                    "qjax.fold_batch_norm(fn, params, ...), and prepare the function that it returns."
                )
            bn = member(module.name, "bn")
            tensors += self._norm(graph, norm, bn, outputs, op.name)
        sites = tuple(self._sites(op, module, weight))
        return Module(
            module.name, tuple(tensors), bn, sites, 2 if norm is not None and isinstance(module, ConvModule) else 1
        )

    def _check_is_module(self, op: Op, module: TorchModule, norm: BatchNorm | None) -> None:
        """Raise where torch observes an op in no module, or in front of its ReLU."""
        roles = [role for role in ("weight", "output") if f"{op.name}/{role}" in self._observed]
        without = isinstance(module, Conv1d) and norm is None
        if self._stage == "qat_prepared" and roles and (_is_transposed(module) or without):
            raise self._error(
                f"op {op.name!r} becomes a {module.kind}{' without a batch norm' if without else ''}, which torch's "
                "prepare_qat leaves in float: it fake-quantizes Conv2d, Conv3d and Linear, and a Conv1d with its batch norm. "
                "Give the op a rule without quantizers, or take qjax.recipes.torch_static and ptq_prepared."
            )
        what = f"a {module.kind}" if _is_transposed(module) else f"a {module.kind} with a batch norm"
        unfused = _is_transposed(module) or (isinstance(module, Linear) and norm is not None)
        if unfused and "output" in roles and self._has_relu(op.name):
            raise self._error(
                f"op {op.name!r} is followed by a ReLU, which torch does not fuse with {what}: it observes the output in "
                f"front of the ReLU, and this function behind it. Give the op a rule with output=None."
            )

    def _has_relu(self, name: str) -> bool:
        return any(g.epilogues[name].relu for g in self._traced.graph.all() if name in g.epilogues)

    def _bias(self, graph: Graph, name: str) -> Operand | None:
        epilogue = graph.epilogues.get(name)
        return None if epilogue is None else epilogue.bias

    def _weight(self, op: Op, module: TorchModule, key: str) -> Tensor:
        path = op.path or ()
        if op.order is None or path not in self._leaves:
            raise self._error(
                f"the weight of {op.name} is not a parameter as it is, transposed at most, but made of {'/'.join(path)}. Keep "
                "the parameter in the shape in which the op takes it."
            )
        return self._tensor(key, path, op.order, layout_of(op, module, self._caller))

    def _tensor(self, key: str, path: Path, order: tuple[int, ...], layout: Layout) -> Tensor:
        return Tensor(key, self._leaf(key, path), "/".join(path), order, layout)

    def _leaf(self, key: str, path: Path) -> int:
        leaf = self._leaves[path]
        if self._dtypes[leaf] != jnp.float32:
            raise self._error(
                f"the parameter {'/'.join(path)} is {self._dtypes[leaf]}; torch's {key} is float32. Keep master weights in "
                "float32, and cast them in the function."
            )
        return leaf

    def _vector(
        self, graph: Graph, operand: Operand, key: str, size: int, op: str, added_to: Node | None = None
    ) -> Vector:
        """A parameter with a number for each output, along the outputs of the node that it is added to."""
        held = places_of(graph, operand, dict(zip(self._leaves, self._shapes, strict=True)))
        if held is None:
            path = None if not isinstance(operand, int) else graph.known(operand).path
            made = "from parameters" if path is None else f"from {'/'.join(path)}, which is no parameter as it is"
            raise self._error(f"{key} of {op} is computed {made}. Keep it as a parameter of its own.")
        path, places = held
        along = places.reshape(-1) if added_to is None else outputs_of(graph, added_to, operand, places)
        return self._numbers(key, path, along, size, op)

    def _numbers(self, key: str, path: Path, places: np.ndarray | None, size: int, op: str) -> Vector:
        """The numbers of a parameter in this order; None where they are not added along the outputs."""
        leaf = self._leaf(key, path)
        shape = self._shapes[leaf]
        if math.prod(shape) != size or places is None or len(places) != size:
            raise self._error(
                f"{'/'.join(path)} of {op} has shape {shape}{'' if places is not None else ', not along the outputs'}; "
                f"torch's {key} has one number for each of {size} outputs."
            )
        return Vector(key, leaf, "/".join(path), shape, places)

    # -- batch norm --------------------------------------------------------------------------------------------------

    def _norm(self, graph: Graph, norm: BatchNorm, bn: str, size: int, op: str) -> Iterator[AnyTensor]:
        for name, operand, value in (("weight", norm.scale, 1.0), ("bias", norm.bias, 0.0)):
            key = member(bn, name)
            yield Fixed(key, value, size) if operand is None else self._vector(graph, operand, key, size, op)
        if not norm.of_batch:
            for name, operand in (("running_mean", norm.mean), ("running_var", norm.var)):
                yield self._vector(graph, operand, member(bn, name), size, op)
            return
        assert norm.running_var is not None
        variance = graph.weights[norm.running_var]
        place = max(i for i, part in enumerate(variance) if _VARIANCE.search(part))
        mean = (*variance[:place], _VARIANCE.sub("mean", variance[place]), *variance[place + 1 :])
        if mean not in self._leaves:
            raise self._error(
                f"the running mean beside {'/'.join(variance)} was not found: there is no parameter {'/'.join(mean)}. Give the "
                "arguments of inference, under which the function reads it."
            )
        for name, path in (("running_mean", mean), ("running_var", variance)):
            yield self._numbers(
                member(bn, name), path, np.arange(math.prod(self._shapes[self._leaves[path]])), size, op
            )

    # -- quantizers --------------------------------------------------------------------------------------------------

    def _sites(self, op: Op, module: TorchModule, weight: Tensor | None) -> Iterator[Site]:
        for role in ("weight", "output"):
            key = f"{op.name}/{role}"
            if key not in self._observed:
                continue
            if role == "weight" and self._stage == "prepared":
                if not self._observed[key][0].dynamic:
                    raise self._error(
                        f"{key!r} is observed by {type(self._observed[key][0]).__name__}; torch observes a weight when it "
                        "converts it, which is observers.dynamic, as qjax.recipes.torch_static has it."
                    )
                continue
            name = OBSERVER if role == "output" else "weight_fake_quant"
            yield self._site((key,), member(module.name, name), weight if role == "weight" else None)

    def _site(self, keys: tuple[str, ...], path: str, weight: Tensor | None) -> Site:
        quantizer = self._observed[keys[0]][0]
        granularity, size = quantizer.spec.granularity, None
        if isinstance(granularity, PerChannel) and weight is not None:
            size = _outputs(weight.layout, granularity)
        if size is None and not isinstance(granularity, PerTensor):
            raise self._error(
                f"{keys[0]!r} is quantized {granularity}; torch's observers have one range for a tensor, or one for each "
                'output of a weight, which is PerChannel("output").'
            )
        name, _, role = keys[0].rpartition("/")
        behind_relu = role == "output" and self._has_relu(name)
        site = Site(keys, self._observers.get(keys[0], path), quantizer, size, behind_relu)
        check_site(site, self._stage, self._caller)
        return site

    def _entry(self, keys: list[str], quantize: str | None) -> Site | None:
        """The quantizers of the model's input, which is one module in torch."""
        inputs: dict[Operand, list[str]] = {}
        for key in keys:
            inputs.setdefault(self._input(key), []).append(key)
        if len(inputs) > 1:
            raise self._error(
                f"the inputs of {', '.join(map(op_of, keys))} are different values, and torch has one module, the QuantStub "
                "at the model's entry, for both. Apply one function to the input in front of all ops."
            )
        if not keys:
            return None
        if quantize is None and keys[0] not in self._observers:
            raise self._error(
                f"{keys[0]!r} quantizes the model's input, for which torch has a QuantStub: say its name, as in "
                "quantize='quant'. Or give the op a rule with input=None."
            )
        quantizers = {self._observed[key][0] for key in keys}
        if len(quantizers) > 1:
            raise self._error(
                f"{' and '.join(map(repr, keys))} quantize one value in different ways; torch's QuantStub has one."
            )
        return self._site(tuple(keys), member(quantize or "", OBSERVER), None)

    def _input(self, key: str) -> Operand:
        name, _, role = key.rpartition("/")
        graph = self._traced.graph
        node = next((node for node in graph.nodes if node.op is not None and node.op.name == name), None)
        if role != "input" or node is None or node.op is None or node.op.weight is None:
            raise self._error(
                f"{key!r} has no counterpart in torch: it quantizes the output of a module, and the model's input. Give the op "
                f"a rule with {role}=None."
            )
        operand = node.inputs[1 - node.op.weight]
        if not _is_of_arguments(self._traced, operand):
            raise self._error(
                f"the input of {name} is quantized by itself ({key}), not by the op that makes it, and torch has no module "
                "that requantizes there (such as after a tanh or an average): its modules quantize what they put out. Give "
                "the op before it a rule with output=..., and have only pools, reshapes and a ReLU between the two; or this "
                "op one with input=None."
            )
        return operand


def _is_transposed(module: TorchModule) -> bool:
    return isinstance(module, ConvModule) and module.transposed


def _outputs(layout: Layout, granularity: PerChannel) -> int | None:
    """How many outputs there are where those are the channels; None where the channels are others."""
    if len(granularity.axes) != 1:
        return None
    axis = granularity.axes[0] % len(layout.parts)
    first = sum(map(len, layout.parts[:axis]))
    return layout.shape[0] if layout.axes[0] == tuple(range(first, first + len(layout.parts[axis]))) else None


def _is_of_arguments(traced: Trace, operand: Operand) -> bool:
    """Whether a value is computed from arguments and constants alone, and without an op: it is the input of the model."""
    producers = {output: node for node in traced.graph.nodes for output in node.outputs}
    rest, seen = [operand], set[int]()
    while rest:
        value = rest.pop()
        if not isinstance(value, int) or value in seen:
            continue
        seen.add(value)
        node = producers.get(value)
        if value in traced.graph.weights or (node is not None and (node.op is not None or node.bodies)):
            return False
        rest += [] if node is None else node.inputs
    return True
