"""What a dialect is: one way of torch to lay quantization out in a state dict. One file each implements it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from qjax._spec import QuantSpec
from qjax.interop._points import QuantPoint
from qjax.interop._read.program import Program
from qjax.recipes._torch import Engine

if TYPE_CHECKING:
    from qjax.interop._read.compressed import Compressed


class Contents(NamedTuple):
    """A state dict as the dialects read it."""

    tensors: Mapping[str, Any]  # flat; packed parameters unpacked
    metadata: Mapping[str, Any]  # torch's `_metadata`
    packed: frozenset[str]  # modules whose weight and bias were unpacked
    subclasses: Mapping[str, tuple[str, Any]]  # of torchao: tensor → class, how it quantizes activations
    program: Program | None = None  # what the code in the file says of quantization
    compressed: Compressed | None = None  # of compressed-tensors: config, modules

    def claims(self, name: str) -> bool:
        """Whether the program or compressed-tensors says what a tensor means: it is then no other dialect's."""
        modules = () if self.compressed is None else self.compressed.modules
        return (self.program is not None and name in self.program.claimed) or split(name)[0] in modules

    def version(self, module: str) -> int | None:
        """The version of a module's layout; None where the file has none."""
        entry = self.metadata.get(module)
        version = entry.get("version") if isinstance(entry, Mapping) else None
        return version if isinstance(version, int) else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What a file of observers does not hold.

    Args:
      engine: Whose default qconfig was used.
      activation: Spec of activations; None takes the engine's.
      weight: Spec of weights; None takes the engine's.
    """

    engine: Engine = "x86"
    activation: QuantSpec | None = None
    weight: QuantSpec | None = None


class Dialect(Protocol):
    """One way of torch to lay quantization out in a state dict.

    A file may mix several: each dialect claims the modules that it knows, in the order of `qjax.interop._dialects.all`.
    """

    @property
    def name(self) -> str:
        """As `Checkpoint.dialect` has it."""
        ...

    def recognises(self, contents: Contents) -> bool:
        """Whether some module of the file is laid out so. Looks at names and dtypes, not at numbers."""
        ...

    def points(self, contents: Contents, assume: Assumptions) -> list[QuantPoint]:
        """The points of the modules that are laid out so."""
        ...


def member(module: str, name: str) -> str:
    """The key of a module's member: the root module has no path."""
    return f"{module}.{name}" if module else name


def split(key: str) -> tuple[str, str]:
    """A key as the module's path and the member's name."""
    module, _, last = key.rpartition(".")
    return module, last
