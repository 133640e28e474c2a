"""Ready-made recipes: what other libraries do by default, as functions of what people vary.

| function      | weights                     | activations                          | whose                               |
|---------------|-----------------------------|--------------------------------------|-------------------------------------|
| torch_static  | int8 per channel            | uint8 per tensor, histogram          | torch's `get_default_qconfig`       |
| torch_qat     | int8 per channel            | uint8 per tensor, moving average     | torch's `get_default_qat_qconfig`   |
| torch_dynamic | int8 per tensor             | uint8 per tensor, dynamic            | torch's `default_dynamic_qconfig`   |
| w8a8_dynamic  | int8 per channel            | int8 per token, dynamic              | compressed-tensors W8A8, torchao    |
| w4a16         | int4 in groups of 128       | float                                | compressed-tensors W4A16            |
| fp8           | e4m3 per channel or tensor  | e4m3 per token, dynamic, or static   | compressed-tensors FP8, FP8_DYNAMIC |
| mxfp8         | MXFP8                       | MXFP8, dynamic                       | OCP MX, torchao                     |
| mxfp4         | MXFP4                       | MXFP4, dynamic                       | OCP MX, torchao                     |
| nvfp4         | NVFP4                       | NVFP4, dynamic                       | NVIDIA, torchao                     |

Each returns a `qjax.Recipe` for the ops whose names match `pattern`. `print` shows what it says. Scales follow the op, not an
index: one for each output channel, or groups along what is summed over, in every layout. What is to be otherwise is added
behind, since the last rule that matches decides:

    recipe = qjax.recipes.torch_qat("x86") + [qjax.Rule("head")]        # the head stays in float
    recipe = qjax.recipes.w8a8_dynamic("block.*") + qjax.recipes.w4a16("block.*/mlp/.*")
"""

from qjax.recipes._language import fp8, mxfp4, mxfp8, nvfp4, w4a16, w8a8_dynamic
from qjax.recipes._torch import torch_dynamic, torch_qat, torch_static

__all__ = [
    "fp8",
    "mxfp4",
    "mxfp8",
    "nvfp4",
    "torch_dynamic",
    "torch_qat",
    "torch_static",
    "w4a16",
    "w8a8_dynamic",
]
