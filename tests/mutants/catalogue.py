"""The table of mutants: every `MUTANTS` of tests/mutants/tables, and which files have to be in it."""

from __future__ import annotations

import importlib
from pathlib import Path

from tests.mutants.mutant import Mutant

REPOSITORY = Path(__file__).resolve().parents[2]

# Each of these has at least one mutant (test_mutants.py). A file joins when its table is written.
COVERED = (
    "qjax/_arithmetic.py",
    "qjax/_codes.py",
    "qjax/_conventions.py",
    "qjax/_fake_quantize.py",
    "qjax/_formats.py",
    "qjax/_granularity.py",
    "qjax/_packing.py",
    "qjax/_qparams.py",
    "qjax/_quantize.py",
    "qjax/_requantize/_accumulator.py",
    "qjax/_requantize/_engines.py",
    "qjax/_requantize/_exact.py",
    "qjax/_requantize/_fbgemm.py",
    "qjax/_requantize/_onednn.py",
    "qjax/_requantize/_qnnpack.py",
    "qjax/_rounding.py",
    "qjax/_scale_rules.py",
    "qjax/_spec.py",
    "qjax/estimators/_straight_through.py",
    "qjax/observers/_base.py",
    "qjax/observers/_counts.py",
    "qjax/observers/_entropy.py",
    "qjax/observers/_fixed.py",
    "qjax/observers/_float64.py",
    "qjax/observers/_min_max.py",
    "qjax/observers/_moments.py",
    "qjax/observers/_moving_average.py",
    "qjax/observers/_mse.py",
    "qjax/observers/_percentile.py",
    "qjax/observers/_torch_arithmetic.py",
    "qjax/observers/_torch_histogram.py",
    "qjax/observers/_torch_search.py",
)
# Where decisions about numbers are made; `--list` names the files below that have no mutant yet.
NUMERICS = (
    *(
        f"qjax/_{name}.py"
        for name in ("formats", "codes", "granularity", "packing", "conventions", "spec", "arithmetic", "rounding")
    ),
    *(f"qjax/_{name}.py" for name in ("scale_rules", "qparams", "quantize", "fake_quantize")),
    "qjax/_requantize/*.py",
    "qjax/estimators/*.py",
    "qjax/observers/*.py",
)


def table() -> list[Mutant]:
    """All mutants, table by table."""
    mutants: list[Mutant] = []
    for file in sorted(Path(__file__).with_name("tables").glob("*.py")):
        mutants += importlib.import_module(f"tests.mutants.tables.{file.stem}").MUTANTS
    return mutants


def without_mutant(mutants: list[Mutant], root: Path = REPOSITORY) -> list[str]:
    """The files of the numerics rooms in which nothing is flipped."""
    files = {file.relative_to(root).as_posix() for pattern in NUMERICS for file in root.glob(pattern)}
    return sorted(file for file in files - {m.file for m in mutants} if not file.endswith("__init__.py"))
