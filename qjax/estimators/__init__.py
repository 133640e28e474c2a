"""How a gradient crosses a rounding, and what is learned of it. One file an estimator; docs/learned_quantizers.md trains one.

| estimator        | learns | gradient                                                            |
|------------------|--------|---------------------------------------------------------------------|
| straight_through | -      | that of x where the mask is true: what specs and observers have     |
| lsq              | scale  | the same, and that of the scale                                     |
"""

from qjax.estimators._base import Estimator, EstimatorVars, Rounded
from qjax.estimators._lsq import LSQ, LSQState, lsq, lsq_fake_quantize
from qjax.estimators._straight_through import straight_through

__all__ = [
    "LSQ",
    "Estimator",
    "EstimatorVars",
    "LSQState",
    "Rounded",
    "lsq",
    "lsq_fake_quantize",
    "straight_through",
]
