"""`shard_map` on several devices, each check of which runs in a process of its own; see `sharded.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*args):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    command = [sys.executable, "-m", "tests.transform.sharded", *args]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("checked\n")


def test_a_batch_in_parts_is_quantized_as_the_whole():
    run()


@pytest.mark.long
def test_observers_and_meshes():
    run("long")
