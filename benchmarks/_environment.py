"""What a measurement has to say about where it was made."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "qwix", "aqtp", "torch", "torchao", "safetensors")


def describe() -> dict[str, Any]:
    """Versions, device and commit as JSON types. It starts JAX, so the process that waits for the others does not call it."""
    import jax

    device = jax.devices()[0]
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "backend": jax.default_backend(),
        "device": processor() if device.platform == "cpu" else device.device_kind,
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(terse=True),
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", "qjax", ":(glob)benchmarks/*.py")),
        "sources": sources(),
    }


def version(package: str) -> str | None:
    """The version of an installed package; None where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def git(*arguments: str) -> str | None:
    """What git prints; None outside a repository."""
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def sources() -> str:
    """A digest of the code that is measured and of that which measures: results of another code are not mixed with these."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "qjax").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
