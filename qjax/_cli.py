"""The `qjax` command."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence

import numpy as np

from qjax import containers, interop
from qjax.interop._explain.shell import describe_outputs, read_codes, save_floats

_EXPECTED = (containers.FormatError, OSError, ValueError, TypeError, ModuleNotFoundError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status.

    `inspect`: 0, 1 for a file that cannot be read, 2 for wrong usage. `compare`, as `diff`: 0 equal, 1 different, 2 trouble.
    """
    parser = argparse.ArgumentParser(prog="qjax", description="Look into quantized checkpoints, without torch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_inspect(commands)
    _add_compare(commands)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="explain a PyTorch checkpoint",
        description="Print what each quantized tensor and output of a PyTorch checkpoint means, and what looks wrong. Nothing "
        "in the file is executed.",
        epilog="Exit status: 0, or 1 for a file that cannot be read, or 2 for wrong usage.",
    )
    inspect.add_argument(
        "file", metavar="FILE", help="what torch.save, safetensors or qjax.interop.save wrote; or a folder of it"
    )
    inspect.add_argument(
        "--op", metavar="REGEX", type=_pattern, help="only ops and tensors in whose names REGEX is found"
    )
    inspect.add_argument("--wide", action="store_true", help="all columns, a line for each point")
    inspect.add_argument(
        "--plot", metavar="OUT.png", help="draw codes, scales and ranges, too; needs matplotlib (also .pdf and .svg)"
    )
    inspect.add_argument("--json", action="store_true", help="print JSON instead of a table")
    inspect.add_argument(
        "--outputs",
        metavar="CODES.npy",
        help="turn a model's integer outputs to floats by the output that --op names (the last one by default)",
    )
    inspect.add_argument("--save", metavar="FLOATS.npy", help="write the floats of --outputs there")
    inspect.set_defaults(run=_inspect)


def _pattern(text: str) -> str:
    """Checked here, so that it is wrong usage and not a bad file."""
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error
    return text


def _inspect(arguments: argparse.Namespace) -> int:
    if arguments.save and not arguments.outputs:
        print("qjax inspect: --save writes the floats of --outputs; give both", file=sys.stderr)
        return 2
    try:
        checkpoint = interop.load(arguments.file)
        if arguments.outputs:
            text = _outputs(checkpoint, arguments)
        else:
            text = _explanation(checkpoint, arguments)
    except _EXPECTED as error:
        print(f"qjax inspect: {error}", file=sys.stderr)
        return 1
    return _print(text)


def _explanation(checkpoint: interop.Checkpoint, arguments: argparse.Namespace) -> str:
    explanation = interop.explain(checkpoint, ops=arguments.op)
    if arguments.plot:
        interop.plot(checkpoint, arguments.plot, explanation=explanation)
    if arguments.json:
        return explanation.to_json() + "\n"
    return _rendered(lambda **how: explanation.render(wide=arguments.wide, **how))


def _outputs(checkpoint: interop.Checkpoint, arguments: argparse.Namespace) -> str:
    point = interop.output_point(checkpoint, arguments.op)
    codes = read_codes(arguments.outputs)
    text = describe_outputs(codes, point, arguments.outputs)
    if arguments.save:
        save_floats(arguments.save, codes, point)
        text += f"Written to {arguments.save}: float32 {list(np.shape(codes))}\n"
    return text


def _add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    compare = commands.add_parser(
        "compare",
        help="compare two checkpoints point by point",
        description="Say which quantization points of two files differ, by how much, and the likely reason.",
        epilog="Exit status, as diff has it: 0 where they are equal, 1 where they differ, 2 for wrong usage and for files that "
        "cannot be read.",
    )
    for name in ("a", "b"):
        compare.add_argument(
            name,
            metavar=name.upper(),
            help="a checkpoint, as inspect takes it, or a program that IntegerProgram.save wrote",
        )
    compare.add_argument("--json", action="store_true", help="print JSON instead of a table")
    compare.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    try:
        comparison = interop.compare(arguments.a, arguments.b)
    except _EXPECTED as error:
        print(f"qjax compare: {error}", file=sys.stderr)
        return 2
    text = comparison.to_json() + "\n" if arguments.json else _rendered(comparison.render)
    return _print(text, 0 if comparison.equal else 1)


def _rendered(render: Callable[..., str]) -> str:
    on_terminal = sys.stdout.isatty()
    width = max(80, shutil.get_terminal_size((80, 24)).columns) if on_terminal else 80
    return render(width=width, color=on_terminal and "NO_COLOR" not in os.environ)


def _print(text: str, status: int = 0) -> int:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status
