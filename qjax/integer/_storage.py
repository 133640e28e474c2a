"""Weights at rest: codes of less than 8 bits packed, as many to a byte as fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qjax._packing import PackEncoding, PackOrder, pack, unpack
from qjax._qparams import QParams
from qjax._quantize import QTensor
from qjax._spec import QuantSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """The codes of a weight as a program holds them; stacked by the steps of scans, in axes in front of its own.

    Codes of 8 bits and more are stored as they are. Others are packed with `qjax.pack`, flat, the first in the lowest bits:
    in order "low_first" where they divide a byte, else in "uint8_stream"; signed integers in two's complement.
    """

    words: jax.Array  # (*steps, bytes) uint8, or codes
    qparams: QParams
    spec: QuantSpec = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # of the codes of one step

    @staticmethod
    def of(weight: QTensor, steps: Sequence[int] = ()) -> StoredWeight:
        """Store codes that are stacked by these steps."""
        codes, shape = weight.codes, tuple(weight.codes.shape[len(steps) :])
        if _is_packed(weight.spec):
            order, encoding = _layout(weight.spec)
            flat = codes.reshape(*steps, math.prod(shape))
            codes = pack(flat, weight.spec.format.bits, order=order, encoding=encoding)
        return StoredWeight(codes, weight.qparams, weight.spec, shape)

    def tensor(self) -> QTensor:
        """The codes, unpacked."""
        codes = self.words
        if _is_packed(self.spec):
            order, encoding = _layout(self.spec)
            size, steps = math.prod(self.shape), codes.shape[:-1]
            codes = unpack(codes, self.spec.format.bits, size, order=order, encoding=encoding)
            codes = codes.reshape(*steps, *self.shape).astype(self.spec.format.storage_dtype)
        return QTensor.of(codes, self.qparams, self.spec)


def _is_packed(spec: QuantSpec) -> bool:
    return spec.format.bits < 8


def _layout(spec: QuantSpec) -> tuple[PackOrder, PackEncoding]:
    is_signed = jnp.issubdtype(spec.format.storage_dtype, jnp.signedinteger)
    return (
        "low_first" if 8 % spec.format.bits == 0 else "uint8_stream",
        "twos_complement" if is_signed else "unsigned",
    )
