"""Observers: the statistics from which qparams are chosen. Pure `init / update / merge / qparams`; one file each."""

from qjax.observers._base import Observer
from qjax.observers._min_max import Dynamic, MinMax, MinMaxState, dynamic, min_max
from qjax.observers._moving_average import MovingAverageMinMax, MovingAverageState, moving_average_min_max

__all__ = [
    "Dynamic",
    "MinMax",
    "MinMaxState",
    "MovingAverageMinMax",
    "MovingAverageState",
    "Observer",
    "dynamic",
    "min_max",
    "moving_average_min_max",
]
