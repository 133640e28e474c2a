"""What a tree is made of, besides numpy arrays, dicts, lists, tuples and Python scalars. All of it is inert data."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

# A tree is recursive through Any: precise recursive aliases over dict and list are invariant and reject real trees.
Tree = Any
Array = np.ndarray[Any, np.dtype[Any]]

QTENSOR = "torch._utils._rebuild_qtensor"
DEVICE = "torch.device"


@dataclass(frozen=True)
class Global:
    """The name of something that lives in another program, such as ``torch.qint8``; nothing is imported for it.

    Args:
        name: the dotted name.

    Examples:
        >>> Global("torch.qint8") == Global("torch.qint8")
        True
    """

    name: str


@dataclass(frozen=True, eq=False)
class Call:
    """A call that a file asks for and that this room leaves to its reader to interpret.

    Two functions occur:

    - ``torch._utils._rebuild_qtensor``: ``args = (codes, quantizer_params, requires_grad)``. ``codes`` is the integer
      array in the tensor's shape: int8 (qint8), uint8 (quint8), int32 (qint32), or a `RawTensor` with
      ``dtype="quint4x2"`` whose ``bits`` hold one code 0..15 per uint8 element. ``quantizer_params`` is
      ``(Global("torch.per_tensor_affine"), scale: float, zero_point: int)`` or
      ``(Global("torch.per_channel_affine"), scales: array, zero_points: array, axis: int)``.
    - ``torch.device``: ``args = ("cuda", 0)`` or ``("cpu",)``.

    Compares by identity, since its arrays have no single truth value.

    Args:
        function: the dotted name of the function.
        args: its arguments, in the normal form above.

    Examples:
        >>> Call("torch.device", ("cpu",)).args
        ('cpu',)
    """

    function: str
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Back:
    """A reference to an `Object` that this place is a part of, as the hooks of a module have them: a tree has no cycles.

    Args:
        name: the dotted name of that object's class.

    Examples:
        >>> Back("torch.fx.graph_module.GraphModule").name
        'torch.fx.graph_module.GraphModule'
    """

    name: str


@dataclass(eq=False, slots=True)
class Object:
    """What a file says about an object of a class, or the result of a function, that this room does not build.

    Nothing is imported for it: it is the name, and what the file would have handed to it. A module that was saved whole,
    a tensor subclass such as torchao's and each module of a TorchScript archive are such objects. Compares by identity.

    Args:
        name: the dotted name of the class or the function.
        args: what it would have been called with.
        state: what would have become its attributes: a dict for most classes.
        items: what would have been put into it: elements where the class is a list, pairs where it is a dict.

    Examples:
        >>> Object("torch.nn.modules.linear.Linear", state={"in_features": 3}).attributes["in_features"]
        3
    """

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list[Any])

    @property
    def attributes(self) -> dict[Any, Any]:
        """The state as a dict; slots and attributes as one; empty where the state is something else."""
        state: Any = self.state
        parts = cast("tuple[Any, ...]", state) if type(state) is tuple else (state,)
        if not all(part is None or isinstance(part, dict) for part in parts):
            return {}
        return {key: value for part in parts if part for key, value in part.items()}


class RawTensor:
    """A tensor whose dtype numpy does not have: the bits of each element as an unsigned integer. Compares by identity.

    Args:
        dtype: torch's name, without ``torch.``: ``"bfloat16"`` (uint16 bits), ``"float8_e4m3fn"`` and the other float8
            formats (uint8), ``"float4_e2m1fn_x2"`` (uint8, two values), ``"float6_e2m3fn_x4"`` and
            ``"float6_e3m2fn_x4"`` (uint8, three bytes hold four values; only safetensors has them), ``"quint4x2"``
            (uint8, one code 0..15; only inside a `Call`).
        bits: array of uint8 or uint16, in the tensor's shape; or a function that makes it when it is first asked for.
        shape: of the bits; needed where they are a function.

    Examples:
        >>> one = RawTensor("bfloat16", np.array([0x3F80], np.uint16))
        >>> (one.bits.astype(np.uint32) << 16).view(np.float32).tolist()
        [1.0]
    """

    __slots__ = ("_bits", "dtype", "shape")

    def __init__(self, dtype: str, bits: Array | Callable[[], Array], *, shape: tuple[int, ...] = ()) -> None:
        self.dtype = dtype
        self.shape: tuple[int, ...] = shape if callable(bits) else bits.shape
        self._bits: Array | Callable[[], Array] = bits

    @property
    def bits(self) -> Array:
        """The bits, in the tensor's shape."""
        bits = self._bits
        if callable(bits):
            bits = self._bits = bits()
        return bits

    def __repr__(self) -> str:
        return f"RawTensor({self.dtype!r}, shape={self.shape})"


@dataclass(frozen=True, eq=False)
class Parameter:
    """A ``torch.nn.Parameter``. Compares by identity.

    Args:
        array: a numpy array, a `RawTensor`, or a quantized tensor's `Call`.
        requires_grad: whether torch trains it.

    Examples:
        >>> Parameter(np.zeros(3)).requires_grad
        True
    """

    array: Any
    requires_grad: bool = True


class Record(dict[Any, Any]):
    """A ``collections.OrderedDict`` of a state_dict: a dict in file order, with the ``_metadata`` torch hangs on it.

    Equality is that of dict and does not look at `metadata`.

    Args:
        items: a mapping or an iterable of pairs.
        metadata: torch's ``_metadata``: module path -> ``{"version": n}``.

    Examples:
        >>> record = Record({"weight": 1}, metadata={"": {"version": 1}})
        >>> record["weight"], record.metadata[""]["version"]
        (1, 1)
    """

    metadata: dict[Any, Any]

    def __init__(
        self,
        items: Mapping[Any, Any] | Iterable[tuple[Any, Any]] = (),
        /,
        *,
        metadata: Mapping[Any, Any] | None = None,
    ) -> None:
        super().__init__(items)
        # Kept as the very object when it already is a dict: a file may fill it after it was attached.
        self.metadata = metadata if isinstance(metadata, dict) else dict(metadata or {})
