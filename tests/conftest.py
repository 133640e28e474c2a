"""How every test runs: strict JAX, one platform, its share of the cores, and random numbers that can be repeated.

Warnings are errors too; that is set in pyproject.toml, with the few exceptions and their reasons.

Code that is not qjax's may need JAX's ordinary promotion (optax.adam raises a float to an int32 power). Such a test
says so where it happens, and nowhere else: ``with jax.numpy_dtype_promotion("standard"):``.
"""

import os
import pathlib
import zlib
from collections.abc import Iterator
from importlib import metadata, util

# Before the first import of JAX and torch, which read these once. A variable that is set already wins: with
# JAX_PLATFORMS=cuda the same tests run on a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Each worker of pytest-xdist gets its share of the cores. Left alone, every worker starts a pool of all cores, and the
# pools fight. XLA's CPU client takes the size of its pools from NPROC (--xla_cpu_multi_thread_eigen=false left a matmul
# on all cores, measured on JAX 0.10 and 0.12); torch and BLAS take theirs from OMP_NUM_THREADS.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _workers > 1:
    _share = str(max(1, (os.cpu_count() or 1) // _workers))
    os.environ.setdefault("NPROC", _share)
    os.environ.setdefault("OMP_NUM_THREADS", _share)

# Most of the time goes into compiling small functions, many of them alike. What was compiled is kept, for the other worker,
# for `make test-long` and for the next run; `make clean` removes it. Entries are keyed by program, versions and flags.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

# A dtype or a rank that changes by accident is a wrong number somewhere else.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# No deadline and no complaint about slowness: the first example of a shape compiles, the next take microseconds.
_common = {"deadline": None, "print_blob": True, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("qjax", **_common)
# In CI a failure must be the commit's, not the dice's: the same examples every time.
hypothesis.settings.register_profile("qjax-ci", derandomize=True, **_common)
hypothesis.settings.load_profile("qjax-ci" if os.environ.get("CI") else "qjax")


def pytest_report_header() -> str:
    """Says what is compared with what: a run without torch skips every comparison with it."""
    torch = metadata.version("torch") if util.find_spec("torch") else "absent (what compares with it is skipped)"
    # Not jax.default_backend(): the process that hands out the tests should not take hold of a GPU.
    return f"jax {jax.__version__} on {os.environ['JAX_PLATFORMS']}, numpy {np.__version__}, torch {torch}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks as long what tests/long.txt lists; a line that names nothing is an error where all tests were collected."""
    path = pathlib.Path(__file__).with_name("long.txt")
    starts = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    unused = set(starts)
    for item in items:
        for start in starts:
            if item.nodeid.startswith(start):
                item.add_marker(pytest.mark.long)
                unused.discard(start)
    if config.args_source is not pytest.Config.ArgsSource.ARGS and util.find_spec("torch") and unused:
        raise pytest.UsageError(f"{path.name} names tests that there are not: {', '.join(sorted(unused))}")


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled() -> Iterator[None]:
    """Drop what one file compiled, which the next hardly uses and which would grow to gigabytes a worker."""
    yield
    jax.clear_caches()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator seeded by the test's own name: the same numbers alone, in any order and on any worker."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))
