"""The state of one quantizer, and the buffers in which torch keeps the same: of an observer, or of a fake-quantization."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from qjax._conventions import TORCH_EPS
from qjax._formats import Int
from qjax._spec import QuantSpec
from qjax.containers import FormatError
from qjax.containers._errors import quoted
from qjax.estimators import EstimatorVars
from qjax.estimators._lsq import LSQ, LSQState
from qjax.interop._dialects.prepared import OBSERVER
from qjax.observers import FusedMovingAverage, MinMaxState, MovingAverageMinMax, MovingAverageState
from qjax.observers._min_max import MinMax
from qjax.observers._torch_histogram import Histogram, HistogramState
from qjax.transform._quantizer import Quantizer

Stage = Literal["prepared", "qat_prepared"]
Flags = tuple[bool, bool]  # whether the observer is on, and whether the fake-quantization is

#: What torch's two flags say, in the words of a prepared function.
MODES: dict[Flags, Literal["train", "calibrate", "eval"]] = {
    (True, True): "train",
    (True, False): "calibrate",
    (False, True): "eval",
}
OBSERVER_VERSION = 3  # `_metadata` of observers since torch 1.10
_OTHER_RECIPE = (
    "Prepare the function with the recipe that torch trained by, such as qjax.recipes.torch_qat(engine, version=...) or "
    "torch_static(engine); a rule says it for single ops."
)


class Site(NamedTuple):
    """One quantizer, and where torch's file has it."""

    keys: tuple[str, ...]  # of QuantVars; several where ops take the same value
    path: str  # of torch's module
    quantizer: Quantizer
    size: int | None  # how many channels have a range of their own; None where the tensor has one
    behind_relu: bool = False


class Buffers(NamedTuple):
    """The tensors of a checkpoint, of which those that were taken are remembered."""

    tensors: Mapping[str, Any]
    taken: set[str]

    def get(self, *keys: str) -> np.ndarray | None:
        """The first of these that is there; its later names come first."""
        for key in keys:
            if key in self.tensors:
                self.taken.add(key)
                value = self.tensors[key]
                if not isinstance(value, np.ndarray | np.generic):
                    raise FormatError(f"a {type(value).__name__}", expected="a tensor", place=place(key))
                return np.asarray(value)
        return None

    def demand(self, *keys: str, mend: str = "") -> np.ndarray:
        """The first of these, or an error."""
        value = self.get(*keys)
        if value is None:
            some = [key for key in self.tensors if key.startswith(keys[0].rpartition(".")[0])]
            near = ", ".join(map(quoted, (some or list(self.tensors))[:8])) or "nothing"
            raise FormatError(f"no {keys[0]}", expected=f"it beside {near}", mend=mend)
        return value

    def floats(self, *keys: str, shape: tuple[int, ...] | None = None, mend: str = "") -> np.ndarray:
        """A float32 tensor, of that shape where one is given."""
        value = self.demand(*keys, mend=mend)
        if value.dtype != np.float32 or (shape is not None and value.shape != shape):
            expected = "float32" if shape is None else f"float32 of shape {shape}"
            raise FormatError(
                f"{value.dtype} of shape {value.shape}", expected=expected, place=place(keys[0]), mend=mend
            )
        return value


def place(key: str) -> str:
    """Where an error is."""
    return f"tensor {quoted(key)}"


def check_site(site: Site, stage: Stage, caller: str) -> None:
    """Raise ValueError where torch has no module that does what the quantizer does."""
    quantizer, key = site.quantizer, site.keys[0]
    spec, wanted = quantizer.spec, ""
    if stage == "prepared":
        if not isinstance(quantizer, Histogram | MinMax | MovingAverageMinMax) or quantizer.dynamic:
            wanted = "observers.histogram, min_max or moving_average_min_max, as qjax.recipes.torch_static has it"
    elif not isinstance(quantizer, MinMax | MovingAverageMinMax | LSQ) or quantizer.dynamic:
        wanted = (
            "observers.fused_moving_average, moving_average_min_max or min_max, as qjax.recipes.torch_qat has it, or "
            "estimators.lsq"
        )
    elif spec.convention != "torch_fake":
        wanted = f'a spec that rounds as torch\'s fake-quantization does, by convention="torch_fake", not {spec.convention!r}'
    if isinstance(quantizer, LSQ) and not spec.symmetric:
        wanted = "a symmetric spec: torch's learnable fake-quantization of an affine one learns the zero_point, too"
    if not isinstance(spec.format, Int) or spec.float_zero_point or spec.is_stochastic:
        wanted = "integers that are rounded to the nearest"
    if not wanted and not isinstance(quantizer, FusedMovingAverage) and spec.scale_rule is not None:
        wanted = "the convention's own scale_rule"
    if wanted:
        raise ValueError(
            f"{caller}: {key!r} is quantized by {type(quantizer).__name__} with {spec}; torch wants {wanted}."
        )


