"""The engines by name, and which formula each takes for which op."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from qjax._qparams import QParams
from qjax._requantize._accumulator import Accumulator
from qjax._requantize._exact import exact_codes
from qjax._requantize._fbgemm import fbgemm_codes, fbgemm_reals
from qjax._requantize._onednn import onednn_codes, onednn_inputs, onednn_reals
from qjax._requantize._qnnpack import qnnpack_codes, qnnpack_reals
from qjax._spec import QuantSpec

Engine = Literal["fbgemm", "onednn", "qnnpack", "x86", "exact"]
ENGINES: tuple[str, ...] = get_args(Engine)
#: One engine for all ops, or one for each kind of op, such as `{"dot": "fbgemm", "conv": "onednn"}`.
Engines = Engine | Mapping[str, Engine]

_ONEDNN_GROUPS = 100  # torch keeps convolutions of more groups in fbgemm


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How one kernel ends: what it makes of its accumulator."""

    name: str
    unclamped: Callable[[Accumulator, QParams], jax.Array]  # whole float32 numbers, of any size; NaN stays NaN
    reals: Callable[[Accumulator], jax.Array]  # float32
    #: Codes, not clamped, and qparams of an input whose range is found from it, where the kernel has a way of its own.
    inputs: Callable[[jax.Array, jax.Array, jax.Array, QuantSpec], tuple[jax.Array, QParams]] | None = None

    def has_own_inputs(self, spec: QuantSpec) -> bool:
        """Whether the kernel has a way of its own of quantizing a dynamic input by this spec, which has to be torch's."""
        torchs = spec.is_deployed and spec.convention == "torch_real" and spec.effective_scale_rule == "torch_aten"
        return self.inputs is not None and torchs

    def codes(self, accumulator: Accumulator, qparams: QParams, spec: QuantSpec) -> jax.Array:
        """The codes of an output with one scale; they saturate at the limits of the format, and NaN has the lowest."""
        low, high = spec.format.quant_min, spec.format.quant_max
        codes = self.unclamped(accumulator, qparams)
        return jnp.clip(jnp.where(jnp.isnan(codes), low, codes), low, high).astype(spec.format.storage_dtype)


_FBGEMM = Kernel("fbgemm", fbgemm_codes, fbgemm_reals)
_QNNPACK = Kernel("qnnpack", qnnpack_codes, qnnpack_reals)
_ONEDNN_DOT = Kernel(
    "onednn", partial(onednn_codes, is_conv=False), partial(onednn_reals, is_conv=False), onednn_inputs
)
_ONEDNN_CONV = Kernel("onednn", partial(onednn_codes, is_conv=True), partial(onednn_reals, is_conv=True))
_EXACT = Kernel("exact", exact_codes, fbgemm_reals)


def check_engine(engine: object, caller: str) -> None:
    """Raise unless engine is the name of one, or a mapping from kinds of ops to names."""
    names = engine.values() if isinstance(engine, Mapping) else (engine,)
    for name in names:
        if name not in ENGINES:
            raise ValueError(
                f"{caller}: engine must be one of {', '.join(map(repr, ENGINES))}, or a mapping such as "
                f"{{'dot': 'fbgemm', 'conv': 'onednn'}}, got {engine!r}."
            )


def kernel_of(engine: Engines, kind: str, *, groups: int, has_output_padding: bool, weight: QuantSpec) -> Kernel:
    """The kernel that an engine runs an op with.

    Args:
      engine: The engine, or one for each kind; a kind that a mapping leaves out gets fbgemm.
      kind: Of the op: `"conv"`, `"dot"`, ….
      groups: Of a convolution; 1 for other ops.
      has_output_padding: Whether a transposed convolution has its output padded at one side.
      weight: The spec of the weight.

    References:
      PyTorch, `aten/src/ATen/native/quantized/cpu/OnednnUtils.h`, `should_use_onednn_quant`.
    """
    name = engine.get(kind, "fbgemm") if isinstance(engine, Mapping) else engine
    is_conv = kind == "conv"
    if name == "x86":
        to_onednn = is_conv and groups <= _ONEDNN_GROUPS and not weight.has_zero_point and not has_output_padding
        name = "onednn" if to_onednn else "fbgemm"
    if name == "onednn":
        return _ONEDNN_CONV if is_conv else _ONEDNN_DOT
    return {"fbgemm": _FBGEMM, "qnnpack": _QNNPACK, "exact": _EXACT}[name]
