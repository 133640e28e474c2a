"""A room of qjax imports only from rooms above it; see ROOMS for the order and CONTRIBUTING.md for the reason."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

QJAX = Path(__file__).resolve().parents[1] / "qjax"

# From the ground up: a room may import the rooms that come before it here, and itself.
ROOMS = (
    "containers",
    "_formats",
    "_packing",
    "_arithmetic",
    "_rounding",
    "_codes",
    "_granularity",
    "_reduce",
    "_conventions",
    "_spec",
    "_block_formats",
    "_scale_rules",
    "_qparams",
    "_quantize",
    "_requantize",
    "estimators",
    "kernels",
    "_fake_quantize",
    "observers",
    "transform",
    "recipes",
    "integer",
    "flax",
    "training",
    "ptq",
    "analysis",
    "interop",
    "_cli",
    "__init__",  # the facade: imports everything, and nothing but __main__ imports it
    "__main__",
)
ORACLES = {"torch", "torchvision", "torchao"}  # qjax promises to do without them; only tests import them


def module_of(file: Path, root: Path) -> list[str]:
    """The dotted name of a file as a list, with `__init__` kept: qjax/flax/__init__.py is [qjax, flax, __init__]."""
    return ["qjax", *file.relative_to(root).with_suffix("").parts]


def imports_in(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str, str | None]]:
    """Yields (line, absolute module, imported name) of every import: also in a function, also under TYPE_CHECKING.

    The name is None for `import a.b`. A relative import that climbs out of the tree yields the module "".
    `importlib.import_module("a.b")` and `__import__("a.b")` count where the name is written out.
    """

    def absolute(level: int, module: str) -> str:
        if level == 0:
            return module
        if level > len(package):
            return ""
        return ".".join([*package[: len(package) - level + 1], *([module] if module else [])])

    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    # Without `as`, `import qjax._spec` binds the facade's name, so it counts as importing the facade.
                    yield node.lineno, alias.name if alias.asname else alias.name.partition(".")[0], None
                    if not alias.asname:
                        yield node.lineno, alias.name, None
            case ast.ImportFrom(module=module, names=names, level=level):
                for alias in names:
                    yield node.lineno, absolute(level, module or ""), alias.name
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                bare = name.lstrip(".")
                yield node.lineno, absolute(len(name) - len(bare), bare), None


def violations(root: Path) -> list[str]:
    """One line for each import below `root`, a tree of qjax, that the house does not allow."""
    found: dict[str, None] = {}  # a set that keeps its order

    for file in sorted(root.rglob("*.py")):
        module = module_of(file, root)
        room, package = module[1], module[:-1]
        where = f"qjax/{file.relative_to(root).as_posix()}"
        if room not in ROOMS:
            found[f"{where}: {room!r} is not a room; give it its place in ROOMS"] = None
            continue

        for line, target, name in imports_in(ast.parse(file.read_bytes(), str(file)), package):
            top, _, rest = target.partition(".")
            complaint = None
            if not target:
                complaint = "a relative import climbs out of qjax"
            elif top in ORACLES:
                complaint = f"imports {top}, which qjax does without"
            elif top == "qjax":
                # `from qjax import observers` names a room; any other name comes from the facade.
                other = rest.partition(".")[0] or (name if name in ROOMS else "__init__")
                if other == "__init__":
                    if room != "__main__":
                        complaint = "imports the facade; import from the room that owns the name"
                elif other not in ROOMS:
                    complaint = f"imports qjax.{other}, which is not a room"
                elif ROOMS.index(other) > ROOMS.index(room):
                    complaint = f"{room} imports {other}, which stands below it"
            elif room == "containers" and top != "numpy" and top not in sys.stdlib_module_names:
                complaint = f"containers stands on the standard library and numpy alone, and imports {top}"
            if complaint:
                found[f"{where}:{line}: {complaint}"] = None

    return list(found)


def test_rooms_import_only_from_rooms_above_them():
    assert any(QJAX.rglob("*.py")), f"no Python files under {QJAX}"
    found = violations(QJAX)
    assert not found, "\n".join(["", *found])


def plant(root: Path, files: dict[str, str]) -> Path:
    for path, source in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(source)
    return root


def test_allowed_imports_pass(tmp_path):
    tree = {
        "containers/_zip.py": "import os.path\nimport numpy as np\nfrom . import _errors\nfrom ._errors import E",
        "containers/_errors.py": "",
        "_spec.py": "from qjax._formats import int8\nfrom ._formats import Int\nimport jax",
        "_formats.py": "import ml_dtypes",
        "flax/linen.py": "import flax\nfrom flax import linen as nn\nfrom qjax.transform import prepare",
        "flax/__init__.py": "from . import linen",
        "_cli.py": "from qjax import containers\nfrom . import interop\nimport qjax.interop as i",
        "__init__.py": "from qjax import observers\nfrom qjax._spec import QuantSpec\nfrom . import containers",
        "__main__.py": "import qjax\nfrom qjax._cli import main",
    }
    assert violations(plant(tmp_path, tree)) == []


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("_spec.py", "from qjax._quantize import quantize", "_spec imports _quantize, which stands below it"),
        ("_spec.py", "from ._quantize import quantize", "_spec imports _quantize, which stands below it"),
        ("_spec.py", "from . import observers", "_spec imports observers, which stands below it"),
        ("_spec.py", "import qjax.observers.min_max as m", "_spec imports observers, which stands below it"),
        ("_spec.py", "import importlib\nimportlib.import_module('qjax.observers')", "_spec imports observers"),
        ("observers/__init__.py", "from ..transform import prepare", "observers imports transform"),
        ("observers/a/b.py", "from ...transform import prepare", "observers imports transform"),
        ("observers/a/b.py", "from ....transform import prepare", "climbs out of qjax"),
        ("observers/a.py", "def f():\n    from qjax.transform import prepare", "observers/a.py:2: observers imports"),
        ("_spec.py", "if TYPE_CHECKING:\n    from qjax._qparams import QParams", "_spec imports _qparams"),
        ("_cli.py", "import qjax", "imports the facade"),
        ("_cli.py", "import qjax as q", "imports the facade"),
        ("_cli.py", "import qjax.interop", "imports the facade"),
        ("_cli.py", "from qjax import quantize", "imports the facade"),
        ("_cli.py", "from . import quantize", "imports the facade"),
        ("_cli.py", "from qjax import *", "imports the facade"),
        ("_cli.py", "from qjax import __main__", "_cli imports __main__, which stands below it"),
        ("_cli.py", "from qjax._helpers import f", "qjax._helpers, which is not a room"),
        ("containers/_zip.py", "import jax", "the standard library and numpy alone, and imports jax"),
        ("containers/_zip.py", "def f():\n    import ml_dtypes", "and imports ml_dtypes"),
        ("containers/_zip.py", "from qjax._formats import int8", "containers imports _formats"),
        ("interop/torch.py", "def f():\n    import torch.nn", "imports torch, which qjax does without"),
        ("interop/torch.py", "from torch import nn", "imports torch, which qjax does without"),
        ("interop/torch.py", "__import__('torch')", "imports torch, which qjax does without"),
        ("_helpers.py", "", "'_helpers' is not a room"),
        ("attic/old.py", "", "'attic' is not a room"),
    ],
)
def test_planted_import_is_caught(tmp_path, path, source, complaint):
    found = violations(plant(tmp_path, {path: source}))
    assert len(found) == 1
    assert complaint in found[0]
