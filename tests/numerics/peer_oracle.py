"""Other libraries, live, for the modules that compare with them; those skip themselves where there are none.

Numpy arrays in, numpy arrays out, bits kept; a number format is named as ml_dtypes and torch name it.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import ml_dtypes
import numpy as np

from tests.numerics.torch_oracle import to_torch, torch


def missing(*modules: str) -> str:
    """Why not to test: the first of these modules that is not installed; an empty string if all are."""
    return next((f"{name} is not installed" for name in modules if importlib.util.find_spec(name) is None), "")


def _module(name: str) -> Any:
    """The module, imported when it is first asked for: pytest looks into every file for doctests."""
    return importlib.import_module(name)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same bits as an array, floats of one byte too."""
    tensor = tensor.detach().contiguous()
    if not tensor.dtype.is_floating_point:
        return tensor.numpy()
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.view(integer).numpy().view(np.dtype(str(tensor.dtype).removeprefix("torch.")))


# torchao: blocks are given by their shape, one number a dimension of x; qparams have the shape of the grid of blocks.


def torchao_quantize(
    x: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    quant_min: int,
    quant_max: int,
    block_size: tuple[int, ...],
    dtype: str = "int8",
) -> tuple[np.ndarray, np.ndarray]:
    """quantize_affine and dequantize_affine: codes of the dtype, and what they stand for, in the type of x."""
    ao = _module("torchao.quantization.quant_primitives")
    qparams = to_torch(scale), to_torch(zero_point)
    limits = getattr(torch, dtype), quant_min, quant_max
    codes = ao.quantize_affine(to_torch(x), block_size, *qparams, *limits)
    y = ao.dequantize_affine(codes, block_size, *qparams, *limits, output_dtype=to_torch(x).dtype)
    return to_numpy(codes), to_numpy(y)


