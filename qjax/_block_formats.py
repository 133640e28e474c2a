"""Block formats by name: the specs of the OCP microscaling (MX) formats and of NVFP4.

Blocks lie along the last axis, which is the contracted one of `x @ w.T`; for another, `replace(granularity=...)`:

    qjax.mxfp4.replace(granularity=qjax.PerGroup(0, 32))
    qjax.mxfp8_e4m3.replace(scale_rule="mx_rceil")

| spec         | elements | block   | scale                      | bits a number |
|--------------|----------|---------|----------------------------|---------------|
| mxfp8_e4m3   | e4m3     | 32      | e8m0                       | 8.25          |
| mxfp8_e5m2   | e5m2     | 32      | e8m0                       | 8.25          |
| mxfp6_e3m2   | e3m2     | 32      | e8m0                       | 6.25          |
| mxfp6_e2m3   | e2m3     | 32      | e8m0                       | 6.25          |
| mxfp4        | e2m1     | 32      | e8m0                       | 4.25          |
| mxint8       | int8     | 32      | e8m0 (with the 2^-6 of the | 8.25          |
|              |          |         | elements taken into it)    |               |
| nvfp4        | e2m1     | 16      | e4m3, and a float32 for    | 4.5           |
|              |          |         | the tensor                 |               |
| nvfp4_16x16  | e2m1     | 16 × 16 | the same                   | 4.03          |

A scale is a float32 that holds a number of its format: a power of two not below 2^-126, or a number of E4M3 not below 2^-6,
as in torchao. The MX specification's rule is "mx_floor"; "mx_ceil", "mx_even" and "mx_rceil" are the others in use.

References:
  Open Compute Project, "Microscaling formats (MX) specification", version 1.0, 2023.
  NVIDIA, "Pretraining large language models with NVFP4", 2025 (arXiv:2509.25149).
"""

from __future__ import annotations

from qjax._formats import e2m1, e2m3, e3m2, e4m3, e5m2, int8
from qjax._granularity import PerBlock, PerGroup
from qjax._spec import QuantSpec

_MX = PerGroup(-1, 32)

mxfp8_e4m3 = QuantSpec(e4m3, granularity=_MX, scale_rule="mx_floor")
mxfp8_e5m2 = QuantSpec(e5m2, granularity=_MX, scale_rule="mx_floor")
mxfp6_e3m2 = QuantSpec(e3m2, granularity=_MX, scale_rule="mx_floor")
mxfp6_e2m3 = QuantSpec(e2m3, granularity=_MX, scale_rule="mx_floor")
mxfp4 = QuantSpec(e2m1, granularity=_MX, scale_rule="mx_floor")
mxint8 = QuantSpec(int8, symmetric=True, granularity=_MX, scale_rule="mx_floor")
nvfp4 = QuantSpec(e2m1, granularity=PerGroup(-1, 16), scale_rule="nvfp4")
nvfp4_16x16 = QuantSpec(e2m1, granularity=PerBlock((16, 16)), scale_rule="nvfp4")
