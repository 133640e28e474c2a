"""Writers that are killed from outside, at any moment of large writes: the file is the old one or the new one, whole."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from qjax import containers

WRITER = """
import itertools, sys, types
import numpy as np
qjax = types.ModuleType("qjax")  # containers alone: the facade would import JAX
qjax.__path__ = [sys.argv[1]]
sys.modules["qjax"] = qjax
from qjax import containers
write, path, count = getattr(containers, sys.argv[2]), sys.argv[3], int(sys.argv[4])
for version in itertools.count(1):
    tree = {str(i): np.full(count, version, np.int32) for i in range(8)}
    print("writing", version, flush=True)
    write(path, tree)
"""
QJAX = os.path.dirname(os.path.dirname(containers.__file__))


def killed_while_writing(write: str, path: pathlib.Path, count: int, seconds: float, version: int) -> None:
    """Start a writer of one version after the other, and kill it so long after it began that one."""
    command = [sys.executable, "-c", WRITER, QJAX, write, str(path), str(count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while process.stdout.readline() != f"writing {version}\n":
            assert process.poll() is None, process.stderr.read()
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (process.returncode, process.stderr.read()) == (-signal.SIGKILL, "")


def check(write: str, folder: pathlib.Path, count: int, moments: list[float]) -> None:
    path = folder / "model"
    getattr(containers, write)(path, {str(i): np.full(count, -1, np.int32) for i in range(8)})
    size, left_over = path.stat().st_size, 0
    for index, moment in enumerate(moments):
        killed_while_writing(write, path, count, moment, 1 + index % 2)
        tree = containers.read(path)
        versions = {int(value) for array in tree.values() for value in np.unique(array)}
        assert len(versions) == 1, "a file of two versions"
        assert [tree[str(i)].shape for i in range(8)] == [(count,)] * 8
        assert path.stat().st_size == size
        rest = [other.name for other in folder.iterdir() if other != path]
        assert all(name.startswith(".model.") and name.endswith(".tmp") for name in rest)
        left_over = max(left_over, len(rest))
    assert left_over, "no writer was killed midway; the moments are wrong"
    getattr(containers, write)(path, {"new": np.arange(3)})
    np.testing.assert_array_equal(containers.read(path)["new"], np.arange(3))


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("write", ["write_torch_zip", "write_safetensors"])
def test_a_large_write_that_is_killed_leaves_one_whole_file(tmp_path, write):
    check(write, tmp_path, 500_000, [0.0, 0.01])


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("write", ["write_torch_zip", "write_safetensors"])
def test_a_large_write_that_is_killed_at_many_moments_leaves_one_whole_file(tmp_path, write):
    check(write, tmp_path, 2_000_000, [0.0, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2])
