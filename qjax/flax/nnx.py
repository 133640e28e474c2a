"""Flax NNX: a module prepared in one line, which holds the float module and what the quantizers know as Variables.

Observer states are `QuantState`, as running averages are `nnx.BatchStat`; learned parameters of quantizers are `QuantParam`,
a kind of `nnx.Param`, so that `nnx.grad` and `nnx.Optimizer(..., wrt=nnx.Param)` train them beside the weights. Each Variable
holds one array.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, get_args

import jax
from flax import nnx

from qjax._quantize import QTensor
from qjax._requantize import Engines
from qjax.flax._arguments import refuse_arrays, split_arrays
from qjax.integer import IntegerProgram
from qjax.integer import convert as convert_function
from qjax.transform import OpTable, QuantVars, Recipe
from qjax.transform import prepare as prepare_function
from qjax.transform._interpret import Compute
from qjax.transform._prepare import CallMode, Derived, Prepared

Variables = Mapping[str, nnx.State]


class QuantState(nnx.Variable):
    """What an observer knows: statistics, which change as a module is called and which no gradient moves."""


class QuantParam(nnx.Param):
    """A learned parameter of a quantizer, such as the scale of LSQ; an optimizer trains it as it does any `nnx.Param`."""


def prepare(
    module: nnx.Module,
    recipe: Recipe,
    *args: Any,
    compute: Compute = "codes",
    engine: Engines = "fbgemm",
    derived_weights: Derived = "activation",
    **kwargs: Any,
) -> PreparedModule:
    """Quantize an NNX module without editing it; see `qjax.prepare` for what is quantized and how ops are named.

    Args:
      module: Any NNX module. It is held, not copied: training the prepared module trains it.
      recipe: Which ops are quantized how; an op is named after its weight's path in the module, such as `"layers/0"`.
      *args: What the module is called with; only shapes matter, so a `jax.ShapeDtypeStruct` will do.
      compute: `"codes"` or `"dequantized"`, as in `qjax.prepare`.
      engine: Whose kernels inference and `convert` compute, as in `qjax.prepare`.
      derived_weights: `"activation"` or `"weight"`, as in `qjax.prepare`.
      **kwargs: What the module is called with.

    Returns:
      A `PreparedModule` in mode "train".

    Raises:
      TypeError: module is no NNX module, or recipe no Recipe.
      qjax.RecipeError: A rule matches no op.
      ValueError: An unknown `compute`, `engine` or `derived_weights`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, qjax
      >>> from flax import nnx
      >>> rngs, x = nnx.Rngs(0), jnp.ones((8, 3))
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.relu, nnx.Linear(4, 2, rngs=rngs))
      >>> q = qjax.flax.nnx.prepare(model, qjax.recipes.torch_qat("x86"), x)
      >>> [op.name for op in q.ops(x)]
      ['layers/0', 'layers/2']
      >>> optimizer = nnx.Optimizer(q, optax.sgd(0.1), wrt=nnx.Param)
      >>> @nnx.jit
      ... def step(q, optimizer, x):
      ...     loss, grads = nnx.value_and_grad(lambda q: (q(x) ** 2).mean())(q)
      ...     optimizer.update(q, grads)
      ...     return loss
      >>> bool(step(q, optimizer, x) > step(q, optimizer, x))
      True
      >>> q.eval()
      >>> integer = q.convert(x)
      >>> bool((integer(x) == q(x)).all())
      True
    """
    if not isinstance(module, nnx.Module):
        raise TypeError(
            f"qjax.flax.nnx.prepare: module must be a flax.nnx.Module, got {type(module).__name__}. For a Linen module there "
            "is qjax.flax.linen.prepare, for a function qjax.prepare."
        )
    prepare_function(
        module.__call__, recipe, compute=compute, engine=engine, derived_weights=derived_weights
    )  # for its errors
    return PreparedModule(module, recipe, compute, engine, derived_weights, args, kwargs)


class PreparedModule(nnx.Module):
    """An NNX module that is quantized; see `prepare`. Called like the module that it holds.

    `train()` and `eval()` switch what NNX's switch in the module (dropout, batch norm) and the quantizers with them, also when
    they are called on a module that this one is part of; `calibrate()` is the third position of the switch.

    Attributes:
      module: The float module.
      mode: "calibrate": observe, and compute in float; "train": observe and quantize; "eval": quantize, frozen.
      quant_state: The observer states, a `QuantState` for each of their arrays, such as `"conv/input/min_val"`.
      quant_params: The learned parameters of quantizers, a `QuantParam` for each; empty where nothing is learned.
    """

    mode: CallMode

    def __init__(
        self,
        module: nnx.Module,
        recipe: Recipe,
        compute: Compute,
        engine: Engines,
        derived_weights: Derived,
        args: Any,
        kwargs: Any,
    ) -> None:
        self.module = module
        self.recipe = recipe
        self.compute: Compute = compute
        # Pairs, since what is static in a module is hashed.
        self._engine: Any = tuple(sorted(engine.items())) if isinstance(engine, Mapping) else engine
        self.derived_weights: Derived = derived_weights
        self.mode = "train"
        call, operands = self._call(args, kwargs)
        qvars = call.init(*operands)
        self.quant_params, self._params_layout = _to_variables(qvars.params, QuantParam)
        self.quant_state, self._state_layout = _to_variables(qvars.state, QuantState)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns, quantized as `mode` says; the module's own state changes as it does in float.

        Raises:
          ValueError: An unknown mode, or "eval" before anything was observed.
        """
        if self.mode not in get_args(CallMode):
            raise ValueError(
                f"qjax.flax.nnx: unknown mode {self.mode!r}; the modes are {', '.join(get_args(CallMode))}."
            )
        call, operands = self._call(args, kwargs)
        (out, state), qvars = call(self.qvars(), *operands, mode=self.mode)
        nnx.update(self.module, state)
        if self.mode != "eval":
            self._params_layout.write(self.quant_params, qvars.params)
            self._state_layout.write(self.quant_state, qvars.state)
        return out

    def calibrate(self) -> None:
        """Switch to mode "calibrate", and the module as `eval` does, so that it is called as in inference."""
        self.eval()
        self.mode = "calibrate"

    @property
    def use_running_average(self) -> bool:
        """Whether the quantizers are frozen; `nnx.Module.train` and `eval` set attributes of this name."""
        return self.mode == "eval"

    @use_running_average.setter
    def use_running_average(self, value: bool) -> None:
        self.mode = "eval" if value else "train"

    def set_view(self, mode: CallMode | None = None, use_running_average: bool | None = None) -> None:
        """For `nnx.view`, which gives a module of the same arrays with other switches: `nnx.view(q, mode="eval")`.

        Args:
          mode: Of the quantizers alone.
          use_running_average: Of the quantizers and, as the name says, of batch norms.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        if mode is not None:
            self.mode = mode

    def codes(self, *args: Any, **kwargs: Any) -> dict[str, QTensor]:
        """Return the integer codes at every quantizer in mode "eval", by `"op/role"`; nothing changes."""
        call, operands = self._call(args, kwargs)
        return call.codes(self.qvars(), *operands)

    def ops(self, *args: Any, **kwargs: Any) -> OpTable:
        """Return the table of the ops of the module and what the recipe makes of each; only shapes matter."""
        call, operands = self._call(args, kwargs)
        return call.ops(*operands)

    def convert(self, *args: Any, **kwargs: Any) -> IntegerProgram:
        """Return the integer program of the module for inference, a function of `*args`; see `qjax.convert`.

        The same as `qjax.convert(q.function(**kwargs), q.qvars(), q.variables(), *args)`.

        Args:
          *args: Example values or `jax.ShapeDtypeStruct`.
          **kwargs: Flags that inference takes; the program has them built in.

        Raises:
          TypeError: A keyword argument holds an array.
          ValueError: As for `qjax.convert`.
        """
        return convert_function(self.function(**kwargs), self.qvars(), self.variables(), *args)

    def function(self, **kwargs: Any) -> Prepared:
        """Return inference as a prepared function of `(variables, *args)`, for what takes one, such as `qjax.convert`.

        Args:
          **kwargs: Keyword arguments of the module that are no arrays; they are built in.

        Raises:
          TypeError: A keyword argument holds an array.
        """
        refuse_arrays(kwargs, "qjax.flax.nnx", "Wrap the module in one whose __call__ takes it by position.")
        module = nnx.clone(self.module)
        module.eval()
        structure = nnx.graphdef(module)

        def fn(variables: Variables, *args: Any) -> Any:
            return nnx.merge(structure, *variables.values())(*args, **kwargs)

        return self._prepare(fn)

    def variables(self) -> dict[str, nnx.State]:
        """Return the float module's parameters, which are its weights, and all else that it holds."""
        _, params, rest = nnx.split(self.module, nnx.Param, ...)
        return {"params": params, "rest": rest}

    def qvars(self) -> QuantVars:
        """Return what the quantizers know as `qjax.QuantVars`."""
        return QuantVars(self._params_layout.read(self.quant_params), self._state_layout.read(self.quant_state))

    @property
    def engine(self) -> Engines:
        """Whose kernels inference and `convert` compute."""
        return dict(self._engine) if isinstance(self._engine, tuple) else self._engine

    def _prepare(self, fn: Callable[..., Any]) -> Prepared:
        return prepare_function(
            fn, self.recipe, compute=self.compute, engine=self.engine, derived_weights=self.derived_weights
        )

    def _call(self, args: Any, kwargs: Any) -> tuple[Prepared, tuple[Any, ...]]:
        """The prepared function of variables and arrays, which returns the module's state too, and its operands."""
        arrays, restore = split_arrays(args, kwargs)
        structure = nnx.graphdef(self.module)

        def fn(variables: Variables, arrays: list[Any]) -> Any:
            args, kwargs = restore(arrays)
            before = _leaves_by_path(
                variables["rest"]
            )  # now: the module that is merged from it may share its Variables
            module = nnx.merge(structure, *variables.values())
            out = module(*args, **kwargs)
            return out, _changed(nnx.state(module, nnx.Not(nnx.Param)), before)

        return self._prepare(fn), (self.variables(), arrays)


