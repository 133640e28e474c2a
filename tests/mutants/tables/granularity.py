"""Which elements share a scale."""

from functools import partial

from tests.mutants.mutant import Mutant

FILE = "qjax/_granularity.py"
TESTS = "tests/numerics/test_granularity.py"

LOOPS = f"{TESTS}::test_by_loops"
ERRORS = f"{TESTS}::test_what_does_not_fit"

geometry = partial(Mutant, file=FILE, kind="statistic", tests=(LOOPS,))

MUTANTS = (
    geometry(
        name="channel_axes/negative",
        within="channel_axes",
        old="axes = tuple(axis % ndim for axis in granularity.axes)",
        new="axes = tuple(abs(axis) % ndim for axis in granularity.axes)",
        flips="a negative axis counts from the end → its sign is dropped",
    ),
    geometry(
        name="channel_axes/out-of-order",
        within="channel_axes",
        old="if list(axes) != sorted(set(axes)):",
        new="if len(axes) != len(set(axes)):",
        flips="channel axes come in the order in which x has them → in any, and scales are transposed in silence",
        tests=(ERRORS,),
    ),
    geometry(
        name="block_shape/channel-reduced",
        within="block_shape",
        old="tuple(1 if i in axes else size for i, size in enumerate(shape))",
        new="tuple(size if i in axes else 1 for i, size in enumerate(shape))",
        flips="a channel has a scale of its own → each element but the channels has",
    ),
    geometry(
        name="block_shape/token-of-the-first-axis",
        within="block_shape",
        old="(1,) * (len(shape) - 1) + shape[-1:]",
        new="shape[:1] + (1,) * (len(shape) - 1)",
        flips="a token is a vector along the last axis → along the first",
    ),
    geometry(
        name="block_shape/group-axis",
        within="block_shape",
        old="axis = granularity.axis % len(shape)",
        new="axis = abs(granularity.axis) % len(shape)",
        flips="a negative axis counts from the end → its sign is dropped",
        tests=("tests/numerics/test_granularity_axes.py::test_groups",),
    ),
    geometry(
        name="block_shape/block-on-the-first-axes",
        within="block_shape",
        old="(1,) * (len(shape) - len(granularity.shape)) + granularity.shape",
        new="granularity.shape + (1,) * (len(shape) - len(granularity.shape))",
        flips="a block lies on the last axes → on the first",
    ),
    geometry(
        name="block_shape/ragged-taken",
        within="block_shape",
        old="if not granularity.pad:",
        new="if granularity.pad:",
        flips="a block that does not divide an axis is refused unless pad=True → unless pad=False",
        tests=(ERRORS, LOOPS),
    ),
    geometry(
        name="counts/floor",
        within="_counts",
        old="-(-size // part) if part else 1",
        new="size // part if part else 1",
        flips="a shorter block at the end has a scale, too → the axis is cut to whole blocks",
    ),
    geometry(
        name="paired/filled-with-zeros",
        within="_paired",
        old='jnp.pad(x, missing, mode="edge") if fill is None',
        new="jnp.pad(x, missing) if fill is None",
        flips="a shorter block is filled with its last element → with zeros, which widen its range",
    ),
    geometry(
        name="paired/other-fill",
        within="_paired",
        old="constant_values=fill",
        new="constant_values=0",
        flips="a shorter block is filled with what the caller says → with zeros, which are counted",
    ),
    geometry(
        name="paired/filled-at-the-start",
        within="_paired",
        old="missing = [(0, count * part - size)",
        new="missing = [(count * part - size, 0)",
        flips="the last block is the shorter one → the first",
    ),
    geometry(
        name="gather/not-transposed",
        within="gather",
        old="pairs.transpose(order).reshape(*counts, size)",
        new="pairs.reshape(*counts, size)",
        flips="the elements of a block come together → those that follow each other in memory",
    ),
    geometry(
        name="expand/tiled",
        within="expand",
        old="for count in counts for size in (count, 1)]",
        new="for count in counts for size in (1, count)]",
        flips="each scale is repeated for its block → the row of scales is, where it fits at all",
    ),
    geometry(
        name="expand/channel-last",
        within="expand",
        old="values.reshape(tuple(shape[i] if i in axes else 1 for i in range(len(shape))))",
        new="values",
        flips="a channel's scale stands on its axis → on the last axes, as numpy broadcasts",
    ),
)
