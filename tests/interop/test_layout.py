"""Weights in torch's layout and back, and which module each op becomes; torch itself is in test_torch_modules.py."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.interop import Conv1d, Conv2d, Conv3d, ConvTranspose2d, Embedding, Linear, torch_modules
from qjax.interop._write.layout import Layout, layout_of
from tests.interop.programs import MODULES, calibrated, program

W8 = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=qjax.PerChannel("output"))
RECIPE = qjax.Recipe([qjax.Rule(".*", weight=W8)])


def derived(fn, params, *args, recipe=RECIPE, **options):
    return torch_modules(qjax.prepare(fn, recipe), params, *args, **options)


def test_the_modules_of_a_convolutional_network_are_derived():
    wanted = {
        "Conv_0": Conv2d("Conv_0"),
        "Conv_1": Conv2d("Conv_1"),
        "Dense_0": Linear("Dense_0", flattened=(2, 3, 6)),
        "Dense_1": Linear("Dense_1"),
    }
    assert torch_modules(program()) == wanted
    prepared, _, _ = calibrated()
    assert torch_modules(prepared) == wanted
    names = {"Conv_0": "conv1", "Conv_1": "conv2", "Dense_0": "fc1", "Dense_1": "fc2"}
    assert torch_modules(program(), names=names) == torch_modules(program(), names=names.__getitem__) == MODULES


def test_convolutions_by_rank_and_an_embedding_and_names_of_paths():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, ids):
            x = nn.Conv(4, (3,), name="one")(x)
            x = nn.Conv(4, (3, 3), name="two")(x[:, :, None])
            x = nn.ConvTranspose(4, (3, 3), strides=(2, 2), padding="VALID", name="up")(x)
            x = nn.Conv(4, (1, 1, 1), name="three")(x[..., None, :])
            return x.sum() + nn.Embed(7, 4, name="table")(ids)

    net = Net()
    x, ids = jnp.ones((2, 5, 3)), jnp.zeros((2,), jnp.int32)
    params = {"params": {"enc": net.init(jax.random.key(0), x, ids)["params"]}}
    got = derived(lambda p, x, ids: net.apply({"params": p["params"]["enc"]}, x, ids), params, x, ids)
    assert got == {
        "enc/one": Conv1d("enc.one"),
        "enc/two": Conv2d("enc.two"),
        "enc/up": ConvTranspose2d("enc.up"),
        "enc/three": Conv3d("enc.three"),
        "enc/table": Embedding("enc.table"),
    }


@pytest.mark.parametrize("numbers", [("NHWC", "WHIO", "NHWC"), ("NWHC", "HWIO", "NWHC")])
def test_spatial_axes_in_another_order_are_refused(numbers):
    def fn(params, x):
        return jax.lax.conv_general_dilated(x, params["conv"]["w"], (1, 1), "VALID", dimension_numbers=numbers)

    recipe = qjax.recipes.torch_qat("x86")
    params, x = {"conv": {"w": jnp.ones((3, 3, 2, 4))}}, jnp.ones((2, 6, 6, 2))
    prepared = qjax.prepare(fn, recipe)
    qvars = prepared.init(params, x)
    with pytest.raises(ValueError, match="conv has its spatial axes in another order than the feature map"):
        qjax.interop.qat_prepared(prepared, qvars, params, modules={"conv": Conv2d("conv")})


KERNEL = {"conv": {"w": jnp.ones((3, 3, 2, 4))}}
IMAGE = jnp.ones((2, 6, 8, 2))


def conv(x, w, numbers=("NHWC", "HWIO", "NHWC")):
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)


def flat(x):
    return x.reshape(x.shape[0], -1)


@pytest.mark.parametrize(
    ("between", "flattened"),
    [
        (flat, (6, 8, 4)),
        (lambda x: flat(jax.nn.relu(x)), (6, 8, 4)),
        (lambda x: jax.nn.gelu(flat(x)), (6, 8, 4)),
        (lambda x: flat(nn.max_pool(x, (2, 2), (2, 2))), (3, 4, 4)),
        (lambda x: flat(jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 4, 1), (1, 2, 4, 1), "VALID") / 8.0), (3, 2, 4)),
        (lambda x: flat(jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))), (8, 8, 4)),
        (lambda x: flat(jnp.concatenate([x, jnp.tanh(x)], -1)), (6, 8, 8)),
        (lambda x: flat(x * jax.nn.sigmoid(x.mean((1, 2), keepdims=True))), (6, 8, 4)),
        (lambda x: x.reshape(x.shape[0], 48, 4).reshape(x.shape[0], -1), (48, 4)),
        (lambda x: flat(x.transpose(0, 3, 1, 2)), None),  # as torch has it
        (lambda x: x.mean((1, 2)), None),
        (lambda x: flat(x.max((1, 2), keepdims=True)), None),
        (lambda x: flat(jax.checkpoint(jnp.tanh)(x)), (6, 8, 4)),
        (lambda x: flat(jax.jit(lambda y: jnp.sin(y) + 1)(x)), (6, 8, 4)),
    ],
)  # fmt: skip
def test_how_a_feature_map_was_flattened_is_found(between, flattened):
    def fn(p, x):
        return between(conv(x, p["conv"]["w"])) @ p["fc"]["w"]

    size = between(conv(IMAGE, KERNEL["conv"]["w"])).shape[-1]
    got = derived(fn, KERNEL | {"fc": {"w": jnp.ones((size, 3))}}, IMAGE)
    assert got["fc"] == Linear("fc", flattened=flattened)


def test_channels_first_needs_no_permutation():
    def fn(p, x):
        return flat(conv(x, p["conv"]["w"], ("NCHW", "OIHW", "NCHW"))) @ p["fc"]["w"]

    params = {"conv": {"w": jnp.ones((4, 2, 3, 3))}, "fc": {"w": jnp.ones((4 * 48, 3))}}
    assert derived(fn, params, IMAGE.transpose(0, 3, 1, 2))["fc"] == Linear("fc")


def test_a_dot_over_a_feature_map_is_flattened_too():
    def fn(p, x):
        return jnp.einsum("bhwc,hwco->bo", conv(x, p["conv"]["w"]), p["fc"]["w"])

    got = derived(fn, KERNEL | {"fc": {"w": jnp.ones((6, 8, 4, 3))}}, IMAGE)
    assert got["fc"] == Linear("fc", flattened=(6, 8, 4))


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (lambda x: flat(x.transpose(0, 1, 3, 2)), "stand between its spatial axes"),
        (lambda x: flat(x + x.transpose(0, 2, 1, 3)[:, :6, :1]), None),
        (lambda x: flat(x[:, ::-1]), "a rev lies between"),
        (lambda x: flat(jax.lax.fori_loop(0, 2, lambda i, y: conv(y, jnp.ones((1, 1, 4, 4))), x)), "it comes from a loop"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_has_to_be_said(between, why):
    def fn(p, x):
        return between(conv(x, p["conv"]["w"])) @ p["fc"]["w"]

    params = KERNEL | {"fc": {"w": jnp.ones((192, 3))}}
    if why is None:
        assert derived(fn, params, IMAGE)["fc"] == Linear("fc", flattened=(6, 8, 4))
        return
    with pytest.raises(ValueError, match=rf"in which order fc takes its inputs in torch: .*({why}).*flattened="):
        derived(fn, params, IMAGE)
    assert derived(fn, params, IMAGE, flattened={"fc": (6, 8, 4)})["fc"] == Linear("fc", flattened=(6, 8, 4))
    assert derived(fn, params, IMAGE, flattened={"fc": None})["fc"] == Linear("fc")


def test_dots_over_the_channels_of_a_feature_map_need_no_order():
    """As in a ConvNeXt: torch moves the channels last for them, and back."""

    def fn(p, x):
        x = conv(x, p["conv"]["w"])
        y = jax.nn.gelu(x @ p["up"]["w"]) @ p["down"]["w"]
        return flat(x + y) @ p["head"]["w"]

    shapes = {"up": (4, 8), "down": (8, 4), "head": (192, 3)}
    params = KERNEL | {name: {"w": jnp.ones(shape)} for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=r"in which order head takes its inputs .* laid out in different ways"):
        derived(fn, params, IMAGE)
    got = derived(fn, params, IMAGE, flattened={"head": (6, 8, 4)})
    assert (got["up"], got["down"]) == (Linear("up"), Linear("down"))


def test_attention_needs_no_order():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(11, 8, name="embed")(ids)
            x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm()(x))
            return nn.Dense(3, name="head")(x.reshape(x.shape[0], -1))

    ids = jnp.zeros((2, 5), jnp.int32)
    params = Block().init(jax.random.key(0), ids)
    got = derived(Block().apply, params, ids)
    assert got["attention/out"] == Linear("attention.out")
    assert got["head"] == Linear("head"), "tokens and features are in one order in both"
    assert len(got) == 6


def test_flattened_arguments_are_in_an_unknown_order_unless_one_axis_is_left():
    def fn(p, x):
        return flat(x) @ p["fc"]["w"]

    params = {"fc": {"w": jnp.ones((96, 3))}}
    with pytest.raises(ValueError, match="the axes of an argument of the function may be in another order in torch"):
        derived(fn, params, IMAGE)
    assert derived(fn, params, jnp.ones((2, 96, 1)))["fc"] == Linear("fc")
    by_token = derived(lambda p, x: x @ p["a"]["w"], {"a": {"w": jnp.ones((2, 3))}}, IMAGE)
    assert by_token["a"] == Linear("a"), "features are last in torch's Linear, too"


def test_names_have_to_be_of_ops_and_different():
    params = {name: {"w": jnp.ones((4, 4))} for name in "ab"}
    both = (lambda p, x: x @ p["a"]["w"] @ p["b"]["w"], params, jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="names has 'c', which is no op that is quantized; these are a, b"):
        derived(*both, names={"c": "x"})
    with pytest.raises(ValueError, match="flattened has 'c'"):
        derived(*both, flattened={"c": None})
    with pytest.raises(ValueError, match="a and b would both become the module 'x'"):
        derived(*both, names={"a": "x", "b": "x"})
    with pytest.raises(ValueError, match=re.escape("Pass them: torch_modules(prepared, params, x)")):
        torch_modules(qjax.prepare(both[0], RECIPE))
    with pytest.raises(TypeError, match=re.escape("expected what qjax.convert or qjax.prepare returns, got int")):
        torch_modules(3)
    with pytest.raises(TypeError, match="knows its arguments"):
        torch_modules(program(), jnp.ones(3))


@pytest.mark.parametrize("equation", ["oi,bi->bo", "bti,bio->bto"])
def test_dots_that_are_no_linear_are_refused(equation):
    weight, x = {"oi,bi->bo": ((3, 4), (2, 4)), "bti,bio->bto": ((2, 4, 3), (2, 5, 4))}[equation]

    def fn(p, x):
        operands = (p["a"]["w"], x) if equation.startswith("o") else (x, p["a"]["w"])
        numbers = (((1,), (1,)), ((), ())) if equation.startswith("o") else (((2,), (1,)), ((0,), (0,)))
        return jax.lax.dot_general(*operands, numbers)

    with pytest.raises(ValueError, match="torch has no quantized module for a, a dot of operands"):
        derived(fn, {"a": {"w": jnp.ones(weight)}}, jnp.ones(x))


# -- layouts -----------------------------------------------------------------------------------------------------------


def op_of(fn, shape, x):
    prepared = qjax.prepare(fn, RECIPE)
    (op,) = prepared.trace({"op": {"w": jnp.zeros(shape)}}, x).graph.ops()
    return op


def dot(equation):
    return lambda p, x: jnp.einsum(equation, x, p["op"]["w"])


def transposed(groups):
    def fn(p, x):
        return jax.lax.conv_general_dilated(
            x,
            p["op"]["w"],
            (1, 1),
            ((2, 2), (1, 1)),
            lhs_dilation=(2, 1),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    return fn


CASES = {
    "linear": (op_of(dot("bi,io->bo"), (6, 4), jnp.zeros((2, 6))), Linear("a")),
    "turned": (op_of(dot("bi,oi->bo"), (4, 6), jnp.zeros((2, 6))), Linear("a")),
    "flattened": (op_of(dot("bi,io->bo"), (12, 4), jnp.zeros((2, 12))), Linear("a", (2, 3, 2))),
    "heads": (op_of(dot("bthd,hdo->bto"), (2, 6, 5), jnp.zeros((1, 3, 2, 6))), Linear("a")),
    "to heads": (op_of(dot("bti,ihd->bthd"), (6, 2, 3), jnp.zeros((1, 3, 6))), Linear("a")),
    "conv": (op_of(lambda p, x: conv(x, p["op"]["w"]), (3, 1, 2, 4), IMAGE), Conv2d("a")),
    "up": (op_of(transposed(1), (3, 2, 2, 4), IMAGE), ConvTranspose2d("a")),
    "up, groups": (op_of(transposed(2), (3, 2, 1, 4), IMAGE), ConvTranspose2d("a")),
}


@pytest.mark.parametrize("name", CASES)
def test_a_layout_keeps_every_number_and_its_scale_and_can_be_undone(name):
    op, module = CASES[name]
    layout = layout_of(op, module)
    shape = op.shapes[op.weight]
    codes = np.arange(np.prod(shape), dtype=np.int8).reshape(shape)
    np.testing.assert_array_equal(layout.inverse.array(layout.array(codes)), codes)
    assert layout.array(codes).shape == layout.shape
    output, contracted = op.named_axes(1)
    kinds = [qjax.PerTensor(), qjax.PerChannel(output)]
    if shape[contracted] % 2 == 0:
        kinds.append(qjax.PerGroup(contracted, 2))
    tried = 0
    for granularity in kinds:
        spec = W8.replace(granularity=granularity)
        scale = 1.0 + np.arange(np.prod(qjax._granularity.statistic_shape(shape, granularity)), dtype=np.float32)
        scale = scale.reshape(qjax._granularity.statistic_shape(shape, granularity))
        q = qjax.QTensor(codes, scale, np.zeros(scale.shape, np.int32), spec)
        if (name == "flattened" and isinstance(granularity, qjax.PerGroup)) or (
            name == "up, groups" and not isinstance(granularity, qjax.PerTensor)
        ):
            with pytest.raises(ValueError, match=f"of op is quantized {re.escape(str(granularity))}"):
                layout.tensor(q)
            continue
        moved = layout.tensor(q)
        np.testing.assert_array_equal(moved.dequantize(), layout.array(q.dequantize()))
        back = layout.inverse.tensor(moved)
        np.testing.assert_array_equal(back.dequantize(), q.dequantize())
        np.testing.assert_array_equal(back.scale, q.scale)
        tried += 1
    assert tried >= 1


def test_blocks_turn_with_the_weight():
    op, module = CASES["linear"]
    spec = W8.replace(granularity=qjax.PerBlock((3, 2)))
    scale = np.arange(1.0, 5.0, dtype=np.float32).reshape(2, 2)
    q = qjax.QTensor(np.ones((6, 4), np.int8), scale, np.zeros((2, 2), np.int32), spec)
    moved = layout_of(op, module).tensor(q)
    assert moved.spec.granularity == qjax.PerBlock((2, 3))
    np.testing.assert_array_equal(moved.scale, scale.T)


def test_a_group_that_is_cut_by_flattening_is_refused():
    layout = Layout(((2,), (3,), (4,)), ((2,), (0, 1)))
    spec = W8.replace(granularity=qjax.PerGroup(0, 2))
    q = qjax.QTensor(np.ones((2, 3, 4), np.int8), np.ones((1, 3, 4), np.float32), np.zeros((1, 3, 4), np.int32), spec)
    with pytest.raises(ValueError, match="do not lie together"):
        layout.tensor(q)
    with pytest.raises(ValueError, match=re.escape("has shape (2,), not (2, 3, 4)")):
        layout.array(np.ones(2))


@pytest.mark.parametrize(
    ("case", "module", "message"),
    [
        ("up", Conv2d("a"), "dilates its input by (2, 1), as a transposed convolution does"),
        ("conv", Conv1d("a"), "op is a conv of rank 4, not a 1-D convolution"),
        ("conv", Linear("a"), "op is a conv whose weight"),
        ("linear", Embedding("a"), "and no Embedding"),
        ("heads", Linear("a", (3, 4)), "sums over axes of sizes (2, 6), but"),
        ("flattened", Linear("a", (2, 2)), "op has 12 inputs, but Linear('a', flattened=(2, 2)) says 4"),
    ],
)
def test_a_module_of_another_kind_is_refused(case, module, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        layout_of(CASES[case][0], module)


@pytest.mark.parametrize(
    ("padding", "message"),
    [(((3, 3), (0, 0)), "padding=-1 and output_padding=0"), (((2, 1), (0, 0)), "padding=0 and output_padding=-1")],
)
def test_transposed_convolutions_that_torch_has_not_are_refused(padding, message):
    def fn(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, p["op"]["w"], (1, 1), padding, lhs_dilation=(2, 1), dimension_numbers=numbers
        )

    with pytest.raises(ValueError, match=re.escape(message)):
        layout_of(op_of(fn, (3, 1, 2, 4), IMAGE), ConvTranspose2d("a"))
