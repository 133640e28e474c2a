"""What every quantizer keeps, whatever its format, scheme, granularity and convention.

A new format, granularity or convention joins by being added to the lists below; nothing else here names one.
"""

import dataclasses
import itertools
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax._conventions import Convention, Mask, ScaleRule
from qjax._formats import Format
from qjax._granularity import Granularity, statistic_shape
from qjax._rounding import ROUNDINGS, STOCHASTIC
from tests.numerics.stress import DTYPES, assert_same_bits, format_id, stress

FORMATS = (qjax.int8, qjax.uint8)
CONVENTIONS = typing.get_args(Convention)
CHANNELS = (qjax.PerTensor(), qjax.PerChannel(0), qjax.PerChannel(-1))
BLOCKS = (
    qjax.PerChannel((0, 2)),
    qjax.PerGroup(1, 3),
    qjax.PerGroup(-1, 2, pad=True),
    qjax.PerBlock((2, 3)),
    qjax.PerToken(),
)
SHAPE = (4, 6, 3)
EXAMPLES = 3


def specs(formats, schemes, granularities, conventions=CONVENTIONS):
    """All combinations that there are: ModelOpt has signed symmetric integers only."""
    for number_format, symmetric, granularity, convention in itertools.product(
        formats, schemes, granularities, conventions
    ):
        if convention != "modelopt" or (symmetric and number_format.signed):
            yield qjax.QuantSpec(number_format, symmetric=symmetric, granularity=granularity, convention=convention)


TORCH = ("torch_fake", "torch_real")
GROUPS = qjax.PerGroup(-1, 3)
FEW_SPECS = [  # each granularity, int8 affine and uint8 symmetric
    *specs(FORMATS[:1], (False,), CHANNELS, TORCH),
    *specs(FORMATS[1:], (True,), CHANNELS, TORCH),
    *specs(FORMATS[:1], (False,), BLOCKS, ("torch_fake",)),
    qjax.QuantSpec(qjax.e4m3, convention="torchao"),
    qjax.QuantSpec(qjax.e2m1, granularity=GROUPS, scale_rule="mx_floor"),
    qjax.QuantSpec(qjax.e2m1, granularity=GROUPS, scale_rule="nvfp4"),
    qjax.QuantSpec(qjax.nf4, granularity=GROUPS),
    qjax.QuantSpec(qjax.uint4, granularity=qjax.PerChannel(0), float_zero_point=True),
]
SPECS = [
    *FEW_SPECS,
    *specs(FORMATS, (False, True), CHANNELS[:2], CONVENTIONS[2:]),
    *specs(FORMATS, (True,), BLOCKS[-2:], ("torch_decomposed", "compressed_tensors")),
    *specs((qjax.Int(4, narrow=True), qjax.ternary, qjax.int16), (True,), CHANNELS[::2], TORCH[:1]),
    *specs((qjax.uint2, qjax.Int(1, signed=False)), (False,), CHANNELS[::2], TORCH),
    *(qjax.QuantSpec(qjax.int8, scale_rule=rule) for rule in ("torch_aten", "torch_fbgemm")),
    *(
        qjax.QuantSpec(qjax.int8, symmetric=True, scale_rule=rule)
        for rule in ("torch_fbgemm", "no_clipping", "max_code")
    ),
    *(
        qjax.QuantSpec(number_format, granularity=GROUPS, scale_rule=rule, symmetric=True)
        for number_format in (qjax.e4m3, qjax.e5m2, qjax.e3m2, qjax.e2m3, qjax.e2m1, qjax.int8)
        for rule in ("mx_ceil", "mx_even", "mx_rceil", "e4m3")[(len(str(number_format)) + number_format.bits) % 4 :][:2]
    ),
    *(qjax.QuantSpec(number_format) for number_format in (qjax.e4m3fnuz, qjax.e5m2fnuz, qjax.Float(3, 4), qjax.binary)),
    *(qjax.QuantSpec(qjax.int8, mask=mask) for mask in ("before_rounding", "none")),
    *(
        qjax.QuantSpec(f, rounding=r)
        for f in (qjax.int8, qjax.e4m3)
        for r in ("half_away", "floor", "ceil", "toward_zero")
    ),
    qjax.QuantSpec(qjax.uint4, granularity=qjax.PerChannel(0), float_zero_point=True, convention="torch_real"),
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=format_id)
few_specs = pytest.mark.parametrize("spec", FEW_SPECS, ids=format_id)


