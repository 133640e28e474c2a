"""Observers of a graph that torch.export traced (PT2E): `activation_post_process_0` and so on, whatever they observe.

Which value an observer watches is in the graph alone. But an observer of a weight has that weight's own minimum and maximum,
so the file tells which one it is.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import numpy as np

from qjax._formats import int8, uint8
from qjax._granularity import PerChannel
from qjax._spec import QuantSpec
from qjax.interop._dialects.protocol import Assumptions, Contents, split
from qjax.interop._dialects.statistics import Statistics
from qjax.interop._points import Origin, QuantPoint

_OBSERVER = re.compile(r"activation_post_process_\d+")
_EPS = 2.0**-12  # of the quantizers' observers, but under QAT
_WHY = "the file holds no dtype; it is that of torchao's X86InductorQuantizer by default"


class ObservedGraph:
    """The weights that the observers of a graph watch; of a file that is no such graph, none."""

    def __init__(self, contents: Contents) -> None:
        self._weights: dict[bytes, str] = {}
        ranges = list(_ranges(contents))
        if ranges:
            for key, value in contents.tensors.items():
                if isinstance(value, np.ndarray) and value.dtype == np.float32 and value.ndim > 1 and value.size:
                    axes = tuple(range(1, value.ndim))
                    self._weights.setdefault(_key(np.min(value, axis=axes), np.max(value, axis=axes)), key)
                    self._weights.setdefault(_key(np.min(value), np.max(value)), key)
        self._observes_weights = any(low.ndim == 1 or _key(low, high) in self._weights for low, high in ranges)
        # FX graph mode observes weights so, too, where they are those of functions. It has no guards, and another eps.
        self._beside_nodes = any(_OBSERVER.fullmatch(split(key)[0]) for key in contents.tensors)
        self._exported = "_guards_fn" in contents.metadata or _EPS in _smallest_scales(contents)

    @property
    def functional(self) -> bool:
        """Whether the observers are those of FX graph mode, which observes the weights of modules in `convert` alone."""
        return self._beside_nodes and not self._exported

    def weight(self, observer: str, stats: Statistics | None) -> str | None:
        """The key of the weight that an observer of the graph watches; None where it watches something else."""
        if stats is None or stats.histogram is not None or not self.has(observer):
            return None
        return self._weights.get(_key(stats.min_val, stats.max_val))

    def assume(self, observer: str, assume: Assumptions) -> Assumptions:
        """What to assume of an observer: the quantizer's default where it is one of a graph's."""
        if not (self._exported and self.has(observer)):
            return assume
        return dataclasses.replace(
            assume,
            activation=assume.activation or QuantSpec(uint8),
            weight=assume.weight or QuantSpec(int8, symmetric=True, granularity=PerChannel(0)),
        )

    def has(self, observer: str) -> bool:
        """Whether an observer is one of a graph in which weights are observed, too."""
        return self._observes_weights and _OBSERVER.fullmatch(observer) is not None

    def named(self, point: QuantPoint, observer: str, stats: Statistics | None, asked: QuantSpec | None) -> QuantPoint:
        """The point with the name of the weight that it is of, and the dtype that such graphs compute in."""
        if not self.has(observer):
            return point
        key = self.weight(observer, stats)
        if key is not None:
            point = dataclasses.replace(point, op=split(key)[0], role="weight", tensor=key)
        if not self._exported:
            return point
        if asked is None and point.codes_from.kind == "assumed":
            point = dataclasses.replace(point, codes_from=Origin("assumed", _WHY))
        return dataclasses.replace(point, dtype=point.dtype and point.dtype.removeprefix("q"))


def _smallest_scales(contents: Contents) -> set[float]:
    """The eps of the observers of the graph."""
    found: set[float] = set()
    for key, value in contents.tensors.items():
        observer, last = split(key)
        if last != "eps" or not _OBSERVER.fullmatch(observer) or not isinstance(value, np.ndarray):
            continue
        if value.dtype == np.float32 and value.size == 1:
            found.add(value.item())
    return found


def _ranges(contents: Contents) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What the observers of the graph saw, by themselves or within a fake-quantization."""
    for key, low in contents.tensors.items():
        observer, last = split(key)
        if last != "min_val" or not _OBSERVER.fullmatch(observer.removesuffix(".activation_post_process")):
            continue
        high = contents.tensors.get(f"{observer}.max_val")
        if (
            f"{observer}.histogram" in contents.tensors
            or not isinstance(low, np.ndarray)
            or not isinstance(high, np.ndarray)
        ):
            continue
        if low.shape == high.shape and low.ndim < 2 and low.dtype == high.dtype == np.float32:
            yield low, high


def _key(low: np.ndarray, high: np.ndarray) -> bytes:
    """One range, or one for each channel, as a key; both zeros are one."""
    return (np.stack([low, high]).astype(np.float32) + np.float32(0)).tobytes()
