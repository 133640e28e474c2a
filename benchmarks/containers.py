"""Open a large checkpoint and read all of it: time and memory, beside torch.load and safetensors.

``python -m benchmarks.containers [--mib 1024] [--folder DIR]``. Each contender runs in a process of its own, on files that are
in the page cache. "anon" is memory of the process's own (copies), "file" is what it has touched of the file's map.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

TENSORS = 64


def make(folder: Path, mib: int) -> None:
    import torch
    from safetensors.torch import save_file

    rng = torch.Generator().manual_seed(0)
    shape = (mib * 2**18 // TENSORS // 1024, 1024)
    state = {f"layers.{i}.weight": torch.randn(shape, generator=rng) for i in range(TENSORS)}
    torch.save(state, folder / "model.pt")
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(state, folder / "model.safetensors")


def memory() -> dict[str, float]:
    """MiB of anonymous and of mapped memory that are resident."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) / 1024 for name, key in (("anon", "RssAnon"), ("file", "RssFile"))}


def qjax(path: str) -> Iterable[Any]:
    from qjax import containers

    return containers.read(path).values()


def torch_mmap(path: str) -> Iterable[Any]:
    import torch

    return [tensor.numpy() for tensor in torch.load(path, mmap=True, weights_only=True).values()]


def torch_load(path: str) -> Iterable[Any]:
    import torch

    return [tensor.numpy() for tensor in torch.load(path, weights_only=True).values()]


def safetensors(path: str) -> Iterable[Any]:
    from safetensors import safe_open

    file = safe_open(path, framework="numpy")
    return (file.get_tensor(name) for name in file.keys())  # noqa: SIM118  # it is no dict


CONTENDERS: dict[str, tuple[Callable[[str], Iterable[Any]], str]] = {
    "qjax, torch zip": (qjax, "model.pt"),
    "torch.load(mmap=True)": (torch_mmap, "model.pt"),
    "torch.load": (torch_load, "model.pt"),
    "qjax, legacy": (qjax, "legacy.pt"),
    "torch.load, legacy": (torch_load, "legacy.pt"),
    "qjax, safetensors": (qjax, "model.safetensors"),
    "safetensors.safe_open": (safetensors, "model.safetensors"),
}


def measure(name: str, folder: str) -> dict[str, float]:
    load, file = CONTENDERS[name]
    path = f"{folder}/{file}"
    with contextlib.suppress(OSError):  # imports are not what is measured
        load(f"{folder}/missing")
    before, start = memory(), time.perf_counter()
    tensors = load(path)
    opened, after = time.perf_counter() - start, memory()
    start = time.perf_counter()
    total, peak = 0.0, after
    for tensor in tensors:
        total += float(np.sum(tensor, dtype=np.float64))
        peak = {key: max(value, memory()[key]) for key, value in peak.items()}
    return {
        "open ms": opened * 1000,
        "open anon": after["anon"] - before["anon"],
        "open file": after["file"] - before["file"],
        "read ms": (time.perf_counter() - start) * 1000,
        "read anon": peak["anon"] - before["anon"],
        "sum": total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--folder", help="where to make the files (default: a temporary folder)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.folder)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        make(Path(folder), arguments.mib)
        print(f"{TENSORS} float32 tensors, {arguments.mib} MiB; times in ms, memory in MiB above that before the call")
        sums: list[float] = []
        for name in CONTENDERS:
            command = [sys.executable, "-m", "benchmarks.containers", "--measure", name, "--folder", folder]
            runs = [json.loads(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(3)]
            best = {key: min(run[key] for run in runs) for key in runs[0]}
            sums.append(best.pop("sum"))
            print(f"{name:24}" + "".join(f"{key} {value:8.1f}  " for key, value in best.items()), flush=True)
        assert np.allclose(sums, sums[0], rtol=1e-9), sums  # all have read the same


if __name__ == "__main__":
    main()
