"""What training is for: the converted program, int8 in int32 sums or with weights alone quantized, beside the float one.

The stored weights are arguments of the jitted function, as parameters are: none becomes a constant of the program.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import qjax
from benchmarks import _peers
from benchmarks._case import Case, Maker
from benchmarks._measure import Contender
from benchmarks._memory import temporary
from benchmarks._models import CNN, MLP
from benchmarks.cases_steps import A8, recipe

STATIC = recipe(qjax.observers.min_max(A8))
FOUND = recipe(qjax.observers.dynamic(A8))
INT8_WEIGHTS = recipe(None)
INT4_WEIGHTS = recipe(
    None, qjax.QuantSpec(qjax.int4, symmetric=True, granularity=qjax.PerGroup("contracted", 128, pad=True))
)


def called(fn: Callable[..., jax.Array], arrays: Any, x: jax.Array, plain: jax.Array) -> Contender:
    """A contender that calls fn(arrays, x); its facts: how far that is from the float result, how many bytes it holds."""
    compiled = jax.jit(fn).lower(arrays, x).compile()
    off = np.abs(np.asarray(compiled(arrays, x), np.float32) - np.asarray(plain, np.float32)).max()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    facts = {"differs": off / np.abs(np.asarray(plain, np.float32)).max(), "bytes": held}
    return Contender(lambda: jax.block_until_ready(compiled(arrays, x)), memory=temporary(compiled), facts=facts)


def converted(
    apply: Callable[..., jax.Array], chosen: qjax.Recipe, params: Any, x: jax.Array, plain: jax.Array
) -> Contender:
    prepared = qjax.prepare(apply, chosen)
    _, qvars = jax.jit(functools.partial(prepared, mode="calibrate"))(prepared.init(params, x), params, x)
    program = qjax.convert(prepared, qvars, params, x)
    return called(lambda arrays, x: program.with_arrays(arrays)(x), program.arrays(), x, plain)


def simulated(apply: Callable[..., jax.Array], params: Any, x: jax.Array, plain: jax.Array) -> Contender:
    prepared = qjax.prepare(apply, FOUND)
    qvars = prepared.init(params, x)
    return called(lambda params, x: prepared(qvars, params, x, mode="eval")[0], params, x, plain)


def qwix_ptq(module: nn.Module, params: Any, x: jax.Array, plain: jax.Array, *, act: str | None) -> Contender:
    """Qwix's post-training quantization: int8 weights per channel; activations int8 with a scale a row, found at each call."""
    import qwix

    rules = [qwix.QuantizationRule(module_path=".*", weight_qtype="int8", act_qtype=act)]
    quantized = qwix.quantize_model(module, qwix.PtqProvider(rules))
    abstract = jax.eval_shape(quantized.init, jax.random.key(0), x)["params"]
    return called(
        lambda params, x: quantized.apply({"params": params}, x), qwix.quantize_params(params, abstract), x, plain
    )


def torch_linear(widths: tuple[int, ...], x: jax.Array, quantized: bool) -> Contender:
    """torch's MLP, and its dynamic quantization: int8 weights per tensor, uint8 activations found at each call."""
    _peers.torch_device()
    import warnings

    import torch

    layers: list[Any] = []
    for inputs, outputs in zip((x.shape[-1], *widths), widths, strict=False):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    module = torch.nn.Sequential(*layers[:-1]).eval()
    if quantized:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.ao.quantization.quantize_dynamic(module, {torch.nn.Linear}, dtype=torch.qint8)
    array = _peers.to_torch(x)

    def run() -> Any:
        with torch.inference_mode():
            return module(array)

    run()
    return Contender(run, base="torch float")


def contenders(module: nn.Module, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Mapping[str, Maker]:
    x = jax.random.normal(jax.random.key(0), shape, jnp.float32).astype(dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), module.init(jax.random.key(1), x)["params"])

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return module.apply({"params": params}, x)

    plain = jax.jit(apply)(params, x)
    makers: dict[str, Maker] = {
        "float": lambda: called(apply, params, x, plain),
        "qjax int8, static": lambda: converted(apply, STATIC, params, x, plain),
        "qjax int8, dynamic": lambda: converted(apply, FOUND, params, x, plain),
        "qjax int8 weights": lambda: converted(apply, INT8_WEIGHTS, params, x, plain),
        "qjax int4 weights": lambda: converted(apply, INT4_WEIGHTS, params, x, plain),
        "qjax simulated": lambda: simulated(apply, params, x, plain),
        "Qwix int8, dynamic": lambda: qwix_ptq(module, params, x, plain, act="int8"),
        "Qwix int8 weights": lambda: qwix_ptq(module, params, x, plain, act=None),
    }
    if isinstance(
        module, CNN
    ):  # four-bit weights are grouped along what is summed, which a kernel of 3 × 3 is too small for
        del makers["qjax int4 weights"]
    if isinstance(module, MLP) and jax.default_backend() == "cpu":
        makers["torch float"] = lambda: torch_linear(module.widths, x, False)
        makers["torch int8, dynamic"] = lambda: torch_linear(module.widths, x, True)
    return makers


def linear(features: int, batch: int) -> Callable[[bool], Mapping[str, Maker]]:
    """One matmul. In bfloat16 on a GPU, which is what it is compared with there."""

    def build(tiny: bool) -> Mapping[str, Maker]:
        size, rows = (128, min(batch, 4)) if tiny else (features, batch)
        if batch == features and jax.default_backend() == "cpu" and not tiny:
            size = rows = features // 4  # 4096³ is for a GPU
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        return contenders(MLP((size,)), (rows, size), dtype)

    return build


CASES = (
    Case(
        "inference/mlp",
        "float",
        lambda tiny: contenders(MLP((16, 10)), (4, 128)) if tiny else contenders(MLP(), (256, 784)),
        quick=True,
        rounds=60,
        beside=True,
        seconds=6,
    ),
    Case(
        "inference/cnn",
        "float",
        lambda tiny: contenders(CNN((4, 4, 4)), (2, 8, 8, 1)) if tiny else contenders(CNN(), (64, 28, 28, 1)),
        rounds=60,
        beside=True,
        seconds=10,
    ),
    Case("inference/decode", "float", linear(4096, 1), quick=True, rounds=60, seconds=6, beside=True),
    Case("inference/matmul", "float", linear(4096, 4096), rounds=60, seconds=8, beside=True),
)
