"""A small file of each kind, put together by hand: what tests damage, with and without torch."""

import json
import struct

import numpy as np

from tests.containers.files import HOOKS, SIX, archive, checkpoint, glob, integer, storage, tensor, text

LEGACY_HEAD = (
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}("
    + text("protocol_version")
    + b"M\xe9\x03"
    + text("little_endian")
    + b"\x88u."
)


def legacy_storage(kind: str = "torch.FloatStorage", key: str = "7", numel: int = 6, view: bytes = b"N") -> bytes:
    return b"(" + text("storage") + glob(kind) + text(key) + text("cpu") + integer(numel) + view + b"tQ"


def legacy(body: bytes, storages: dict[str, bytes], itemsize: int = 4, keys: bytes | None = None) -> bytes:
    """A torch.save file without ZIP around the opcodes of its object."""
    if keys is None:
        keys = b"](" + b"".join(map(text, storages)) + b"e" if storages else b"]"
    data = b"".join(struct.pack("<q", len(raw) // itemsize) + raw for raw in storages.values())
    return LEGACY_HEAD + b"\x80\x02" + body + b"." + b"\x80\x02" + keys + b"." + data


LEGACY = legacy(b"}" + text("w") + tensor(source=legacy_storage()) + b"s", {"7": SIX["0"]})

MODULE = glob("__torch__.Net") + b")\x81}(" + text("weight") + tensor() + text("training") + b"\x89" + text("k")
MODULE += glob("torch.jit._pickle.build_intlist") + b"](K\x01K\x02e\x85R" + b"ub"


def torchscript(body: bytes = MODULE, *, code: bytes = b"class Net(Module):\n  pass\n", **others: bytes) -> bytes:
    """A TorchScript archive; its code is compressed, as torch compresses it."""
    records = {"data.pkl": b"\x80\x02" + body + b".", "data/0": SIX["0"], "constants.pkl": b"\x80\x02)."}
    records |= {"version": b"3\n", "byteorder": b"little", **others}
    return archive(records, deflated={"code/__torch__.py": code})


def payload(name: str = "weight_0", **meta: object) -> dict[str, object]:
    return {
        "path_name": name,
        "is_param": True,
        "use_pickle": False,
        "tensor_meta": {
            "dtype": 7,
            "sizes": [{"as_int": 2}, {"as_int": 3}],
            "strides": [{"as_int": 3}, {"as_int": 1}],
            "storage_offset": {"as_int": 0},
            "requires_grad": True,
            "layout": 7,
        }
        | meta,
    }


def pt2(weights: object = None, program: object = None, **others: bytes) -> bytes:
    """A .pt2 archive of one model with one weight."""
    weights = {"config": {"l.weight": payload()}} if weights is None else weights
    program = {"graph_module": {"graph": {"nodes": []}}} if program is None else program
    records = {
        "archive_format": b"pt2",
        "models/model.json": json.dumps(program).encode(),
        "data/weights/model_weights_config.json": json.dumps(weights).encode(),
        "data/weights/weight_0": SIX["0"],
        "data/constants/model_constants_config.json": b'{"config": {}}',
        "byteorder": b"little",
    }
    return archive(records | {name.replace("__", "/"): data for name, data in others.items()})


def safetensors(header: object, data: bytes = b"") -> bytes:
    """A safetensors file around a header: JSON, or the bytes that stand for it."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: str = "F32", shape: list[int] | None = None, begin: int = 0, end: int = 24) -> dict[str, object]:
    return {"dtype": dtype, "shape": [2, 3] if shape is None else shape, "data_offsets": [begin, end]}


QUANTIZED = tensor(
    function="torch._utils._rebuild_qtensor",
    source=storage("torch.QInt8Storage", numel=6),
    tail=glob("torch.per_tensor_affine") + b"G" + struct.pack(">d", 0.5) + b"K\x00\x87\x89" + HOOKS,
)
SUBCLASS = (
    glob("torch._tensor._rebuild_from_type_v2")
    + b"("
    + glob("torch._utils._rebuild_wrapper_subclass")
    + glob("torchao.quantization.Int8Tensor")
    + b"("
    + glob("torchao.quantization.Int8Tensor")
    + glob("torch.float32")
    + b"t}"
    + text("qdata")
    + tensor()
    + b"stR"
)

SAMPLES: dict[str, bytes] = {
    "torch_zip": checkpoint(b"}(" + text("w") + tensor() + text("s") + SUBCLASS + b"u", SIX),
    "quantized": checkpoint(b"}" + text("q") + QUANTIZED + b"s", {"0": bytes(range(6))}),
    "torch_legacy": LEGACY,
    "torchscript": torchscript(),
    "pt2": pt2(),
    "safetensors": safetensors({"__metadata__": {"a": "b"}, "w": entry(), "b": entry("BF16", [2], 24, 28)}, bytes(28)),
}


FLOATS = np.arange(6.0, dtype=np.float32).reshape(2, 3)
INDEX = json.dumps(
    {"metadata": {"total_size": 56}, "weight_map": {"w": "a.safetensors", "b": "b.safetensors"}}
).encode()
