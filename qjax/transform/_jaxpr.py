"""The only file that touches the parameters of jaxprs, which change between JAX versions. All else speaks its words.

Checked on jax 0.10 (sub-jaxprs are closed) and 0.12 (closed and open jaxprs are one type).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.extend.core

from qjax.transform._contraction import Contraction, Conv, Dot

try:  # what JAX's own evaluator uses to keep names in profiles and error messages; not public
    from jax._src import source_info_util
except ImportError:  # a JAX that has moved it loses those names and nothing else
    source_info_util = None

Eqn = Any
Jaxpr = Any

_JIT = frozenset({"jit", "pjit", "closed_call", "core_call"})
_REMAT = frozenset({"remat2", "remat", "checkpoint"})
_CUSTOM_JVP = frozenset({"custom_jvp_call"})


def trace(fn: Callable[..., Any], *args: Any) -> tuple[Jaxpr, list[Any], Any]:
    """Trace fn to `(jaxpr, constants, output tree)`.

    A fresh function each time, so that nothing is taken from JAX's caches of traces, or left there.
    """
    closed, shape = jax.make_jaxpr(lambda *a: fn(*a), return_shape=True)(*args)
    jaxpr, consts = open_jaxpr(closed)
    return jaxpr, consts, jax.tree.structure(shape)


def open_jaxpr(jaxpr: Jaxpr) -> tuple[Jaxpr, list[Any]]:
    """The jaxpr and its constants, from a closed or an open one."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))


def is_literal(atom: Any) -> bool:
    """Whether an operand is a constant written into the jaxpr."""
    return isinstance(atom, jax.extend.core.Literal)


def is_jit(eqn: Eqn) -> bool:
    """Whether the equation calls its body as it is."""
    return eqn.primitive.name in _JIT


def is_remat(eqn: Eqn) -> bool:
    """Whether the equation calls its body and recomputes it in the backward pass."""
    return eqn.primitive.name in _REMAT


def is_custom_jvp(eqn: Eqn) -> bool:
    """Whether the equation calls its body and has a derivative rule of its own."""
    return eqn.primitive.name in _CUSTOM_JVP


def body(eqn: Eqn) -> tuple[Jaxpr, list[Any]] | None:
    """The one jaxpr that a jit, remat or custom_jvp equation calls on its operands; None for other equations."""
    if is_jit(eqn) or is_remat(eqn):
        return open_jaxpr(eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"])
    if is_custom_jvp(eqn):
        return open_jaxpr(eqn.params["call_jaxpr"])
    return None


def inner_jaxprs(eqn: Eqn) -> Iterator[Jaxpr]:
    """Every jaxpr in the parameters of an equation, whatever the equation is."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            inner = open_jaxpr(item)[0]
            if hasattr(inner, "eqns"):
                yield inner


def rematerialize(eqn: Eqn, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap fn as the remat equation wraps its body."""
    return jax.checkpoint(fn, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])


def name_stack(eqn: Eqn) -> str:
    """The scopes that the equation was traced in, such as Linen's module path; empty where there are none."""
    return str(eqn.source_info.name_stack)


def contraction(eqn: Eqn) -> Contraction | None:
    """The dot or convolution that the equation is; None where it is neither."""
    params = eqn.params
    if eqn.primitive.name == "dot_general":
        contracting, batch = params["dimension_numbers"]
        return Dot((tuple(contracting[0]), tuple(contracting[1])), (tuple(batch[0]), tuple(batch[1])))
    if eqn.primitive.name == "conv_general_dilated":
        return Conv(
            tuple(params["window_strides"]),
            tuple((int(low), int(high)) for low, high in params["padding"]),
            tuple(params["lhs_dilation"]),
            tuple(params["rhs_dilation"]),
            params["dimension_numbers"],
            params["feature_group_count"],
            params["batch_group_count"],
        )
    return None


def pooled_axes(eqn: Eqn, ndim: int) -> tuple[int, ...] | None:
    """The axes over which the equation takes a maximum; None where it does not take one."""
    if eqn.primitive.name == "reduce_window_max":
        params = eqn.params
        window = zip(
            params["window_dimensions"],
            params["window_strides"],
            params["padding"],
            params["base_dilation"],
            strict=True,
        )
        return tuple(i for i, geometry in enumerate(window) if geometry != (1, 1, (0, 0), 1))
    if eqn.primitive.name == "reduce_max":
        return tuple(eqn.params["axes"])
    del ndim
    return None


def removes_axes(eqn: Eqn) -> bool:
    """Whether the rank of the output is below that of the input, for an equation with pooled axes."""
    return eqn.primitive.name == "reduce_max"


def broadcast_dimensions(eqn: Eqn) -> tuple[int, ...] | None:
    """Which output axis each input axis of a broadcast becomes; None for other equations."""
    if eqn.primitive.name == "broadcast_in_dim":
        return tuple(eqn.params["broadcast_dimensions"])
    return None


def new_dtype(eqn: Eqn) -> Any:
    """The dtype that a conversion converts to; None for other equations."""
    return eqn.params["new_dtype"] if eqn.primitive.name == "convert_element_type" else None


def bind(eqn: Eqn, operands: Sequence[Any]) -> list[Any]:
    """Evaluate the equation on other operands, under its own context and name stack."""
    with contextlib.ExitStack() as stack:
        if source_info_util is not None:
            names = source_info_util.current_name_stack() + eqn.source_info.name_stack
            stack.enter_context(source_info_util.user_context(eqn.source_info.traceback, name_stack=names))
        stack.enter_context(eqn.ctx.manager)
        out = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]
