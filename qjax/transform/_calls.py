"""Calls whose bodies hold ops, called again with quantized bodies: states go in and come out as operands, so nothing leaks.

The state of an op is sliced by the scans that have a layer for each step, and carried through all other loops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from qjax._quantize import QTensor
from qjax.transform import _jaxpr
from qjax.transform._trace import Graph, Node
from qjax.transform._values import ABSENT, Value, to_real

States = Mapping[str, Any]


class Outcome(NamedTuple):
    """What evaluating a body gave; results may be structured values, the rest are pytrees of arrays."""

    results: list[Value]
    updates: dict[str, Any]  # what quantizers know now that they have observed, by quantizer
    codes: dict[str, QTensor]  # the codes at each quantizer, where they are wanted


Run = Callable[[Graph, Sequence[Value], States], Outcome]


def evaluate(
    node: Node, values: Sequence[Value], states: States, run: Run, *, moving: Container[str], keeps_codes: bool
) -> Outcome:
    """Evaluate a call.

    Args:
      node: The call.
      values: Its operands.
      states: What the quantizers of its ops know, by quantizer, laid out as in `QuantVars`.
      run: Evaluates a body on operands and states.
      moving: The quantizers whose states are updated. All other states are constants, through which gradients flow.
      keeps_codes: Whether `run` gives codes, so that a body which does not run needs something in their place.
    """
    kind = _jaxpr.call_kind(node.eqn)
    with _jaxpr.context(node.eqn):
        match kind:
            case "scan":
                return _scan(node, values, states, run, moving)
            case "shard_map":
                return _shard_map(node, values, states, run, moving)
            case "cond":
                return _cond(node, values, states, run, moving, keeps_codes)
            case "while":
                return _while(node, values, states, run, moving, keeps_codes)
            case "custom_jvp":
                return _custom_jvp(node, values, states, run)
            case "custom_vjp":
                return _custom_vjp(node, values, states, run)
        assert kind == "remat"
        call = _jaxpr.rematerialize(node.eqn, lambda values, states: tuple(run(node.bodies[0], values, states)))
        return Outcome(*call(list(values), dict(states)))


def op_of(quantizer: str) -> str:
    """The op of a quantizer: `"Dense_0"` of `"Dense_0/input"`."""
    return quantizer.rpartition("/")[0]


def split_states(node: Node, states: States) -> tuple[dict[str, Any], dict[str, Any]]:
    """The states that there is one of for each step of a scan, and those that all steps share."""
    per_step = {key: state for key, state in states.items() if op_of(key) in node.per_step}
    return per_step, {key: state for key, state in states.items() if key not in per_step}


def hide_absent(values: Sequence[Value]) -> tuple[list[Value], Callable[[Sequence[Value]], list[Value]]]:
    """The values that are there, and a function that puts those that are not back in between."""
    absent = [value is ABSENT for value in values]

    def restore(present: Sequence[Value]) -> list[Value]:
        rest = iter(present)
        return [ABSENT if missing else next(rest) for missing in absent]

    return [value for value in values if value is not ABSENT], restore


def _updated(states: States, outcome: Outcome, moving: Container[str]) -> dict[str, Any]:
    return {key: outcome.updates.get(key, state) for key, state in states.items() if key in moving}


def _reals(outcome: Outcome) -> list[Value]:
    return [to_real(result) for result in outcome.results]


def _scan(node: Node, values: Sequence[Value], states: States, run: Run, moving: Container[str]) -> Outcome:
    parts = _jaxpr.scan(node.eqn)
    consts, rest = values[: parts.consts], [to_real(value) for value in values[parts.consts :]]
    init, restore_carries = hide_absent(rest[: parts.carries])
    sliced, restore_slices = hide_absent(rest[parts.carries :])
    per_step, shared = split_states(node, states)
    fixed = {key: state for key, state in shared.items() if key not in moving}
    restore_stacked: list[Callable[[Sequence[Value]], list[Value]]] = []

    def step(carry: Any, slices: Any) -> Any:
        carries, carried = carry
        slices, own = slices
        operands = [*consts, *restore_carries(carries), *restore_slices(slices)]
        # What is not updated is closed over, not carried: it stays a constant of the loop.
        outcome = run(node.bodies[0], operands, {**fixed, **carried, **own})
        results = _reals(outcome)
        present, _ = hide_absent(results[: parts.carries])
        stacked, restore = hide_absent(results[parts.carries :])
        restore_stacked.append(restore)
        return (present, _updated(carried, outcome, moving)), (stacked, _updated(own, outcome, moving), outcome.codes)

    (carries, carried), (stacked, own, codes) = lax.scan(
        step,
        (init, {key: state for key, state in shared.items() if key in moving}),
        (sliced, per_step),
        length=parts.length,
        reverse=parts.reverse,
        unroll=parts.unroll,
    )
    for key in [key for key in codes if key.endswith("/weight") and op_of(key) not in node.per_step]:
        codes[key] = jax.tree.map(first_slice, codes[key])  # all steps have the same
    return Outcome([*restore_carries(carries), *restore_stacked[-1](stacked)], {**carried, **own}, codes)


def _shard_map(node: Node, values: Sequence[Value], states: States, run: Run, moving: Container[str]) -> Outcome:
    """States are whole on every shard, before and after; codes are stacked by shard."""
    parts = _jaxpr.shard_map(node.eqn)
    present, restore = hide_absent([to_real(value) for value in values])
    specs = [spec for spec, value in zip(parts.in_specs, values, strict=True) if value is not ABSENT]

    def call(present: list[Any], states: States) -> Any:
        outcome = run(node.bodies[0], restore(present), states)
        codes = jax.tree.map(lambda leaf: leaf[None], outcome.codes)
        return _reals(outcome), _updated(states, outcome, moving), codes

    whole, stacked = PartitionSpec(), PartitionSpec(parts.axes)
    mapped = jax.shard_map(
        call,
        mesh=parts.mesh,
        in_specs=(specs, whole),
        out_specs=(list(parts.out_specs), whole, stacked),
        axis_names=set(parts.axes),
        check_vma=parts.check_vma,
    )
    return Outcome(*mapped(present, dict(states)))


def first_slice(stacked: jax.Array) -> jax.Array:
    """What the first step of a scan sees; of a scan without steps, zeros of that shape."""
    return stacked[0] if stacked.shape[0] else jnp.zeros(stacked.shape[1:], stacked.dtype)


def _cond(
    node: Node, values: Sequence[Value], states: States, run: Run, moving: Container[str], keeps_codes: bool
) -> Outcome:
    """Every branch gives out the states of all branches; only those of its own ops are new."""
    called = list(node.calls(values))

    def everything(body: Graph, operands: Sequence[Value]) -> Outcome:
        outcome = run(body, operands, states)
        return Outcome(_reals(outcome), _updated(states, outcome, moving), outcome.codes)

    empty = _no_codes([lambda call=call: everything(*call).codes for call in called]) if keeps_codes else {}

    def branch(body: Graph, operands: Sequence[Value]) -> Callable[[], tuple[Any, ...]]:
        def call() -> tuple[Any, ...]:
            outcome = everything(body, operands)
            return outcome.results, outcome.updates, {**empty, **outcome.codes}

        return call

    return Outcome(*lax.switch(to_real(values[0]), [branch(*call) for call in called]))


def _while(
    node: Node, values: Sequence[Value], states: States, run: Run, moving: Container[str], keeps_codes: bool
) -> Outcome:
    """States are loop variables. A condition that holds ops is evaluated in the body, since it could not hand any out."""
    carried = _jaxpr.loop_operands(node.eqn)[0]
    init, restore = hide_absent([to_real(values[operand]) for operand in carried])
    observed = {key: state for key, state in states.items() if key in moving}

    def call(which: int, carries: Sequence[Value], states: States) -> Outcome:
        operands = list(values)
        operands[carried.start : carried.stop] = restore(carries)
        body, inputs = list(node.calls(operands))[which]
        outcome = run(body, inputs, states)
        return Outcome(_reals(outcome), _updated(states, outcome, moving), outcome.codes)

    condition, body = functools.partial(call, 0), functools.partial(call, 1)
    empty = _no_codes([lambda each=each: each(init, states).codes for each in (condition, body)]) if keeps_codes else {}

    def step(carries: Sequence[Value], current: States, codes: dict[str, QTensor]) -> Outcome:
        outcome = body(carries, {**states, **current})
        present, _ = hide_absent(outcome.results)
        return Outcome(present, outcome.updates, {**codes, **outcome.codes})

    start = Outcome(init, observed, empty)
    if next(node.bodies[0].ops(), None) is None:  # the usual case, and a condition that XLA may know
        loop = lax.while_loop(lambda loop: condition(loop.results, {}).results[0], lambda loop: step(*loop), start)
        return Outcome(restore(loop.results), loop.updates, loop.codes)

    def check(outcome: Outcome) -> tuple[Any, Any]:
        checked = condition(outcome.results, {**states, **outcome.updates})
        return Outcome(outcome.results, checked.updates, {**outcome.codes, **checked.codes}), checked.results[0]

    loop, _ = lax.while_loop(lambda loop: loop[1], lambda loop: check(step(*loop[0])), check(start))
    return Outcome(restore(loop.results), loop.updates, loop.codes)


def _no_codes(calls: Sequence[Callable[[], dict[str, QTensor]]]) -> dict[str, QTensor]:
    """Zeros for the codes that the calls give, scales included: what stands for those of a body that did not run."""
    shapes: dict[str, Any] = {}
    for call in calls:
        shapes |= jax.eval_shape(call)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _custom_jvp(node: Node, values: Sequence[Value], states: States, run: Run) -> Outcome:
    """The value is the quantized one; the derivative is the rule that the function's author gave, on its float operands."""

    @jax.custom_jvp
    def call(values: list[Any], states: States) -> Any:
        outcome = run(node.bodies[0], values, states)
        return _reals(outcome), outcome.updates, outcome.codes

    @call.defjvp
    def rule(primals: Any, tangents: Any) -> Any:
        out = call(*primals)
        _, outer = jax.jvp(lambda *operands: _jaxpr.bind(node.eqn, operands), tuple(primals[0]), tuple(tangents[0]))
        return out, (outer, *jax.tree.map(_zero_tangent, out[1:]))

    return Outcome(*call([to_real(value) for value in values], dict(states)))


def _custom_vjp(node: Node, values: Sequence[Value], states: States, run: Run) -> Outcome:
    """As for custom_jvp: the author's rule, with the residuals that it keeps of the float operands."""

    @jax.custom_vjp
    def call(values: list[Any], states: States) -> Any:
        outcome = run(node.bodies[0], values, states)
        return _reals(outcome), outcome.updates, outcome.codes

    def forward(values: list[Any], states: States) -> Any:
        _, pullback = jax.vjp(lambda *operands: _jaxpr.bind(node.eqn, operands), *values)
        return call(values, states), pullback

    def backward(pullback: Any, cotangents: Any) -> Any:
        return list(pullback(cotangents[0])), None  # no gradient flows into a state

    call.defvjp(forward, backward)
    return Outcome(*call([to_real(value) for value in values], dict(states)))


def _zero_tangent(value: Any) -> Any:
    return jnp.zeros(value.shape, jax.dtypes.float0 if not jnp.issubdtype(value.dtype, jnp.floating) else value.dtype)
