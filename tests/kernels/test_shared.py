"""What holds for all kernels: no cost where they are not called, no second compile, and the same in a simulator of a TPU."""

import ast
import importlib
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import kernels

MXFP4 = qjax.mxfp4.replace(granularity=qjax.PerGroup(0, 32))
UINT8 = qjax.QuantSpec(qjax.uint8)
WEIGHT = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=qjax.PerChannel(-1))


def calls(rng):
    """Each kernel by name as a function of x, (40, 160), and of how to run it."""
    packed = jnp.asarray(rng.integers(0, 256, (80, 70)), jnp.uint8)
    groups = qjax.QParams(jnp.ones((5, 70)), jnp.zeros((5, 70), jnp.int32))
    codes = jnp.asarray(rng.integers(-128, 128, (160, 70)), jnp.int8)
    weight = qjax.QTensor(codes, jnp.ones(70), jnp.zeros(70, jnp.int32), WEIGHT)
    one, key = qjax.QParams(jnp.float32(0.02), jnp.int32(128)), jax.random.key(0)
    stochastic = UINT8.replace(rounding="stochastic")
    return {
        "quantize_blocks": lambda x, **how: kernels.quantize_blocks(x, qjax.nvfp4, **how),
        "fake_quantize_blocks": lambda x, **how: kernels.fake_quantize_blocks(x, qjax.mxfp4, **how),
        "packed_matmul": lambda x, **how: kernels.packed_matmul(x, packed, groups, MXFP4, **how),
        "int8_matmul": lambda x, **how: kernels.int8_matmul(x, weight, one, UINT8, **how),
        "observe_quantize": lambda x, **how: kernels.observe_quantize(x, one, UINT8, **how),
        "quantize_stochastic": lambda x, **how: kernels.quantize_stochastic(x, one, stochastic, key=key, **how),
        "histogram": lambda x, **how: kernels.histogram(x, 512, **how),
    }


NAMES = sorted(set(kernels.__all__) - {"Observed", "Support", "supports"})


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_simulated_tpu_computes_the_same(rng, name):
    """With its memories apart, NaN in what was not written, and races found."""
    from jax.experimental.pallas import tpu

    call, x = calls(rng)[name], jnp.asarray(rng.normal(size=(40, 160)).astype(np.float32))
    simulated = tpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
    found, wanted = (call(x, platform="tpu", interpret=how) for how in (simulated, True))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_no_second_compile(rng, name):
    call, other = calls(rng)[name], jnp.asarray(rng.normal(size=(40, 160)).astype(np.float32))
    run = importlib.import_module(getattr(kernels, name).__module__)._run
    call(jnp.ones((40, 160)))
    compiled = run._cache_size()
    call(other)
    assert run._cache_size() == compiled


def test_pallas_is_imported_where_it_is_used():
    """`import qjax` takes none of its time."""
    for file in Path(kernels.__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_bytes()).body:
            assert "pallas" not in ast.dump(node) or not isinstance(node, ast.Import | ast.ImportFrom), file


def test_a_jax_without_the_backend_is_a_reason(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    x = jnp.ones((2, 32))
    assert "has no jax.experimental.pallas.triton" in kernels.supports(kernels.histogram, x, platform="gpu").reason
    with pytest.raises(ValueError, match=r"not supported here: JAX .* has no jax\.experimental\.pallas\.tpu"):
        kernels.histogram(x, platform="tpu")
