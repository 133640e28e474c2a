"""The peers, each set to the recipe of the comparison: int8 weights per output channel, symmetric; int8 activations per tensor,
symmetric, their range found in each batch. Where one cannot do that, the function says what it does instead.

Every import of a peer is inside a function: who lacks it gets an ImportError there, and the case says so.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax


def qwix_train(module: nn.Module) -> nn.Module:
    """Qwix's quantized training. Its gradients use the float operands, which is its default.

    By itself it gives each row of an activation a scale. A rule can turn that off for both operands at once alone, so the two
    that make configurations are asked for the left one. In an attention's dots, whose operands are both activations, both are.
    """
    import qwix

    class PerTensorActivations(qwix.QtProvider):
        def _create_conv_general_qt_config(self, *arguments: Any) -> Any:
            config = super()._create_conv_general_qt_config(*arguments)
            return dataclasses.replace(config, lhs_disable_channelwise_axes=True)

        def _create_dot_general_qt_config(self, *arguments: Any) -> Any:
            config = super()._create_dot_general_qt_config(*arguments)
            return dataclasses.replace(config, lhs_disable_channelwise_axes=True)

    types = {"weight_qtype": "int8", "act_qtype": "int8"}
    attention = qwix.QtRule(module_path=".*", op_names=("einsum",), disable_channelwise_axes=True, **types)
    rules = [attention, qwix.QtRule(module_path=".*", **types)]
    return qwix.quantize_model(module, PerTensorActivations(rules))


def qwix_fake_quantize(
    qtype: Any, *, channelwise: tuple[int, ...] = (), tiled: Mapping[int, int] | None = None
) -> Callable:
    """Qwix's fake-quantization with its straight-through gradient: that of its QAT for edge devices. The range is found."""
    import qwix
    from qwix._src.core.qarray import HowToQuantize

    how = HowToQuantize(qtype=qtype, channelwise_axes=channelwise, tiled_axes=dict(tiled or {}))
    provider = qwix.OdmlQatProvider([])
    return lambda x: provider._fake_quant(x, how)


def aqt_fake_quantize(bits: int, shared_axes: tuple[int, ...]) -> Callable[[jax.Array], jax.Array]:
    """AQT's fake-quantization: narrow range, round to nearest. `shared_axes` are those that share a scale."""
    from aqt.jax.v2 import aqt_quantizer

    return aqt_quantizer.make_fake_quant(aqt_quantizer.quantizer_make(bits), calibration_axes=shared_axes)


def aqt_dense() -> Callable[..., nn.Module]:
    """A dense layer with AQT's int8 dot forward and a float one backward."""
    from aqt.jax.v2 import config

    chosen = config.fully_quantized(fwd_bits=8, bwd_bits=None, use_stochastic_rounding=False)
    chosen.fwd.dg_quantizer.lhs.calib_shared_axes = "per_tensor"
    return functools.partial(nn.Dense, dot_general=chosen)


def torch_module(name: str) -> Any:
    """The network of `_models.network` for images, in torch. Images are NCHW there."""
    import torch
    from torch import nn as tnn

    torch.manual_seed(0)
    match name:
        case "mlp":
            return tnn.Sequential(
                tnn.Linear(784, 1024), tnn.ReLU(), tnn.Linear(1024, 1024), tnn.ReLU(), tnn.Linear(1024, 10)
            )
        case "cnn":
            layers: list[Any] = []
            for inputs, outputs in ((1, 32), (32, 64)):
                layers += [tnn.Conv2d(inputs, outputs, 3, padding=1), tnn.ReLU(), tnn.MaxPool2d(2)]
            layers += [tnn.Conv2d(64, 64, 3, padding=1), tnn.ReLU(), tnn.Flatten(), tnn.Linear(64 * 7 * 7, 10)]
            return tnn.Sequential(*layers)
    raise ValueError(f"there is no torch network {name!r}.")


def torch_qat(module: Any) -> Any:
    """torch's eager QAT with its fused fake-quantization; averaging constant 1 finds the range in each batch.

    It quantizes what each Linear or Conv, with its ReLU, gives out, and the input: one tensor more than the others, the logits.
    """
    import torch
    from torch.ao import quantization as tq

    fused = tq.FusedMovingAvgObsFakeQuantize.with_args
    limits = {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8, "averaging_constant": 1.0}
    activation = fused(observer=tq.MovingAverageMinMaxObserver, qscheme=torch.per_tensor_symmetric, **limits)
    weight = fused(
        observer=tq.MovingAveragePerChannelMinMaxObserver, qscheme=torch.per_channel_symmetric, ch_axis=0, **limits
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [name for name, _ in module.named_children()]
        kinds = dict(module.named_children())
        pairs = [
            [first, second]
            for first, second in itertools.pairwise(names)
            if isinstance(kinds[first], torch.nn.Linear | torch.nn.Conv2d) and isinstance(kinds[second], torch.nn.ReLU)
        ]
        fusible = tq.fuse_modules_qat(module.train(), pairs)
        wrapped = torch.nn.Sequential(tq.QuantStub(), fusible)
        wrapped.qconfig = tq.QConfig(activation=activation, weight=weight)
        return tq.prepare_qat(wrapped.train())


def torchao_qat(module: Any) -> Any:
    """torchao's QAT: activations int8 affine per token, for it has none per tensor; weights int8 per channel; Linear alone."""
    import torch
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        activation = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
        weight = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
        quantize_(module, QATConfig(activation_config=activation, weight_config=weight, step="prepare"))
    return module.train()


def torch_device() -> Any:
    """Where torch runs: beside JAX on the same kind of device, or not at all."""
    import torch

    from benchmarks._case import Skipped

    if jax.default_backend() == "cpu":
        torch.set_num_threads(_cores())
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise Skipped("this build of torch has no GPU")
    return torch.device("cuda")


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def to_torch(x: jax.Array) -> Any:
    """The same values as a torch tensor."""
    import numpy as np
    import torch

    tensor = torch.from_numpy(np.array(x.astype("float32"))).to(torch_device())
    return tensor.to(torch.bfloat16) if x.dtype == "bfloat16" else tensor


def torch_wait() -> None:
    """Wait for the device."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
