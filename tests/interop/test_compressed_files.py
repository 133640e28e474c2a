"""compressed-tensors without the library: single files, permuted groups, sizes, and folders that lie."""

import json
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

import qjax
from qjax import containers
from qjax.containers import FormatError
from tests.interop.compressed_folder import hand_made, packed

E4M3 = ml_dtypes.float8_e4m3fn
CHANNEL = {"num_bits": 8, "strategy": "channel"}
FOUR = {"num_bits": 4, "strategy": "group", "group_size": 4}
FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
EXPONENTS = {"weight_packed": np.ones((2, 16), np.uint8), "weight_scale": np.full((2, 1), 127, np.uint8)}
MX4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}


def raw(values, dtype=E4M3):
    name = {"float8_e4m3fn": "float8_e4m3fn", "bfloat16": "bfloat16"}[np.dtype(dtype).name]
    return containers.RawTensor(name, np.asarray(values, dtype).view(np.uint8))


def words_of(codes, bits, **options):
    return np.asarray(qjax.pack(codes, bits, order="int32_stream", encoding="offset_binary", **options))


@pytest.mark.parametrize("answer", [qjax.interop.points, qjax.interop.explain])
def test_what_is_wrong_with_an_input_is_said_with_the_file(tmp_path, answer):
    args = {"num_bits": 8, "strategy": "tensor"}
    tensors = {"weight": np.ones((2, 2), np.int8), "weight_scale": np.float32([1]), "input_scale": np.float32([-1])}
    checkpoint = qjax.interop.load(hand_made(tmp_path / "a", args, group={"input_activations": args}, **tensors))
    with pytest.raises(FormatError, match=r"a: tensor 'fc\.input_scale': found input_scale with -1\.0") as error:
        answer(checkpoint)
    assert error.value.file == checkpoint.path


