"""Hypothesis draws recipes: any format, granularity, convention, observer and role that can be combined."""

import dataclasses
import inspect
from typing import get_args

from hypothesis import assume
from hypothesis import strategies as st

import qjax
from qjax import observers
from qjax._conventions import Convention, Mask, ScaleRule
from qjax._rounding import ROUNDINGS
from qjax.estimators import lsq

PRESETS = (
    *(qjax.int16, qjax.uint16, qjax.int8, qjax.uint8, qjax.int4, qjax.uint4, qjax.int2, qjax.uint2, qjax.ternary),
    *(
        qjax.binary,
        qjax.nf4,
        qjax.e4m3,
        qjax.e5m2,
        qjax.e3m2,
        qjax.e2m3,
        qjax.e2m1,
        qjax.e8m0,
        qjax.e4m3fnuz,
        qjax.e5m2fnuz,
    ),
)
FORMATS = (
    *PRESETS,
    qjax.Int(1),
    qjax.Int(7, signed=False),
    qjax.Int(8, narrow=True),
    qjax.Float(5, 10, bias=12),
    qjax.Float(4, 3, special="fn", signed=False, saturate=False),
    qjax.Codebook((-1.5, 0.1, 1 / 3)),
    qjax.Codebook((-1.0, 2.0), name="[bold]two\n", ties="upper"),
)
GRANULARITIES = (
    qjax.PerTensor(),
    qjax.PerToken(),
    qjax.PerChannel(-1),
    qjax.PerChannel((0, 2)),
    qjax.PerChannel("output"),
    qjax.PerGroup(0, 32),
    qjax.PerGroup("contracted", 128, pad=True),
    qjax.PerBlock((16, 16)),
    qjax.PerBlock((3,), pad=True),
)
EPS = st.none() | st.floats(2.0**-126, 1e30) | st.sampled_from([2.0**-12, 1])


@st.composite
def specs(draw):
    """A valid spec."""
    fields = {
        "symmetric": draw(st.booleans()),
        "granularity": draw(st.sampled_from(GRANULARITIES)),
        "convention": draw(st.sampled_from(get_args(Convention))),
        "reduce_range": draw(st.sampled_from([False, False, True])),
        "eps": draw(EPS),
        "scale_rule": draw(st.sampled_from([None, None, None, *get_args(ScaleRule)])),
        "rounding": draw(st.sampled_from(["nearest_even", *ROUNDINGS])),
        "mask": draw(st.sampled_from([None, *get_args(Mask)])),
        "float_zero_point": draw(st.sampled_from([False, False, True])),
    }
    try:
        return qjax.QuantSpec(draw(st.sampled_from(FORMATS)), **fields)
    except ValueError:  # fields that contradict each other
        assume(False)
        raise


def observers_of(name, spec):
    """Some observers that a public function makes, with its defaults and with other values of its fields."""
    function = getattr(observers, name)
    if name == "fixed":  # it has no defaults that go together
        return [function(spec, scale=0.5, zero_point=0), function(spec, min_val=-1.0, max_val=2.5)]
    made = [function(spec)]
    for field in inspect.signature(function).parameters.values():
        if field.name != "spec" and isinstance(field.default, int | float):
            made.append(
                function(spec, **{field.name: 0.75 * field.default if isinstance(field.default, float) else 1024})
            )
    assert all(dataclasses.is_dataclass(observer) for observer in made)
    return made


def estimators_of(spec):
    """LSQ with its defaults and with other values of its fields."""
    return [lsq(spec), lsq(spec, gradient_scale="lsq_net", init_scale="max"), lsq(spec, batch_axes=(0, -2))]


@st.composite
def roles(draw):
    """A spec, an observer, an estimator or None; of observers that take any spec."""
    spec = draw(specs())
    kind = draw(st.sampled_from(["none", "spec", "min_max", "dynamic", "moving_average_min_max", "lsq"]))
    if kind in ("none", "spec"):
        return None if kind == "none" else spec
    if kind == "lsq":
        try:
            return draw(st.sampled_from(estimators_of(spec)))
        except ValueError:  # a spec without a scale that could be learned
            return spec
    return draw(st.sampled_from(observers_of(kind, spec)))


@st.composite
def rules(draw):
    """A valid rule."""
    named = ("output", "contracted")
    output = draw(roles())
    spec = output if isinstance(output, qjax.QuantSpec | None) else output.spec
    assume(spec is None or getattr(spec.granularity, "axis", None) not in named)
    return qjax.Rule(
        draw(st.sampled_from([".*", "Dense_[0-9]+", r"a/b|\w+…", "block\n(1|2)"])),
        kind=draw(st.sampled_from([None, "dot", "conv", ("dot", "embedding")])),
        weight=draw(roles()),
        input=draw(roles()),
        lhs=draw(st.just("input") | roles()),
        rhs=draw(st.just("input") | roles()),
        output=output,
        tied=draw(st.booleans()),
    )


def recipes():
    """Recipes of up to three rules."""
    return st.lists(rules(), max_size=3).map(qjax.Recipe)
