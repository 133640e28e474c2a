"""Flax Linen: a module prepared in one line, with the `init` and `apply` that a Linen user knows.

What the quantizers know is a collection of the variables, `"quant"`, as the running averages of a batch norm are: it is handed
in with the others, comes back where it is mutable, and goes wherever variables go (TrainState, checkpoints, replication)
without a second thing to carry around. `module.apply` ignores it, so one set of variables serves the float and the quantized
model. Learned quantizer parameters (a scale that is trained) are a collection of their own, `"quant_params"`, so that gradients
and optax take them beside `"params"`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn
from flax.core.scope import DenyList, in_filter

from qjax._quantize import QTensor
from qjax._requantize import Engines
from qjax.flax._arguments import refuse_arrays, split_arrays
from qjax.integer import IntegerProgram
from qjax.integer import convert as convert_function
from qjax.transform import OpTable, QuantVars, Recipe
from qjax.transform import prepare as prepare_function
from qjax.transform._interpret import Compute
from qjax.transform._prepare import CallMode, Derived, Prepared

QUANT = "quant"  # observer states, by quantizer
QUANT_PARAMS = "quant_params"  # learned parameters of quantizers; there only if there are any

Variables = Mapping[str, Any]


def prepare(
    module: nn.Module,
    recipe: Recipe,
    *,
    compute: Compute = "codes",
    engine: Engines = "fbgemm",
    derived_weights: Derived = "activation",
) -> PreparedModule:
    """Quantize a Linen module without editing it; see `qjax.prepare` for what is quantized and how ops are named.

    Args:
      module: Any Linen module.
      recipe: Which ops are quantized how; an op is named after its module's path, such as `"encoder/Dense_0"`.
      compute: `"codes"` or `"dequantized"`, as in `qjax.prepare`.
      engine: Whose kernels inference and `convert` compute, as in `qjax.prepare`.
      derived_weights: `"activation"` or `"weight"`, as in `qjax.prepare`.

    Returns:
      A `PreparedModule`.

    Raises:
      TypeError: module is no Linen module, or recipe no Recipe.
      ValueError: An unknown `compute`, `engine` or `derived_weights`.

    Examples:
      Where a training loop says `model.init` and `model.apply`, it now says `q.init` and `q.apply`:

      >>> import jax, jax.numpy as jnp, qjax
      >>> from flax import linen as nn
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, train=False):
      ...         x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
      ...         return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))
      >>> q = qjax.flax.linen.prepare(Net(), qjax.recipes.torch_qat("x86"))
      >>> x = jnp.ones((8, 3))
      >>> variables = jax.jit(q.init)(jax.random.key(0), x)
      >>> sorted(variables)
      ['batch_stats', 'params', 'quant']
      >>> @jax.jit
      ... def step(variables, x, key):
      ...     mutable, rngs = ["batch_stats", "quant"], {"dropout": key}
      ...     out, updates = q.apply(variables, x, train=True, mutable=mutable, rngs=rngs)
      ...     return {**variables, **updates}
      >>> variables = step(variables, x, jax.random.key(1))
      >>> integer = q.convert(variables, x, train=False)
      >>> bool((jax.jit(integer)(x) == jax.jit(q.apply)(variables, x)).all())
      True
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"qjax.flax.linen.prepare: module must be a flax.linen.Module, got {type(module).__name__}. For an NNX module "
            "there is qjax.flax.nnx.prepare, for a function qjax.prepare."
        )
    prepared = PreparedModule(
        module, recipe, compute, dict(engine) if isinstance(engine, Mapping) else engine, derived_weights
    )
    prepared._prepare(module.apply)  # for its errors
    return prepared


