"""How a file is to be read: the arguments that every reader passes on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ._limits import Limits
from ._torch_names import is_alarming, is_known_object

Objects = Literal["refuse", "inert"]


@dataclass
class Budget:
    """What is left of a limit for all files and records of one checkpoint together: one record may be named many times.

    Args:
        opcodes: of pickles.
        json_bytes: of JSON texts.
    """

    opcodes: int
    json_bytes: int


@dataclass(frozen=True)
class Options:
    """Limits, checksums and objects, as `open_container` explains them.

    Args:
        limits: bounds on what is accepted.
        check_crc: True for every record, None for those that are read anyway, False for none.
        inert: whether an object of this name, unknown to torch's own list, may stand in the tree.
        budget: counted down as the checkpoint is read.
    """

    limits: Limits
    check_crc: bool | None
    inert: Callable[[str], bool]
    budget: Budget


def make_options(limits: Limits | None, check_crc: bool | None, objects: Objects) -> Options:
    """Options from the arguments of a public reader.

    Args:
        limits: None for ``Limits()``.
        check_crc: as in `Options`.
        objects: ``"refuse"`` or ``"inert"``.

    Returns:
        The options.

    Raises:
        ValueError: objects is something else.

    Examples:
        >>> make_options(None, None, "refuse").inert("my_project.Net")
        False
    """
    if objects not in ("refuse", "inert"):
        raise ValueError(f"objects is {objects!r}; expected 'refuse' or 'inert'")
    inert = is_known_object if objects == "refuse" else _is_harmless
    limits = limits or Limits()
    return Options(limits, check_crc, inert, Budget(limits.max_opcodes, limits.max_json_bytes))


def _is_harmless(name: str) -> bool:
    return not is_alarming(name)
