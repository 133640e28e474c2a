"""The fixed observer: torch's fixed qparams, ranges, and what is refused."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import PerChannel, PerGroup, PerToken, QuantSpec, observers
from tests.numerics.stress import assert_same_bits, format_id

U8 = QuantSpec(qjax.uint8)
X = np.float32([[1, -200, 3], [4, 5, 6]])


def test_the_qparams_of_torchs_activations():
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle of its own constants")
    quantization = torch.ao.quantization.observer
    for ours, theirs in (
        (observers.fixed(U8, scale=1 / 256, zero_point=0), quantization.default_fixed_qparams_range_0to1_observer),
        (observers.fixed(U8, scale=2 / 256, zero_point=128), quantization.default_fixed_qparams_range_neg1to1_observer),
    ):
        expected = theirs()
        expected(torch.from_numpy(X))
        scale, zero_point = expected.calculate_qparams()
        got = ours.qparams(ours.update(ours.init(X), X))
        assert_same_bits(got.scale, scale.numpy().reshape(()))
        assert_same_bits(got.zero_point, zero_point.numpy().reshape(()))


@pytest.mark.parametrize("granularity", [PerChannel(1), PerToken(), PerGroup(0, 2), PerChannel((0, 1))], ids=format_id)
def test_every_statistic_has_the_same(granularity):
    spec = U8.replace(granularity=granularity)
    plain = observers.min_max(spec)
    shape = plain.init(X).min_val.shape
    for observer, scale, point in (
        (observers.fixed(spec, scale=0.25, zero_point=7), 0.25, 7),
        (observers.fixed(spec, min_val=-1, max_val=50.0), np.float32(51) / np.float32(255), 5),
    ):
        qparams = observer.qparams(observer.init(X))
        assert_same_bits(qparams.scale, np.full(shape, scale, np.float32))
        assert_same_bits(qparams.zero_point, np.full(shape, point, np.int32))
        y = qjax.fake_quantize(jnp.asarray(X), qparams, spec)
        assert y.shape == X.shape


def test_a_range_gets_the_qparams_that_min_max_would_give_it():
    for spec in (
        U8,
        QuantSpec(qjax.int4, symmetric=True),
        QuantSpec(qjax.e4m3),
        QuantSpec(qjax.uint8, float_zero_point=True),
    ):
        fixed, plain = observers.fixed(spec, min_val=-0.3, max_val=1.7), observers.min_max(spec)
        seen = plain.update(plain.init(X), jnp.float32([-0.3, 1.7]))
        for got, want in zip(fixed.qparams(fixed.init(X)), plain.qparams(seen), strict=True):
            assert_same_bits(got, want)


def test_a_symmetric_spec_has_a_zero_point_of_its_own():
    for number_format, point in ((qjax.int8, 0), (qjax.uint8, 128), (qjax.e4m3, 0)):
        spec = QuantSpec(number_format, symmetric=True)
        for observer in (observers.fixed(spec, scale=0.5), observers.fixed(spec, scale=0.5, zero_point=point)):
            assert int(observer.qparams(observer.init(X)).zero_point) == point
        assert observers.fixed(spec, scale=0.5) == observers.fixed(spec, scale=0.5, zero_point=point)
    with pytest.raises(
        ValueError, match=r"zero_point of a symmetric spec \(int8 .*\) is 0, got 3. Use symmetric=False"
    ):
        observers.fixed(QuantSpec(qjax.int8, symmetric=True), scale=1.0, zero_point=3)


def test_a_float_zero_point():
    observer = observers.fixed(QuantSpec(qjax.uint8, float_zero_point=True), scale=0.5, zero_point=1.25)
    assert_same_bits(observer.qparams(observer.init(X)).zero_point, np.float32(1.25))


def test_it_is_a_value_and_numpy_numbers_will_do():
    a, b = (
        observers.fixed(U8, scale=np.float32(0.5), zero_point=np.int64(3)),
        observers.fixed(U8, scale=0.5, zero_point=3),
    )
    assert a == b
    assert hash(a) == hash(b)
    assert a != observers.fixed(U8, scale=0.5, zero_point=4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"min_val": 0.0},
        {"max_val": 1.0},
        {"zero_point": 0},
        {"scale": 1.0, "zero_point": 0, "min_val": 0.0, "max_val": 1.0},
        {"scale": 1.0, "max_val": 1.0},
    ],
    ids=format_id,
)
def test_neither_or_both(options):
    with pytest.raises(ValueError, match="fixed: give either scale and zero_point or min_val and max_val, got scale="):
        observers.fixed(U8, **options)


def test_errors():
    with pytest.raises(ValueError, match=r"an affine spec needs a zero_point beside the scale\. Add zero_point=0"):
        observers.fixed(U8, scale=1.0)
    for scale in (0.0, -1.0, 1e-39, 1e39):
        with pytest.raises(
            ValueError, match=rf"scale must be positive and a normal float32, got {re.escape(str(scale))}"
        ):
            observers.fixed(U8, scale=scale, zero_point=0)
    for point in (-1, 256, 1.5):
        with pytest.raises(ValueError, match=rf"zero_point must be a whole number in 0 … 255 for uint8.*got {point}"):
            observers.fixed(U8, scale=1.0, zero_point=point)
    with pytest.raises(ValueError, match=r"min_val 2.0 exceeds max_val 1.0. Swap the two"):
        observers.fixed(U8, min_val=2.0, max_val=1.0)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"max_val must be finite, got {value}"):
            observers.fixed(U8, min_val=0.0, max_val=value)
    for value in ("1", True, jnp.float32(1), [0.5]):
        with pytest.raises(TypeError, match=r"fixed: scale must be a number, got .* of type .*same for every channel"):
            observers.fixed(U8, scale=value, zero_point=0)
    with pytest.raises(ValueError, match=r"scales depend on all blocks at once\. Use scale_rule='e4m3'"):
        observers.fixed(
            QuantSpec(qjax.e2m1, granularity=PerGroup(-1, 16), scale_rule="nvfp4"), min_val=0.0, max_val=1.0
        )
    observer = observers.fixed(U8.replace(granularity=PerChannel(1)), scale=1.0, zero_point=0)
    with pytest.raises(
        ValueError, match=r"Fixed.update: the state has statistics of shape \(3,\), but x of shape \(2, 2\)"
    ):
        observer.update(observer.init(X), X[:, :2])
    with pytest.raises(TypeError, match=r"Fixed.init: x must be floating point, got dtype int32"):
        observer.init(X.astype(np.int32))
    with pytest.raises(ValueError, match="only states of tensors with the same channels can be merged"):
        observer.merge(observer.init(X), observer.init(X[:, :2]))
