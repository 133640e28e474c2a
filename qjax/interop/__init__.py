"""What the arrays of a checkpoint mean, without torch: read, explained and written."""

from qjax.interop._checkpoint import Checkpoint, load, save
from qjax.interop._dialects import points
from qjax.interop._eager_static import Conv2d, Linear, eager_static
from qjax.interop._explain import Explanation, Point, explain
from qjax.interop._points import Origin, PointTable, QuantPoint

__all__ = [
    "Checkpoint",
    "Conv2d",
    "Explanation",
    "Linear",
    "Origin",
    "Point",
    "PointTable",
    "QuantPoint",
    "eager_static",
    "explain",
    "load",
    "points",
    "save",
]
