"""Torch's quantized modules of the geometry that an op of a program has, as a torch user would write them; imported late."""

import numpy as np

from qjax.interop import ConvTranspose1d, Linear
from qjax.interop._write.layout import transposed_padding
from qjax.transform._contraction import Conv


def conv_arguments(op, module):
    """The arguments of torch's convolution: channels, kernel, stride and so on."""
    conv = op.contraction
    assert isinstance(conv, Conv)
    outputs, inputs, *spatial = conv.dimension_numbers.rhs_spec
    shape, groups = op.weight.shape, conv.feature_group_count
    arguments = {
        "in_channels": shape[inputs] * groups,
        "out_channels": shape[outputs],
        "kernel_size": tuple(shape[axis] for axis in spatial),
        "dilation": conv.rhs_dilation,
        "groups": groups,
        "bias": op.bias is not None,
    }
    if type(module).transposed:
        padding, output_padding = transposed_padding(shape, conv)
        return arguments | {"stride": conv.lhs_dilation, "padding": padding, "output_padding": output_padding}
    return arguments | {"stride": conv.window_strides, "padding": tuple(low for low, _ in conv.padding)}


def linear_arguments(op):
    contracted = op.contraction.contracting[1]
    inputs = int(np.prod([op.weight.shape[axis] for axis in contracted]))
    return inputs, op.weight.codes.size // inputs


def static_module(op, module):
    """A module of `torch.ao.nn.quantized`, fused with its ReLU where the op has one."""
    import torch.ao.nn.intrinsic.quantized as nniq
    import torch.ao.nn.quantized as nnq

    if isinstance(module, Linear):
        kind = nniq.LinearReLU if op.relu else nnq.Linear
        return kind(*linear_arguments(op))
    transposed = type(module).transposed
    kind = getattr(nniq, f"ConvReLU{module.rank}d") if op.relu and not transposed else getattr(nnq, module.kind)
    arguments = conv_arguments(op, module)
    if transposed and isinstance(module, ConvTranspose1d):
        arguments = {key: value[0] if isinstance(value, tuple) else value for key, value in arguments.items()}
    return kind(**arguments)


def add_module(net, name, module):
    """Put a module at a dotted place."""
    import torch

    *path, last = name.split(".")
    for part in path:
        if not hasattr(net, part):
            net.add_module(part, torch.nn.Module())
        net = getattr(net, part)
    net.add_module(last, module)
