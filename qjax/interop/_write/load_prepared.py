"""Continue in JAX what torch has begun: a prepared or QAT-prepared checkpoint as parameters and quantizer variables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qjax.containers import FormatError
from qjax.containers._errors import quoted
from qjax.interop._checkpoint import Checkpoint
from qjax.interop._write.modules import TorchModule
from qjax.interop._write.observed import MODES, Buffers, Flags, Stage, place, read_site
from qjax.interop._write.prepared_layout import AnyTensor, Fixed, ModelPlan, plan_of
from qjax.transform import Prepared, QuantVars

_STAGES: dict[str, Stage] = {"prepared": "prepared", "qat_prepared": "qat_prepared"}
#: Where batch norm was kept up to version 1 of torch's fused modules, and since.
_OLD_NORM = {"weight": "gamma", "bias": "beta", "running_mean": "running_mean", "running_var": "running_var"}


class PreparedState(NamedTuple):
    """What a prepared checkpoint holds, as a prepared function takes it."""

    params: Any  # as the function takes them: float32 master weights in its own layout
    qvars: QuantVars
    mode: Literal["train", "calibrate", "eval"]  # what torch's flags say: "eval" where the observers are switched off


def load_prepared(
    checkpoint: Checkpoint,
    prepared: Prepared,
    *args: Any,
    modules: Mapping[str, TorchModule] | None = None,
    quantize: str | None = "quant",
    observers: Mapping[str, str] | None = None,
) -> PreparedState:
    """Read a checkpoint of torch's `prepare_qat`, or of its `prepare`, to train or to calibrate on in JAX.

    Every number arrives bit for bit: float weights and biases, in the layout of the function's parameters; batch norms where
    the function has them (`<module>.bn.*`); and of each observer min_val, max_val and histogram. `scale` and `zero_point` of a
    fake-quantization follow from the range by the observer of the recipe, which is checked: where they are not the file's,
    the recipe is not the one that torch trained by. Both of torch's generations are read, `FakeQuantize` (for the recipe
    `qjax.recipes.torch_qat(engine, version=0)`) and `FusedMovingAvgObsFakeQuantize` (`version=1`), and a learnable
    fake-quantization of a symmetric scheme, whose scale is that of `qjax.estimators.lsq`.

    An op with a ReLU is observed behind it here, as torch observes a module that it has fused with one (`LinearReLU`,
    `ConvBnReLU2d`, `add_relu`). One that it has not fused is observed in front of it, which shows in a range with negative
    numbers, and is an error.

    What is in no file, and so is not checked: an observer's averaging constant, which is the recipe's; epsilon and momentum of
    a batch norm, which are the function's; how many updates a moving average has had, which is 1 here (it is a weight where
    states are merged, no more); and for LSQ what calibration saw, and how torch scales the gradient.

    Args:
      checkpoint: From `load`.
      prepared: From `qjax.prepare`, with the recipe that torch trained by.
      *args: As for the function, parameters included; shapes matter alone.
      modules: What each op is in torch: `{"Conv_0": qjax.interop.Conv2d("features.0")}`; by default what
        `qjax.interop.torch_modules` derives. (An addition or a product of activations that a rule quantizes is a
        `FloatFunctional`.)
      quantize: The name of torch's `QuantStub`, which the quantizers of the function's input belong to; None where the input
        is not quantized.
      observers: Where quantizers are in torch if not in their module, by quantizer: of graph modules (`prepare_qat_fx`)
        `{"Conv_0/input": "activation_post_process_0"}`.

    Returns:
      `PreparedState(params, qvars, mode)`. Go on with `prepared(qvars, params, x, mode=mode)`.

    Raises:
      containers.FormatError: The file is of another dialect or damaged; a tensor is missing, left over or of another shape or
        dtype; an observer is of another kind, or chooses other qparams than the file has; torch's flags differ from module to
        module.
      TypeError: An argument is something else.
      ValueError: Torch has no module for what an op is, or how it is quantized; or modules does not fit the function.

    Examples:
      >>> import jax.numpy as jnp, os, qjax, tempfile
      >>> def model(params, x):
      ...     return x @ params["fc"]["w"]
      >>> params, x = {"fc": {"w": jnp.eye(2)}}, jnp.array([[0.5, -1.0]])
      >>> modules = {"fc": qjax.interop.Linear("0")}
      >>> prepared = qjax.prepare(model, qjax.recipes.torch_qat("x86"))
      >>> _, qvars = prepared(prepared.init(params, x), params, x)
      >>> path = os.path.join(tempfile.mkdtemp(), "qat.pt")
      >>> qjax.interop.save(path, qjax.interop.qat_prepared(prepared, qvars, params, modules=modules))
      >>> state = qjax.interop.load_prepared(qjax.interop.load(path), prepared, params, x, modules=modules)
      >>> state.mode, float(state.qvars.state["fc/input"].min_val)
      ('train', -1.0)

    References:
      PyTorch, `torch/ao/quantization/fake_quantize.py`, `observer.py`, `torch/ao/nn/intrinsic/qat/modules/`.
    """
    if not isinstance(checkpoint, Checkpoint):
        raise TypeError(f"load_prepared: checkpoint must come from qjax.interop.load, got {type(checkpoint).__name__}.")
    try:
        stage = _STAGES.get(checkpoint.dialect)
        if stage is None:
            raise FormatError(
                f"a checkpoint of dialect {checkpoint.dialect}",
                expected="one that torch's prepare_qat or prepare has put observers in",
                mend="Save the state_dict of the model before it is converted.",
            )
        plan = plan_of(
            prepared, args, modules, quantize=quantize, observers=observers, stage=stage, caller="load_prepared"
        )
        return _read(checkpoint, prepared, args, plan, stage)
    except FormatError as error:
        error.locate(file=checkpoint.path)
        raise


def _read(checkpoint: Checkpoint, prepared: Prepared, args: Any, plan: ModelPlan, stage: Stage) -> PreparedState:
    buffers = Buffers(checkpoint, set())
    leaves, tree = jax.tree.flatten(args[prepared.params_argnum])
    shared: dict[int, np.ndarray] = {}
    for tensor in plan.tensors():
        value = _value(tensor, plan, buffers)
        if not isinstance(tensor, Fixed):
            leaf = tensor.from_torch(value)
            if not np.array_equal(shared.setdefault(tensor.leaf, leaf), leaf, equal_nan=True):
                raise FormatError(
                    "other numbers than in another of its tensors",
                    expected=f"the same, since both are the parameter {tensor.path}",
                    place=place(tensor.key),
                    mend="Give the ops parameters of their own, or tie the weights in torch, too.",
                )
            leaves[tensor.leaf] = jnp.asarray(leaf)
        elif np.any(value != np.float32(tensor.value)):
            raise FormatError(
                "other numbers",
                expected=f"{tensor.value} throughout, since the function's batch norm has no parameter for it",
                place=place(tensor.key),
                mend="Give the batch norm of the function a scale and a bias.",
            )
    states: dict[str, Any] = {}
    flags: dict[str, Flags] = {}
    for site in plan.sites():
        state, flags[site.path] = read_site(site, buffers, stage)
        states |= dict.fromkeys(site.keys, state)
    _check_taken(buffers, plan)
    mode = _mode(flags)
    return PreparedState(jax.tree.unflatten(tree, leaves), prepared.init(*args).updated(states), mode)


def _value(tensor: AnyTensor, plan: ModelPlan, buffers: Buffers) -> np.ndarray:
    keys = [tensor.key, *_old_keys(tensor.key, plan)]
    what = "its batch norm" if isinstance(tensor, Fixed) else f"the parameter {tensor.path}"
    mend = f"{what} of the function is to come from it. Say in modules what its op is in torch, or drop it from the function."
    return buffers.floats(*keys, shape=tensor.shape, mend=mend[0].upper() + mend[1:])


def _old_keys(key: str, plan: ModelPlan) -> list[str]:
    for module in plan.modules:
        if module.bn is not None and key.startswith(f"{module.bn}."):
            old = _OLD_NORM[key.removeprefix(f"{module.bn}.")]
            return [f"{module.name}.{old}" if module.name else old]
    return []


def _check_taken(buffers: Buffers, plan: ModelPlan) -> None:
    """A tensor that the function does not have is a layer or a quantizer that it does not have."""
    counts = [f"{module.bn}.num_batches_tracked" for module in plan.modules if module.bn is not None]
    counts += [f"{module.name}.num_batches_tracked" for module in plan.modules if module.bn is not None]
    left = [key for key in buffers.tensors if key not in buffers.taken and key not in counts]
    if left:
        sites = ", ".join(sorted({site.path for site in plan.sites()}))
        raise FormatError(
            f"{len(left)} tensors that the function has no place for: {', '.join(map(quoted, left[:6]))}",
            expected=f"its weights, biases and batch norms, and the quantizers {sites}",
            mend='A batch norm belongs to an op with a rule of batch_norm="fold_if_present"; an observer to a rule for that '
            "role of the op; a layer to an op of the function.",
        )


def _mode(flags: Mapping[str, Flags]) -> Literal["train", "calibrate", "eval"]:
    kinds = set(flags.values()) or {(True, True)}
    if len(kinds) == 1 and (only := next(iter(kinds))) in MODES:
        return MODES[only]
    first = next(iter(flags))
    other = next((path for path, each in flags.items() if each != flags[first]), first)
    raise FormatError(
        f"observer and fake-quantization {_onoff(flags[first])} at {quoted(first)}, {_onoff(flags[other])} at {quoted(other)}",
        expected="the same everywhere, one of them on at least: a prepared function has one mode for all",
        mend="Set them in torch, as by model.apply(torch.ao.quantization.enable_fake_quant), and save the model again.",
    )


def _onoff(flags: Flags) -> str:
    return " and ".join("on" if flag else "off" for flag in flags)
