"""Files whose program says how they are quantized: `.pt2`, TorchScript, and the state dicts that PT2E converted."""

from __future__ import annotations

from qjax.interop._dialects.protocol import Assumptions, Contents
from qjax.interop._points import QuantPoint


class FromProgram:
    """The points are those that were found when the program was read."""

    def __init__(self, name: str) -> None:
        self.name = name

    def recognises(self, contents: Contents) -> bool:
        """Whether the file has a program of this kind."""
        return contents.program is not None and contents.program.dialect == self.name

    def points(self, contents: Contents, assume: Assumptions) -> list[QuantPoint]:
        """In the order of the program."""
        return list(contents.program.points) if contents.program is not None and self.recognises(contents) else []
