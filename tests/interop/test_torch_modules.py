"""Weights laid out for torch: torch's float modules compute with them what the op computes here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.interop import torch_modules
from qjax.interop._layout import layout_of, transposed_padding

torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")

RECIPE = qjax.Recipe([qjax.Rule(".*", weight=qjax.QuantSpec(qjax.int8, symmetric=True))])


def op_and_module(fn, shape, x):
    """The one op of the function, and the module that is derived for it."""
    prepared, params = qjax.prepare(fn, RECIPE), {"op": {"w": jnp.zeros(shape)}}
    (op,) = prepared.trace(params, x).graph.ops()
    return op, torch_modules(prepared, params, x)["op"]


def geometries(rank):
    """Strides, dilations, groups, padding: (what JAX is told, torch's arguments, kernel sizes)."""
    kernel = (3, 2, 4)[:rank]
    yield (
        {"window_strides": (2, 1, 1)[:rank], "padding": [(1, 1)] * rank},
        {"stride": (2, 1, 1)[:rank], "padding": 1},
        kernel,
    )
    yield {
        "window_strides": (1,) * rank, "padding": "VALID", "rhs_dilation": (1, 2, 1)[:rank], "feature_group_count": 2
    }, {"dilation": (1, 2, 1)[:rank], "groups": 2}, kernel  # fmt: skip


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("case", [0, 1])
def test_convolutions(rng, rank, case):
    options, arguments, kernel = list(geometries(rank))[case]
    groups = options.get("feature_group_count", 1)
    spatial = "DHW"[3 - rank :]
    numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")

    def fn(p, x):
        return jax.lax.conv_general_dilated(x, p["op"]["w"], dimension_numbers=numbers, **options)

    x = rng.integers(-8, 9, (2, *(7, 6, 8)[:rank], 4)).astype(np.float32)
    w = rng.integers(-8, 9, (*kernel, 4 // groups, 6)).astype(np.float32)
    op, module = op_and_module(fn, w.shape, x)
    assert module.kind == f"Conv{rank}d"
    theirs = getattr(torch.nn, module.kind)(4, 6, kernel, bias=False, **arguments)
    check(theirs, layout_of(op, module).array(w), x, fn({"op": {"w": w}}, x))


def check(module, weight, x, want):
    """The module with this weight gives, channels first, what is wanted: whole numbers, so exactly."""
    with torch.no_grad():
        assert module.weight.shape == weight.shape
        module.weight.copy_(torch.from_numpy(weight))
        got = module(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).numpy()
    np.testing.assert_array_equal(np.moveaxis(got, 1, -1), want)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_transposed_convolutions(rng, rank, groups, transpose_kernel):
    kernel, strides, dilation = (3, 2, 4)[:rank], (2, 1, 3)[:rank], (1, 2, 1)[:rank]
    spatial = "DHW"[3 - rank :]
    numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    # output_padding is 1 along the first axis
    padding = [
        (d * (k - 1) - p, d * (k - 1) - p + (i == 0))
        for i, (d, k, p) in enumerate(zip(dilation, kernel, (1, 0, 1), strict=False))
    ]

    def fn(p, x):
        w = p["op"]["w"]
        if transpose_kernel:  # as jax.lax.conv_transpose does with a kernel of the other direction
            w = jnp.flip(w, range(rank))
        return jax.lax.conv_general_dilated(
            x, w, (1,) * rank, padding, strides, dilation, dimension_numbers=numbers, feature_group_count=groups
        )

    x = rng.integers(-8, 9, (2, *(3, 4, 3)[:rank], 4)).astype(np.float32)
    w = rng.integers(-8, 9, (*kernel, 4 // groups, 6)).astype(np.float32)
    op, module = op_and_module(fn, w.shape, x)
    assert module.kind == f"ConvTranspose{rank}d"
    before, behind = transposed_padding(w.shape, op.contraction)
    assert (before, behind) == ((1, 0, 1)[:rank], (1, 0, 0)[:rank])
    theirs = getattr(torch.nn, module.kind)(
        4, 6, kernel, strides, before, behind, groups=groups, bias=False, dilation=dilation
    )
    seen = np.flip(w, range(rank)) if transpose_kernel else w  # the op takes the kernel as it is turned already
    check(theirs, layout_of(op, module).array(seen), x, fn({"op": {"w": w}}, x))


def test_flax_and_torch_agree_on_an_upsampling_layer(rng):
    import flax.linen as nn

    layer = nn.ConvTranspose(6, (3, 3), strides=(2, 2), padding="VALID", use_bias=False)
    x = rng.integers(-8, 9, (2, 4, 5, 3)).astype(np.float32)
    w = rng.integers(-8, 9, (3, 3, 3, 6)).astype(np.float32)
    op, module = op_and_module(lambda p, x: layer.apply({"params": {"kernel": p["op"]["w"]}}, x), w.shape, x)
    want = layer.apply({"params": {"kernel": w}}, x)
    check(torch.nn.ConvTranspose2d(3, 6, 3, 2, bias=False), layout_of(op, module).array(w), x, want)


@pytest.mark.parametrize("form", ["reshape", "einsum"])
def test_a_linear_on_a_feature_map(rng, form):
    kernel = rng.integers(-3, 4, (2, 2, 3, 4)).astype(np.float32)
    x = rng.integers(-3, 4, (2, 4, 5, 3)).astype(np.float32)
    w = rng.integers(-3, 4, (48, 5)).astype(np.float32)

    def fn(p, x):
        y = jax.lax.conv_general_dilated(x, p["conv"]["w"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        if form == "reshape":
            return y.reshape(2, -1) @ p["fc"]["w"]
        return jnp.einsum("bhwc,hwco->bo", y, p["fc"]["w"])

    params = {"conv": {"w": kernel}, "fc": {"w": w if form == "reshape" else w.reshape(3, 4, 4, 5)}}
    prepared = qjax.prepare(fn, RECIPE)
    ops = {op.name: op for op in prepared.trace(params, x).graph.ops()}
    modules = torch_modules(prepared, params, x)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 2, bias=False), torch.nn.Flatten(), torch.nn.Linear(48, 5, bias=False)
    )
    with torch.no_grad():
        for name, module in (("conv", net[0]), ("fc", net[2])):
            module.weight.copy_(torch.from_numpy(layout_of(ops[name], modules[name]).array(params[name]["w"])))
        got = net(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    np.testing.assert_array_equal(got, fn(params, x))