def test_every_choice_takes_part():
    """A granularity, convention, scale rule, mask or rounding that is added has to join."""
    assert {type(spec.granularity) for spec in SPECS} == set(typing.get_args(Granularity))
    assert {type(spec.format) for spec in SPECS} == set(typing.get_args(Format))
    assert {spec.convention for spec in SPECS} == set(CONVENTIONS)
    assert {spec.effective_scale_rule for spec in SPECS} == set(typing.get_args(ScaleRule))
    assert {spec.effective_mask for spec in SPECS} == set(typing.get_args(Mask))
    assert {spec.rounding for spec in SPECS} == set(ROUNDINGS) - set(STOCHASTIC)  # these have a test of their own


def statistic(spec):
    return statistic_shape(SHAPE, spec.granularity)


def examples(spec, rng, dtype=DTYPES[0]):
    """(x, min_val, max_val) with a leading axis of examples, and ties in x."""
    limits = np.sort(rng.standard_normal((2, EXAMPLES, *statistic(spec))).astype(np.float32) * 3, axis=0)
    x = rng.choice(stress(np.float32(0.25), rng, dtype, span=20), (EXAMPLES, *SHAPE))
    x[:, 0] = (rng.integers(-40, 40, x[:, 0].shape) / 8).astype(dtype)
    return x, *limits


def everything(spec):
    """All that a quantizer computes from x, min_val and max_val, as one function."""

    def call(x, low, high):
        qparams = qjax.choose_qparams(low, high, spec)
        q = qjax.quantize(x, qparams, spec)
        y, vjp = jax.vjp(lambda x: qjax.fake_quantize(x, qparams, spec), x)
        dx = vjp(jnp.ones_like(y))[0]
        return {"q": q, "y": y, "dequantized": q.dequantize(x.dtype), "dx": dx}

    return call


def assert_trees_same_bits(actual, expected, what):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert_same_bits(a, b, f"{what} {jax.tree_util.keystr(path)}")


