"""From an integer program to torch's eager-static state dict; what torch makes of it is in test_torch.py."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.interop import Conv2d, Linear, eager_static
from tests.interop.programs import A8, ENTRY, MODULES, W8, program


def test_keys_and_versions_are_torchs():
    state = eager_static(program(), MODULES)
    conv = ["weight", "bias", "scale", "zero_point"]
    linear = ["scale", "zero_point", "_packed_params.dtype", "_packed_params._packed_params"]
    assert list(state) == ["quant.scale", "quant.zero_point"] + [
        f"{name}.{key}"
        for name, keys in (("conv1", conv), ("conv2", conv), ("fc1", linear), ("fc2", linear))
        for key in keys
    ]
    assert state.metadata["fc1"] == state.metadata["fc1._packed_params"] == {"version": 3}
    assert state["quant.scale"].shape == (1,)
    assert state["conv1.scale"].shape == ()
    assert state["conv1.zero_point"].dtype == np.int64


def test_kernels_are_turned_and_the_flattened_inputs_permuted():
    integer = program()
    state = eager_static(integer, MODULES)
    ops = {op.name: op for op in integer.ops}
    kernel = np.asarray(ops["Conv_1"].weight.codes)
    for out, into, row, column in ((0, 0, 0, 0), (5, 3, 2, 1), (2, 1, 0, 2)):
        assert state["conv2.weight"].codes[out, into, row, column] == kernel[row, column, into, out]
    dense = np.asarray(ops["Dense_0"].weight.codes)
    weight, bias = state["fc1._packed_params._packed_params"]
    height, width, channels = MODULES["Dense_0"].flattened
    for row, column, channel in ((0, 0, 0), (1, 2, 5), (0, 2, 1)):
        ours = (row * width + column) * channels + channel
        torchs = (channel * height + row) * width + column
        np.testing.assert_array_equal(weight.codes[:, torchs], dense[ours])
    assert weight.spec.granularity == qjax.PerChannel(0)
    np.testing.assert_array_equal(weight.scale, ops["Dense_0"].weight.scale)
    np.testing.assert_array_equal(bias, np.asarray(ops["Dense_0"].bias).reshape(-1))
    plain, _ = state["fc2._packed_params._packed_params"]
    np.testing.assert_array_equal(plain.codes, np.asarray(ops["Dense_1"].weight.codes).T)


def test_no_quantize_module_where_none_is_asked_for():
    assert not [key for key in eager_static(program(), MODULES, quantize=None) if key.startswith("quant")]


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({**MODULES, "Dense_7": Linear("x")}, "has no op 'Dense_7'; its ops are Conv_0, Conv_1, Dense_0, Dense_1"),
        ({k: v for k, v in MODULES.items() if k != "Conv_1"}, "does not say what op 'Conv_1' becomes"),
        ({**MODULES, "Dense_1": Linear("fc1")}, "two ops become the same torch module"),
        ({**MODULES, "Dense_1": Conv2d("fc2")}, "Dense_1 is a dot of rank 2, not a 2-D convolution"),
        ({**MODULES, "Conv_0": Linear("conv1")}, "Conv_0 is a conv whose weight"),
        ({**MODULES, "Dense_0": Linear("fc1", flattened=(3, 3, 6))}, "Dense_0 has 36 inputs, but Linear('fc1', "
         "flattened=(3, 3, 6)) says 54"),
    ],
)  # fmt: skip
def test_a_wrong_mapping_is_explained(modules, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        eager_static(program(), modules)


W4 = qjax.QuantSpec(qjax.int4, symmetric=True, granularity=qjax.PerChannel(-1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": W4}, "the weight of Conv_0 is int4 symmetric per_channel(-1); torch's fbgemm kernels want int8"),
        ({"weight": W8.replace(symmetric=False)}, "the weight of Conv_0 is int8 affine"),
        ({"activation": qjax.QuantSpec(qjax.int8)}, "the output of Conv_0 is int8 affine per_tensor"),
        ({"activation": qjax.QuantSpec(qjax.uint4)}, "the output of Conv_0 is uint4 affine per_tensor"),
        ({"entry": None}, "the input of Conv_0 is not quantized"),
        ({"rules": (qjax.Rule("Dense_1", weight=W8),)}, "the output of Dense_1 is not quantized"),
    ],
)
def test_what_torch_cannot_hold_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        eager_static(program(**changes), MODULES)


def test_a_weight_scaled_along_its_inputs_is_refused():
    integer = program()
    qparams = {"scale": np.ones(8, np.float32), "zero_point": np.zeros(8, np.int32)}
    turned = dataclasses.replace(integer.ops[-1].weight, spec=W8.replace(granularity=qjax.PerChannel(0)), **qparams)
    integer.ops = (*integer.ops[:-1], dataclasses.replace(integer.ops[-1], weight=turned))
    with pytest.raises(ValueError, match=r"Dense_1 is quantized per_channel\(0\); torch wants one scale for each"):
        eager_static(integer, MODULES)


def test_an_entry_that_rounds_otherwise_than_torch_is_warned_of():
    with pytest.warns(UserWarning, match="simulated with convention 'torch_fake'.*torch_real"):
        eager_static(program(entry=A8), MODULES)
    assert ENTRY.convention == "torch_real"  # which the other tests use, without a warning


def changed(index, **changes):
    """The program with some fields of one op replaced."""
    integer = program()
    ops = list(integer.ops)
    ops[index] = dataclasses.replace(ops[index], **changes)
    integer.ops = tuple(ops)
    return integer


@pytest.mark.parametrize("quantize", ["quant", None])
def test_an_input_that_is_quantized_where_torch_cannot_is_refused(quantize):
    spec, qparams = program().ops[2].input
    other = (spec, qjax.QParams(2 * qparams.scale, qparams.zero_point))
    integer = changed(2, input=other, input_quantizer="Dense_0/input")
    message = (
        r"eager_static: the input of Dense_0 is quantized by itself \(Dense_0/input\), not by the op that makes it, and torch "
        r"has no module that requantizes there \(such as after a tanh .* Else quantize the output of the op before .* the two\."
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        eager_static(integer, MODULES, quantize=quantize)


def test_a_tanh_between_two_ops_is_refused():
    def model(params, x):
        return jnp.tanh(x @ params["a"]["w"]) @ params["b"]["w"]

    params = {name: {"w": jax.random.normal(jax.random.key(i), (4, 4))} for i, name in enumerate("ab")}
    recipe = qjax.Recipe([qjax.Rule(".*", weight=W8, input=ENTRY, output=A8)])
    prepared = qjax.prepare(model, recipe)
    x = jax.random.normal(jax.random.key(9), (16, 4))
    _, qvars = prepared(prepared.init(params, x), params, x, mode="calibrate")
    integer = qjax.convert(prepared, qvars, params)
    with pytest.raises(ValueError, match=r"the input of b is quantized by itself \(b/input\).*such as after a tanh"):
        eager_static(integer, {"a": Linear("a"), "b": Linear("b")})


def test_a_second_branch_off_the_models_input_is_an_entry_too():
    first = program().ops[0]
    integer = changed(1, input=first.input, input_quantizer="Conv_1/input")
    state = eager_static(integer, MODULES)
    assert state["quant.scale"] == np.asarray(first.input[1].scale)
    other = (first.input[0], qjax.QParams(first.input[1].scale, first.input[1].zero_point + 1))
    with pytest.raises(ValueError, match=r"the input of Conv_1 is quantized by itself"):
        eager_static(changed(1, input=other, input_quantizer="Conv_1/input"), MODULES)


def test_every_input_is_checked_and_not_only_the_first():
    with pytest.raises(ValueError, match=r"the input of Dense_1 is not quantized.* rule with output="):
        eager_static(changed(3, input=None, input_quantizer=None), MODULES)
    point = program().ops[2].input
    with pytest.raises(
        ValueError, match=r"the input of Dense_0 is int8 affine per_tensor; torch's fbgemm kernels want"
    ):
        eager_static(changed(2, input=(qjax.QuantSpec(qjax.int8), point[1])), MODULES)


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        ({"lhs_dilation": (2, 2)}, r"Conv_1 dilates its input by \(2, 2\), as a transposed convolution does"),
        ({"batch_group_count": 2}, r"Conv_1 has batch_group_count=2"),
        ({"padding": ((0, 1), (1, 1))}, r'Conv_1 pads by \(\(0, 1\), \(1, 1\)\).*"SAME" pads unevenly.*padding=1'),
        ({"padding": ((-1, -1), (1, 1))}, r"Conv_1 pads by"),
    ],
)
def test_convolutions_that_torch_has_not_are_refused(geometry, message):
    conv = dataclasses.replace(program().ops[1].contraction, **geometry)
    with pytest.raises(ValueError, match=message):
        eager_static(changed(1, contraction=conv), MODULES)


def test_strides_dilation_and_even_padding_are_torchs_too():
    conv = dataclasses.replace(
        program().ops[1].contraction, padding=((2, 2), (0, 0)), window_strides=(2, 1), rhs_dilation=(2, 2)
    )
    assert "conv2.weight" in eager_static(changed(1, contraction=conv), MODULES)


def test_a_depthwise_convolution_of_the_full_range_is_warned_of():
    op = program().ops[1]
    scale, zero_point = op.weight.scale, op.weight.zero_point
    weight = qjax.QTensor(op.weight.codes[:, :, :1], scale, zero_point, op.weight.spec)
    depthwise = dataclasses.replace(op.contraction, feature_group_count=6)
    full = (op.input[0].replace(reduce_range=False), op.input[1])
    with pytest.warns(
        UserWarning, match=r"Conv_1 is a depthwise convolution.*may saturate.*reduce_range=True"
    ) as caught:
        eager_static(changed(1, weight=weight, contraction=depthwise, input=full), MODULES)
    assert [warning.filename for warning in caught] == [__file__]
    # None of these warns, which would be an error.
    eager_static(changed(1, weight=weight, contraction=depthwise), MODULES)
    eager_static(changed(1, input=full), MODULES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, {}), r"eager_static: integer must come from qjax\.convert, got NoneType\."),
        (
            ("program", ["conv1"]),
            r"eager_static: modules must map the names of ops to Conv2d, Linear and their like, got list\.",
        ),
        (("program", {"Conv_0": "conv1"}), r"eager_static: modules must map .*; got 'Conv_0': 'conv1'\."),
    ],
)
def test_arguments_of_another_type_are_refused(arguments, message):
    integer, modules = arguments
    with pytest.raises(TypeError, match=f"^{message}$"):
        eager_static(program() if integer else None, modules)