def torchao_fake_quantize(
    x: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    quant_min: int,
    quant_max: int,
    block_size: tuple[int, ...],
    dy: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """_fake_quantize_affine as QAT uses it, and its gradient by x for the cotangent dy."""
    ao = _module("torchao.quantization.quant_primitives")
    tensor = to_torch(x).requires_grad_()
    y = ao._fake_quantize_affine(
        tensor, block_size, to_torch(scale), to_torch(zero_point), torch.int32, quant_min, quant_max
    )
    y.backward(to_torch(dy))
    return to_numpy(y), to_numpy(tensor.grad)


def torchao_choose_qparams(
    x: np.ndarray,
    mapping: str,
    block_size: tuple[int, ...],
    quant_min: int,
    quant_max: int,
    *,
    eps: float | None = None,
    dtype: str = "int8",
) -> tuple[np.ndarray, np.ndarray]:
    """choose_qparams_affine for "SYMMETRIC", "SYMMETRIC_NO_CLIPPING_ERR" or "ASYMMETRIC": scale and int32 zero_point."""
    ao = _module("torchao.quantization.quant_primitives")
    scale, zero_point = ao.choose_qparams_affine(
        to_torch(x), ao.MappingType[mapping], block_size, getattr(torch, dtype), quant_min, quant_max, eps, keepdim=True
    )
    return to_numpy(scale), to_numpy(zero_point)


# PyTorch: how qparams are chosen in its C++. Two copies of one function, which differ.


def aten_choose_qparams(x: np.ndarray, *, signed: bool, reduce_range: bool) -> tuple[float, int]:
    """The aten copy, as torch.quantize_per_tensor_dynamic uses it, for eight bits: float64 scale and zero_point."""
    if not signed:
        return torch._choose_qparams_per_tensor(to_torch(x), reduce_range)
    quantized = torch.quantize_per_tensor_dynamic(to_torch(x), torch.qint8, reduce_range)
    return quantized.q_scale(), quantized.q_zero_point()


def fused_moving_average(
    batches: list[np.ndarray],
    averaging_constant: float,
    quant_min: int,
    quant_max: int,
    *,
    symmetric: bool,
    axis: int | None = None,
) -> dict[str, np.ndarray]:
    """fused_moving_avg_obs_fake_quant after these batches: min_val, max_val, scale, zero_point and the last output.

    The qparams come from the copy in fbgemm. An axis of None is per tensor; torch's own kernel for a channel wants 0.
    """
    size = 1 if axis is None else batches[0].shape[axis]
    on = torch.ones(1, dtype=torch.long)
    low, high = torch.full((size,), torch.inf), torch.full((size,), -torch.inf)
    scale, zero_point = torch.ones(size), torch.zeros(size, dtype=torch.int32)
    y = None
    for batch in batches:
        y = torch.fused_moving_avg_obs_fake_quant(
            to_torch(batch),
            on,
            on,
            low,
            high,
            scale,
            zero_point,
            averaging_constant,
            quant_min,
            quant_max,
            -1 if axis is None else axis,
            axis is not None,
            symmetric,
        )
    names = "min_val", "max_val", "scale", "zero_point", "y"
    return {name: to_numpy(value) for name, value in zip(names, (low, high, scale, zero_point, y), strict=True)}


# PyTorch: quantized_decomposed, the ops of an exported program.


def _decomposed() -> Any:
    """The ops, which exist once this module has been imported."""
    _module("torch.ao.quantization.fx._decomposed")
    return torch.ops.quantized_decomposed


def decomposed_quantize(
    x: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    quant_min: int,
    quant_max: int,
    *,
    granularity: str = "per_tensor",
    axis: int = 0,
    group_size: int = 0,
    dtype: str = "int8",
    out_dtype: str = "float32",
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and reals; granularity is "per_tensor", "per_channel" (axis), "per_token" or "per_channel_group"."""
    ops, data, code_type, real_type = _decomposed(), to_torch(x), getattr(torch, dtype), getattr(torch, out_dtype)
    limits = quant_min, quant_max, code_type
    if granularity == "per_tensor":
        qparams = float(scale), int(zero_point)
        codes = ops.quantize_per_tensor(data, *qparams, *limits)
        return to_numpy(codes), to_numpy(ops.dequantize_per_tensor(codes, *qparams, *limits, out_dtype=real_type))
    arrays = to_torch(scale), to_torch(zero_point)
    if granularity == "per_channel":
        codes = ops.quantize_per_channel(data, *arrays, axis, *limits)
        y = ops.dequantize_per_channel(codes, *arrays, axis, *limits, out_dtype=real_type)
    elif granularity == "per_token":
        codes = ops.quantize_per_token(data, *arrays, *limits)
        y = ops.dequantize_per_token(codes, *arrays, *limits, real_type)
    else:
        codes = ops.quantize_per_channel_group(data, *arrays, *limits, group_size)
        y = ops.dequantize_per_channel_group(codes, *arrays, *limits, group_size, real_type)
    return to_numpy(codes), to_numpy(y)


def decomposed_choose_qparams(
    x: np.ndarray,
    quant_min: int = -128,
    quant_max: int = 127,
    *,
    kind: str = "choose_qparams",
    eps: float = 2.0**-23,
    dtype: str = "int8",
) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero_point of "choose_qparams", "choose_qparams_symmetric" or "choose_qparams_per_token[_asymmetric]"."""
    op, code_type = getattr(_decomposed(), kind), getattr(torch, dtype)
    if "per_token" in kind:
        return tuple(map(to_numpy, op(to_torch(x), code_type)))
    return tuple(map(to_numpy, op.tensor(to_torch(x), quant_min, quant_max, eps, code_type)))


# PyTorch: zero_points that are floats.


def fake_quantize_float_zero_point(
    x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, axis: int, quant_min: int, quant_max: int, dy: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """fake_quantize_per_channel_affine with float32 zero_points, and its gradient by x for the cotangent dy."""
    tensor = to_torch(x).requires_grad_()
    y = torch.fake_quantize_per_channel_affine(
        tensor, to_torch(scale), to_torch(zero_point), axis, quant_min, quant_max
    )
    y.backward(to_torch(dy))
    return to_numpy(y), to_numpy(tensor.grad + 0.0)


def float_qparams_quantize(
    x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, axis: int, *, bits: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """quantize_per_channel with float32 zero_points: quint8 or quint4x2 codes, one a byte, and their reals."""
    dtype = {8: torch.quint8, 4: torch.quint4x2}[bits]
    quantized = torch.quantize_per_channel(to_torch(x), to_torch(scale), to_torch(zero_point), axis, dtype)
    codes = to_numpy(quantized.int_repr())
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(-1)[: x.size].reshape(x.shape)
    return codes, to_numpy(quantized.dequantize())


# compressed-tensors: `options` are the fields of its QuantizationArgs, such as num_bits=8, type="int", strategy="group".


def compressed_tensors_quantize(
    x: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray | None,
    *,
    global_scale: np.ndarray | None = None,
    dtype: str | None = None,
    **options: object,
) -> dict[str, np.ndarray]:
    """Codes (of the dtype, else floats in the type of x / scale), their "dequantized" reals, and "fake_quantized" x."""
    quantization = _module("compressed_tensors.quantization")
    forward = _module("compressed_tensors.quantization.lifecycle.forward")
    args = quantization.QuantizationArgs(**options)
    scale_tensor, *others = (None if a is None else to_torch(a) for a in (scale, zero_point, global_scale))
    point, whole = others
    code_type = None if dtype is None else getattr(torch, dtype)
    codes = forward.quantize(to_torch(x), scale_tensor, point, args, dtype=code_type, global_scale=whole)
    y = forward.dequantize(codes, scale_tensor, point, args, global_scale=whole)
    fake = forward.fake_quantize(to_torch(x), scale_tensor, point, args, global_scale=whole)
    return {"codes": to_numpy(codes), "dequantized": to_numpy(y), "fake_quantized": to_numpy(fake)}


def compressed_tensors_choose_qparams(
    min_val: np.ndarray, max_val: np.ndarray, *, global_scale: np.ndarray | None = None, **options: object
) -> tuple[np.ndarray, np.ndarray]:
    """calculate_qparams: scale in the type of min_val, and zero_point."""
    quantization = _module("compressed_tensors.quantization")
    utils = _module("compressed_tensors.quantization.utils")
    options = {name: getattr(torch, str(v)) if name.endswith("_dtype") else v for name, v in options.items()}
    whole = None if global_scale is None else to_torch(global_scale)
    args = quantization.QuantizationArgs(**options)
    scale, zero_point = utils.calculate_qparams(to_torch(min_val), to_torch(max_val), args, global_scale=whole)
    return to_numpy(scale), to_numpy(zero_point)


def compressed_tensors_global_scale(min_val: np.ndarray, max_val: np.ndarray) -> np.ndarray:
    """generate_gparam: by how much the local scales of NVFP4 are multiplied, for the extremes of a whole tensor."""
    utils = _module("compressed_tensors.quantization.utils")
    return to_numpy(utils.generate_gparam(to_torch(min_val), to_torch(max_val)))


# ONNX: the reference evaluator that comes with its specification. The types are those of scale and zero_point.


def _onnx_run(
    op: str, inputs: dict[str, np.ndarray | None], outputs: int = 1, **attributes: object
) -> list[np.ndarray]:
    """The outputs of a model of one node."""
    onnx = _module("onnx")
    given = {name: np.asarray(value) for name, value in inputs.items() if value is not None}
    names = [f"y{i}" for i in range(outputs)]
    node = onnx.helper.make_node(op, list(given), names, **attributes)
    types = {name: onnx.helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in given.items()}
    values = [onnx.helper.make_tensor_value_info(name, types[name], value.shape) for name, value in given.items()]
    results = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None) for name in names]
    graph = onnx.helper.make_graph([node], "one", values, results)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)])
    return _module("onnx.reference").ReferenceEvaluator(model).run(None, given)


