"""From an accumulator to the codes of the next tensor, or to floats: the formulas of the deployed kernels, a file for each.

Simulation and integer program both end here, so that what one predicts the other computes.

| engine    | dots              | convolutions                                                                        |
|-----------|-------------------|-------------------------------------------------------------------------------------|
| `fbgemm`  | fbgemm            | fbgemm                                                                              |
| `onednn`  | onednn            | onednn's, which takes the scale of the weight as it is                              |
| `qnnpack` | qnnpack           | qnnpack                                                                             |
| `x86`     | fbgemm            | onednn's where torch hands them to it, else fbgemm                                  |
| `exact`   | one exact rounding of the real result                                                                   |

These are what PyTorch 2.13 computes on x86 processors with VNNI instructions; the tests compare each with its kernels.
"""

from qjax._requantize._accumulator import Accumulator
from qjax._requantize._engines import ENGINES, Engine, Engines, Kernel, check_engine, kernel_of
from qjax._requantize._fbgemm import add_bias, requantize, requantize_unclamped

__all__ = [
    "ENGINES",
    "Accumulator",
    "Engine",
    "Engines",
    "Kernel",
    "add_bias",
    "check_engine",
    "kernel_of",
    "requantize",
    "requantize_unclamped",
]
