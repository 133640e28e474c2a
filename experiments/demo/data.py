"""The handwritten digits that scikit-learn ships: no download, 1797 images of 8 × 8 pixels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

IMAGE_SHAPE = (8, 8, 1)
CLASSES = 10
_BRIGHTEST = 16.0  # each pixel counts the dark points in a 4 × 4 field of the scan


class Split(NamedTuple):
    """Images and their labels."""

    images: np.ndarray  # float32, (n, 8, 8, 1), in [0, 1]
    labels: np.ndarray  # int32, (n,), 0 to 9


def load(test_fraction: float) -> tuple[Split, Split]:
    """Return the train and the test split: the same for every seed, each digit equally frequent in both.

    Args:
      test_fraction: Share of the images in the test split, between 0 and 1.
    """
    pixels, targets = load_digits(return_X_y=True)
    images = (np.asarray(pixels, np.float32) / np.float32(_BRIGHTEST)).reshape(-1, *IMAGE_SHAPE)
    labels = np.asarray(targets, np.int32)
    train, test = train_test_split(np.arange(len(labels)), test_size=test_fraction, stratify=labels, random_state=0)
    return Split(images[train], labels[train]), Split(images[test], labels[test])


def batches(split: Split, batch_size: int) -> Iterator[Split]:
    """Yield the split in order, in batches of one size: a shorter last batch would compile every step a second time."""
    for start in range(0, len(split.labels) - batch_size + 1, batch_size):
        part = slice(start, start + batch_size)
        yield Split(split.images[part], split.labels[part])


def shuffled_batches(split: Split, batch_size: int, *, epochs: int, seed: int) -> Iterator[Split]:
    """Yield batches for so many epochs, in a new order each epoch; the seed decides the orders."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(split.labels))
        yield from batches(Split(split.images[order], split.labels[order]), batch_size)


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """How many batches an epoch has."""
    steps = len(split.labels) // batch_size
    if steps == 0:
        raise ValueError(f"batch_size is {batch_size}, but there are only {len(split.labels)} training images.")
    return steps
