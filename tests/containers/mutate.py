"""Damage done to files: to their bytes, and to the records inside them with everything around kept in order.

The second kind reaches the code behind the checksums and lengths that stop the first.
"""

import io
import json
import random
import struct
import zipfile

from tests.containers.files import AFFINE, HALF, HOOKS, archive, glob, qtensor, storage, tensor, text

INTERESTING = [
    0,
    1,
    2,
    3,
    7,
    8,
    127,
    128,
    255,
    256,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
]
OPCODES = b"cRbQaesu(t\x85\x86\x87)]}N\x88\x89KMJ\x8aGXUhjqr\x81."
VALUES = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    6,
    7,
    24,
    2**31,
    2**53,
    2**63,
    2**64,
    1e308,
    0.5,
    "",
    "x",
    "../x",
    "/etc/passwd",
    "F32",
    [],
    {},
    [0],
    [[]],
    float("nan"),
    float("inf"),
]


# Bits of pickle that mean something, to be put together in any order.
PIECES = [
    *(bytes([code]) for code in b"Rbaesu(t\x85\x86\x87)]}N\x88\x89Q\x8101"),
    b"K\x02",
    b"h\x00",
    b"h\x01",
    b"q\x00",
    b"q\x01",
    HALF,
    HOOKS,
    text("storage"),
    text("0"),
    text("latin1"),
    text("_metadata"),
    AFFINE,
    storage(),
    tensor(),
    qtensor(AFFINE + HALF + b"K\x00\x87"),
    *map(
        glob,
        (
            "torch._utils._rebuild_tensor_v2",
            "torch._utils._rebuild_tensor_v3",
            "torch._utils._rebuild_qtensor",
            "torch._utils._rebuild_parameter",
            "collections.OrderedDict",
            "torch.Size",
            "torch.device",
            "_codecs.encode",
            "__builtin__.complex",
            "torch.FloatStorage",
            "torch._tensor._rebuild_from_type_v2",
            "torch._utils._rebuild_wrapper_subclass",
            "torch.serialization._get_layout",
            "torch.Tensor",
            "torchao.quantization.Int8Tensor",
            "builtins.getattr",
            "builtins.set",
            "my.Net",
        ),
    ),
]


def mutate_bytes(data: bytes, rng: random.Random, pool: list[bytes] | None = None) -> bytes:
    """One to four edits of a byte string."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        if not changed:
            break
        position = rng.randrange(len(changed))
        kind = rng.randrange(9)
        if kind == 0:
            changed[position] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[position] = rng.randrange(256)
        elif kind == 2:
            changed.insert(position, rng.choice(OPCODES))
        elif kind == 3:
            del changed[position : position + rng.choice((1, 1, 2, 4, 16))]
        elif kind == 4:
            end = position + rng.choice((1, 2, 4, 8, 32, 100))
            changed[position:position] = changed[position:end] * rng.choice((1, 1, 2, 50))
        elif kind == 5:
            del changed[position:]
        elif kind == 6:
            size = rng.choice("BHIQ")
            value = rng.choice(INTERESTING) % 2 ** (8 * struct.calcsize(size))
            raw = struct.pack(rng.choice("<>") + size, value)
            changed[position : position + len(raw)] = raw
        elif kind == 7:
            changed[position] = rng.choice(OPCODES)
        else:
            other = rng.choice(pool or [data])
            start = rng.randrange(len(other))
            changed[position : position + rng.choice((0, 8))] = other[start : start + rng.choice((4, 16, 64))]
    return bytes(changed)


def mutate_json(text: bytes, rng: random.Random) -> bytes:
    """Another value somewhere in a JSON text, a key away or twice; or other bytes."""
    try:
        value = json.loads(text)
    except ValueError:
        return mutate_bytes(text, rng)
    node = value
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node))) if isinstance(node, list) else []
        if not keys:
            break
        key = rng.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.7:
            node = node[key]
            continue
        kind = rng.randrange(4)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[rng.choice(keys)] = node[key]
        else:
            node[key] = rng.choice(VALUES)
        break
    text = json.dumps(value).encode()
    return mutate_bytes(text, rng) if rng.random() < 0.1 else text


def records_of(data: bytes) -> tuple[str, dict[str, bytes], dict[str, bytes]] | None:
    """Prefix, stored records and deflated records of an archive; None where it is none."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            prefix = file.namelist()[0].partition("/")[0]
            stored, deflated = {}, {}
            for info in file.infolist():
                part = deflated if info.compress_type else stored
                part[info.filename.removeprefix(f"{prefix}/")] = file.read(info)
    except (zipfile.BadZipFile, OSError):
        return None
    return prefix, stored, deflated


def mutate_inside(data: bytes, rng: random.Random, pool: list[bytes] | None = None) -> bytes:
    """Damage one record of an archive, or the header of a safetensors file, and close the file around it again."""
    parts = records_of(data) if data[:2] == b"PK" else None
    if parts is not None:
        prefix, stored, deflated = parts
        weighted = [name for name in stored for _ in range(6 if name.endswith((".pkl", ".json")) else 1)]
        name = rng.choice(weighted + list(deflated))
        if rng.random() < 0.03:
            data = stored.pop(name) if name in stored else deflated.pop(name)
            name = rng.choice(["data/0", "version", "byteorder", "constants.pkl", "archive_format", "x"])
            deflated.pop(name, None)
            stored[name] = data
        elif name in deflated:
            deflated[name] = mutate_bytes(deflated[name], rng)
        elif name.endswith(".json"):
            stored[name] = mutate_json(stored[name], rng)
        elif name.endswith(".pkl") and rng.random() < 0.3:
            pickle, position = stored[name], rng.randrange(2, max(len(stored[name]), 3))
            piece = b"".join(rng.choices(PIECES, k=rng.choice((1, 1, 2, 5, 20))))
            stored[name] = pickle[:position] + piece + pickle[position + rng.choice((0, 0, 1, 4)) :]
        else:
            stored[name] = mutate_bytes(stored[name], rng, pool)
        return archive(stored, prefix=prefix, deflated=deflated)
    if data[8:9] == b"{":
        length = int.from_bytes(data[:8], "little")
        header = mutate_json(data[8 : 8 + length], rng)
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    if data[:1] == b"{":
        return mutate_json(data, rng)
    return mutate_bytes(data, rng, pool)


def mutate(data: bytes, rng: random.Random, pool: list[bytes] | None = None) -> bytes:
    """Either of them, or both."""
    if rng.random() < 0.65:
        data = mutate_inside(data, rng, pool)
        if rng.random() < 0.9:
            return data
    return mutate_bytes(data, rng, pool)