# -- from torch ------------------------------------------------------------------------------------------------------


def read_site(site: Site, buffers: Buffers, stage: Stage) -> tuple[Any, Flags]:
    """The state of the quantizer, or its variables, and the flags.

    Raises:
      FormatError: A buffer is missing or of another shape or dtype, or the qparams are not those that the quantizer chooses.
    """
    if stage == "prepared":
        return _observer_state(site, site.path, buffers), (True, False)
    if isinstance(site.quantizer, LSQ):
        return _learned(site, site.quantizer, buffers)
    fused = isinstance(site.quantizer, FusedMovingAverage)
    flags = (_flag(site, "observer_enabled", buffers, fused), _flag(site, "fake_quant_enabled", buffers, fused))
    state = _observer_state(site, f"{site.path}.{OBSERVER}", buffers)
    scale, zero_point = buffers.floats(f"{site.path}.scale"), buffers.demand(f"{site.path}.zero_point")
    if not (fused and not flags[1]):  # torch's fused kernel leaves them as they were unless it fake-quantizes
        _check_qparams(site, state, scale, zero_point)
    return state, flags


def _flag(site: Site, name: str, buffers: Buffers, fused: bool | None) -> bool:
    key = f"{site.path}.{name}"
    mend = "The module is not fake-quantized in torch. Give the op a rule without this role, or prepare it in torch."
    value = buffers.demand(key, mend=mend)
    if value.size != 1 or value.dtype not in (np.uint8, np.int64) or value.item() not in (0, 1):
        raise FormatError(
            f"{value.dtype} of shape {value.shape}", expected="a flag, 0 or 1, in int64 or uint8", place=place(key)
        )
    if fused is not None and fused != (value.dtype == np.int64):
        kinds = {np.dtype(np.int64): "FusedMovingAvgObsFakeQuantize", np.dtype(np.uint8): "FakeQuantize"}
        raise FormatError(
            f"a flag of {value.dtype}, which is a {kinds[value.dtype]}",
            expected=f"{'int64' if fused else 'uint8'} for {site.keys[0]}, which {type(site.quantizer).__name__} observes",
            place=place(key),
            mend=f"Take qjax.recipes.torch_qat(..., version={0 if fused else 1}).",
        )
    return bool(value.item())