def onnx_quantize(
    x: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    *,
    axis: int = 1,
    block_size: int = 0,
    saturate: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """QuantizeLinear and DequantizeLinear: codes in the type of zero_point, reals in the type of scale."""
    qparams = {"scale": scale, "zero_point": zero_point}
    place = {"axis": axis, "block_size": block_size}
    with np.errstate(all="ignore"):
        (codes,) = _onnx_run("QuantizeLinear", {"x": x, **qparams}, saturate=int(saturate), **place)
        (y,) = _onnx_run("DequantizeLinear", {"x": codes, **qparams}, **place)
    return codes, y


def onnx_dynamic_quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """DynamicQuantizeLinear: uint8 codes, scale and zero_point."""
    with np.errstate(all="ignore"):
        return tuple(_onnx_run("DynamicQuantizeLinear", {"x": x}, 3))


# Brevitas


def brevitas_quantize(
    x: np.ndarray,
    scale: np.ndarray,
    zero_point: np.ndarray,
    bits: int,
    dy: np.ndarray,
    *,
    signed: bool = True,
    narrow: bool = False,
    clamp_ste: bool = False,
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """IntQuant: codes as floats, reals, and for the cotangent dy the gradients by "x", "scale" and "zero_point".

    Brevitas clamps with TensorClampSte (gradient 1 everywhere) where the scale is a statistic or constant, and with
    TensorClamp (gradient 0 where it clamps) where the scale is learned: clamp_ste says which.
    """
    wrapper = _module("brevitas.core.function_wrapper")
    clamp = (wrapper.TensorClampSte if clamp_ste else wrapper.TensorClamp)()
    quant = _module("brevitas.core.quant").IntQuant(narrow, signed, wrapper.Identity(), tensor_clamp_impl=clamp)
    inputs = {"scale": to_torch(scale), "zero_point": to_torch(zero_point), "x": to_torch(x)}
    width = torch.tensor(float(bits))
    codes = quant.to_int(inputs["scale"], inputs["zero_point"], width, inputs["x"])
    for tensor in inputs.values():
        tensor.requires_grad_()
    y = quant(inputs["scale"], inputs["zero_point"], width, inputs["x"])
    y.backward(to_torch(dy))
    return to_numpy(codes), to_numpy(y), {name: to_numpy(tensor.grad) for name, tensor in inputs.items()}


def brevitas_weight(weight: np.ndarray, quantizer: str, **options: object) -> dict[str, np.ndarray]:
    """Scale, zero_point and quantized "value" of a weight (out, in) under, say, "Int8WeightPerTensorFloat".

    Options override what is injected, such as weight_bit_width=4, weight_narrow_range=False.
    """
    layer = _module("brevitas.nn").QuantLinear(
        *weight.shape[::-1], bias=False, weight_quant=getattr(_module("brevitas.quant"), quantizer), **options
    )
    layer.weight.data = to_torch(weight)
    quantized = layer.quant_weight()
    return {name: to_numpy(getattr(quantized, name)) for name in ("scale", "zero_point", "value")}


# torchao: microscaling and float8. Elements come as arrays of their ml_dtypes type.

MX_ELEMENTS = ("float8_e4m3fn", "float8_e5m2", "float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn")
MX_MODES = ("FLOOR", "CEIL", "EVEN", "RCEIL")


def _fp4_elements(packed: torch.Tensor) -> np.ndarray:
    """Two elements a byte, the first in the low nibble."""
    codes = to_numpy(packed.view(torch.uint8))
    pairs = np.stack([codes & 15, codes >> 4], -1)
    return pairs.reshape(*codes.shape[:-1], -1).view(ml_dtypes.float4_e2m1fn)


def torchao_to_mx(
    x: np.ndarray, element: str, mode: str, block_size: int = 32
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """to_mx: float8_e8m0fnu scales (…, blocks), elements of the shape of x, and their reals in the type of x."""
    mx = _module("torchao.prototype.mx_formats.mx_tensor")
    modes = _module("torchao.prototype.mx_formats.config").ScaleCalculationMode
    names = {"float6_e2m3fn": "fp6_e2m3", "float6_e3m2fn": "fp6_e3m2", "float4_e2m1fn": torch.float4_e2m1fn_x2}
    element_type = names[element] if element in names else getattr(torch, element)
    data = to_torch(x)
    scale, codes = mx.to_mx(data, element_type, block_size, modes[mode])
    y = mx.to_dtype(codes, scale, element_type, block_size, data.dtype)
    if element == "float4_e2m1fn":
        elements = _fp4_elements(codes)
    else:
        elements = to_numpy(codes).view(np.dtype(element))
    return to_numpy(scale), elements, to_numpy(y)


def torchao_nvfp4(
    x: np.ndarray, per_tensor_scale: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """nvfp4_quantize: float8_e4m3fn scales (…, blocks of 16), float4_e2m1fn elements, and their reals in x's type."""
    nvfp4 = _module("torchao.prototype.mx_formats.nvfp4_tensor")
    whole = None if per_tensor_scale is None else to_torch(per_tensor_scale)
    tensor = nvfp4.NVFP4Tensor.to_nvfp4(to_torch(x), per_tensor_scale=whole)
    return to_numpy(tensor.scale), _fp4_elements(tensor.qdata), to_numpy(tensor.dequantize())


def torchao_nvfp4_tensor_scale(amax: np.ndarray) -> np.ndarray:
    """per_tensor_amax_to_scale."""
    return to_numpy(_module("torchao.prototype.mx_formats.nvfp4_tensor").per_tensor_amax_to_scale(to_torch(amax)))


def torchao_float8(
    x: np.ndarray, dtype: str, block_size: tuple[int, ...], power_of_two: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """_choose_scale_float8 (float32 scales), _quantize_affine_float8 and its reals in x's type, as Float8Tensor does."""
    ao = _module("torchao.quantization.quant_primitives")
    element, data = getattr(torch, dtype), to_torch(x)
    scale_type = torch.float8_e8m0fnu if power_of_two else torch.float32
    scale = ao._choose_scale_float8(data, block_size, element, scale_type)
    codes = ao._quantize_affine_float8(data, scale, element)
    y = ao._dequantize_affine_float8(codes, scale, data.dtype)
    return to_numpy(scale), to_numpy(codes), to_numpy(y)


def torchao_float8_training_scale(amax: np.ndarray, dtype: str, *, power_of_two: bool = False) -> np.ndarray:
    """amax_to_scale of torchao.float8, the training side: by how much x is multiplied."""
    utils = _module("torchao.float8.float8_utils")
    return to_numpy(utils.amax_to_scale(to_torch(amax), getattr(torch, dtype), power_of_two))


def torchao_nf4(x: np.ndarray, block_size: int = 64, scaler_block_size: int = 256) -> dict[str, np.ndarray]:
    """NF4Tensor, whose block scales are quantized too: "codes", "table", the parts of its scales, "scale", "dequantized".

    The size of x must be a multiple of block_size times scaler_block_size.
    """
    module = _module("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    tensor = module.to_nf4(to_torch(x), block_size, scaler_block_size)
    packed = to_numpy(tensor.quantized_data)
    scale = tensor.dequantize_scalers(tensor.quantized_scalers, tensor.quantization_factor, scaler_block_size)
    parts = "quantized_scalers", "quantization_factor", "scaler_mean"
    return {
        "codes": np.stack([packed >> 4, packed & 15], -1).reshape(x.shape),  # the first in the high nibble
        "table": to_numpy(tensor.nf4),
        "scale": to_numpy(scale),
        "dequantized": to_numpy(tensor.get_original_weight()),
        **{name: to_numpy(getattr(tensor, name)) for name in parts},
    }


# gfloat: what a number format's values are, in float64.

GFLOAT_FORMATS = {
    "float8_e4m3fn": "ocp_e4m3",
    "float8_e5m2": "ocp_e5m2",
    "float6_e2m3fn": "ocp_e2m3",
    "float6_e3m2fn": "ocp_e3m2",
    "float4_e2m1fn": "ocp_e2m1",
    "float8_e8m0fnu": "ocp_e8m0",
    "int8": "ocp_int8",  # the element of MXINT8: multiples of 2^-6
}


def gfloat_round(
    x: np.ndarray, dtype: str, *, rounding: str = "TiesToEven", saturate: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """round_ndarray and encode_ndarray: float64 values and their bits; rounding is a name of gfloat's RoundMode."""
    gfloat = _module("gfloat")
    number_format = getattr(_module("gfloat.formats"), f"format_info_{GFLOAT_FORMATS[dtype]}")
    values = gfloat.round_ndarray(number_format, np.asarray(x, np.float64), gfloat.RoundMode[rounding], saturate)
    return values, np.asarray(gfloat.encode_ndarray(number_format, values))
