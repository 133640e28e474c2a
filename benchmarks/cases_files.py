"""Opening a checkpoint of 1 GiB and reading all of it, beside torch.load and safetensors.

Each call is a process of its own, on files that are in the page cache. Imports are not measured. Memory is what was added by
the call: "peak MiB" all that is resident, "own MiB" that which is not a map of the file.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _memory
from benchmarks._case import Case, Maker
from benchmarks._measure import Contender, Parts

TENSORS = 64
_folders: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


def write(folder: Path, mib: int) -> None:
    """Write the same tensors in three formats."""
    import torch
    from safetensors.torch import save_file

    rng = torch.Generator().manual_seed(0)
    shape = (mib * 2**18 // TENSORS // 1024, 1024)
    state = {f"layers.{i}.weight": torch.randn(shape, generator=rng) for i in range(TENSORS)}
    torch.save(state, folder / "model.pt")
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(state, folder / "model.safetensors")


def qjax(path: str) -> Iterable[Any]:
    from qjax import containers

    return containers.read(path).values()


def torch_mmap(path: str) -> Iterable[Any]:
    import torch

    return (tensor.numpy() for tensor in torch.load(path, mmap=True, weights_only=True).values())


def torch_load(path: str) -> Iterable[Any]:
    import torch

    return (tensor.numpy() for tensor in torch.load(path, weights_only=True).values())


def safetensors(path: str) -> Iterable[Any]:
    from safetensors import safe_open

    file = safe_open(path, framework="numpy")
    return (file.get_tensor(name) for name in file.keys())  # noqa: SIM118  # it is no dict


READERS: dict[str, tuple[Callable[[str], Iterable[Any]], str, str]] = {
    "torch.load(mmap=True)": (torch_mmap, "model.pt", "torch.load(mmap=True)"),
    "qjax, .pt": (qjax, "model.pt", "torch.load(mmap=True)"),
    "torch.load": (torch_load, "model.pt", "torch.load(mmap=True)"),
    "torch.load, legacy .pt": (torch_load, "legacy.pt", "torch.load, legacy .pt"),
    "qjax, legacy .pt": (qjax, "legacy.pt", "torch.load, legacy .pt"),
    "safetensors.safe_open": (safetensors, "model.safetensors", "safetensors.safe_open"),
    "qjax, .safetensors": (qjax, "model.safetensors", "safetensors.safe_open"),
}


def read(name: str, folder: str) -> dict[str, float]:
    """Open and read with one reader, in this process; also gives the sum of all numbers, which has to be that of the others."""
    load, file, _ = READERS[name]
    with contextlib.suppress(OSError):  # imports are not what is measured
        list(load(f"{folder}/missing"))
    _memory.forget_peak()
    before, start = _memory.resident(), time.perf_counter()
    tensors = load(f"{folder}/{file}")
    opened = time.perf_counter()
    total, own = 0.0, _memory.resident()["anon"]
    for tensor in tensors:
        total += float(np.sum(tensor, dtype=np.float64))
        own = max(own, _memory.resident()["anon"])
    ended = time.perf_counter()
    return {
        "seconds": ended - start,
        "seconds, open": opened - start,
        "seconds, read": ended - opened,
        "peak MiB": max(_memory.resident()["peak"] - before["now"], 0.01),
        "own MiB": max(own - before["anon"], 0.01),
        "sum": total,
    }


def reader(name: str, folder: str, sums: list[float]) -> Contender:
    def run() -> Parts:
        command = [sys.executable, "-m", "benchmarks.cases_files", name, folder]
        found = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines()[-1])
        sums.append(found.pop("sum"))
        if not np.allclose(sums, sums[0], rtol=1e-9):
            raise AssertionError(f"{name} has read other numbers than the others: {sums}")
        return Parts(found)

    run()  # fails here where the reader is missing
    return Contender(run, base=READERS[name][2])


def contenders(tiny: bool) -> Mapping[str, Maker]:
    _folders.append(tempfile.TemporaryDirectory(prefix="qjax-benchmarks-"))
    folder, sums = _folders[-1].name, []
    write(Path(folder), 1 if tiny else 1024)
    return {name: lambda name=name: reader(name, folder, sums) for name in READERS}


CASES = (
    Case(
        "files/1GiB", "torch.load(mmap=True)", contenders, allocator="default", rounds=7, seconds=60, least=3, warmup=0
    ),
)

if __name__ == "__main__":
    print(json.dumps(read(*sys.argv[1:])))
