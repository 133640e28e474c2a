"""Three ways to quantize the model, each as torch's static scheme: every op has weight and output, the first an input."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import qjax
from experiments.demo.model import OPS

MakeObserver = Callable[[qjax.QuantSpec], qjax.observers.Observer]

# 0..127 instead of 0..255, as torch's fbgemm engine has it: without VNNI, an x86 processor multiplies uint8 by int8 and
# adds pairs of products in 16 bits. 2 · 127 · 128 fits into them and 2 · 255 · 128 does not.
_ACTIVATION_8 = qjax.QuantSpec(qjax.uint8, reduce_range=True)
# The image is quantized by torch's Quantize module, which rounds by another formula than its fake-quant does.
_IMAGE = _ACTIVATION_8.replace(convention="torch_real")
_ACTIVATION_4 = qjax.QuantSpec(qjax.uint4)


def _weight(fmt: qjax.Int) -> qjax.QuantSpec:
    """Symmetric, one scale for each output channel, which is the last axis of Linen's kernels."""
    return qjax.QuantSpec(fmt, symmetric=True, granularity=qjax.PerChannel(-1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """How many bits weights and activations have."""

    name: str
    weight: qjax.QuantSpec
    activation: qjax.QuantSpec

    def recipe(self, observer: MakeObserver) -> qjax.Recipe:
        """Return the recipe whose activations are observed by `observer(spec)`.

        The image and the logits keep 8 bits in every setting, as is common practice: there is next to nothing to save
        there, and what is lost at the two ends cannot be made good between them.
        """
        activation, image, logits = observer(self.activation), observer(_IMAGE), observer(_ACTIVATION_8)
        return qjax.Recipe(
            [
                qjax.Rule(".*", weight=self.weight, output=activation),
                qjax.Rule(OPS[0], weight=self.weight, input=image, output=activation),
                qjax.Rule(OPS[-1], weight=self.weight, output=logits),
            ]
        )


SETTINGS = (
    Setting(name="W8A8", weight=_weight(qjax.int8), activation=_ACTIVATION_8),
    Setting(name="W4A8", weight=_weight(qjax.int4), activation=_ACTIVATION_8),
    Setting(name="W4A4", weight=_weight(qjax.int4), activation=_ACTIVATION_4),
)