def _observer_state(site: Site, path: str, buffers: Buffers) -> Any:
    quantizer = site.quantizer
    shape = () if site.size is None else (site.size,)
    low = buffers.floats(f"{path}.min_val", f"{path}.min_vals", mend="It has no observer in torch. " + _OTHER_RECIPE)
    high = buffers.floats(f"{path}.max_val", f"{path}.max_vals")
    _check_eps(site.quantizer.spec, path, buffers)
    unseen = low.shape == high.shape == (0,) and site.size is not None
    if not unseen and not low.shape == high.shape == shape:
        raise FormatError(
            f"a range of shape {low.shape} and {high.shape}",
            expected=f"{shape} for {site.keys[0]}, which is quantized {quantizer.spec.granularity}",
            place=place(f"{path}.min_val"),
            mend=_OTHER_RECIPE,
        )
    seen = not unseen and not bool(np.all((low == np.inf) & (high == -np.inf)))
    if seen and not isinstance(quantizer, FusedMovingAverage) and bool(np.any(low > high)):
        at = int(np.argmax(low > high))
        raise FormatError(
            f"a min_val of {low.reshape(-1)[at]} above the max_val of {high.reshape(-1)[at]}",
            expected="a range, as observers see them",
            place=place(f"{path}.min_val"),
            mend="The file is damaged.",
        )
    if site.behind_relu and bool(np.any(low < 0)):
        raise FormatError(
            f"a min_val of {low.min()}",
            expected=f"none below 0 for {site.keys[0]}, which is observed behind a ReLU",
            place=place(f"{path}.min_val"),
            mend="Torch has not fused the ReLU. Fuse it, by fuse_modules_qat or FloatFunctional.add_relu, and train or "
            "calibrate anew.",
        )
    if unseen:
        low, high = np.full(shape, np.inf, np.float32), np.full(shape, -np.inf, np.float32)
    ends = jnp.asarray(low), jnp.asarray(high)
    if isinstance(quantizer, Histogram):
        mend = "It is no HistogramObserver in torch. " + _OTHER_RECIPE
        counts = buffers.floats(f"{path}.histogram", shape=(quantizer.bins,), mend=mend)
        bad = counts[~(np.isfinite(counts) & (counts >= 0))]
        if bad.size:
            raise FormatError(
                f"a count of {bad[0]}",
                expected="counts that are finite and not negative",
                place=place(f"{path}.histogram"),
                mend="The file is damaged.",
            )
        return HistogramState(jnp.asarray(counts), *ends)
    if isinstance(quantizer, MinMax):
        return MinMaxState(*ends)
    # How many updates there were is in no file: it matters for the first one, and as a weight where states are merged.
    return MovingAverageState(*ends, jnp.int32(seen))


def _check_eps(spec: QuantSpec, path: str, buffers: Buffers) -> None:
    eps = buffers.get(f"{path}.eps")  # files of old have none
    wanted = np.float32(TORCH_EPS if spec.eps is None else spec.eps)
    if eps is not None and (eps.size != 1 or eps.dtype != np.float32 or eps.item() != wanted):
        raise FormatError(
            f"eps {eps.item() if eps.size == 1 else f'of shape {eps.shape}'}",
            expected=f"{wanted} for {spec}",
            place=place(f"{path}.eps"),
            mend="Say it in the spec, as QuantSpec(..., eps=...).",
        )


def _check_qparams(site: Site, state: Any, scale: np.ndarray, zero_point: np.ndarray) -> None:
    """The buffers must follow from the range by the quantizer's scheme: by nothing else does the file say what that is."""
    chosen = site.quantizer.qparams(state)
    expected = np.asarray(chosen.scale).reshape(-1), np.asarray(chosen.zero_point).reshape(-1)
    found = scale.reshape(-1), zero_point.reshape(-1)
    unseen = not bool(site.quantizer.is_calibrated(state))
    if unseen and found[0].size == 1:  # torch makes them one a channel when it observes
        expected = expected[0][:1], expected[1][:1]
    for name, got, want in zip(("scale", "zero_point"), found, expected, strict=True):
        if got.shape == want.shape and np.array_equal(got, want, equal_nan=True):
            continue
        differ = "" if got.shape != want.shape else f" at {int(np.argmax(got != want))}"
        raise FormatError(
            f"{name} {_some(got, want)}",
            expected=f"{_some(want, got)}{differ}, which {site.keys[0]} ({type(site.quantizer).__name__}, "
            f"{site.quantizer.spec}) chooses for the file's min_val and max_val",
            place=place(f"{site.path}.{name}"),
            mend="The file is of another scheme or range. " + _OTHER_RECIPE,
        )


def _some(values: np.ndarray, others: np.ndarray) -> str:
    if values.shape != others.shape:
        return f"of {values.size} values"
    return str(values[int(np.argmax(values != others))])