def test_real_sizes_are_read_without_copies(tmp_path, rng):
    size = 2048
    words = rng.integers(-(2**31), 2**31, (size, size // 8)).astype(np.int32)
    scale = np.full((size, size // 128), 0.5, np.float32)
    tensors = packed(words, (size, size)) | {"weight_scale": scale}
    folder = hand_made(tmp_path / "four", {**FOUR, "group_size": 128}, **tensors)
    tracemalloc.start()
    checkpoint = qjax.interop.load(folder)
    table = qjax.interop.points(checkpoint)
    assert tracemalloc.get_traced_memory()[1] < 2**20  # neither looks at the codes
    tracemalloc.reset_peak()
    start = time.perf_counter()
    weight = checkpoint["fc.weight"]
    seconds = time.perf_counter() - start
    assert tracemalloc.get_traced_memory()[1] < 2.5 * size * size
    tracemalloc.stop()
    assert seconds < 0.5
    assert weight.shape == (size, size)
    assert table[0].scale.shape == (size, size // 128)
    np.testing.assert_array_equal(words_of(weight.codes[:8], 4), words[:8])

    codes = rng.integers(-128, 128, (size, size)).astype(np.int8)
    for name, args, stored in (("int", CHANNEL, codes), ("float", CHANNEL | {"type": "float"}, raw(codes.view(E4M3)))):
        folder = hand_made(tmp_path / name, args, weight=stored, weight_scale=np.ones((size, 1), np.float32))
        tracemalloc.start()
        weight = qjax.interop.load(folder)["fc.weight"]
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()
        np.testing.assert_array_equal(np.asarray(weight.codes).view(np.int8), codes)
        assert np.asarray(weight.codes).base is not None


def test_permuted_groups(tmp_path, rng):
    """weight_g_idx, which releases before 0.20 wrote for actorder: column k has the scale of group g_idx[k]."""
    codes = rng.integers(-8, 8, (6, 32)).astype(np.int8)
    scale = rng.uniform(0.5, 2, (6, 4)).astype(np.float32)
    points = rng.integers(-8, 8, (6, 4)).astype(np.int8)
    order = rng.permutation(np.repeat(np.arange(4), 8)).astype(np.int32)
    tensors = packed(words_of(codes, 4), codes.shape) | {
        "weight_scale": scale, "weight_g_idx": order, "weight_zero_point": words_of(points, 4, axis=0)
    }  # fmt: skip
    args = {"num_bits": 4, "strategy": "group", "group_size": 8, "symmetric": False, "actorder": "group"}
    checkpoint = qjax.interop.load(hand_made(tmp_path, args, **tensors))
    wanted = (codes.astype(np.float32) - points[:, order]) * scale[:, order]
    np.testing.assert_array_equal(checkpoint["fc.weight"].dequantize(), wanted)
    (point,) = qjax.interop.points(checkpoint)
    assert "weight_g_idx" in point.qparams_from.detail
    np.testing.assert_array_equal(point.scale, scale)
    for index in (np.repeat(np.arange(4), 8), np.full(32, -1)):
        tensors["weight_g_idx"] = index.astype(np.int32)
        weight = qjax.interop.load(hand_made(tmp_path, args, **tensors))["fc.weight"]
        assert weight.spec.granularity == qjax.PerGroup(-1, 8)
        np.testing.assert_array_equal(weight.dequantize(), (codes - np.repeat(points, 8, 1)) * np.repeat(scale, 8, 1))


def test_stacked_experts(tmp_path, rng):
    codes = rng.integers(-4, 4, (2, 5, 24)).astype(np.int8)
    points = rng.integers(-4, 4, (2, 5, 3)).astype(np.int8)
    scale = rng.uniform(0.5, 2, (2, 5, 3)).astype(np.float32)
    tensors = {
        "weight_packed": words_of(codes, 3), "weight_shape": np.array(codes.shape), "weight_scale": scale,
        "weight_zero_point": words_of(points, 3, axis=1),
    }  # fmt: skip
    args = {"num_bits": 3, "strategy": "group", "group_size": 8, "symmetric": False}
    weight = qjax.interop.load(hand_made(tmp_path, args, version="0.20.0", **tensors))["fc.weight"]
    wanted = (codes - np.repeat(points, 8, 2)) * np.repeat(scale, 8, 2)
    np.testing.assert_array_equal(weight.dequantize(), wanted)


def test_a_global_scale_divides(tmp_path, rng):
    """compressed-tensors rounds what it decompresses to bfloat16, which hides the last places; they are right before it."""
    scale = np.exp2(rng.uniform(-6, 8, (64, 4))).astype(E4M3)
    overall = np.float32(1234.567)
    codes = rng.integers(0, 16, (64, 64)).astype(np.uint8)
    tensors = {
        "weight_packed": codes[:, ::2] | codes[:, 1::2] << 4,
        "weight_scale": raw(scale),
        "weight_global_scale": overall.reshape(1),
    }
    weight = qjax.interop.load(hand_made(tmp_path, FP4, **tensors))["fc.weight"]
    np.testing.assert_array_equal(weight.codes, codes)
    step = scale.astype(np.float32) / overall
    assert (step != scale.astype(np.float32) * (1 / overall)).any()
    levels = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(weight.dequantize(), levels * np.repeat(step, 16, 1))
    again = qjax.quantize(levels * np.repeat(step, 16, 1), weight.qparams, weight.spec)
    np.testing.assert_array_equal(np.asarray(again.values()), levels)


def test_a_single_file(tmp_path):
    """Its metadata may hold the config; else dtypes and shapes say what can be said, and it is called an assumption."""
    codes = np.arange(-8, 8, dtype=np.int8).repeat(4).reshape(2, 32)
    tensors = {f"fc.{key}": value for key, value in packed(words_of(codes, 4), codes.shape).items()}
    tensors["fc.weight_scale"] = np.float32([[1, 2, 4, 8], [0.5, 1, 2, 4]])
    path = tmp_path / "a.safetensors"
    containers.write_safetensors(path, tensors)
    args = {"num_bits": 4, "strategy": "group", "group_size": 8}
    said = {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": ["Linear"], "weights": args}}}
    for metadata, kind in ((None, "assumed"), ({"quantization_config": json.dumps(said)}, "file")):
        containers.write_safetensors(path, tensors, metadata=metadata)
        checkpoint = qjax.interop.load(path)
        assert checkpoint.dialect == "compressed_tensors"
        np.testing.assert_array_equal(checkpoint["fc.weight"].codes, codes)
        assert checkpoint["fc.weight"].spec.granularity == qjax.PerGroup(-1, 8)
        (point,) = qjax.interop.points(checkpoint)
        assert (point.dtype, point.codes_from.kind) == ("int4", kind)
    for text in ("[", "3", "[" * 10**5, '{"quant_method": "gptq"}'):
        containers.write_safetensors(path, tensors, metadata={"quantization_config": text})
        assert qjax.interop.points(qjax.interop.load(path))[0].codes_from.kind == "assumed"


@pytest.mark.parametrize(
    ("tensors", "dtype", "granularity"),
    [
        ({"weight": np.ones((2, 32), np.int8), "weight_scale": np.ones((2, 1), np.float32)}, "int8", "per_channel(0)"),
        ({"weight": raw(np.ones((2, 32))), "weight_scale": np.ones(1, np.float32)}, "float8_e4m3fn", "per_tensor"),
        ({"weight": raw(np.ones((2, 64))), "weight_scale": np.uint8([[127] * 2] * 2)}, "float8_e4m3fn", "per_group(-1,32)"),
        (EXPONENTS, "float4_e2m1fn", "per_group(-1,32)"),
        (
            {
                "weight_packed": np.ones((2, 32), np.uint8), "weight_scale": raw(np.ones((2, 4))),
                "weight_global_scale": np.ones(1, np.float32),
            },
            "float4_e2m1fn", "per_group(-1,16)",
        ),
    ],
)  # fmt: skip
def test_what_shapes_and_dtypes_say(tmp_path, tensors, dtype, granularity):
    path = tmp_path / "a.safetensors"
    containers.write_safetensors(path, {f"fc.{key}": value for key, value in tensors.items()})
    checkpoint = qjax.interop.load(path)
    (point,) = qjax.interop.points(checkpoint)
    assert (point.dtype, str(checkpoint["fc.weight"].spec.granularity)) == (dtype, granularity)
    assert point.codes_from.kind == "assumed"


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, {"weight": np.ones((2, 8), np.int8)}),
        ({}, {"weight": np.ones((2, 8), np.float32)}),
        ({}, {"weight": np.ones((2, 8), np.int16)}),
        ({}, {"weight_packed": np.ones((2, 7), np.int32), "weight_shape": np.array([2, 17])}),
        ({}, {"weight_packed": np.ones((2, 7), np.int32)}),
    ],
)
def test_others_files_are_left_alone(tmp_path, config, tensors):
    tensors = {"fc.weight_scale": np.ones((2, 1), np.float32)} | {f"fc.{key}": value for key, value in tensors.items()}
    containers.write_safetensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = qjax.interop.load(tmp_path)
    assert checkpoint.dialect == "plain"
    assert set(checkpoint) == set(tensors)


@pytest.mark.parametrize("nest", ["quantization_config", "compression_config", "text_config", "nested"])
def test_where_the_config_stands(tmp_path, nest):
    folder = hand_made(tmp_path, CHANNEL, weight=np.ones((2, 8), np.int8), weight_scale=np.ones((2, 1), np.float32))
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = {
        "quantization_config": {"quantization_config": said},
        "compression_config": {"compression_config": said},
        "text_config": {"text_config": {"quantization_config": said}},
        "nested": {"compression_config": {"quantization_config": said, "sparsity_config": {}}},
    }[nest]
    (folder / "config.json").write_text(json.dumps(config))
    assert qjax.interop.load(folder).dialect == "compressed_tensors"


INT = {"weight": np.ones((2, 8), np.int8), "weight_scale": np.ones((2, 1), np.float32)}
PACKED = packed(np.zeros((2, 1), np.int32), (2, 8))
GROUPED = PACKED | {"weight_scale": np.ones((2, 2), np.float32)}
NV4 = {
    "weight_packed": np.ones((2, 16), np.uint8),
    "weight_scale": raw(np.ones((2, 2))),
    "weight_global_scale": np.ones(1, np.float32),
}
ASYMMETRIC = {**FOUR, "symmetric": False}
LIES = {
    "scales": (CHANNEL, INT | {"weight_scale": np.ones((3, 1), np.float32)}, "2 scales, one for each channel"),
    "nan": (CHANNEL, INT | {"weight_scale": np.float32([[1], [np.nan]])}, "weight_scale with nan"),
    "negative": (CHANNEL, INT | {"weight_scale": np.float32([[1], [-0.5]])}, "weight_scale with -0.5"),
    "infinite": (CHANNEL, INT | {"weight_scale": np.float32([[1], [np.inf]])}, "weight_scale with inf"),
    "too large": (CHANNEL, INT | {"weight_scale": np.float64([[1], [1e300]])}, "weight_scale with inf"),
    "whole scales": (CHANNEL, INT | {"weight_scale": np.ones((2, 1), np.int64)}, "weight_scale of dtype int64"),
    "wide codes": (CHANNEL, INT | {"weight": np.ones((2, 8), np.int16)}, "a weight of dtype int16"),
    "floats of integers": (CHANNEL | {"type": "float"}, INT, "a weight of dtype int8"),
    "8 bits of 4": (CHANNEL | {"type": "float", "num_bits": 4}, INT | {"weight": raw(np.ones((2, 8)))}, "float of 4 bits"),
    "two weights": (FOUR, GROUPED | {"weight": np.ones((2, 8), np.int8)}, "a weight beside a weight_packed"),
    "groups": (FOUR | {"group_size": 3}, GROUPED, "rows of 8 in groups of 3"),
    "rank": (FOUR, GROUPED | {"weight_shape": np.array([16])}, r"weight_shape \[16\] for \[2, 1\] words"),
    "rows": (FOUR, GROUPED | {"weight_shape": np.array([3, 8])}, r"weight_shape \[3, 8\] for"),
    "huge": (FOUR, GROUPED | {"weight_shape": np.array([2, 2**62])}, "1 words for 4611686018427387904 codes"),
    "less than none": (FOUR, GROUPED | {"weight_shape": np.array([2, -8])}, r"weight_shape \[2, -8\]"),
    "no shape": (FOUR, GROUPED | {"weight_shape": None}, r"weight_shape \[\] for"),
    "float shape": (FOUR, GROUPED | {"weight_shape": np.ones(2, np.float32)}, r"weight_shape \[\] for"),
    "words": (FOUR, GROUPED | {"weight_packed": np.zeros((2, 3), np.int32)}, "3 words for 8 codes of 4 bits"),
    "bytes": (FOUR, GROUPED | {"weight_packed": np.zeros((2, 4), np.int16)}, "4 bits packed in int16"),
    "a vector": (FOUR, GROUPED | {"weight_packed": np.zeros(2, np.int32), "weight_shape": np.array([8])}, "weight_shape"),
    "12 bits": (FOUR | {"num_bits": 12}, GROUPED, "12 bits packed in int32"),
    "no zero_point": (ASYMMETRIC, GROUPED, "no weight_zero_point"),
    "zero_points": (ASYMMETRIC, GROUPED | {"weight_zero_point": np.zeros((2, 2), np.int32)}, "2 words for 2 codes"),
    "zero_points' groups": (ASYMMETRIC, GROUPED | {"weight_zero_point": np.zeros((1, 3), np.int32)}, "2 for each row"),
    "zero_points' dtype": (ASYMMETRIC, GROUPED | {"weight_zero_point": np.zeros((1, 2), np.int8)}, "of int8, 2 axes"),
    "far": (CHANNEL | {"symmetric": False}, INT | {"weight_zero_point": np.array([[200], [0]])}, "zero_points from 0 to 200"),
    "no number": (CHANNEL | {"symmetric": False}, INT | {"weight_zero_point": np.full((2, 1), np.nan)}, "from nan to nan"),
    "half": (CHANNEL | {"symmetric": False}, INT | {"weight_zero_point": np.full((2, 1), 0.5)}, "from 0.5 to 0.5"),
    "one for two": (CHANNEL | {"symmetric": False}, INT | {"weight_zero_point": np.zeros(1, np.int8)}, "2, one for each scale"),
    "g_idx": (FOUR, GROUPED | {"weight_g_idx": np.array([0, 0, 0, 0, 2, 1, 1, 1])}, "weight_g_idx from 0 to 2"),
    "g_idx short": (FOUR, GROUPED | {"weight_g_idx": np.zeros(3, np.int32)}, r"weight_g_idx of int32, shape \[3\]"),
    "no global": (FP4, NV4 | {"weight_global_scale": None}, "no weight_global_scale"),
    "global of 0": (FP4, NV4 | {"weight_global_scale": np.zeros(1, np.float32)}, "a weight_global_scale of 0"),
    "global nan": (FP4, NV4 | {"weight_global_scale": np.full(1, np.nan, np.float32)}, "weight_global_scale with nan"),
    "two globals": (FP4, NV4 | {"weight_global_scale": np.ones(2, np.float32)}, "no weight_global_scale of one"),
    "scale nan": (FP4, NV4 | {"weight_scale": raw([[1, np.nan], [1, 1]])}, "weight_scale with nan"),
    "fp4 words": (FP4, NV4 | {"weight_packed": np.ones((2, 16), np.int32)}, "4-bit floats in int32"),
    "exponent 255": (MX4, EXPONENTS | {"weight_scale": np.uint8([[1], [255]])}, "with inf"),
    "no exponents": (MX4, EXPONENTS | {"weight_scale": np.ones((2, 1), np.float32)}, "float32"),
    "block": ({"num_bits": 8, "strategy": "block", "block_structure": [1, 4]}, INT, "4 scales, one for each block"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_tensors_that_contradict_the_config(tmp_path, name):
    args, tensors, message = LIES[name]
    with pytest.raises(FormatError, match=rf"module 'fc': found .*{message}") as caught:
        qjax.interop.load(hand_made(tmp_path, args, **tensors))
    assert str(tmp_path) in caught.value.file


def test_codes_beyond_their_width_are_found_when_they_are_read(tmp_path):
    args = CHANNEL | {"num_bits": 4}
    tensors = INT | {"weight": np.full((2, 8), 8, np.int8)}
    checkpoint = qjax.interop.load(hand_made(tmp_path, args, **tensors))
    with pytest.raises(FormatError, match=r"tensor 'fc\.weight': found codes from 8 to 8; expected -8 to 7") as caught:
        checkpoint["fc.weight"]
    assert caught.value.file == str(tmp_path)


@pytest.mark.parametrize(
    ("args", "tensors", "why"),
    [
        ({"num_bits": 16, "type": "float"}, {"weight": raw(np.ones((2, 8)))}, "no float of 16 bits"),
        ({"num_bits": 32, "strategy": "channel"}, {"weight": np.ones((2, 8), np.int32)}, "integers of 32 bits"),
        ({"num_bits": 8, "strategy": "token", "dynamic": True}, {}, "quantized token"),
        (
            CHANNEL | {"type": "float"},
            {"weight": raw(np.ones((2, 8))), "weight_zero_point": np.ones((2, 1), np.float16)},
            "floats with",
        ),
        (None, {}, "quantizes no weight"),
    ],
)  # fmt: skip
def test_schemes_that_a_qtensor_cannot_say_are_left_and_said(tmp_path, args, tensors, why):
    checkpoint = qjax.interop.load(hand_made(tmp_path, args, **(INT | tensors)))
    assert "fc.weight_scale" in checkpoint
    (point,) = qjax.interop.points(checkpoint)
    assert point.qparams_from.kind == "unknown"
    assert why in point.qparams_from.detail


BAD = {
    "groups": ({"config_groups": [1]}, r"quantization_config\.config_groups: found a list; expected a dict"),
    "a group": ({"config_groups": {"g": 3}}, r"config_groups\.g: found a int"),
    "a preset": ({"config_groups": {"W4A16": ["Linear"]}}, "the preset 'W4A16'"),
    "targets": ({"config_groups": {"g": {"targets": "Linear"}}}, r"g\.targets: found something else"),
    "a target": ({"config_groups": {"g": {"targets": [1]}}}, r"g\.targets: found"),
    "a pattern": ({"ignore": ["re:("]}, "found no regular expression"),
    "ignore": ({"ignore": {}, "config_groups": {}}, None),
    "ignore text": ({"ignore": "lm_head"}, r"ignore: found something else"),
    "format": ({"format": 3}, r"format: found a int"),
    "cache": ({"kv_cache_scheme": []}, r"kv_cache_scheme: found a list"),
}
ARGS = {
    "bits": ({"num_bits": "8"}, r"weights\.num_bits: found a str; expected a int"),
    "many bits": ({"num_bits": 10**30}, "bits of type"),
    "no bits": ({"num_bits": 0}, "0 bits"),
    "true": ({"num_bits": True}, "found a bool"),
    "type": ({"type": "complex"}, "8 bits of type 'complex'"),
    "strategy": ({"strategy": "row"}, "the strategy 'row'"),
    "group": ({"strategy": "group"}, "without a group_size"),
    "group of 0": ({"group_size": 0}, "a group_size of '0'"),
    "group of 1.5": ({"group_size": 1.5}, "a group_size of '1.5'"),
    "block": ({"strategy": "block"}, "without a block_structure"),
    "block of 3": ({"strategy": "block", "block_structure": [1, 2, 3]}, "two positive ints"),
    "block of 0": ({"strategy": "block", "block_structure": [0, 2]}, "two positive ints"),
    "block text": ({"strategy": "block", "block_structure": "2x"}, "two positive ints"),
    "dynamic": ({"dynamic": "yes"}, "dynamic: 'yes'"),
    "symmetric": ({"symmetric": 1}, r"weights\.symmetric: found a int"),
}


@pytest.mark.parametrize("name", [*BAD, *ARGS])
def test_configs_that_are_none(tmp_path, name):
    config, message = BAD[name] if name in BAD else ({}, ARGS[name][1])
    folder = hand_made(tmp_path, CHANNEL | (ARGS[name][0] if name in ARGS else {}), config=config, **INT)
    if message is None:
        assert qjax.interop.load(folder).dialect == "compressed_tensors"
        return
    with pytest.raises(FormatError, match=message) as caught:
        qjax.interop.load(folder)
    assert str(tmp_path) in str(caught.value)


def test_blocks_as_older_releases_wrote_them(tmp_path):
    args = {"num_bits": 8, "strategy": "block", "block_structure": "2x4"}
    weight = qjax.interop.load(hand_made(tmp_path, args, **INT | {"weight_scale": np.float32([[1, 2]])}))["fc.weight"]
    np.testing.assert_array_equal(weight.dequantize(), np.repeat([[1, 2]], 4, 1).repeat(2, 0))


STATIC = {"num_bits": 8, "strategy": "tensor"}


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"input_scale": np.float32([np.nan])}, "input_scale with nan"),
        ({"input_scale": np.float32([-1])}, "input_scale with -1"),
        ({"input_scale": np.float32([1, 2])}, "2 scales for a tensor"),
        ({"input_scale": np.float32([1]), "input_zero_point": np.int8([1, 2])}, "1 scales and 2 zero_points"),
        ({"input_scale": np.float32([1]), "input_zero_point": np.float32([np.nan])}, "no small integers"),
        ({"input_scale": np.float32([1]), "input_zero_point": np.int64([2**60])}, "no small integers"),
    ],
)
def test_activations_that_are_no_numbers(tmp_path, numbers, message):
    folder = hand_made(tmp_path, CHANNEL, group={"input_activations": STATIC}, **INT, **numbers)
    with pytest.raises(FormatError, match=rf"tensor 'fc\.input_\w+': found .*{message}"):
        qjax.interop.points(qjax.interop.load(folder))


def test_a_static_input_without_a_scale_is_unknown(tmp_path):
    folder = hand_made(tmp_path, CHANNEL, group={"input_activations": STATIC}, **INT)
    (point,) = qjax.interop.points(qjax.interop.load(folder)).of("fc", "input")
    assert point.qparams_from == qjax.interop.Origin("unknown", "the file has no input_scale")


def test_a_block_that_was_never_used_has_a_scale_of_zero(tmp_path):
    checkpoint = qjax.interop.load(hand_made(tmp_path, CHANNEL, **INT | {"weight_scale": np.float32([[1], [0]])}))
    np.testing.assert_array_equal(checkpoint["fc.weight"].dequantize(), np.repeat([[1], [0]], 8, 1))
    assert not qjax.interop.points(checkpoint)[0].valid


def test_names_that_act_on_a_terminal(tmp_path):
    containers.write_safetensors(
        tmp_path / "model.safetensors", {f"\x1b[31m.{key}": value for key, value in INT.items()}
    )
    config = {
        "quant_method": "compressed-tensors",
        "config_groups": {"\x1b[0m": {"targets": ["Linear"], "weights": CHANNEL}},
    }
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    assert qjax.interop.points(qjax.interop.load(tmp_path)).render().replace("\n", "").isprintable()
