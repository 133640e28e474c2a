"""Bounds on what a reader accepts."""

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds that keep the memory and time of a read in proportion to what a real checkpoint needs.

    The defaults fit checkpoints of hundreds of gigabytes. A file past a bound is refused with `FormatError` before anything
    of that size is allocated. The worst file that the defaults let in (a pickle of 8 MB that makes eight million dicts)
    takes a reader about a minute and 1.6 GB.

    Args:
        max_file_bytes: size of the file (it is mapped, not loaded).
        max_records: entries of the archive.
        max_pickle_bytes: size of the pickle record.
        max_opcodes: opcodes that the pickle machine executes, for all pickles of a checkpoint together.
        max_depth: nesting of the tree that is returned; far below Python's recursion limit, so that `repr`, `==` and
            recursive walks of the tree are safe.
        max_nodes: nodes of the tree, a shared node counted each time a walk meets it (a small pickle can describe a
            graph whose walk never ends).
        max_elements: elements of one tensor.
        max_expanded_elements: elements of a tensor that has more elements than its storage (stride 0 or overlapping);
            such a view costs nothing until someone copies it. Of an empty tensor, the product of its sizes but for 0.
        max_json_bytes: size of the JSON texts of a checkpoint, all together: safetensors headers, an index, a config, graphs.
        max_inflated_bytes: what the compressed records of one archive inflate to, all together (TorchScript compresses
            its code, and nothing else is read compressed).
        max_files: shards of one checkpoint.

    Raises:
        ValueError: a bound is not a positive integer.

    Examples:
        >>> Limits(max_depth=10).max_depth
        10
    """

    max_file_bytes: int = 2**42
    max_records: int = 2**18
    max_pickle_bytes: int = 2**28
    max_opcodes: int = 2**23
    max_depth: int = 100
    max_nodes: int = 2**23
    max_elements: int = 2**38
    max_expanded_elements: int = 2**26
    max_json_bytes: int = 2**27
    max_inflated_bytes: int = 2**26
    max_files: int = 2**12

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value <= 0:
                raise ValueError(f"Limits.{field.name} is {value!r}; expected a positive int")
