"""Which parameters of a program a file of its layers would lose, though its outputs depend on them."""

from __future__ import annotations

from collections.abc import Collection

from qjax.integer import IntegerProgram
from qjax.integer._convert import needed_inputs
from qjax.transform import Prepared
from qjax.transform._names import leaf_paths
from qjax.transform._trace import Graph, Node


def check_left_out(program: IntegerProgram, left_out: Collection[str], caller: str) -> None:
    """Raise where the outputs depend on parameters that are no weight and no bias of a layer.

    Layers that are left in float are no concern of a file of quantized ones: a model that has them misses their tensors.

    Args:
      program: From `qjax.convert`.
      left_out: Parameters that may be missing, or what they lie under, such as "norm/scale" and "norm".
      caller: For messages.

    Raises:
      TypeError: left_out is a str, or holds something else.
      ValueError: Parameters would be missing, or one is left out that there is not.
    """
    if isinstance(left_out, str) or not all(isinstance(path, str) for path in left_out):
        raise TypeError(f"{caller}: left_out must hold paths of parameters, such as ('norm/scale',), got {left_out!r}.")
    prepared, traced = program._prepared, program.trace()
    place = prepared.params_argnum
    paths = leaf_paths((*program._signature[:place], program._params_shape), place)
    start = len(Prepared.array_leaves(program._signature[:place]))
    layers = {op.name for op in traced.graph.ops() if op.weight is not None}
    needed = (
        needed_inputs(traced.graph, layers, lambda graph: _biases(graph, layers))
        - prepared.recipe.bind(traced).tied.keys()
    )
    used = ["/".join(path) for i, path in paths.items() if traced.graph.inputs[start + i - min(paths)] in needed]
    known = ["/".join(path) for path in paths.values()]
    for path in left_out:
        if not any(_lies_under(each, path) for each in known):
            raise ValueError(
                f"{caller}: left_out has {path!r}, but there is no such parameter; there are {', '.join(known)}."
            )
    lost = [path for path in used if not any(_lies_under(path, each) for each in left_out)]
    if lost:
        raise ValueError(
            f"{caller}: the outputs depend on the parameters {', '.join(lost)}, which are no weight and no bias of a layer: "
            "the file would not hold them, and a torch model that loads it would compute something else. A bias is added right "
            "behind its op, once: write x @ w - b as x @ w + (-b), and (x @ w) * s as x @ (w * s); fold a batch norm "
            "(qjax.fold_batch_norm). Where the torch model gets them in another way, as those of a layer norm, say so: "
            f"left_out=({lost[0]!r}, ...)."
        )


def _lies_under(path: str, above: str) -> bool:
    return path == above or path.startswith(f"{above}/")


def _biases(graph: Graph, layers: Collection[str]) -> dict[int, int]:
    """By the sum with a layer's bias, that bias."""
    makers: dict[int, Node] = {output: node for node in graph.nodes for output in node.outputs}
    found: dict[int, int] = {}
    for name, epilogue in graph.epilogues.items():
        if name not in layers or epilogue.bias is None:
            continue
        value = epilogue.end
        # From the end back to the sum there are casts, a ReLU and axes of size 1, each of which takes one value.
        while epilogue.bias not in makers[value].inputs:
            value = next(each for each in makers[value].inputs if isinstance(each, int))
        found[value] = epilogue.bias
    return found
