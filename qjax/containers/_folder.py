"""Checkpoints of several files: an index that names shards, and a Hugging Face folder with config.json.

Source: ``transformers/modeling_utils.py`` (``SAFE_WEIGHTS_INDEX_NAME`` and the like).
"""

import os
from collections.abc import Callable
from typing import Any

from ._errors import FormatError, quoted
from ._json import json_object, parse_json
from ._options import Options
from ._source import open_source

# In the order in which transformers looks.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
# What says how the tensors are to be understood: key of the metadata -> file name.
_CONFIGS = {
    "config": "config.json",
    "quantize_config": "quantize_config.json",
    "quant_config": "quant_config.json",
    "hf_quant_config": "hf_quant_config.json",
    "adapter_config": "adapter_config.json",
}

ReadFile = Callable[[str], tuple[str, Any, dict[str, Any]]]  # path -> (kind, tree, metadata)


def find_weights(folder: str) -> str:
    """The path of the file in a folder that holds the weights, or that says which files do.

    Args:
        folder: its path.

    Returns:
        The path of a checkpoint or of an index.

    Raises:
        FormatError: there is none, or there are several and no way to tell which.
    """
    names = sorted(os.listdir(folder))
    for name in _WEIGHTS:
        if name in names:
            return os.path.join(folder, name)
    for suffix in (".safetensors.index.json", ".bin.index.json", ".safetensors", ".bin", ".pt", ".pth"):
        found = [name for name in names if name.endswith(suffix)]
        if len(found) == 1:
            return os.path.join(folder, found[0])
        if found:
            raise FormatError(
                f"a folder with {len(found)} files *{suffix} and no index",
                expected=f"one of {', '.join(_WEIGHTS[:4])}",
                mend="Name the file rather than the folder.",
            )
    raise FormatError("a folder without weights", expected=f"one of {', '.join(_WEIGHTS[:4])}")


def read_configs(folder: str, options: Options) -> dict[str, Any]:
    """The JSON files beside the weights that say how they are to be understood.

    Args:
        folder: its path.
        options: how to read.

    Returns:
        ``{"config": content of config.json, ...}``, those there are.

    Raises:
        FormatError: one of them is no JSON object.
    """
    found: dict[str, Any] = {}
    for key, name in _CONFIGS.items():
        path = os.path.join(folder, name)
        if os.path.exists(path):
            data = open_source(path, options.limits)
            found[key] = json_object(parse_json(data, options, name, strict=False), name)
    return found


def read_index(
    buffer: memoryview, folder: str, options: Options, read_file: ReadFile
) -> tuple[str, dict[str, Any], dict[str, Any], tuple[str, ...]]:
    """The tensors of all shards that an index names.

    Args:
        buffer: the index.
        folder: where the shards are; empty where there is none, as for an index given as bytes.
        options: how to read.
        read_file: reads one shard.

    Returns:
        Kind of the shards; name -> tensor, in the order of the index; ``{"index": the index's own metadata, "shards":
        {file name: its metadata}, "unlisted": names in shards that the index does not have there}``; paths of the shards.

    Raises:
        FormatError: the index is none, names a file outside its folder, or a tensor that its shard does not have.
    """
    limits = options.limits
    index = json_object(parse_json(buffer, options, "index"), "index")
    weight_map = json_object(index.get("weight_map"), "index, weight_map")
    if not folder:
        raise FormatError("an index of shards", expected="a path: an index as bytes has no files beside it")
    bad = [name for name in weight_map.values() if not _is_plain(name)]
    if bad or not weight_map:
        raise FormatError(
            f"the shard {quoted(str(bad[0]))}" if bad else "no shards",
            expected="names of files in the folder of the index",
            place="index, weight_map",
            mend="Nothing outside that folder is read.",
        )
    files = list(dict.fromkeys(weight_map.values()))
    if len(files) > limits.max_files:
        raise FormatError(f"{len(files)} shards", expected=f"at most Limits.max_files = {limits.max_files}")
    kinds: dict[str, str] = {}
    trees: dict[str, dict[Any, Any]] = {}
    shards: dict[str, Any] = {}
    for name in files:
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            raise FormatError(
                f"no file {quoted(name)}",
                expected="each shard beside the index",
                place="index, weight_map",
                mend="Download the missing shard.",
            )
        kinds[name], tree, shards[name] = read_file(path)
        if not isinstance(tree, dict):
            raise FormatError(f"a {type(tree).__name__}", expected="a state_dict", file=path)
        trees[name] = tree
    if len(set(kinds.values())) > 1:
        raise FormatError(f"shards of the kinds {', '.join(sorted(set(kinds.values())))}", expected="one kind")
    tensors: dict[str, Any] = {}
    for name, file in weight_map.items():
        if name not in trees[file]:
            raise FormatError(
                f"no tensor {quoted(name)} in {quoted(file)}",
                expected="every tensor where the index says it is",
                place="index, weight_map",
                mend="Index and shards are not of one checkpoint.",
            )
        tensors[name] = trees[file][name]
    unlisted = [str(name) for file, tree in trees.items() for name in tree if weight_map.get(name) != file]
    metadata = {"index": index.get("metadata", {}), "shards": shards, "unlisted": unlisted}
    return next(iter(kinds.values())), tensors, metadata, tuple(os.path.join(folder, name) for name in files)


def _is_plain(name: Any) -> bool:
    """Whether a name is that of a file in the same folder, on any system."""
    return (
        type(name) is str
        and 0 < len(name) <= 255
        and name not in (".", "..")
        and not any(char in name for char in "/\\:\0")
        and name.isprintable()
    )
