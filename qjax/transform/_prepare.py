"""prepare: quantization as a transformation of functions, like `jax.grad`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import jax
import numpy as np

from qjax._qparams import is_concrete
from qjax._quantize import QTensor
from qjax._requantize import Engines, check_engine
from qjax.estimators import EstimatorVars
from qjax.transform._calls import op_of
from qjax.transform._fold import fold_batch_norms
from qjax.transform._interpret import Compute, Interpreter, Mode, Plan
from qjax.transform._ops import OpTable, op_table
from qjax.transform._quantizer import observes
from qjax.transform._recipe import Recipe
from qjax.transform._search import Wanted
from qjax.transform._trace import Trace, trace
from qjax.transform._values import to_real

CallMode = Literal["calibrate", "train", "eval"]
Derived = Literal["activation", "weight"]


class QuantVars(NamedTuple):
    """What the quantizers of a prepared function know; a pytree.

    To differentiate with respect to the params, put them back in with `qvars._replace(params=...)`.
    """

    params: dict[str, Any]  # what optimizers train, by quantizer: {"scale": float32} for LSQ; no entry for observers
    state: dict[str, Any]  # what was observed, by quantizer, such as "Dense_0/input"

    def joined(self) -> dict[str, Any]:
        """By quantizer, what it takes: the state of an observer, or the variables of an estimator."""
        return {
            key: EstimatorVars(self.params[key], state) if key in self.params else state
            for key, state in self.state.items()
        }

    def updated(self, joined: Mapping[str, Any]) -> QuantVars:
        """These variables with some replaced."""
        params, state = dict(self.params), dict(self.state)
        for key, value in joined.items():
            if isinstance(value, EstimatorVars):
                params[key], state[key] = value
            else:
                state[key] = value
        return QuantVars(params, state)


def prepare(
    fn: Callable[..., Any],
    recipe: Recipe,
    *,
    params_argnum: int = 0,
    compute: Compute = "codes",
    engine: Engines = "fbgemm",
    derived_weights: Derived = "activation",
) -> Prepared:
    """Quantize a JAX function by rewriting its jaxpr: no edits to the model, no layer classes to swap in.

    The function is traced at every call and its dots, ragged dots, convolutions and embeddings are evaluated as the recipe
    says, those inside `jit`, `jax.checkpoint`, `custom_jvp`, `custom_vjp`, `scan`, `cond`, `switch`, `while_loop` and
    `fori_loop` included, and in `shard_map` where the weight is whole on each shard. Those inside anything else
    (`custom_linear_solve`) are left in float and listed by `prepared.ops`, as are calls that cannot be looked into (Pallas,
    FFI, callbacks). A function with a derivative rule of its own keeps that rule, evaluated in float.

    An operand is a weight when it comes from a leaf of argument `params_argnum` through primitives that move, pick or cast
    elements alone: slices, also those of a scan, indexing with constants, concatenation, sharding constraints. (Of Flax
    variables, a mapping that has `"params"`, only the leaves of that collection are.) An embedding
    looks up a parameter, its table, by an index that depends on the arguments (`table[ids]`, `jnp.take`, `nn.Embed`; `w[i]`
    in a `fori_loop`, too). It is an op with a weight and no input: the table is quantized, and what is looked up is an
    activation, in codes still where the table has one scale. (A row out of bounds, for which `jnp.take` fills in NaN, is
    NaN in float and has the code of NaN.) A carry that a loop changes is an activation, too. An op is named after the path
    of its weight without the last part (`Dense_0`), or after the scope it is traced in; a second op of the same name is
    called `Dense_0:1`.

    In a scan that slices the weight of an op, each step is a layer: the state of that op's quantizers, and of those of ops
    between activations, is stacked by step. In any other scan, over time for one, and in a while, an op has one state, which
    the loop carries, as that of a layer which is called at each step: the state is the same at every length. (Its moving
    average moves at each step, too. A recurrent state that starts at zero makes its range start there: `observers.min_max`, or
    a larger averaging_constant, finds the range sooner.) Of a cond only the branch that is taken observes anything.

    A rule with `batch_norm="fold"` folds the batch normalization behind an op into its weight. It is found in the traced
    function, `(y - mean) · rsqrt(var + eps) · scale + bias` in any grouping, where y is the op's result with its bias; each
    vector but the statistics of a batch has to be made from leaves of argument `params_argnum` alone, so that of Flax the whole
    variables are passed. The op's result may have no other use. With running statistics (inference, or a frozen layer) the
    normalization goes: the weight that is quantized is `w · factor` with `factor = scale / sqrt(var + eps)`, the bias is
    `(b - mean) · factor + bias`, and `output` comes after both and a ReLU; codes are those of torch's converted modules. With
    statistics of the batch (training) it stays, as in torch's `ConvBn2d` for QAT: `w · factor` of the *running* variance is
    quantized, the result is divided by factor, and gradients reach weight and scale through both. No gradient reaches the
    running variance, which is the parameter that the function updates with the variance of the batch, or else the one named
    `var` beside scale and bias. A channel whose scale is zero is quantized unfolded in training, where torch gives NaN. In a
    `scan`, `cond`, `while_loop` or `jax.checkpoint`, op and batch normalization have to stand in the same body.

    Inside `shard_map` quantizers see what they would see of the whole: shards exchange their smallest and largest values, and
    with observers that look at more than these, each shard gets the parts of all, so that every shard ends with one state.
    Activations are quantized per tensor there, or dynamically; `prepared.codes` stacks codes by shard; estimators are
    calibrated outside.

    With `compute="codes"` an op whose two operands are quantized multiplies integer codes, which is exact, and rescales
    once. Its bias is added and its ReLU, max-pooling and reshapes are done in units of the accumulator, so that the
    next quantizer sees what the deployed kernel sees and "eval" gives the codes of `qjax.convert`. Where a scale
    varies along a contracted axis, where so many products are summed that they may pass int32 (more than 65 793 of 8
    bits), or with `compute="dequantized"`, the dequantized operands are multiplied instead.
    With bfloat16 or float16 operands codes are the more exact of the two: dequantized ones are rounded to that dtype first.
    Codes are kept for the backward pass, a byte an element, by a custom_vjp. That is for first derivatives: forward mode
    is refused, and second derivatives take the codes for constants. Use `"dequantized"` for either.

    Which kernel that is says `engine`. With u = scale_x · scale_w, 1/v for a rounded reciprocal, everything in float32 unless
    it says otherwise, and codes that saturate and have the zero_point added after the rounding, the engines compute

    | engine      | codes of a static output                                                         | floats         |
    |-------------|----------------------------------------------------------------------------------|----------------|
    | `"fbgemm"`  | `rint((acc + b/u) · (u/s))`; of a weight per tensor `fma(b, 1/u, acc)`           | fma(acc, u, b) |
    | `"onednn"`  | `rint((((acc · X) · W) + b) · (1/s))`; X, W are `1/(1/scale)`, a conv's W is not | ((acc·X)·W)+b  |
    | `"qnnpack"` | `rint((acc + rint(b · (1/u))) · (u · (1/s)))`, the bias added as an int32        | (acc·u)+b      |
    | `"exact"`   | `rint((acc · scale_x · scale_w + b) / s)` of the real number, rounded once       | fma(acc, u, b) |

    `"x86"`, torch's default, takes fbgemm for dots, onednn for convolutions of up to 100 groups with symmetric weights. These
    are PyTorch 2.13's kernels on processors with VNNI instructions. Training computes nearly what fbgemm does, for any engine.

    Args:
      fn: Any function of arrays; `fn(params, *args) -> out`, without keyword arguments. Arguments that are not arrays
        (bool, int, str, None, …) are passed on as they are; Python floats are traced like arrays.
      recipe: Which ops are quantized how.
      params_argnum: Which argument holds the parameters.
      compute: `"codes"` or `"dequantized"`.
      engine: Whose kernels mode "eval" and `qjax.convert` compute: a name of the table, or a name for each kind of op such as
        `{"dot": "fbgemm", "conv": "exact"}`.

      derived_weights: What is computed from parameters and constants alone: `"activation"`, as anything else, or `"weight"`.
        With `"weight"` the quantizer of `x @ (w * mask)`, of a standardized weight or of `w + a @ b` is that of a weight. It
        sees what is computed; the op is named after the parameter, or after what the names of several share; and `convert`
        stores the codes of the product. (Weights that a scan slices are layers here, too.)

    Returns:
      A `Prepared` function.

    Raises:
      TypeError: fn is not callable or recipe is not a Recipe.
      ValueError: An unknown `compute`, `derived_weights` or `engine`, or a negative `params_argnum`.

    Examples:
      >>> import jax.numpy as jnp, qjax
      >>> def fn(params, x):
      ...     return x @ params["dense"]["w"]
      >>> w8 = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=qjax.PerChannel(-1))
      >>> recipe = qjax.Recipe([qjax.Rule(".*", weight=w8, input=qjax.QuantSpec(qjax.uint8))])
      >>> prepared = qjax.prepare(fn, recipe)
      >>> params, x = {"dense": {"w": jnp.eye(2)}}, jnp.array([[0.1, 1.0]])
      >>> qvars = prepared.init(params, x)
      >>> out, qvars = prepared(qvars, params, x, mode="train")
      >>> print(out.round(3))
      [[0.098 0.996]]
    """
    return Prepared(
        fn, recipe, params_argnum=params_argnum, compute=compute, engine=engine, derived_weights=derived_weights
    )


class Prepared:
    """A quantized function; see `prepare`. It holds no arrays: what changes is in the `QuantVars` it takes and returns."""

    def __init__(
        self,
        fn: Callable[..., Any],
        recipe: Recipe,
        *,
        params_argnum: int,
        compute: Compute,
        engine: Engines = "fbgemm",
        derived_weights: Derived = "activation",
    ) -> None:
        if not callable(fn):
            raise TypeError(f"prepare: fn must be callable, got {fn!r} of type {type(fn).__name__}.")
        if not isinstance(recipe, Recipe):
            raise TypeError(
                f"prepare: recipe must be a qjax.Recipe, got {type(recipe).__name__}. Wrap rules as qjax.Recipe([...])."
            )
        if isinstance(params_argnum, bool) or not isinstance(params_argnum, int) or params_argnum < 0:
            raise ValueError(f"prepare: params_argnum must be an int >= 0, got {params_argnum!r}.")
        if compute not in get_args(Compute):
            raise ValueError(f"prepare: compute must be one of {get_args(Compute)}, got {compute!r}.")
        if derived_weights not in get_args(Derived):
            raise ValueError(f"prepare: derived_weights must be one of {get_args(Derived)}, got {derived_weights!r}.")
        check_engine(engine, "prepare")
        self.fn = fn
        self.recipe = recipe
        self.params_argnum = params_argnum
        self.compute: Compute = compute
        self.derived_weights: Derived = derived_weights
        self.engine: Engines = dict(engine) if isinstance(engine, Mapping) else engine
        self.signature: tuple[Any, ...] | None = None  # of init or the last "eval" call: shapes only, for `convert`

    def init(self, *args: Any) -> QuantVars:
        """Return the quantizer variables before anything was observed; only shapes matter.

        Args:
          *args: As for fn, parameters included.

        Raises:
          RecipeError: A rule matches no op.
        """
        traced, interpreter = self._abstract(args)
        self.signature = shapes_of(tuple(args))
        quantizers, steps = interpreter.spare | interpreter.observed, traced.graph.steps()

        @jax.jit  # what is observed is never made: its shape is all that an observer's init looks at
        def init() -> dict[str, Any]:
            states: dict[str, Any] = {}
            for key, (observer, seen) in quantizers.items():
                one = observer.init(jax.numpy.zeros(seen.shape, seen.dtype))
                stack = steps[op_of(key)]
                states[key] = jax.tree.map(
                    lambda leaf, stack=stack: jax.numpy.broadcast_to(leaf, stack + leaf.shape), one
                )
            return states

        return QuantVars({}, {}).updated(init())

    def __call__(self, qvars: QuantVars, *args: Any, mode: CallMode = "train") -> tuple[Any, QuantVars]:
        """Evaluate the quantized function.

        Args:
          qvars: From `init`, or from an earlier call.
          *args: As for fn, parameters included.
          mode: `"calibrate"` observes and computes in float, and sets `qvars.params` by what it saw; `"train"` observes and
            quantizes, with straight-through gradients or those of the estimators, and leaves `qvars.params` to an optimizer;
            `"eval"` quantizes with what was observed and leaves `qvars` as they are.

        Returns:
          What fn returns, and the new `QuantVars`.

        Raises:
          ValueError: An unknown mode, `qvars` of another function or recipe, or "eval" (with estimators "train", too) before
            anything was observed. Under `jit` with traced `qvars` the last cannot be seen: what has observed nothing has scale
            1 and zero_point 0, and what an estimator quantizes is NaN.
        """
        out, updates, _ = self._evaluate(qvars, args, mode)
        return out, qvars if mode == "eval" else qvars.updated(updates)

    def codes(self, qvars: QuantVars, *args: Any) -> dict[str, QTensor]:
        """Return the integer codes at every quantizer in "eval" mode, by `"op/weight"`, `"op/input"` and `"op/output"`.

        Codes in a scan are stacked by step, scale and zero_point with them; of a weight that all steps share there is one.
        In a while they are those of the last step. Where no step and no branch was run, codes and scales are zeros.
        """
        return self._evaluate(qvars, args, "eval", keeps_codes=True)[2]

    def ops(self, *args: Any) -> OpTable:
        """Return the table of the ops of fn: what each is called, is, and what the recipe makes of it; shapes only matter.

        Printed it fits 80 columns, and a notebook and `rich` show tables of their own; for programs it is a sequence of
        `OpInfo`. Below the rows it says what each spec is, and why what was left in float was.

        Examples:
          >>> import jax, jax.numpy as jnp, qjax
          >>> def fn(params, x):
          ...     return jax.nn.relu(x @ params["fc1"]["w"]) @ params["head"]["w"]
          >>> params = {name: {"w": jnp.eye(4)} for name in ("fc1", "head")}
          >>> prepared = qjax.prepare(fn, qjax.recipes.w4a16(group_size=4) + [qjax.Rule("head")])
          >>> print(prepared.ops(params, jnp.ones((2, 4))))
          op    kind  operands      input  weight  output  compute
          ────  ────  ────────────  ─────  ──────  ──────  ───────────
          fc1   dot   2x4 · 4x4(w)  float  int4    float   dequantized
          head  dot   2x4 · 4x4(w)  float  float   float   float
          <BLANKLINE>
          int4  int4 symmetric per_group(contracted,4) compressed_tensors, dynamic
          <BLANKLINE>
          left in float
            head: the rule 'head' leaves input and weight in float
        """
        traced, interpreter = self._abstract(args)
        return op_table(traced, self.recipe, interpreter)

    # -- inside ------------------------------------------------------------------------------------------------------

    def trace(self, *args: Any, fold: bool = True) -> Trace:
        """Trace fn on these arguments and check the recipe against its ops; without fold, batch norms stay where they are."""
        if len(args) <= self.params_argnum:
            raise TypeError(
                f"prepare: params_argnum is {self.params_argnum}, but the function got {len(args)} argument(s). "
                "The quantizer variables come first, then all arguments of fn: prepared(qvars, params, x)."
            )
        leaves, in_tree = jax.tree.flatten(tuple(args))
        is_array = [_is_array(leaf) for leaf in leaves]
        # Each argument keeps its place and loses the leaves that are not arrays, which the function closes over.
        dynamic = jax.tree.unflatten(
            in_tree, [leaf if traced else None for leaf, traced in zip(leaves, is_array, strict=True)]
        )

        def call(*dynamic_args: Any) -> Any:
            arrays = iter(jax.tree.leaves(dynamic_args))
            whole = [next(arrays) if traced else leaf for leaf, traced in zip(leaves, is_array, strict=True)]
            return self.fn(*jax.tree.unflatten(in_tree, whole))

        folds = any(rule.batch_norm is not None for rule in self.recipe.rules)
        wanted = Wanted(self.recipe.elementwise, self.derived_weights == "weight")
        traced = trace(call, self.params_argnum, dynamic, wanted, inline=folds)
        self.recipe.check([(op.name, op.kind) for op in traced.graph.ops()], traced.unquantized)
        if folds and fold:
            traced = fold_batch_norms(traced, self.recipe.bind(traced))
            # A normalization that is folded is no op any more, for a rule of kind "norm".
            self.recipe.check([(op.name, op.kind) for op in traced.graph.ops()], traced.unquantized)
        return traced

    @staticmethod
    def array_leaves(args: Sequence[Any]) -> list[Any]:
        """The leaves that the traced function takes, in its order; numpy's and Python's as JAX sees them."""
        leaves = [leaf for leaf in jax.tree.leaves(tuple(args)) if _is_array(leaf)]
        return [
            leaf if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else jax.numpy.asarray(leaf) for leaf in leaves
        ]

    def _abstract(self, args: Sequence[Any]) -> tuple[Trace, Interpreter]:
        traced = self.trace(*args)
        interpreter = Interpreter(Plan(self.recipe.bind(traced), "init", self.compute), {})
        interpreter.run_abstractly(traced.graph, self.array_leaves(args))
        return traced, interpreter

    def _evaluate(
        self, qvars: QuantVars, args: Sequence[Any], mode: str, *, keeps_codes: bool = False
    ) -> tuple[Any, dict[str, Any], dict[str, QTensor]]:
        if mode not in get_args(CallMode):
            raise ValueError(
                f"prepared: unknown mode {mode!r}; the modes are {', '.join(map(repr, get_args(CallMode)))}."
            )
        if not isinstance(qvars, QuantVars):
            raise TypeError(
                f"prepared: the first argument must be the QuantVars from init, got {type(qvars).__name__}. "
                "Call prepared(qvars, params, x)."
            )
        traced = self.trace(*args)
        plan = Plan(self.recipe.bind(traced), cast(Mode, mode), self.compute, self.engine, keeps_codes)
        interpreter = Interpreter(plan, qvars.joined())
        outputs = interpreter.run(traced.graph, self.array_leaves(args))
        if mode == "eval":
            self.signature = shapes_of(tuple(args))
        check_calibrated(interpreter, qvars, cast(Mode, mode))
        out = jax.tree.unflatten(traced.out_tree, [to_real(value) for value in outputs])
        return out, interpreter.updates, interpreter.codes


def check_calibrated(interpreter: Interpreter, qvars: QuantVars, mode: Mode) -> None:
    """Raise when a quantizer that was used frozen has seen nothing; only concrete states can be looked at."""
    joined = qvars.joined()
    for key, (observer, _) in interpreter.observed.items():
        state = joined.get(key)
        if (
            state is None
            or observer.dynamic
            or observes(observer, mode)
            or not is_concrete(*jax.tree.leaves(qvars.state[key]))
        ):
            continue
        with jax.ensure_compile_time_eval():  # under jit, too, what is concrete can be looked at
            calibrated = bool(observer.is_calibrated(state).all())  # for each step of a scan, where it is stacked
        if not calibrated:
            op, _, role = key.rpartition("/")
            modes = " or ".join(f'mode="{mode}"' for mode in ("calibrate", "train") if observes(observer, mode))
            raise ValueError(
                f"prepared: the {role} of {op} has observed nothing, so it has no range to quantize with. Run some batches "
                f"with {modes} first; where the op stands in a cond or a while, a batch that takes its branch."
            )


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | float | complex | jax.ShapeDtypeStruct)


def shapes_of(tree: Any) -> Any:
    """The tree with each array replaced by its shape and dtype; leaves that are not arrays stay as they are."""

    def shape(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct) or not _is_array(leaf):
            return leaf
        return jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.result_type(leaf))

    return jax.tree.map(shape, tree)