@every_spec
def test_eager_jit_and_vmap_agree(spec, rng):
    """jit = eager and vmap = loop, bit for bit; nothing is compiled twice; the parts fit together."""
    batch = examples(spec, rng)
    call, traces = everything(spec), []

    @jax.jit
    def jitted(*arrays):
        traces.append(1)
        return call(*arrays)

    loop = [call(*(jnp.asarray(array[i]) for array in batch)) for i in range(EXAMPLES)]
    for i, expected in enumerate(loop):
        assert_trees_same_bits(jitted(*(array[i] for array in batch)), expected, f"jit, example {i}")
    assert len(traces) == 1

    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *loop)
    assert_trees_same_bits(jax.jit(jax.vmap(call))(*batch), stacked, "vmap")
    for out in loop:
        q = out["q"]
        point_dtype = jnp.float32 if spec.float_zero_point else jnp.int32
        assert (q.codes.dtype, q.scale.dtype, q.zero_point.dtype) == (
            spec.format.storage_dtype,
            jnp.float32,
            point_dtype,
        )
        assert (q.shape, q.scale.shape, q.zero_point.shape) == (SHAPE, statistic(spec), statistic(spec))
        assert_same_bits(out["y"], out["dequantized"], "fake_quantize is the dequantized quantize")

    if spec not in FEW_SPECS:
        return
    # The same qparams for all examples: vmap then batches x alone.
    x, low, high = batch
    shared = [call(jnp.asarray(x[i]), low[0], high[0]) for i in range(EXAMPLES)]
    mapped = jax.jit(jax.vmap(lambda x, low, high: call(x, low, high)["y"], (0, None, None)))(x, low[0], high[0])
    assert_same_bits(mapped, np.stack([out["y"] for out in shared]), "vmap over x alone")


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [(spec, DTYPES[0]) for spec in FEW_SPECS] + [(spec, dtype) for dtype in DTYPES[1:] for spec in FEW_SPECS[:4]],
    ids=format_id,
)
def test_dtypes_and_gradients(spec, dtype, rng):
    """The dtype of x is kept; its gradient is x's shape and a mask; none flows into qparams or the range."""
    x, low, high = (array[0] for array in examples(spec, rng, dtype))

    @jax.jit
    def total_and_gradients(x, low, high, scale_factor):
        def total(x, low, high, scale_factor):
            qparams = qjax.choose_qparams(low, high, spec)
            scale = qparams.scale
            y = qjax.fake_quantize(x, dataclasses.replace(qparams, scale=scale * scale_factor), spec)
            return y.astype(jnp.float32).sum() + scale.sum(), y

        return jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True)(x, low, high, scale_factor)

    (_, y), (dx, *others) = total_and_gradients(x, low, high, np.float32(1))
    assert (y.dtype, y.shape) == (dtype, SHAPE)
    assert (dx.dtype, dx.shape) == (dtype, SHAPE)
    assert set(np.unique(np.asarray(dx, np.float32))) == {0.0, 1.0}
    for gradient in others:
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@few_specs
def test_qtensor_is_a_pytree(spec, rng):
    """It survives jit, tree_map, flattening and scan with its spec; two QTensors of one spec have one structure."""
    x, low, high = examples(spec, rng)
    qparams = qjax.choose_qparams(low[0], high[0], spec)
    q, other = (qjax.quantize(x[i], qparams, spec) for i in range(2))
    leaves, structure = jax.tree.flatten(q)
    fields = [f for f in (q.codes, q.scale, q.zero_point, q.tensor_scale, q.amax, q.global_scale) if f is not None]
    assert [leaf is field for leaf, field in zip(leaves, fields, strict=True)] == [True] * len(fields)
    assert jax.tree.structure(other) == structure
    for copy in (jax.tree.unflatten(structure, leaves), jax.tree.map(lambda leaf: leaf, q), jax.jit(lambda q: q)(q)):
        assert isinstance(copy, qjax.QTensor)
        assert copy.spec == spec
        assert_trees_same_bits(copy, q, "copy")
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), q, other)
    _, rows = jax.lax.scan(lambda carry, q: (carry, q.dequantize()), 0, stacked)
    assert_same_bits(rows, np.stack([q.dequantize(), other.dequantize()]))


def test_specs_are_values():
    """Equal fields make equal specs with equal hashes, so a spec is a static argument of jit that does not retrace."""

    def copy(value):
        """The same again, made anew all the way down."""
        if not dataclasses.is_dataclass(value):
            return value
        fields = [field for field in dataclasses.fields(value) if field.name != "_"]
        return type(value)(**{field.name: copy(getattr(value, field.name)) for field in fields})

    again = [copy(spec) for spec in SPECS]
    assert again == SPECS
    assert list(map(hash, again)) == list(map(hash, SPECS))
    assert len(set(SPECS)) == len(SPECS)
    assert len({str(spec) for spec in SPECS}) == len(SPECS)
    base = qjax.QuantSpec(qjax.uint8)
    for change in ({"reduce_range": True}, {"eps": 2.0**-12}, {"format": qjax.int8}, {"symmetric": True}):
        assert base.replace(**change) != base

    traces = []

    @jax.tree_util.Partial(jax.jit, static_argnums=1)
    def call(x, spec):
        traces.append(1)
        return qjax.fake_quantize(x, qjax.QParams(jnp.float32(1), jnp.int32(0)), spec)

    for spec in (SPECS[0], again[0]):
        call(jnp.ones(3), spec)
    assert len(traces) == 1
