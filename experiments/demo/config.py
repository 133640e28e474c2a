"""What a run is made of, and the command line that is generated from it."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, get_type_hints


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides the numbers of a run. Each field is an option of the command line.

    Raises:
      ValueError: A count or a rate that makes no sense.
    """

    out: Path = field(
        default=Path("runs/demo"), metadata={"help": "folder for results.json, digits_int8.pt and demo.png"}
    )
    seeds: int = field(
        default=3, metadata={"help": "how many seeds; a seed decides the initial weights and the order of the batches"}
    )
    test_fraction: float = field(
        default=0.4,
        metadata={"help": "share of the digits held out for testing; large, so that accuracies are less noisy"},
    )
    batch_size: int = field(default=64, metadata={"help": "images per step; an incomplete last batch is left out"})
    float_epochs: int = field(default=100, metadata={"help": "epochs of float training"})
    float_learning_rate: float = field(
        default=5e-3, metadata={"help": "where the cosine schedule of float training starts"}
    )
    qat_epochs: int = field(
        default=50, metadata={"help": "epochs of quantization-aware training, from the float weights"}
    )
    qat_learning_rate: float = field(
        default=3e-3, metadata={"help": "where the cosine schedule of quantization-aware training starts"}
    )
    averaging_constant: float = field(
        default=0.01, metadata={"help": "how fast the observers of quantization-aware training follow"}
    )

    def __post_init__(self) -> None:
        for name in ("seeds", "batch_size", "float_epochs", "qat_epochs", "float_learning_rate", "qat_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}.")
        if not 0.0 < self.test_fraction < 1.0:
            raise ValueError(f"test_fraction must lie between 0 and 1, got {self.test_fraction}.")
        if not 0.0 < self.averaging_constant <= 1.0:
            raise ValueError(f"averaging_constant must be above 0 and at most 1, got {self.averaging_constant}.")

    def smoke(self) -> Config:
        """The same run cut down to seconds: every step is taken once or twice, and the accuracies mean nothing."""
        return dataclasses.replace(self, seeds=1, float_epochs=2, qat_epochs=1)

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON types. Where the results lie is not part of what they are."""
        fields = dataclasses.asdict(self)
        del fields["out"]
        return fields


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Read a Config from the command line; argparse exits on what it does not know.

    Args:
      arguments: The words after the program's name; those of this process when None.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.demo",
        description="Train a small CNN on handwritten digits, quantize it, run it in integers, write it for PyTorch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    types = get_type_hints(Config)
    for option in dataclasses.fields(Config):
        flag = "--" + option.name.replace("_", "-")
        parser.add_argument(flag, type=types[option.name], default=option.default, help=option.metadata["help"])
    # With ArgumentDefaultsHelpFormatter a flag would end in "(default: False)"; a default of SUPPRESS says nothing.
    parser.add_argument(
        "--smoke", action="store_true", default=argparse.SUPPRESS, help="run for seconds only: does every step work?"
    )
    options = vars(parser.parse_args(arguments))
    smoke = options.pop("smoke", False)
    try:
        config = Config(**options)
    except ValueError as error:
        parser.error(str(error))
    return config.smoke() if smoke else config
