"""Lowering a Pallas kernel for a platform that is not at hand, and what else the tests of kernels share."""

import contextlib
import warnings

import jax
import numpy as np

PLATFORMS = ("gpu", "tpu")
#: What a kernel may meet: ties, both zeros, denormals, the smallest and the largest numbers.
ODD_FINITE = np.array(
    [0.0, -0.0, 0.5, 1.5, 2.5, -0.5, -2.5, 0.25, 1e-40, -1e-40, 2.0**-126, 3e38, -3e38, 1e-30, 5.0, 5.0000005],
    np.float32,
)
ODD = np.concatenate([ODD_FINITE, np.array([np.inf, -np.inf, np.nan], np.float32)])


def lower(function, *args, platform):
    """The module that would be compiled for the platform. JAX 0.12 wants to know which GPU, and takes an abstract one."""
    device = contextlib.nullcontext()
    if platform == "gpu" and hasattr(jax.sharding, "AbstractDevice"):
        kind = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
        device = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=kind))
    with device, warnings.catch_warnings():
        # JAX 0.12 says so; qjax lets 0.13 in when it has been read, and docs/kernels.md tells what becomes of the kernels.
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        traced = jax.jit(function).trace(*args)
        return traced.lower(lowering_platforms=("cuda" if platform == "gpu" else "tpu",)).as_text()


def assert_lowers(function, *args, platform):
    """The kernel becomes a call of the platform's compiler: Triton on a GPU, Mosaic on a TPU."""
    text = lower(function, *args, platform=platform)
    assert ("xla.gpu.triton" if platform == "gpu" else "tpu_custom_call") in text


def assert_same_bits(found, wanted):
    """Equal to the last bit, the signs of zeros too; a NaN equals a NaN."""
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    if np.issubdtype(found.dtype, np.integer) or found.dtype == bool:
        np.testing.assert_array_equal(found, wanted)
        return
    found, wanted = found.astype(np.float32), wanted.astype(np.float32)
    np.testing.assert_array_equal(found, wanted)
    zero = wanted == 0
    np.testing.assert_array_equal(np.signbit(found[zero]), np.signbit(wanted[zero]))
