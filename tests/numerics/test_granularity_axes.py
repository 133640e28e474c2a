"""Groups and channels on every axis, counted from either end: hypothesis seldom draws a negative axis and a real group."""

import pytest

import qjax
from tests.numerics.test_granularity import check

SHAPE = (2, 3, 5)


@pytest.mark.parametrize("axis", range(-3, 3))
def test_groups(axis, rng):
    check(SHAPE, qjax.PerGroup(axis, 2, pad=True), rng)


@pytest.mark.parametrize("axis", range(-3, 3))
def test_channels(axis, rng):
    check(SHAPE, qjax.PerChannel(axis), rng)
