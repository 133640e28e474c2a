"""The packers of torch, torchao and compressed-tensors, live: the same words from the same codes, and back."""

import importlib

import numpy as np
import pytest

from qjax._packing import pack, packed_size, unpack

torch = pytest.importorskip("torch", reason="PyTorch and its neighbours are the oracles of their own packing")

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)  # by code; OCP MX, 2023


def peer(name):
    """A module of a library that may be absent."""
    pytest.importorskip(name.split(".")[0])
    return importlib.import_module(name)


def codes_of(rng, shape, bits, low=0):
    return rng.integers(low, low + 2**bits, shape).astype(np.int8 if low else np.uint8)


# --- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "bits"), [("quint4x2", 4), ("quint2x4", 2)])
@pytest.mark.parametrize("shape", [(3, 8), (3, 5), (2, 3, 7), (9,), (1, 1)])
@pytest.mark.parametrize("per_channel", [False, True])
def test_quint4x2_is_flat(name, bits, shape, per_channel, rng):
    """Also where a row ends within a byte, although the storage has room for rows of whole bytes."""
    codes = codes_of(rng, shape, bits)
    x, dtype = torch.tensor(codes, dtype=torch.float32), getattr(torch, name)
    if per_channel:
        q = torch.quantize_per_channel(x, torch.ones(shape[0]), torch.zeros(shape[0]), 0, dtype)
    else:
        q = torch.quantize_per_tensor(x, 1.0, 0, dtype)
    packed = pack(codes.reshape(-1), bits, order="low_first")
    np.testing.assert_array_equal(packed, q.int_repr().numpy())

    storage = np.array(list(q.untyped_storage()), np.uint8)
    assert storage.size == np.prod(shape[:-1], dtype=int) * packed_size(shape[-1], bits, order="low_first")
    used = storage[: packed_size(codes.size, bits, order="low_first")]
    np.testing.assert_array_equal(packed, used)
    np.testing.assert_array_equal(unpack(used, bits, codes.size, order="low_first").reshape(shape), codes)


@pytest.mark.parametrize("bits", [4, 2])
def test_embedding_prepack_is_by_row(bits, rng):
    """A row's codes, then its float16 scale and minimum, four bytes; codes are given by rows that reach 0 and 2^bits - 1."""
    codes = codes_of(rng, (5, 24), bits)
    codes[:, 3], codes[:, 11] = 0, 2**bits - 1
    prepack = getattr(torch.ops.quantized, f"embedding_bag_{bits}bit_prepack")
    rows = prepack(torch.tensor(codes, dtype=torch.float32)).numpy()[:, :-4]
    np.testing.assert_array_equal(pack(codes, bits, order="low_first"), rows)
    np.testing.assert_array_equal(unpack(rows, bits, 24, order="low_first"), codes)


# --- torchao ---------------------------------------------------------------------------------------------------------


def test_torchao_uint4(rng):
    kernels = peer("torchao.prototype.mx_formats.kernels")
    codes = codes_of(rng, (3, 10), 4)
    packed = kernels.pack_uint4(torch.tensor(codes)).numpy()
    np.testing.assert_array_equal(pack(codes, 4, order="low_first"), packed)
    np.testing.assert_array_equal(unpack(packed, 4, 10, order="low_first"), codes)
    ours = torch.tensor(np.asarray(pack(codes, 4, order="low_first")))
    np.testing.assert_array_equal(kernels.unpack_uint4(ours).numpy(), codes)


def test_torchao_mx_and_nvfp4(rng):
    """Blocks on the grid of E2M1 that reach its 6: the scale is 1 and the codes are those of the values."""
    mx = peer("torchao.prototype.mx_formats.mx_tensor")
    nvfp4 = peer("torchao.prototype.mx_formats.nvfp4_tensor")
    codes = codes_of(rng, (4, 64), 4)
    codes[:, ::16] = rng.choice([7, 15], (4, 4))
    x = torch.tensor(E2M1[codes])
    for name, (scale, data) in {
        "mx": mx.to_mx(x, torch.float4_e2m1fn_x2, 32),
        "nvfp4": nvfp4.nvfp4_quantize(x),
    }.items():
        assert np.all(scale.float().numpy() == 1), name
        packed = data.view(torch.uint8).numpy()
        np.testing.assert_array_equal(pack(codes, 4, order="low_first"), packed, name)
        np.testing.assert_array_equal(unpack(packed, 4, 64, order="low_first"), codes, name)


