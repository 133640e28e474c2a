"""interpret against torch's own dequantize, bit for bit."""

import numpy as np
import pytest

import qjax
from qjax.interop import Origin, QuantPoint, interpret
from tests.torch_engine import torch_engine

torch = pytest.importorskip("torch", reason="compares with torch, which is installed for Python 3.11 only")
ao, nn = torch.ao.quantization, torch.nn

DTYPES = {"qint8": np.int8, "quint8": np.uint8, "qint32": np.int32}


def point(dtype, scale, zero_point, axis=None):
    here = Origin("file", "here")
    return QuantPoint(
        op="m", role="output", dtype=dtype, scheme=None, quant_min=None, quant_max=None, axis=axis, scale=np.asarray(scale),
        zero_point=np.asarray(zero_point), qparams_from=here, codes_from=here,
    )  # fmt: skip


def assert_same_bits(found, tensor):
    np.testing.assert_array_equal(found.view(np.uint32), tensor.dequantize().numpy().view(np.uint32))


def scales_of(rng, count):
    """From denormal to overflowing, some that are no float32, some that are powers of two."""
    found = np.exp(rng.uniform(-100, 80, count))
    found[::3] = found[::3].astype(np.float32)
    found[::5] = 2.0 ** np.rint(np.log2(found[::5]))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_integer_dtype(rng, dtype):
    limits = np.iinfo(DTYPES[dtype])
    for index, scale in enumerate(scales_of(rng, 30)):
        codes = rng.integers(limits.min, limits.max, (4, 33), dtype=np.int64, endpoint=True).astype(DTYPES[dtype])
        codes[0, :3] = limits.min, limits.max, 0
        zero_point = [0, limits.min, limits.max, int(rng.integers(limits.min, limits.max))][index % 4]
        codes[1, 0] = zero_point
        tensor = torch._make_per_tensor_quantized_tensor(torch.tensor(codes), float(scale), zero_point)
        assert_same_bits(interpret(codes, point(dtype, scale, zero_point)), tensor)
        scales = scales_of(rng, 4)
        points = rng.integers(limits.min, limits.max, 4)
        for axis, view in ((0, codes), (1, codes.T)):
            view = np.ascontiguousarray(view)
            channels = torch.tensor(scales), torch.tensor(points), axis
            tensor = torch._make_per_channel_quantized_tensor(torch.tensor(view), *channels)
            assert_same_bits(interpret(view, point(dtype, scales, points, axis)), tensor)


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_an_embedding(tmp_path, bits):
    net = nn.Sequential(nn.Embedding(7, 6)).eval()
    net.qconfig = ao.float_qparams_weight_only_qconfig if bits == 8 else ao.float_qparams_weight_only_qconfig_4bit
    model = ao.convert(ao.prepare(net))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    checkpoint = qjax.interop.load(tmp_path / "a.pt")
    (found,) = qjax.interop.points(checkpoint)
    assert_same_bits(interpret(checkpoint["0.weight"].codes, found), model[0].weight())


def test_outputs_of_a_model(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(ao.QuantStub(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    with torch_engine("fbgemm"):
        net.qconfig = ao.get_default_qconfig("fbgemm")
        net = ao.prepare(net)
        for batch in range(3):
            net(torch.randn(8, 6) * (batch + 1))
        model = ao.convert(net)
        out = model(torch.randn(50, 6) * 5)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    checkpoint = qjax.interop.load(tmp_path / "a.pt")
    found = qjax.interop.output_point(checkpoint)
    assert (found.op, found.scale, found.zero_point) == ("3", np.float32(out.q_scale()), out.q_zero_point())
    codes = out.int_repr().numpy()
    assert_same_bits(interpret(codes, found), out)
    np.testing.assert_array_equal(codes.argmax(1), out.dequantize().numpy().argmax(1))
    weight = model[3].weight()
    assert_same_bits(interpret(weight.int_repr().numpy(), qjax.interop.points(checkpoint).of("3", "weight")[0]), weight)
