"""Observers: the statistics from which qparams are chosen. Pure `init / update / merge / qparams`; one file each.

| observer               | range                                                  | merge       |
|------------------------|--------------------------------------------------------|-------------|
| min_max                | smallest and largest value ever seen                   | exact       |
| dynamic                | of the tensor at hand                                  | exact       |
| moving_average_min_max | exponential moving average of each batch's             | approximate |
| fused_moving_average   | the same, with the qparams of PyTorch's fused kernel   | approximate |
| histogram              | PyTorch's HistogramObserver                            | approximate |
| percentile             | holds a share of all values                            | exact       |
| mse                    | of least squared error                                 | exact       |
| entropy                | of least KL divergence, as TensorRT's                  | exact       |
| fixed                  | known beforehand                                       | exact       |

All work per tensor, channel, group, block and token, but for histogram, which is per tensor. Those that count (percentile,
mse, entropy) keep a histogram for each statistic: thousands of tokens cost megabytes.
"""

from qjax.observers._base import Observer
from qjax.observers._counts import CountState
from qjax.observers._entropy import Entropy, entropy
from qjax.observers._fixed import Fixed, FixedState, fixed
from qjax.observers._min_max import Dynamic, MinMax, MinMaxState, dynamic, min_max
from qjax.observers._moving_average import (
    FusedMovingAverage,
    MovingAverageMinMax,
    MovingAverageState,
    fused_moving_average,
    moving_average_min_max,
)
from qjax.observers._mse import MSE, mse
from qjax.observers._percentile import Percentile, percentile
from qjax.observers._torch_histogram import Histogram, HistogramState, histogram

__all__ = [
    "MSE",
    "CountState",
    "Dynamic",
    "Entropy",
    "Fixed",
    "FixedState",
    "FusedMovingAverage",
    "Histogram",
    "HistogramState",
    "MinMax",
    "MinMaxState",
    "MovingAverageMinMax",
    "MovingAverageState",
    "Observer",
    "Percentile",
    "dynamic",
    "entropy",
    "fixed",
    "fused_moving_average",
    "histogram",
    "min_max",
    "moving_average_min_max",
    "mse",
    "percentile",
]
