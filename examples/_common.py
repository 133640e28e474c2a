"""What the examples share: two small sets of data that need no download, a loss, and how results are printed."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

CONTEXT = 32  # characters that the language models see


class Result(NamedTuple):
    """What an example found out."""

    losses: list[float]  # at each step of training
    float: float  # the trained weights in the float model; accuracy in %, or loss in nats a character
    quantized: float  # in mode "eval"
    integer: float  # the integer program
    differ: int  # outputs in which the integer program differs from mode "eval"

    def show(self, what: str) -> "Result":
        """Print the result and return it."""
        print(f"loss in training   {np.mean(self.losses[:5]):.2f} -> {np.mean(self.losses[-5:]):.2f}")
        for name in ("float", "quantized", "integer"):
            print(f"{name:<10}{what:>8}   {getattr(self, name):.3f}")
        return self


def compare(
    what: str,
    measure: Callable[[jax.Array, np.ndarray], Any],
    target: np.ndarray,
    losses: list[float],
    logits: jax.Array,
    quantized: jax.Array,
    integer: jax.Array,
) -> Result:
    """Print and return what the float model, mode "eval" and the integer program make of the same test data."""
    measured = (float(measure(each, target)) for each in (logits, quantized, integer))
    return Result(losses, *measured, int(np.sum(quantized != integer))).show(what)


def digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """The 1797 handwritten digits inside scikit-learn: (images, labels) to train, and to test. Images are (n, 8, 8)."""
    pixels, labels = load_digits(return_X_y=True)
    images = (np.asarray(pixels) / 16).astype(np.float32).reshape(-1, 8, 8)
    labels = np.asarray(labels, np.int32)
    return (images[:1297], labels[:1297]), (images[1297:], labels[1297:])


def text() -> tuple[np.ndarray, np.ndarray, int]:
    """Windows of CONTEXT + 1 characters of this repository's own pages, as numbers: to train, to test; and how many kinds."""
    root = Path(__file__).parents[1]
    pages = "".join((root / page).read_text(encoding="utf-8") for page in ("README.md", "CONTRIBUTING.md"))
    alphabet, tokens = np.unique(np.array(list(pages)), return_inverse=True)
    windows = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.int32), CONTEXT + 1)
    split = len(windows) * 9 // 10
    return windows[:split], windows[split::CONTEXT], len(alphabet)


def batches(*arrays: np.ndarray, size: int, steps: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield random batches, the same in every run."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.integers(0, len(arrays[0]), size)
        yield tuple(array[rows] for array in arrays)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross-entropy in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(logits: jax.Array, labels: np.ndarray) -> float:
    """The share of right answers in %."""
    return 100 * float(jnp.mean(logits.argmax(axis=-1) == labels))
