"""How a gradient crosses a rounding. One file an estimator."""

from qjax.estimators._straight_through import straight_through

__all__ = ["straight_through"]
