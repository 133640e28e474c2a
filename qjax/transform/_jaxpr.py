"""The only file that touches the parameters of jaxprs, which change between JAX versions. All else speaks its words.

Checked on jax 0.10 (sub-jaxprs are closed) and 0.12 (closed and open jaxprs are one type).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core

from qjax.transform._contraction import Contraction, Conv, Dot, RaggedDot
from qjax.transform._lookup import Lookup

try:  # what JAX's own evaluator uses to keep names in profiles and error messages; not public
    from jax._src import source_info_util
except ImportError:  # a JAX that has moved it loses those names and nothing else
    source_info_util = None

Eqn = Any
Jaxpr = Any

_JIT = frozenset({"jit", "pjit", "closed_call", "core_call"})
_REMAT = frozenset({"remat2", "remat", "checkpoint"})
_KINDS = {
    "custom_jvp_call": "custom_jvp",
    "custom_vjp_call": "custom_vjp",
    "shard_map": "shard_map",
    "scan": "scan",
    "cond": "cond",
    "while": "while",
}


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


def call_name(eqn: Eqn) -> str | None:
    """What the function is called that a jit or custom_jvp equation calls; None for others."""
    name = eqn.params.get("name") if call_kind(eqn) in ("jit", "custom_jvp") else None
    return name if isinstance(name, str) else None


def is_remat(eqn: Eqn) -> bool:
    """Whether the equation calls its body and recomputes it in the backward pass."""
    return eqn.primitive.name in _REMAT


def call_kind(eqn: Eqn) -> str | None:
    """Which call the equation is: jit, remat, custom_jvp, custom_vjp, scan, cond, while, shard_map; None for any other."""
    if is_jit(eqn):
        return "jit"
    return "remat" if is_remat(eqn) else _KINDS.get(eqn.primitive.name)


class ShardMap(NamedTuple):
    """A `shard_map` without its body."""

    mesh: Any
    in_specs: tuple[Any, ...]  # of each operand
    out_specs: tuple[Any, ...]
    axes: tuple[str, ...]  # of the mesh, that it maps over
    check_vma: bool

    @property
    def sharded(self) -> frozenset[int]:
        """The operands of which each shard has a part."""
        return frozenset(i for i, spec in enumerate(self.in_specs) if any(axis is not None for axis in spec))


def shard_map(eqn: Eqn) -> ShardMap:
    """What a shard_map equation is."""
    params = eqn.params
    axes = tuple(axis for axis in params["mesh"].axis_names if axis in params["newly_manual_axes"])
    return ShardMap(params["mesh"], tuple(params["in_specs"]), tuple(params["out_specs"]), axes, params["check_vma"])


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes along which a value varies, as its type says inside a shard_map that checks types."""
    kind = jax.typeof(x)
    of_jax_0_10 = getattr(kind, "manual_axis_type", None)
    return frozenset(getattr(kind, "vma", ()) if of_jax_0_10 is None else of_jax_0_10.varying)


class Body(NamedTuple):
    """A jaxpr that an equation calls."""

    jaxpr: Jaxpr
    consts: list[Any]
    operands: tuple[int, ...]  # which operands of the equation the inputs are; a scan's are sliced


class Scan(NamedTuple):
    """A scan without its body; its operands are constants, carries and what is sliced, in this order."""

    consts: int
    carries: int
    length: int
    reverse: bool
    unroll: int | bool


def scan(eqn: Eqn) -> Scan:
    """What a scan equation is."""
    params = eqn.params
    if "num_carry" in params:
        consts, carries = params["num_consts"], params["num_carry"]
    else:  # JAX 0.12
        consts, carries = (len(group) for group in params["ft_in"].unpack()[:2])
    return Scan(consts, carries, params["length"], params["reverse"], params["unroll"])


def bodies(eqn: Eqn) -> list[Body]:
    """The jaxprs that a call runs: one, but for a cond (its branches) and a while (its condition, then its body)."""
    kind, operands = call_kind(eqn), range(len(eqn.invars))
    if kind is None:
        return []
    if kind == "cond":
        return [Body(*open_jaxpr(branch), tuple(operands[1:])) for branch in eqn.params["branches"]]
    if kind == "while":
        first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        carries = tuple(operands[first + second :])
        return [
            Body(*open_jaxpr(eqn.params["cond_jaxpr"]), (*operands[:first], *carries)),
            Body(*open_jaxpr(eqn.params["body_jaxpr"]), (*operands[first : first + second], *carries)),
        ]
    name = "jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"
    return [Body(*open_jaxpr(eqn.params[name]), tuple(operands))]


