"""Damage small files of every dialect, many times: ``python -m tests.interop.fuzz --inputs 100000``.

Each input is loaded, its quantization points are listed and rendered, it is explained, and compared with itself. What is
allowed is that this works, or a `FormatError`, within the time and memory of `tests.containers.fuzz`, whose loop and options
these are.
"""

import random
import sys
from pathlib import Path

import jax
import numpy as np

from qjax import containers, interop
from qjax.interop import points
from tests.containers import fuzz
from tests.interop.fuzz_samples import COMPRESSED, CONFIG, hand_made, of_torch


def read(name: str, data: bytes, folder: Path, rng: random.Random) -> bool:
    """Whether the input was understood; False where it was refused."""
    try:
        checkpoint = interop.load(_placed(name, data, folder))
        table = points(checkpoint, engine=rng.choice(("x86", "onednn", "qnnpack")))
        assert table.render().replace("\n", "").isprintable()
        table.to_json()
        explanation = interop.explain(checkpoint)
        explanation.render()
        explanation.render(wide=True)
        explanation.to_json()
        if explanation.answer.point is not None:
            interop.interpret(np.arange(16, dtype=np.uint8), explanation.answer.point)
        comparison = interop.compare(checkpoint, checkpoint)
        assert comparison.equal, comparison.render()
    except containers.FormatError as error:
        return fuzz.refusal(error)
    return True


def _placed(name: str, data: bytes, folder: Path) -> bytes | Path:
    """What to load: the bytes of a file, or the folder that a config.json is of."""
    if name != CONFIG:
        return data
    if not (folder / "model.safetensors").exists():
        containers.write_safetensors(folder / "model.safetensors", COMPRESSED)
    (folder / CONFIG).write_bytes(data)
    return folder


def main(argv: list[str] | None = None) -> int:
    return fuzz.main(
        argv, description=__doc__, hand_made=hand_made, of_torch=of_torch, reader=read, forget=jax.clear_caches
    )


if __name__ == "__main__":
    sys.exit(main())
