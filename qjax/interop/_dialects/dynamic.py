"""Eager dynamic: `torch.ao.nn.quantized.dynamic`, whose inputs are quantized when they are seen."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from qjax import containers
from qjax._formats import uint8
from qjax._quantize import QTensor
from qjax._spec import QuantSpec
from qjax.interop._dialects.protocol import Assumptions, Contents, member
from qjax.interop._points import Origin, QuantPoint, range_point, tensor_point
from qjax.interop._read.outputs import is_dynamic, module_outputs

_DYNAMIC_LINEAR = 4  # the version of its layout; the static one is at 3
# A layer of an LSTM or a GRU quantizes its whole sequence at once, and its hidden state at every step.
_WHAT = {
    "weight": "x, the whole input",
    "weight_ih": "x, the whole input",
    "weight_hh": "x, the hidden state at each step",
}


class EagerDynamic:
    """Weights are quantized in the file; the input's qparams follow from the range of each whole input."""

    name = "eager_dynamic"

    def recognises(self, contents: Contents) -> bool:
        """Whether there is a dynamic module."""
        return any(is_dynamic_module(module, contents) for module in contents.packed)

    def points(self, contents: Contents, assume: Assumptions) -> list[QuantPoint]:
        """Weights, and inputs by formula."""
        found: list[QuantPoint] = []
        for op in sorted(contents.packed):
            if is_dynamic_module(op, contents):
                found += _module_points(op, contents)
        return found


def is_dynamic_module(module: str, contents: Contents) -> bool:
    """Whether a module quantizes its input at run time: by its version, or by an output that was never calibrated."""
    if module not in contents.packed:
        return False
    if _recurrent(module, contents):
        return True
    version = contents.version(module)
    if version is not None and version >= _DYNAMIC_LINEAR:
        return True
    outputs = module_outputs(contents.tensors, module)
    return module in outputs and is_dynamic(*outputs[module])


def _recurrent(module: str, contents: Contents) -> bool:
    return any(member(module, f"weight_{which}") in contents.tensors for which in ("ih", "hh"))


def _module_points(op: str, contents: Contents) -> Iterator[QuantPoint]:
    names = ("weight_ih", "weight_hh") if _recurrent(op, contents) else ("weight",)
    for name in names:
        key = member(op, name)
        value = contents.tensors.get(key)
        if isinstance(value, QTensor):
            yield tensor_point(op, key, value)
            yield _input(op, name, contents)
        elif isinstance(value, np.ndarray):
            yield _rounded(op, key, contents)


def _input(op: str, name: str, contents: Contents) -> QuantPoint:
    stored = contents.tensors.get(member(op, "reduce_range"))
    reduced = stored if isinstance(stored, bool) else True
    spec = QuantSpec(uint8, reduce_range=reduced, scale_rule="torch_aten", convention="torch_real")
    formula = (
        f"scale = (max(x, 0) - min(x, 0)) / {spec.quant_max}, zero_point = rint(-min(x, 0) / scale), of {_WHAT[name]}; torch's "
        "ChooseQuantizationParams, which qjax.choose_qparams(min, max, spec) computes"
    )
    if isinstance(stored, bool):
        origin = Origin("file", member(op, "reduce_range"))
    else:
        origin = Origin(
            "fixed", "the module asks for reduce_range=True, which fbgemm, x86 and onednn heed and qnnpack does not"
        )
    return range_point(op, "input", spec, qparams_from=Origin("run_time", formula), codes_from=origin, tensor=None)


def _rounded(op: str, key: str, contents: Contents) -> QuantPoint:
    declared = contents.tensors.get(member(op, "_packed_params.dtype"))
    kind = "file" if isinstance(declared, containers.Global) else "fixed"
    return QuantPoint(
        op=op,
        role="weight",
        dtype="float16",
        scheme=None,
        quant_min=None,
        quant_max=None,
        axis=None,
        scale=None,
        zero_point=None,
        qparams_from=Origin(kind, "it is rounded to float16, and has no scale"),
        codes_from=Origin(kind, member(op, "_packed_params.dtype") if kind == "file" else "quantized_fp16"),
        tensor=key,
    )
