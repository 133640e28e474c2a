"""What a kernel holds when its sums of products are done."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from qjax._qparams import QParams
from qjax._rounding import round_half_even

_INT16_LIMIT = 32767.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Accumulator:
    """The sums of an op before anything is rounded: `sums · input_scale · weight_scale + bias`, and its ReLU if `relu`.

    Whatever a kernel does with them is monotone in `sums`, so elements may be moved, and the largest of those that share
    scales and bias picked.
    """

    sums: jax.Array  # int32
    input_scale: jax.Array  # float32, () or of the rank of sums and broadcastable to it
    weight_scale: jax.Array  # the same
    bias: jax.Array | None = None  # float32, of the rank of sums and broadcastable to it
    relu: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def unit(self) -> jax.Array:
        """What 1 is worth, in float32."""
        return self.input_scale * self.weight_scale


def saturating(scaled: jax.Array, qparams: QParams, *, is_relu: bool) -> jax.Array:
    """`rint(scaled) + zero_point` as whole float32 numbers; the first saturates like the int16 stage of the kernels."""
    rounded = jnp.clip(round_half_even(scaled), -_INT16_LIMIT - 1, _INT16_LIMIT)
    zero_point = qparams.zero_point.astype(jnp.float32)
    codes = rounded + zero_point
    return jnp.maximum(codes, zero_point) if is_relu else codes
