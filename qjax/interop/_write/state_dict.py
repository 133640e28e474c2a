"""A torch state dict in the making: tensors by key, and torch's versions of the modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qjax.containers import Record


class StateDict:
    """Keys in the order in which modules are added."""

    def __init__(self) -> None:
        self.tensors: dict[str, Any] = {}
        self.versions: dict[str, dict[str, int]] = {"": {"version": 1}}

    def add(self, module: str, values: Mapping[str, Any], version: int) -> None:
        """Add a module's own keys.

        Raises:
          ValueError: There is a module of that name.
        """
        if module in self.versions:
            raise ValueError(
                f"two modules are called {module!r}, a Quantize module perhaps. Give each a name of its own."
            )
        self.tensors.update({f"{module}.{key}": value for key, value in values.items()})
        self.versions[module] = {"version": version}

    def record(self) -> Record:
        """What `qjax.interop.save` writes."""
        return Record(self.tensors, metadata=self.versions)