def _leaves_by_path(state: nnx.State) -> dict[Any, list[Any]]:
    return {path: jax.tree.leaves(variable) for path, variable in nnx.to_flat_state(state)}


def _changed(state: nnx.State, before: Mapping[Any, list[Any]]) -> nnx.State:
    """What a call has changed of a module's state: it alone is written back, as the module itself would have done."""

    def is_same(path: Any, variable: Any) -> bool:
        leaves, old = jax.tree.leaves(variable), before.get(path, [])
        return len(leaves) == len(old) and all(leaf is other for leaf, other in zip(leaves, old, strict=True))

    return nnx.from_flat_state([each for each in nnx.to_flat_state(state) if not is_same(*each)])


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How the Variables of an `nnx.Dict`, which has an order of its own, make up a tree."""

    names: tuple[str, ...]
    structure: Any

    def read(self, variables: nnx.Dict) -> Any:
        return jax.tree.unflatten(self.structure, [variables[name].get_value() for name in self.names])

    def write(self, variables: nnx.Dict, tree: Any) -> None:
        for name, leaf in zip(self.names, jax.tree.leaves(tree), strict=True):
            variables[name].set_value(leaf)


def _to_variables(tree: Any, kind: type[nnx.Variable]) -> tuple[nnx.Dict, _Layout]:
    """Each array of a dict of states as a Variable that is named by its path, and their layout."""
    with_path, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = tuple(jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in with_path)
    variables = {name: kind(leaf) for name, (_, leaf) in zip(names, with_path, strict=True)}
    return nnx.Dict(variables), _Layout(names, structure)


__all__ = ["PreparedModule", "QuantParam", "QuantState", "prepare"]