def test_torchao_nf4(rng):
    """Two blocks on the grid of NF4 that reach its 1: the indices are those of the values, flat."""
    nf4 = peer("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    codes = codes_of(rng, (4, 32), 4)
    codes[::2, 5] = 15
    grid = nf4.to_nf4(torch.zeros(64), 64, 1).nf4
    tensor = nf4.to_nf4(grid[torch.tensor(codes).long()], 64, 1)
    packed = tensor.quantized_data.numpy().reshape(-1)
    np.testing.assert_array_equal(pack(codes.reshape(-1), 4, order="high_first"), packed)
    np.testing.assert_array_equal(unpack(packed, 4, codes.size, order="high_first").reshape(4, 32), codes)


def test_torchao_optimizer_state(rng):
    """Both ways: a state made of our bytes reads as the codes, and copying values into it writes our bytes."""
    optim = peer("torchao.optim.subclass_4bit")
    codes = codes_of(rng, (128,), 4)
    codes[0] = 15
    qmap = torch.arange(16.0) / 15
    packed = np.asarray(pack(codes, 4, order="high_first"))
    state = optim.OptimState4bit(torch.tensor(packed), torch.ones(1), qmap, False, torch.Size([128]))
    np.testing.assert_array_equal(state.dequantize().numpy(), qmap.numpy()[codes])
    empty = optim.OptimState4bit(torch.zeros(64, dtype=torch.uint8), torch.ones(1), qmap, False, torch.Size([128]))
    empty.copy_(qmap[torch.tensor(codes).long()])
    np.testing.assert_array_equal(packed, empty.codes.numpy())


def test_torchao_bitnet(rng):
    """Two bits, two's complement, the first code in the high bits; torchao keeps the bytes as int8."""
    bitnet = peer("torchao.prototype.quantized_training.bitnet")
    codes = codes_of(rng, (5, 16), 2, -2)
    packed = bitnet._pack_i2_in_i8(torch.tensor(codes)).numpy()
    options = {"order": "high_first", "encoding": "twos_complement"}
    np.testing.assert_array_equal(pack(codes, 2, **options), packed.view(np.uint8))
    np.testing.assert_array_equal(unpack(packed, 2, 16, **options), codes)
    ours = torch.tensor(np.asarray(pack(codes, 2, **options)).view(np.int8))
    np.testing.assert_array_equal(bitnet._unpack_i2_in_i8(ours).numpy(), codes)


# --- compressed-tensors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("axis", [0, 1])
def test_compressed_tensors_int32(bits, axis, rng):
    """pack-quantized of 0.18 and later: weights along axis 1, zero points along axis 0, sizes that end within a word."""
    helpers = peer("compressed_tensors.compressors.pack_quantized.helpers")
    options = {"order": "int32_stream", "axis": axis, "encoding": "offset_binary"}
    # Not fewer than two words: compressed-tensors 0.20 cannot unpack its own one word of 4 bits along axis 0.
    for shape in ((11, 64), (45, 7), (19, 41)):
        codes = codes_of(rng, shape, bits, -(2 ** (bits - 1)))
        packed = helpers.pack_to_int32(torch.tensor(codes), bits, packed_dim=axis).numpy()
        np.testing.assert_array_equal(pack(codes, bits, **options), packed)
        np.testing.assert_array_equal(unpack(packed, bits, shape[axis], **options), codes)
        ours = torch.tensor(np.asarray(pack(codes, bits, **options)))
        back = helpers.unpack_from_int32(ours, bits, torch.Size(shape), packed_dim=axis)
        np.testing.assert_array_equal(back.numpy(), codes)


def test_compressed_tensors_experts(rng):
    """Weights of rank 3, one matrix an expert: the same as the last axis here."""
    helpers = peer("compressed_tensors.compressors.pack_quantized.helpers")
    codes = codes_of(rng, (2, 3, 21), 3, -4)
    packed = helpers.pack_to_int32(torch.tensor(codes), 3).numpy()
    np.testing.assert_array_equal(pack(codes, 3, order="int32_stream", encoding="offset_binary"), packed)


def test_compressed_tensors_fp4(rng):
    """nvfp4-pack and mxfp4-pack take values and give bytes; all sixteen codes, -0 among them."""
    helpers = peer("compressed_tensors.compressors.nvfp4.helpers")
    codes = codes_of(rng, (8, 32), 4)
    packed = helpers.pack_fp4_to_uint8(torch.tensor(E2M1[codes])).numpy()
    np.testing.assert_array_equal(pack(codes, 4, order="low_first"), packed)
    np.testing.assert_array_equal(unpack(packed, 4, 32, order="low_first"), codes)
    ours = torch.tensor(np.asarray(pack(codes, 4, order="low_first")))
    values = helpers.unpack_fp4_from_uint8(ours, 8, 32, torch.float32).numpy()
    np.testing.assert_array_equal(values.view(np.int32), E2M1[codes].view(np.int32))


def test_compressed_tensors_fp6(rng):
    """Four E2M3 codes in three bytes: sign, two bits of exponent, three of mantissa."""
    helpers = peer("compressed_tensors.compressors.mxfp6.helpers")
    codes = codes_of(rng, (5, 16), 6)
    exponent, mantissa = (codes >> 3) & 3, codes & 7
    values = np.where(exponent == 0, mantissa / 8, (1 + mantissa / 8) * 2.0 ** (exponent.astype(int) - 1))
    values = np.where(codes & 32, -values, values).astype(np.float32)
    packed = helpers.pack_fp6_to_uint8(torch.tensor(values)).numpy()
    np.testing.assert_array_equal(pack(codes, 6, order="uint8_stream"), packed)
    np.testing.assert_array_equal(unpack(packed, 6, 16, order="uint8_stream"), codes)
    ours = torch.tensor(np.asarray(pack(codes, 6, order="uint8_stream")))
    np.testing.assert_array_equal(helpers.unpack_fp6_from_uint8(ours, 5, 16, torch.float32).numpy(), values)


def test_compressed_tensors_bitmasks(rng):
    helpers = peer("compressed_tensors.utils.helpers")
    mask = rng.integers(0, 2, (5, 19)).astype(bool)
    packed = helpers.pack_bitmasks(torch.tensor(mask)).numpy()
    np.testing.assert_array_equal(pack(mask, 1, order="low_first"), packed)
    np.testing.assert_array_equal(unpack(packed, 1, 19, order="low_first"), mask)
