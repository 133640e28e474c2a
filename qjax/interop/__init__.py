"""What the arrays of a checkpoint mean, without torch: read, explained and written.

`_read` turns the layouts of torch, torchao and compressed-tensors into arrays and QTensors; `_dialects` says what they mean, as
a table of points (`_points.py`); `_explain` puts it into words; `_write` lays converted and prepared functions out for torch.
"""

from qjax.interop._checkpoint import Checkpoint, load, save
from qjax.interop._dialects.all import points
from qjax.interop._explain.answer import Answer, output_point
from qjax.interop._explain.compare import Comparison, compare
from qjax.interop._explain.differences import PointDifference
from qjax.interop._explain.explain import Explanation, Point, explain
from qjax.interop._explain.findings import Finding
from qjax.interop._explain.plot import plot
from qjax.interop._interpret import interpret
from qjax.interop._points import Origin, PointTable, QuantPoint
from qjax.interop._write.compressed import save_compressed_tensors
from qjax.interop._write.derive import torch_modules
from qjax.interop._write.eager_dynamic import eager_dynamic
from qjax.interop._write.eager_static import eager_static
from qjax.interop._write.fx_reference import fx_reference
from qjax.interop._write.load_prepared import PreparedState, load_prepared
from qjax.interop._write.modules import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    Embedding,
    FloatFunctional,
    Linear,
    TorchModule,
)
from qjax.interop._write.prepared import ptq_prepared, qat_prepared
from qjax.interop._write.torchao import save_torchao

__all__ = [
    "Answer",
    "Checkpoint",
    "Comparison",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Embedding",
    "Explanation",
    "Finding",
    "FloatFunctional",
    "Linear",
    "Origin",
    "Point",
    "PointDifference",
    "PointTable",
    "PreparedState",
    "QuantPoint",
    "TorchModule",
    "compare",
    "eager_dynamic",
    "eager_static",
    "explain",
    "fx_reference",
    "interpret",
    "load",
    "load_prepared",
    "output_point",
    "plot",
    "points",
    "ptq_prepared",
    "qat_prepared",
    "save",
    "save_compressed_tensors",
    "save_torchao",
    "torch_modules",
]
