"""save_compressed_tensors: a converted program, or QTensors by name, as a folder that compressed-tensors loads."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from qjax import containers
from qjax._quantize import QTensor
from qjax._spec import QuantSpec
from qjax.containers._atomic import replace_folder
from qjax.integer import IntegerProgram
from qjax.interop._dialects.protocol import member, split
from qjax.interop._read.compressed_config import METHOD
from qjax.interop._write.compressed_weights import Written, write_activation, write_weight
from qjax.interop._write.modules import TorchModule
from qjax.interop._write.program_weights import Input, plain_array, weights_and_inputs

_RELEASE = "0.20.0"  # whose layout this is
_CALLER = "save_compressed_tensors"
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"


def save_compressed_tensors(
    folder: str | os.PathLike[str],
    program: IntegerProgram | Mapping[str, Any],
    *,
    modules: Mapping[str, TorchModule] | None = None,
    inputs: Mapping[str, Input] | None = None,
    tensors: Mapping[str, Any] | None = None,
    left_out: Collection[str] = (),
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json and model.safetensors as compressed-tensors 0.20 does, for vLLM, transformers and the library itself.

    Which format a module gets follows from its weight and from whether its input is quantized:

    | weight, `(out, in)`                              | input     | format                                                 |
    |--------------------------------------------------|-----------|--------------------------------------------------------|
    | integers of 8 bits and less                      | quantized | `int-quantized` (W8A8)                                 |
    |                                                  | float     | `pack-quantized` (W4A16)                               |
    | e4m3                                             | quantized | `float-quantized` (FP8)                                |
    |                                                  | float     | `naive-quantized`                                      |
    | e2m1 in groups of 16, scales of E4M3             | any       | `nvfp4-pack-quantized`                                 |
    | e2m1, e2m3, e4m3 in groups of 32, powers of two  | any       | `mxfp4-pack-quantized`, `mxfp6-…`, `mxfp8-quantized`   |

    Codes are kept as they are, but for unsigned ones, which are shifted by half their range, zero_point with them: the format
    has signed integers only. Values are kept, too, with one exception: compressed-tensors computes `q · (scale / global_scale)`
    where qjax's NVFP4 has `q · (scale · tensor_scale)`; with `global_scale = 1 / tensor_scale` the two may be some units in
    the last place apart before they are rounded to bfloat16. A tensor that has a global_scale keeps its values.

    How activations are rounded is compressed-tensors' affair, which divides by the scale, and chooses the dynamic ones by its
    own rules. `QuantSpec(..., convention="compressed_tensors")` simulates both. What the outputs of a program are quantized by
    is written where it is the input of a module.

    Args:
      folder: Where to. A folder that is there already keeps its other files, such as a tokenizer's; its weights are replaced.
        All is written or nothing.
      program: From `qjax.convert`; or a mapping from names as torch has them, such as `"model.fc.weight"`, to QTensors and
        arrays.
      modules: Of a program: the module of each op, `Linear` or `Embedding`; None derives them (`torch_modules`).
      inputs: How the inputs of modules are quantized, by the module's name: a spec for a range that is found at each call, or
        a spec and its qparams. Of a program, these go before what it says itself.
      tensors: More float arrays to write, by name, such as those of layers that are not quantized.
      left_out: Of a program: parameters that are no weight and no bias of a layer, such as those of a layer norm, which
        tensors has, or the torch model gets in another way: their paths, or what they lie under (`"norm"`). No others may be
        missing in the file. (Layers that are left in float need not be named: a model that has them misses their tensors.)
      config: What else config.json is to hold, such as `"architectures"` and the sizes of the model; None keeps what is there.

    Raises:
      TypeError: program, modules or inputs is something else.
      ValueError: A parameter of a program would be missing in the file;
        compressed-tensors has no layout for a weight or an input; an op is no matrix product with its weight on the
        right, nor an embedding; an op is missing in modules or unknown, or stands for several layers (a scan); a name is given
        twice or is no module's.
      OSError: The folder cannot be written.

    Examples:
      >>> import jax.numpy as jnp, os, qjax, tempfile
      >>> spec = qjax.QuantSpec(qjax.int4, symmetric=True, granularity=qjax.PerGroup(-1, 32))
      >>> observer = qjax.observers.min_max(spec)
      >>> w = jnp.linspace(-1, 1, 128).reshape(2, 64)
      >>> q = qjax.quantize(w, observer.qparams(observer.update(observer.init(w), w)), spec)
      >>> folder = os.path.join(tempfile.mkdtemp(), "model")
      >>> qjax.interop.save_compressed_tensors(folder, {"fc.weight": q})
      >>> checkpoint = qjax.interop.load(folder)
      >>> checkpoint.dialect, bool((checkpoint["fc.weight"].codes == q.codes).all())
      ('compressed_tensors', True)

    References:
      compressed-tensors, `compressors/`, `quantization/quant_config.py`.
    """
    held, found = weights_and_inputs(program, modules, inputs, tensors, left_out, _CALLER)
    written, schemes = _lay_out(held, found)
    quantization = _quantization_config(schemes)

    def write(place: str) -> None:
        containers.write_safetensors(os.path.join(place, _WEIGHTS), written, metadata={"format": "pt"})
        whole = {**(_config_of(folder) if config is None else config), "quantization_config": quantization}
        text = json.dumps(whole, indent=2, sort_keys=True, allow_nan=False) + "\n"
        with open(os.path.join(place, _CONFIG), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    replace_folder(folder, write, lambda name: name.endswith((".safetensors", ".safetensors.index.json")))


def _config_of(folder: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        with open(os.path.join(folder, _CONFIG), encoding="utf-8") as file:
            found = json.load(file)
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{_CALLER}: the {_CONFIG} in {os.fspath(folder)} is no JSON. Give config=..., or remove it."
        ) from error
    return found if isinstance(found, dict) else {}


def _lay_out(held: Mapping[str, Any], inputs: Mapping[str, Input]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of the file, and of each module its part of the config."""
    written: dict[str, Any] = {}
    schemes: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        if name in written:
            raise ValueError(f"{_CALLER}: {name!r} is given, and is made of a quantized tensor, too. Leave it out.")
        written[name] = value

    for name, value in held.items():
        if not isinstance(name, str):
            raise TypeError(f"{_CALLER}: the name {name!r} is of type {type(name).__name__}; names must be str.")
        if not isinstance(value, QTensor):
            add(name, _array(name, value))
            continue
        module, last = split(name)
        if last != "weight":
            raise ValueError(f"{_CALLER}: {name!r} is quantized; compressed-tensors has codes for weights alone.")
        weight = write_weight(value, has_input=module in inputs, name=f"{_CALLER}: {name}")
        activation = _activation(module, inputs.get(module))
        for part, array in (weight.tensors | activation.tensors).items():
            add(member(module, part), array)
        schemes[module] = {
            "weights": weight.args,
            "input_activations": activation.args or None,
            "output_activations": None,
            "format": weight.format,
        }
    if not schemes:
        raise ValueError(f"{_CALLER}: nothing is quantized. Write a float model with containers.write_safetensors.")
    return written, schemes


def _activation(module: str, how: Input | None) -> Written:
    if how is None:
        return Written({}, {})
    spec, qparams = (how, None) if isinstance(how, QuantSpec) else how
    return write_activation("input", spec, qparams, f"{_CALLER}: the input of {module}")


def _array(name: str, value: Any) -> Any:
    if isinstance(value, containers.RawTensor) or np.asarray(value).dtype != ml_dtypes.float8_e4m3fn:
        return plain_array(name, value, _CALLER)
    return containers.RawTensor("float8_e4m3fn", np.asarray(value).view(np.uint8))


def _quantization_config(schemes: Mapping[str, Any]) -> dict[str, Any]:
    formats = {scheme["format"] for scheme in schemes.values()}
    return {
        "quant_method": METHOD,
        "version": _RELEASE,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": group for index, group in enumerate(_groups(schemes))},
        "ignore": [],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _groups(schemes: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Modules of one scheme together, named one by one: a file cannot tell which other modules are of their class."""
    alike: dict[str, dict[str, Any]] = {}
    for module, scheme in schemes.items():
        group = alike.setdefault(json.dumps(scheme, sort_keys=True), {"targets": [], **scheme})
        group["targets"].append(module)
    yield from alike.values()