def loop_operands(eqn: Eqn) -> tuple[range, range]:
    """The operands of a loop that are carried, and those that are sliced; both empty for other equations."""
    end = len(eqn.invars)
    if call_kind(eqn) == "scan":
        parts = scan(eqn)
        return range(parts.consts, parts.consts + parts.carries), range(parts.consts + parts.carries, end)
    if call_kind(eqn) == "while":
        return range(eqn.params["cond_nconsts"] + eqn.params["body_nconsts"], end), range(end, end)
    return range(0), range(0)


def unchanged(eqn: Eqn) -> frozenset[int]:
    """The carried operands that every step of the loop hands on as they are."""
    carried = loop_operands(eqn)[0]
    if not carried:
        return frozenset()
    body = bodies(eqn)[-1]
    return frozenset(
        operand
        for i, operand in enumerate(carried)
        if body.jaxpr.outvars[i] is body.jaxpr.invars[body.operands.index(operand)]
    )


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
    """The dot, ragged dot or convolution that the equation is; None where it is none, or ragged in a way that is not known."""
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
    if eqn.primitive.name == "ragged_dot_general":
        numbers = params["ragged_dot_dimension_numbers"]
        contracting, batch = numbers.dot_dimension_numbers
        rows, groups = tuple(numbers.lhs_ragged_dimensions), tuple(numbers.rhs_group_dimensions)
        known = len(rows) == len(groups) == 1 and rows[0] not in contracting[0] and not batch[0]
        if known and params["group_offset"] is None and eqn.invars[2].aval.ndim == 1:
            return RaggedDot((tuple(contracting[0]), tuple(contracting[1])), rows[0], groups[0])
    return None


def lookup(eqn: Eqn) -> Lookup | None:
    """What the equation picks out of its first operand by the others; None where it does no such thing."""
    if eqn.primitive.name not in ("gather", "dynamic_slice"):
        return None
    shape, sizes = eqn.invars[0].aval.shape, tuple(eqn.params["slice_sizes"])
    if eqn.primitive.name == "dynamic_slice":
        return Lookup(tuple(i for i, size in enumerate(shape) if sizes[i] < size), sizes, None, None)
    numbers, mode, fill = eqn.params["dimension_numbers"], eqn.params["mode"], None
    if mode == jax.lax.GatherScatterMode.FILL_OR_DROP:
        fill = float("nan") if eqn.params["fill_value"] is None else float(eqn.params["fill_value"])
    axes = sorted({*numbers.start_index_map, *numbers.operand_batching_dims})
    return Lookup(tuple(axes), sizes, numbers, fill)


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


def permutation(eqn: Eqn) -> tuple[int, ...] | None:
    """Which axis of its one operand each axis of the output is; None where the equation does more than move axes and cast."""
    if eqn.primitive.name == "transpose":
        return tuple(eqn.params["permutation"])
    if eqn.primitive.name in (
        "convert_element_type",
        "copy",
        "copy_p",
        "pvary",
        "reduce_precision",
        "sharding_constraint",
    ):
        return tuple(range(len(eqn.outvars[0].aval.shape)))
    return None


def new_dtype(eqn: Eqn) -> Any:
    """The dtype that a conversion converts to; None for other equations."""
    return eqn.params["new_dtype"] if eqn.primitive.name == "convert_element_type" else None


def exponent(eqn: Eqn) -> int:
    """The power that an `integer_pow` raises to."""
    return eqn.params["y"]


@contextlib.contextmanager
def context(eqn: Eqn) -> Iterator[None]:
    """The context and the name stack that the equation was traced in."""
    with contextlib.ExitStack() as stack:
        if source_info_util is not None:
            names = source_info_util.current_name_stack() + eqn.source_info.name_stack
            stack.enter_context(source_info_util.user_context(eqn.source_info.traceback, name_stack=names))
        stack.enter_context(eqn.ctx.manager)
        yield


def bind(eqn: Eqn, operands: Sequence[Any]) -> list[Any]:
    """Evaluate the equation on other operands, under its own context and name stack."""
    with context(eqn):
        out = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]
