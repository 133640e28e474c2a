"""`python -m experiments.demo.check runs/demo/results.json`: exit with status 1 unless the run shows what it should."""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.demo.results import claims, read


def main(path: str) -> int:
    """Print each claim and whether it holds; returns the exit status."""
    found = claims(read(Path(path)))
    for claim, holds in found.items():
        print(f"{claim}: {'yes' if holds else 'NO'}")
    return 0 if all(found.values()) else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
