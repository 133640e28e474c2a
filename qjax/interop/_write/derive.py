"""From the ops of a program to the torch modules that they become, where the structure says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qjax.integer import IntegerProgram
from qjax.interop._write.flow import Unknown, flattened_of, linear_inputs
from qjax.interop._write.modules import CONVS, Embedding, FloatFunctional, Linear, OpGeometry, TorchModule
from qjax.transform._contraction import Conv, Dot
from qjax.transform._prepare import Prepared
from qjax.transform._trace import Op, Trace

#: Elementwise ops that torch has in its `FloatFunctional`.
FUNCTIONAL = ("add", "mul")
Names = Mapping[str, str] | Callable[[str], str]


def torch_modules(
    program: IntegerProgram | Prepared,
    *args: Any,
    names: Names | None = None,
    flattened: Mapping[str, tuple[int, ...] | None] | None = None,
) -> dict[str, TorchModule]:
    """Say which torch module each op of a program becomes, as far as its structure tells.

    | op                                                                        | module                             |
    |---------------------------------------------------------------------------|------------------------------------|
    | a convolution with a weight, of 1 to 3 spatial axes                       | `Conv1d`, `Conv2d`, `Conv3d`       |
    | one that dilates its input                                                | `ConvTranspose1d`, 2d, 3d          |
    | a dot whose right operand is a weight, without batch axes                 | `Linear`                           |
    | an embedding                                                              | `Embedding`                        |
    | an addition or a product of activations whose output is quantized         | `FloatFunctional`                  |

    A `Linear` whose input is the feature map of a convolution, flattened with its channels last, has to know the sizes of that
    map, because torch flattens channels first. They are found by following the values of the traced function from the
    convolution through pools, elementwise functions, transposes and reshapes.

    Args:
      program: From `qjax.convert`, whose quantized ops are listed; or from `qjax.prepare`, where those are that its recipe
        quantizes.
      *args: Of a prepared function the arguments, parameters included (shapes only matter); left out, those of its last call.
      names: What the modules are called, by op, or a function from the op's name to the module's. An op that is not named is
        called what it is called here, with dots in the place of slashes.
      flattened: By op, what `Linear(flattened=...)` is to say where the structure does not tell: the sizes of the feature map,
        channels last; None where the axes are in one order here and in torch.

    Returns:
      The module of each op, by the op's name; a dict to change, and to hand to the writers as `modules`.

    Raises:
      TypeError: program is something else.
      ValueError: An op has no torch module, or it cannot be told how its input was flattened; names or flattened name an op
        that there is not; or two ops would become one module.

    Examples:
      >>> import jax.numpy as jnp, qjax
      >>> params = {"fc1": {"w": jnp.ones((4, 3))}, "fc2": {"w": jnp.ones((3, 2))}}
      >>> prepared = qjax.prepare(lambda p, x: x @ p["fc1"]["w"] @ p["fc2"]["w"], qjax.recipes.torch_static())
      >>> qjax.interop.torch_modules(prepared, params, jnp.ones((1, 4)), names={"fc2": "head.out"})
      {'fc1': Linear(name='fc1', flattened=None), 'fc2': Linear(name='head.out', flattened=None)}
    """
    traced, wanted = traced_ops(program, args, "torch_modules")
    ops = {op.name: op for op in traced.graph.ops() if op.name in wanted}
    for what, given in (("names", names if isinstance(names, Mapping) else {}), ("flattened", flattened or {})):
        for name in given.keys() - ops.keys():
            raise ValueError(
                f"torch_modules: {what} has {name!r}, which is no op that is quantized; these are {', '.join(ops) or 'none'}."
            )
    places = linear_inputs(traced.graph)
    found: dict[str, TorchModule] = {}
    for name, op in ops.items():
        module = _name(name, names)
        found[name] = _module(op, module)
        if isinstance(found[name], Linear):
            sizes = flattened[name] if flattened is not None and name in flattened else flattened_of(places, name)
            if isinstance(sizes, Unknown):
                raise ValueError(
                    f"torch_modules: it cannot be told in which order {name} takes its inputs in torch: {sizes.why}. Say it: "
                    f"flattened={{{name!r}: (height, width, channels)}} if the inputs are a feature map that torch has with "
                    f"its channels first, flattened={{{name!r}: None}} if torch has them in this order."
                )
            found[name] = Linear(module, flattened=sizes)
    by_name: dict[str, str] = {}
    for name, module in found.items():
        if module.name in by_name:
            raise ValueError(
                f"torch_modules: {by_name[module.name]} and {name} would both become the module {module.name!r}. Name one of "
                f"them otherwise: names={{{name!r}: ...}}."
            )
        by_name[module.name] = name
    return found


def traced_ops(program: Any, args: tuple[Any, ...], caller: str) -> tuple[Trace, set[str]]:
    """The traced function of a program or of a prepared function, and the names of the ops that are quantized."""
    if isinstance(program, IntegerProgram):
        if args:
            raise TypeError(f"{caller}: a converted program knows its arguments; leave them out.")
        traced, weighted = program.trace(), {op.name for op in program.ops}
        return traced, weighted | {
            op.name for op in traced.graph.ops() if op.kind in FUNCTIONAL and f"{op.name}/output" in program.points
        }
    if not isinstance(program, Prepared):
        raise TypeError(f"{caller}: expected what qjax.convert or qjax.prepare returns, got {type(program).__name__}.")
    whole = args or program.signature
    if not whole:
        raise ValueError(
            f"{caller}: the shapes of the arguments are not known, since this prepared function was never called. Pass them: "
            f"{caller}(prepared, params, x)."
        )
    table = {op.name: op for op in program.ops(*whole)}
    traced = program.trace(*whole)
    return traced, {
        op.name for op in traced.graph.ops() if op.weight is not None and "weight" in table[op.name].quantizers
    }


def _name(op: str, names: Names | None) -> str:
    given = names.get(op) if isinstance(names, Mapping) else None if names is None else names(op)
    return op.replace("/", ".").replace(":", "_") if given is None else given


def _module(op: Op, name: str) -> TorchModule:
    if op.kind in FUNCTIONAL:
        return FloatFunctional(name)
    geometry = OpGeometry.of(op)
    if isinstance(op.contraction, Conv):
        kind = CONVS.get((len(op.contraction.padding), geometry.is_transposed))
        if kind is not None and op.weight == 1:
            return kind(name)
    elif op.lookup is not None:
        if len(geometry.shape) == 2 and op.lookup.axes == (0,):
            return Embedding(name)
    elif isinstance(op.contraction, Dot) and op.weight == 1 and not op.contraction.batch[1]:
        return Linear(name)
    raise ValueError(
        f"torch_modules: torch has no quantized module for {op.name}, a {op.kind} of operands {op.shapes[0]} and "
        f"{op.shapes[1]} whose weight is operand {op.weight}. A Linear wants x @ w, a convolution its kernel on the right, an "
        "embedding rows of a matrix. Leave the op in float, or write it so."
    )
