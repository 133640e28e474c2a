"""Hand over to torch what JAX has begun: the state dict of a prepared or a QAT-prepared model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

from qjax.containers import Record
from qjax.interop._checkpoint import Checkpoint
from qjax.interop._dialects.prepared import OBSERVER
from qjax.interop._write.modules import TorchModule
from qjax.interop._write.observed import MODES, OBSERVER_VERSION, Site, Stage, knows, write_site
from qjax.interop._write.prepared_layout import Fixed, ModelPlan, Module, check_arguments, plan_of
from qjax.transform import Prepared, QuantVars

_FLAGS = {mode: flags for flags, mode in MODES.items()}


def qat_prepared(
    prepared: Prepared,
    qvars: QuantVars,
    params: Any,
    *,
    modules: Mapping[str, TorchModule] | None = None,
    quantize: str | None = "quant",
    observers: Mapping[str, str] | None = None,
    mode: Literal["train", "calibrate", "eval"] = "train",
    like: Checkpoint | None = None,
    batches: int = 0,
) -> Record:
    """Lay out a prepared function as the state dict of the model that torch's `prepare_qat` makes, to train on in torch.

    Keys, dtypes, shapes and order are torch's. Per module: the float `weight` and `bias` in torch's layout; `bn.*` where a
    batch norm is folded into the op; and, of the weight and of the output, the flags, `scale`, `zero_point` and the observer's
    range. Load it with `model.load_state_dict(torch.load(path, weights_only=True))`. Which generation of fake-quantization it
    is follows from the recipe: `qjax.recipes.torch_qat(engine, version=1)` is `FusedMovingAvgObsFakeQuantize`, `version=0` is
    `FakeQuantize`, and `qjax.estimators.lsq` a `_LearnableFakeQuantize` that learns.

    Args:
      prepared: From `qjax.prepare`; its `init` has been called.
      qvars: Its quantizer variables.
      params: The parameters.
      modules: What each op becomes, in the order of the torch model: `{"Conv_0": qjax.interop.Conv2d("features.0")}`; by
        default what `qjax.interop.torch_modules` derives.
      quantize: The name of the model's `QuantStub`; None where the input is not quantized.
      observers: As for `load_prepared`.
      mode: How torch is to go on: `"train"` has observers and fake-quantization switched on, `"calibrate"` the observers
        alone, `"eval"` the fake-quantization alone, with frozen ranges. (A learnable one learns in any mode.)
      like: The checkpoint that the training began with. Its tensors and its metadata are kept where the function has no
        number for them, and its order is.
      batches: How many batches were trained on since; added to `num_batches_tracked` of the batch norms, which torch uses where
        momentum is None.

    Returns:
      A mapping to hand to `qjax.interop.save`, with torch's module versions as its metadata.

    Raises:
      TypeError: An argument is something else.
      ValueError: Torch has no module for what an op is, or how it is quantized; modules does not fit the function; `init` was
        not called; quantizers that torch has one module for know different things; like lacks a tensor that there is.

    Examples:
      >>> import jax.numpy as jnp, qjax
      >>> def model(params, x):
      ...     return x @ params["fc"]["w"]
      >>> params, x = {"fc": {"w": jnp.eye(2)}}, jnp.array([[0.5, -1.0]])
      >>> prepared = qjax.prepare(model, qjax.recipes.torch_qat("x86"))
      >>> _, qvars = prepared(prepared.init(params, x), params, x)
      >>> state = qjax.interop.qat_prepared(prepared, qvars, params, modules={"fc": qjax.interop.Linear("fc")})
      >>> print(state["quant.activation_post_process.scale"], state["quant.activation_post_process.zero_point"])
      [0.01181102] [85]

    References:
      PyTorch, `torch/ao/quantization/fake_quantize.py`, `observer.py`, `torch/ao/nn/intrinsic/qat/modules/`.
    """
    if mode not in _FLAGS:
        raise ValueError(f"qat_prepared: mode must be one of {', '.join(map(repr, _FLAGS))}, got {mode!r}.")
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 0:
        raise ValueError(f"qat_prepared: batches must be an int >= 0, got {batches!r}.")
    return _Writer(prepared, qvars, params, modules, quantize, observers, "qat_prepared", like).record(mode, batches)


def ptq_prepared(
    prepared: Prepared,
    qvars: QuantVars,
    params: Any,
    *,
    modules: Mapping[str, TorchModule] | None = None,
    quantize: str | None = "quant",
    observers: Mapping[str, str] | None = None,
    like: Checkpoint | None = None,
) -> Record:
    r"""Lay out a prepared function as the state dict of the model that torch's `prepare` makes, to calibrate on in torch.

    Its weights are float; each module's output, and the model's input, has an observer: min_val and max_val, and the counts of
    a histogram, as `qjax.recipes.torch_static` observes them. A module with a ReLU is torch's fused one, so that its weight is
    `<module>.0.weight`; batch norms are folded beforehand, in torch by `fuse_modules` and here by `qjax.fold_batch_norm`.
    Torch observes weights when it converts, so that those have none. Torch's `convert` then gives the qparams that
    `qjax.interop.points` lists for the file.

    Args:
      prepared: From `qjax.prepare`; its `init` has been called.
      qvars: Its quantizer variables, calibrated or not.
      params: The parameters.
      modules: As for `qat_prepared`.
      quantize: The name of the model's `QuantStub`; None where the input is not quantized.
      observers: As for `load_prepared`.
      like: As for `qat_prepared`.

    Returns:
      A mapping to hand to `qjax.interop.save`, with torch's module versions as its metadata.

    Raises:
      TypeError: An argument is something else.
      ValueError: As for `qat_prepared`; or an op has a batch norm that is not folded into its weight.

    Examples:
      >>> import jax, jax.numpy as jnp, qjax
      >>> def model(params, x):
      ...     return jax.nn.relu(x @ params["fc"]["w"])
      >>> params, x = {"fc": {"w": jnp.eye(2)}}, jnp.array([[0.5, -1.0]])
      >>> prepared = qjax.prepare(model, qjax.recipes.torch_static("x86"))
      >>> _, qvars = prepared(prepared.init(params, x), params, x, mode="calibrate")
      >>> print(*qjax.interop.ptq_prepared(prepared, qvars, params, modules={"fc": qjax.interop.Linear("fc")}), sep="\n")
      quant.activation_post_process.eps
      quant.activation_post_process.histogram
      quant.activation_post_process.min_val
      quant.activation_post_process.max_val
      fc.0.weight
      fc.activation_post_process.eps
      fc.activation_post_process.histogram
      fc.activation_post_process.min_val
      fc.activation_post_process.max_val

    References:
      PyTorch, `torch/ao/quantization/observer.py`.
    """
    return _Writer(prepared, qvars, params, modules, quantize, observers, "prepared", like).record("calibrate", 0)


class _Writer:
    def __init__(
        self,
        prepared: Prepared,
        qvars: QuantVars,
        params: Any,
        modules: Mapping[str, TorchModule] | None,
        quantize: str | None,
        observers: Mapping[str, str] | None,
        stage: Stage,
        like: Checkpoint | None,
    ) -> None:
        self._caller = "qat_prepared" if stage == "qat_prepared" else "ptq_prepared"
        check_arguments(prepared, modules, observers, self._caller)
        if not isinstance(qvars, QuantVars):
            raise TypeError(f"{self._caller}: qvars must be the QuantVars of prepared, got {type(qvars).__name__}.")
        if like is not None and not isinstance(like, Checkpoint):
            raise TypeError(f"{self._caller}: like must come from qjax.interop.load, got {type(like).__name__}.")
        if prepared.signature is None:
            raise ValueError(
                f"{self._caller}: the shapes of the function's arguments are not known. Call prepared.init(params, x) first."
            )
        self._plan: ModelPlan = plan_of(
            prepared,
            prepared.signature,
            modules,
            quantize=quantize,
            observers=observers,
            stage=stage,
            caller=self._caller,
        )
        self._leaves = self._checked(params, prepared)
        self._joined = qvars.joined()
        self._stage: Stage = stage
        self._like, self._quantize = like, quantize

    def _checked(self, params: Any, prepared: Prepared) -> list[np.ndarray]:
        assert prepared.signature is not None
        wanted = jax.tree.flatten(prepared.signature[prepared.params_argnum])
        leaves, tree = jax.tree.flatten(params)
        if tree != wanted[1] or any(np.shape(a) != np.shape(b) for a, b in zip(leaves, wanted[0], strict=True)):
            raise ValueError(
                f"{self._caller}: params have another structure or other shapes than those that prepared was initialized with."
            )
        return leaves

    def record(self, mode: str, batches: int) -> Record:
        state: dict[str, Any] = {}
        versions: dict[str, dict[str, int]] = {"": {"version": 1}}
        if self._plan.entry is not None:
            if self._quantize is not None and self._plan.entry.path.startswith(f"{self._quantize}."):
                versions[self._quantize] = {"version": 1}
            self._add_site(self._plan.entry, mode, state, versions)
        for module in self._plan.modules:
            self._add_module(module, mode, batches, state, versions)
        if self._like is None:
            return Record(state, metadata=versions)
        missing = [key for key in state if key not in self._like]
        if missing:
            raise ValueError(
                f"{self._caller}: like has no {', '.join(missing[:6])}. It is a checkpoint of another model; leave it out."
            )
        return Record({key: state.get(key, value) for key, value in self._like.items()}, metadata=self._like.metadata)

    def _add_module(
        self, module: Module, mode: str, batches: int, state: dict[str, Any], versions: dict[str, dict[str, int]]
    ) -> None:
        versions[module.name] = {"version": module.version}
        for tensor in module.tensors:
            start = tensor.key.rpartition(".")[0]  # the module, or the layer in one that is fused
            versions.setdefault(start, {"version": 1})
            if isinstance(tensor, Fixed):
                state[tensor.key] = np.full((tensor.size,), tensor.value, np.float32)
                continue
            leaf = np.asarray(self._leaves[tensor.leaf])
            if leaf.dtype != np.float32:
                raise ValueError(f"{self._caller}: {tensor.path} is {leaf.dtype}; torch's {tensor.key} is float32.")
            state[tensor.key] = tensor.to_torch(leaf)
        if module.bn is not None:
            key = f"{module.bn}.num_batches_tracked"
            before = 0 if self._like is None else np.asarray(self._like.get(key, 0))
            state[key] = np.asarray(before + batches, np.int64)
            versions[module.bn] = {"version": 2}  # of batch norms
        for site in module.sites:
            self._add_site(site, mode, state, versions)

    def _add_site(self, site: Site, mode: str, state: dict[str, Any], versions: dict[str, dict[str, int]]) -> None:
        states = [self._state(key) for key in site.keys]
        for key, other in zip(site.keys, states, strict=True):
            if not _same(states[0], other):
                raise ValueError(
                    f"{self._caller}: {site.keys[0]!r} and {key!r} are one module in torch, {site.path}, and have observed "
                    "different things. Calibrate both on the same data."
                )
        for name, value in write_site(site, states[0], self._stage, _FLAGS[mode]).items():
            key = f"{site.path}.{name}"
            like = None if self._like is None or knows(site, name) else self._like.get(key)
            state[key] = value if like is None else like
        if self._stage == "prepared":
            versions[site.path] = {"version": OBSERVER_VERSION}
        else:
            versions[site.path] = {"version": 1}
            versions[f"{site.path}.{OBSERVER}"] = {"version": OBSERVER_VERSION}

    def _state(self, key: str) -> Any:
        if key not in self._joined:
            raise ValueError(
                f"{self._caller}: qvars has no state for {key!r}. It was made by the init of another function."
            )
        return self._joined[key]


def _same(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y), equal_nan=True) for x, y in pairs)
