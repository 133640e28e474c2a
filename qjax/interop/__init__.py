"""What the arrays of a checkpoint mean, without torch: read, explained and written."""

from qjax.interop._answer import Answer, output_point
from qjax.interop._checkpoint import Checkpoint, load, save
from qjax.interop._compare import Comparison, compare
from qjax.interop._derive import torch_modules
from qjax.interop._dialects import points
from qjax.interop._differences import PointDifference
from qjax.interop._eager_dynamic import eager_dynamic
from qjax.interop._eager_static import eager_static
from qjax.interop._explain import Explanation, Point, explain
from qjax.interop._findings import Finding
from qjax.interop._fx_reference import fx_reference
from qjax.interop._interpret import interpret
from qjax.interop._load_prepared import PreparedState, load_prepared
from qjax.interop._modules import (
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
from qjax.interop._plot import plot
from qjax.interop._points import Origin, PointTable, QuantPoint
from qjax.interop._save_compressed import save_compressed_tensors
from qjax.interop._save_torchao import save_torchao
from qjax.interop._write_prepared import ptq_prepared, qat_prepared

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
