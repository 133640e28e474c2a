"""Small checks that reading and writing share."""

from typing import Any, cast

import numpy as np

from ._nodes import QTENSOR, Call, Global, RawTensor


def exact(value: Any, *types: type[Any]) -> bool:
    """Whether the type of a value is one of these, not a subclass: a bool is no int here, a namedtuple no tuple.

    Args:
        value: anything.
        types: the accepted types.

    Returns:
        True if it is.

    Examples:
        >>> exact(True, int)
        False
    """
    return type(value) in types


def as_tuple(value: Any) -> tuple[Any, ...]:
    """A tuple as it is, and anything else as the empty tuple.

    Args:
        value: anything.

    Returns:
        A tuple.

    Examples:
        >>> as_tuple([1, 2])
        ()
    """
    return cast("tuple[Any, ...]", value) if exact(value, tuple) else ()


def are(values: tuple[Any, ...], *types: type[Any]) -> bool:
    """Whether values have exactly these types, one for one.

    Args:
        values: the values.
        types: as many types.

    Returns:
        True if they do.

    Examples:
        >>> are((1, "a"), int, str)
        True
    """
    return len(values) == len(types) and all(exact(value, kind) for value, kind in zip(values, types, strict=True))


def is_qtensor(value: Any) -> bool:
    """Whether a node is a quantized tensor.

    Args:
        value: any node.

    Returns:
        True for a `Call` of ``torch._utils._rebuild_qtensor``.

    Examples:
        >>> is_qtensor(Call("torch.device", ("cpu",)))
        False
    """
    return exact(value, Call) and value.function == QTENSOR


def is_tensor(value: Any) -> bool:
    """Whether a node may stand inside a parameter.

    Args:
        value: any node.

    Returns:
        True for an array, a `RawTensor` and a quantized tensor.

    Examples:
        >>> is_tensor(np.zeros(2)), is_tensor(2.0)
        (True, False)
    """
    return exact(value, np.ndarray, RawTensor) or is_qtensor(value)


def quantizer_problem(params: Any, shape: tuple[int, ...]) -> tuple[str, str] | None:
    """What torch would hold against the quantizer parameters of a tensor.

    Args:
        params: ``(per_tensor_affine, float, int)`` or ``(per_channel_affine, scales, zero_points, axis)``.
        shape: the tensor's shape.

    Returns:
        None if they fit, else what was found and what is expected.

    Examples:
        >>> quantizer_problem((Global("torch.per_tensor_affine"), 0.5, 0), (3, 4))
        >>> quantizer_problem((Global("torch.per_tensor_affine"), 1, 0), (3, 4))[1]
        '(torch.per_tensor_affine, float scale, int zero_point)'
    """
    parts = as_tuple(params)
    scheme = parts[0].name if parts and exact(parts[0], Global) else ""
    found = f"({', '.join(type(part).__name__ for part in parts[:9])})" if parts else type(params).__name__
    if scheme == "torch.per_tensor_affine":
        fits = are(parts[1:], float, int)
        return None if fits else (f"quantizer {found}", f"({scheme}, float scale, int zero_point)")
    if scheme in ("torch.per_channel_affine", "torch.per_channel_affine_float_qparams"):
        if not are(parts[1:], np.ndarray, np.ndarray, int):
            return f"quantizer {found}", f"({scheme}, scales array, zero_points array, int axis)"
        scales, zero_points, axis = parts[1], parts[2], parts[3]
        if not 0 <= axis < len(shape):
            return f"a quantizer axis that a tensor of shape {shape} does not have", "one of its axes"
        if scales.shape != (shape[axis],) or zero_points.shape != (shape[axis],):
            return (
                f"scales of shape {scales.shape} and zero_points of shape {zero_points.shape}",
                f"({shape[axis]},), the size of axis {axis}",
            )
        return None
    return f"quantizer {found} with scheme {scheme!r}", "torch.per_tensor_affine or torch.per_channel_affine first"
