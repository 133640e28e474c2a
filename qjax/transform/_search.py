"""Where ops are: which calls have to be looked into, and what those that are not hide."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator, Sequence
from typing import Any

from qjax.transform import _elementwise, _jaxpr
from qjax.transform._weights import BY_INDEX, Known, into_bodies, is_lookup, through

SHORT_KIND = {"dot_general": "dot", "conv_general_dilated": "conv", "ragged_dot_general": "ragged_dot"}
KINDS = (*SHORT_KIND.values(), "embedding")
#: Calls of something that is no jaxpr: nothing is known of what they compute.
_OPAQUE = frozenset({"ffi_call", "io_callback", "pallas_call", "pure_callback"})


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is looked for beyond dots, convolutions and embeddings of parameters."""

    kinds: frozenset[str] = frozenset()  # of elementwise ops that are quantized
    derive: bool = False  # whether what is computed from parameters and constants alone is a weight

    def calls_op(self, eqn: Any, inputs: Sequence[Known]) -> bool:
        """Whether a body of the call holds an op; whether a lookup is one depends on what it looks up."""
        bodies = _jaxpr.bodies(eqn)
        if any(_holds(body.jaxpr, SHORT_KIND) for body in bodies):
            return True
        looks_inside = self.kinds and not _elementwise.is_named(eqn)
        if looks_inside and any(_elementwise.holds(body.jaxpr, self.kinds) for body in bodies):
            return True
        if not any(_holds(body.jaxpr, BY_INDEX) for body in bodies):
            return False
        return any(map(self._holds_lookup, bodies, into_bodies(eqn, inputs, 0)))

    def _holds_lookup(self, body: _jaxpr.Body, inputs: Sequence[Known]) -> bool:
        env = dict(zip(body.jaxpr.invars, inputs, strict=True)) | dict.fromkeys(body.jaxpr.constvars, Known(fixed=True))
        for eqn in body.jaxpr.eqns:
            known = [Known(fixed=True) if _jaxpr.is_literal(atom) else env[atom] for atom in eqn.invars]
            if is_lookup(eqn, known) or self.calls_op(eqn, known):
                return True
            env.update(zip(eqn.outvars, through(eqn, known, self.derive), strict=True))
        return False


NOTHING_ELSE = Wanted()


def _holds(jaxpr: Any, names: Container[str]) -> bool:
    return any(
        eqn.primitive.name in names or any(_holds(body.jaxpr, names) for body in _jaxpr.bodies(eqn))
        for eqn in jaxpr.eqns
    )


def left_alone(eqn: Any) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """What an equation that is not rewritten hides: parts of a name, kind, and why it is left in float."""
    name = eqn.primitive.name
    if name in _OPAQUE:
        yield (name,), name, "an opaque call: what it computes is not known"
        return
    for inner in _jaxpr.inner_jaxprs(eqn):
        for inner_eqn in inner.eqns:
            if inner_eqn.primitive.name in SHORT_KIND:
                kind = SHORT_KIND[inner_eqn.primitive.name]
                yield (name, kind), kind, f"inside {name}, which is not rewritten"
            else:
                for parts, kind, why in left_alone(inner_eqn):
                    yield (name, *parts), kind, why
