"""The `qjax` command."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence

from qjax import containers, interop


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 for a file that cannot be read, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="qjax", description="Look into quantized checkpoints, without torch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = commands.add_parser(
        "inspect",
        help="explain a PyTorch checkpoint",
        description="Print what each quantized tensor of a PyTorch checkpoint means. Nothing in the file is executed.",
    )
    inspect.add_argument("file", metavar="FILE", help="a file that torch.save or qjax.interop.save wrote")
    inspect.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    try:
        explanation = interop.explain(interop.load(arguments.file))
    except (containers.FormatError, OSError) as error:
        print(f"qjax inspect: {error}", file=sys.stderr)
        return 1
    on_terminal = sys.stdout.isatty()
    width = max(80, shutil.get_terminal_size((80, 24)).columns) if on_terminal else 80
    text = explanation.to_json() + "\n" if arguments.json else explanation.render(width=width, color=on_terminal)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