@dataclasses.dataclass(frozen=True)
class PreparedModule:
    """A Linen module that is quantized; see `prepare`. It holds no arrays, and compares equal by what it is made of."""

    module: nn.Module
    recipe: Recipe
    compute: Compute = "codes"
    engine: Engines = dataclasses.field(default="fbgemm", hash=False)  # a mapping has no hash
    derived_weights: Derived = "activation"

    def init(self, rngs: Any, *args: Any, method: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Return the variables of `module.init(rngs, *args, **kwargs)` and those of the quantizers."""
        variables = self.module.init(rngs, *args, method=method, **kwargs)
        return self.init_quant(variables, *args, rngs=rngs, method=method, **kwargs)

    def init_quant(
        self, variables: Variables, *args: Any, rngs: Any = None, method: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the variables with quantizers that have observed nothing: for a model that was trained in float.

        Args:
          variables: Of the module, from `module.init` or a checkpoint; what it has of `"quant"` is replaced.
          *args: As for `module.apply`; only shapes matter.
          rngs: As for `module.apply`.
          method: As for `module.apply`.
          **kwargs: As for `module.apply`.

        Raises:
          qjax.RecipeError: A rule matches no op.
        """
        call, arrays = self._call(args, kwargs, method, DenyList("params"))
        qvars = call.init(_float(variables), arrays, rngs)
        return {**_float(variables), **_collections(qvars)}

    def apply(
        self,
        variables: Variables,
        *args: Any,
        rngs: Any = None,
        method: Any = None,
        mutable: Any = False,
        mode: CallMode | None = None,
        **kwargs: Any,
    ) -> Any:
        """Evaluate the quantized module; arguments and results are those of `module.apply`.

        Args:
          variables: All collections of the module, and `"quant"`.
          *args: For the module.
          rngs: Keys by name, such as `{"dropout": key}`.
          method: Which method of the module to call, as for `module.apply`.
          mutable: Which collections are handed back changed. With `"quant"` among them the quantizers observe.
          mode: As for a function from `qjax.prepare`. By default "train" where `"quant"` is mutable and "eval" where it is not.
          **kwargs: For the module, and `capture_intermediates`.

        Returns:
          What the module returns, and the mutable collections behind it where any are asked for.

        Raises:
          ValueError: There is no `"quant"`, it is that of other ops, or it has observed nothing in mode "eval"; mode is "train"
            or "calibrate" although `"quant"` is not mutable.
        """
        observes = in_filter(mutable, QUANT)
        mode = mode or ("train" if observes else "eval")
        if mode in ("train", "calibrate") and not observes:
            raise ValueError(
                f'qjax.flax.linen: mode {mode!r} observes, but "quant" is not mutable (mutable is {mutable!r}), so what was '
                'observed would be lost. Add it, as in mutable=["batch_stats", "quant"].'
            )
        call, arrays = self._call(args, kwargs, method, _without_quant(mutable))
        out, qvars = call(self.qvars(variables), _float(variables), arrays, rngs, mode=mode)
        if mutable is False:
            return out
        result, updates = out
        return result, {
            **updates,
            **{name: value for name, value in _collections(qvars).items() if in_filter(mutable, name)},
        }

    def calibrate(
        self, variables: Variables, *args: Any, rngs: Any = None, method: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the variables after the quantizers have observed a batch, computed in float; nothing else changes.

        Variables without quantizers get them first, so this is all there is to post-training quantization:
        `for x in batches: variables = q.calibrate(variables, x)`.
        """
        if QUANT not in variables:
            variables = self.init_quant(variables, *args, rngs=rngs, method=method, **kwargs)
        mutable = [QUANT, QUANT_PARAMS]
        _, updates = self.apply(variables, *args, rngs=rngs, method=method, mutable=mutable, mode="calibrate", **kwargs)
        return {**variables, **updates}

    def codes(
        self, variables: Variables, *args: Any, rngs: Any = None, method: Any = None, **kwargs: Any
    ) -> dict[str, QTensor]:
        """Return the integer codes at every quantizer in mode "eval", by `"op/role"`."""
        call, arrays = self._call(args, kwargs, method, False)
        return call.codes(self.qvars(variables), _float(variables), arrays, rngs)

    def ops(self, variables: Variables, *args: Any, rngs: Any = None, method: Any = None, **kwargs: Any) -> OpTable:
        """Return the table of the ops of the module and what the recipe makes of each; only shapes matter."""
        call, arrays = self._call(args, kwargs, method, DenyList("params"))
        return call.ops(_float(variables), arrays, rngs)

    def convert(self, variables: Variables, *args: Any, method: Any = None, **kwargs: Any) -> IntegerProgram:
        """Return the integer program of the module for inference, a function of `*args`; see `qjax.convert`.

        The same as `qjax.convert(q.function(**kwargs), q.qvars(variables), variables, *args)`.

        Args:
          variables: All collections, `"quant"` included; the program keeps what it needs of them.
          *args: Example values or `jax.ShapeDtypeStruct`.
          method: Which method of the module to call.
          **kwargs: Flags that inference takes, such as `train=False`; the program has them built in.

        Raises:
          TypeError: A keyword argument holds an array.
          ValueError: As for `qjax.convert`.
        """
        return convert_function(self.function(method=method, **kwargs), self.qvars(variables), variables, *args)

    def function(self, *, method: Any = None, **kwargs: Any) -> Prepared:
        """Return the prepared function of `(variables, *args)`, for what takes one, such as `qjax.convert`.

        Args:
          method: Which method of the module to call.
          **kwargs: Keyword arguments of the module that are no arrays; they are built in.

        Raises:
          TypeError: A keyword argument holds an array.
        """
        mend = "Name a method that takes it so: method=lambda module, x, mask: module(x, mask=mask)."
        refuse_arrays(kwargs, "qjax.flax.linen", mend)

        def fn(variables: Variables, *args: Any) -> Any:
            return self.module.apply(_float(variables), *args, method=method, **kwargs)

        return self._prepare(fn)

    def qvars(self, variables: Variables) -> QuantVars:
        """Return what the quantizers know as `qjax.QuantVars`."""
        if QUANT not in variables:
            raise ValueError(
                f'qjax.flax.linen: there is no collection "quant" among the variables, which are {", ".join(variables)}. Make '
                "it with q.init(key, x), or with q.init_quant(variables, x) or q.calibrate(variables, x) for a trained model."
            )
        return QuantVars(dict(variables.get(QUANT_PARAMS, {})), dict(variables[QUANT]))

    def _prepare(self, fn: Callable[..., Any]) -> Prepared:
        return prepare_function(
            fn, self.recipe, compute=self.compute, engine=self.engine, derived_weights=self.derived_weights
        )

    def _call(self, args: Any, kwargs: Any, method: Any, mutable: Any) -> tuple[Prepared, list[Any]]:
        """The prepared function of variables, arrays and keys, and the arrays among the arguments.

        What is no array stays a Python value, as in `module.apply`; arrays are arguments, keyword or not.
        """
        leaves, restore = split_arrays(args, kwargs)

        def fn(variables: Variables, arrays: list[Any], rngs: Any) -> Any:
            args, kwargs = restore(arrays)
            return self.module.apply(variables, *args, rngs=rngs, method=method, mutable=mutable, **kwargs)

        return self._prepare(fn), leaves


def _float(variables: Variables) -> dict[str, Any]:
    """The variables without those of the quantizers."""
    return {name: values for name, values in variables.items() if name not in (QUANT, QUANT_PARAMS)}


def _collections(qvars: QuantVars) -> dict[str, Any]:
    return {QUANT: qvars.state} | ({QUANT_PARAMS: qvars.params} if qvars.params else {})


def _without_quant(mutable: Any) -> Any:
    """The filter for the module, which has no such collections; where one is asked for it still gives updates back."""
    if isinstance(mutable, bool | DenyList):
        return mutable
    names = [mutable] if isinstance(mutable, str) else mutable
    return [name for name in names if name not in (QUANT, QUANT_PARAMS)]


__all__ = ["QUANT", "QUANT_PARAMS", "PreparedModule", "prepare"]
