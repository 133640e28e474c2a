"""How much memory a compiled program and a process need."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

MIB = 2**20


def temporary(compiled: Any) -> int | None:
    """Bytes that a compiled JAX program needs beside arguments and results: of a training step, activations and gradients."""
    analysis = compiled.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


def resident() -> dict[str, float]:
    """MiB of this process that are resident: "anon" its own, "file" mapped from files and touched, "now" and "peak" both."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    keys = {"anon": "RssAnon", "file": "RssFile", "now": "VmRSS", "peak": "VmHWM"}
    return {name: int(lines[key].split()[0]) / 1024 for name, key in keys.items()}


def forget_peak() -> None:
    """Let "peak" begin anew from here (Linux; where that is not allowed it stays what it is)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
