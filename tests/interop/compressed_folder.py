"""A folder of compressed-tensors with one module, put together by hand: what tests damage, with and without the library."""

import json

import numpy as np

from qjax import containers


def packed(words, shape, **more):
    """The tensors of a module with packed integers and one scale a row."""
    scale = np.ones((shape[0], 1), np.float32)
    return {"weight_packed": words, "weight_shape": np.array(shape), "weight_scale": scale, **more}


def hand_made(place, weights, *, version=None, config=None, group=None, **tensors):
    """The module `fc`, of these tensors; `config` and `group` change what config.json says."""
    place.mkdir(exist_ok=True)
    held = {f"fc.{key}": value for key, value in tensors.items() if value is not None}
    containers.write_safetensors(place / "model.safetensors", held)
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, **(group or {})}}
    said = {"quant_method": "compressed-tensors", "format": "", "config_groups": groups, "version": version}
    (place / "config.json").write_text(json.dumps({"quantization_config": said | (config or {})}))
    return place