def _learned(site: Site, lsq: LSQ, buffers: Buffers) -> tuple[EstimatorVars, Flags]:
    fake = _flag(site, "fake_quant_enabled", buffers, None)
    static, learning = (_flag(site, name, buffers, None) for name in ("static_enabled", "learning_enabled"))
    buffers.get(f"{site.path}.observer_enabled")  # torch does not ask for it here
    for name in ("eps", f"{OBSERVER}.eps", f"{OBSERVER}.min_val", f"{OBSERVER}.max_val"):
        buffers.get(f"{site.path}.{name}")
    if static or not learning or not fake:
        raise FormatError(
            "a learnable fake-quantization that does not learn its scale",
            expected=f"learning for {site.keys[0]}, which is quantized by estimators.lsq",
            place=place(f"{site.path}.learning_enabled"),
            mend="Call enable_param_learning() on it in torch before it is saved.",
        )
    shape = () if site.size is None else (site.size,)
    scale = buffers.floats(f"{site.path}.scale", shape=shape or (1,), mend=_OTHER_RECIPE).reshape(shape)
    points = buffers.floats(f"{site.path}.zero_point", shape=shape or (1,))
    bad = scale[~(np.isfinite(scale) & (scale > 0))]
    if bad.size:
        raise FormatError(
            f"a scale of {bad[0]}", expected="a positive and finite float32", place=place(f"{site.path}.scale")
        )
    if np.any(points):
        raise FormatError(
            f"a zero_point of {points[np.argmax(points != 0)]}",
            expected=f"0 for {site.keys[0]}, which is {lsq.spec}",
            place=place(f"{site.path}.zero_point"),
            mend="LSQ learns the scale alone. Use a symmetric qscheme in torch.",
        )
    # What calibration saw is not in the file. Calibrating on starts from this scale, as if it had seen one value.
    found, largest = jnp.asarray(scale), float(lsq.spec.quant_max)
    state = LSQState(found * jnp.float32(math.sqrt(largest) / 2), found * jnp.float32(largest), jnp.ones(shape))
    return EstimatorVars({"scale": jnp.asarray(scale)}, state), (True, True)


# -- to torch --------------------------------------------------------------------------------------------------------


def write_site(site: Site, state: Any, stage: Stage, flags: Flags) -> dict[str, np.ndarray]:
    """The buffers of torch's module, by their names in it, in torch's order."""
    if stage == "prepared":
        return _observer_buffers(site, state)
    own = {f"{OBSERVER}.{name}": value for name, value in _observer_buffers(site, state).items()}
    if isinstance(site.quantizer, LSQ):
        on, off = np.asarray([True], np.uint8), np.asarray([False], np.uint8)
        # The scale that is used, which is positive: what torch makes of a negative one differs.
        scale = np.asarray(site.quantizer.qparams(state).scale).reshape(-1)
        return {
            "scale": scale,
            "zero_point": np.zeros_like(scale),
            "fake_quant_enabled": on,
            "observer_enabled": on,
            "static_enabled": off,
            "learning_enabled": on,
            "eps": np.asarray([TORCH_EPS], np.float32),
            **own,
        }
    dtype = np.int64 if isinstance(site.quantizer, FusedMovingAverage) else np.uint8
    qparams = site.quantizer.qparams(state)
    scale, zero_point = (np.asarray(value).reshape(-1) for value in (qparams.scale, qparams.zero_point))
    if not bool(site.quantizer.is_calibrated(state)):
        scale, zero_point = scale[:1], zero_point[:1]
    return {
        "fake_quant_enabled": np.asarray([flags[1]], dtype),
        "observer_enabled": np.asarray([flags[0]], dtype),
        "scale": scale.astype(np.float32),
        "zero_point": zero_point.astype(np.int32),
        **own,
    }


def knows(site: Site, name: str) -> bool:
    """Whether a buffer is something that the quantizer knows: not the range of an observer whose scale is learned now."""
    return not isinstance(site.quantizer, LSQ) or (name != "observer_enabled" and not name.startswith(OBSERVER))


def _observer_buffers(site: Site, state: Any) -> dict[str, np.ndarray]:
    spec = site.quantizer.spec
    buffers = {"eps": np.asarray([TORCH_EPS if spec.eps is None else spec.eps], np.float32)}
    if isinstance(site.quantizer, LSQ):  # its observer has nothing to say once the scale is learned
        shape = () if site.size is None else (0,)
        return buffers | {"min_val": np.full(shape, np.inf, np.float32), "max_val": np.full(shape, -np.inf, np.float32)}
    if isinstance(site.quantizer, Histogram):
        buffers["histogram"] = np.asarray(state.histogram)
    unseen = site.size is not None and not bool(site.quantizer.is_calibrated(state))
    for name, value in (("min_val", state.min_val), ("max_val", state.max_val)):
        buffers[name] = np.zeros((0,), np.float32) if unseen else np.asarray(value)
    return buffers
