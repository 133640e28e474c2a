"""The numbers of a quantization point as plain Python values, to compare with == whatever their shape."""

import numpy as np


def scales(point):
    """Flat; None where not known."""
    return None if point.scale is None else tuple(np.asarray(point.scale).reshape(-1).tolist())


def zeros(point):
    """Zero_points, flat; None where not known."""
    return None if point.zero_point is None else tuple(np.asarray(point.zero_point).reshape(-1).tolist())
