"""Damage small files of every kind, many times: ``python -m tests.containers.fuzz --inputs 1000000``.

Each input is read with default limits, and the tree, if there is one, is walked. What is allowed is a tree or a
`FormatError`, within the time and memory given below. Anything else is saved (``--save``) and counted; the status is then 1.
Inputs follow from the seed and their number alone: ``--seed S --first N --inputs 1`` repeats one.
"""

import argparse
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from qjax import containers
from tests.containers.mutate import mutate
from tests.containers.samples import INDEX, SAMPLES
from tests.containers.walk import walk

SECONDS = 2.0  # of the processor, for one input of some kilobytes; what takes a hundredth of that is already slow
BYTES = 2**30  # of address space above what the process had at the start


def torch_samples() -> dict[str, bytes]:
    """Small files of live torch, where it is installed."""
    try:
        import torch
    except ImportError:
        return {}
    import io
    import warnings

    warnings.simplefilter("ignore")
    found: dict[str, bytes] = {}

    def add(name: str, save: Callable[[io.BytesIO], object]) -> None:
        file = io.BytesIO()
        save(file)
        found[name] = file.getvalue()

    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).eval()
    values = torch.arange(12.0).reshape(3, 4)
    scales, zeros = torch.ones(3), torch.zeros(3)
    quantized = {
        "tensor": torch.quantize_per_tensor(values, 0.1, 3, torch.quint8),
        "channel": torch.quantize_per_channel(values, scales, zeros.long(), 0, torch.qint8),
        "nibbles": torch.quantize_per_channel(values, scales, zeros, 0, torch.quint4x2),
        "half": values.to(torch.bfloat16),
        "wide": values.to(torch.uint16).t(),
        "eighth": values.to(torch.float8_e4m3fn),
        "flags": values > 3,
    }
    add("torch state_dict", lambda file: torch.save(net.state_dict(), file))
    add("torch quantized", lambda file: torch.save(quantized, file))
    add("torch module", lambda file: torch.save(net, file))
    add("torch legacy", lambda file: torch.save(quantized, file, _use_new_zipfile_serialization=False))
    add("torch legacy module", lambda file: torch.save(net, file, _use_new_zipfile_serialization=False))
    add("torch script", lambda file: torch.jit.save(torch.jit.script(net), file))
    return found


def files_around(index: bytes, folder: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes(SAMPLES["safetensors"])
    (folder / "model.safetensors.index.json").write_bytes(index)


def refusal(error: containers.FormatError) -> bool:
    """False, for an input that was refused; its message is fit for a terminal."""
    message = str(error)
    assert message.isprintable()
    assert len(message) < 2000
    return False


def read(name: str, data: bytes, folder: Path, rng: random.Random) -> bool:
    """Whether the input was read; False where it was refused."""
    options = {"check_crc": rng.choice((None, None, True, False)), "objects": rng.choice(("refuse", "inert"))}
    try:
        if name == "index":
            files_around(data, folder)
            walk(containers.open_container(folder, **options))
        else:
            walk(containers.open_container(data, **options))
    except containers.FormatError as error:
        return refusal(error)
    return True


def hand_made_samples() -> dict[str, bytes]:
    return {**SAMPLES, "index": INDEX}


def main(
    argv: list[str] | None = None,
    *,
    description: str | None = __doc__,
    hand_made: Callable[[], dict[str, bytes]] = hand_made_samples,
    of_torch: Callable[[], dict[str, bytes]] = torch_samples,
    reader: Callable[[str, bytes, Path, random.Random], bool] | None = None,
    forget: Callable[[], None] = lambda: None,
) -> int:
    """Run the command; other rooms fuzz their own readers with files of their own."""
    reader = reader or read
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--save", type=Path, help="folder for inputs that were neither read nor refused")
    parser.add_argument("--no-torch", action="store_true", help="hand-made files alone")
    arguments = parser.parse_args(argv)
    import resource  # where there is no such module, tests still import this one

    seeds = hand_made() | ({} if arguments.no_torch else of_torch())
    names, pool = list(seeds), list(seeds.values())
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts = {"read": 0, "refused": 0, "failed": 0}
    slowest, start = (0.0, 0), time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:

        def read_undamaged() -> None:
            """What is compiled for a sample, is so before time is taken."""
            for name in names:
                if not reader(name, seeds[name], Path(temporary), random.Random(0)):
                    raise ValueError(f"the undamaged sample {name!r} is refused")

        read_undamaged()
        for number in range(arguments.first, arguments.first + arguments.inputs):
            if number % 2000 == 1999:
                forget()
                read_undamaged()
            rng = random.Random(f"{arguments.seed}/{number}")
            name = rng.choice(names)
            data = mutate(seeds[name], rng, pool)
            since = time.process_time()
            try:
                outcome = "read" if reader(name, data, Path(temporary), rng) else "refused"
            except OSError as error:
                # A name in an index that the system does not take, such as one too long.
                outcome = "refused" if name == "index" else "failed"
                if outcome == "failed":
                    print(f"input {number} ({name}): {error!r}")
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                outcome = "failed"
                print(f"input {number} ({name}):")
                traceback.print_exc(limit=-3, file=sys.stdout)
            seconds = time.process_time() - since
            if seconds > SECONDS:
                outcome = "failed"
                print(f"input {number} ({name}): {seconds:.1f} s")
            slowest = max(slowest, (seconds, number))
            counts[outcome] += 1
            if outcome == "failed" and arguments.save:
                arguments.save.mkdir(parents=True, exist_ok=True)
                (arguments.save / f"{name.replace(' ', '_')}-{arguments.seed}-{number}.bin").write_bytes(data)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    print(
        f"{sum(counts.values())} inputs of {len(seeds)} files in {time.monotonic() - start:.0f} s: "
        + ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        + f"; slowest {slowest[0] * 1000:.0f} ms (input {slowest[1]}); peak memory grew by {grown:.0f} MiB"
    )
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
