"""Every kernel, compiled to machine code for TPUs that are not at hand, where libtpu is installed: more than lowering shows.

pip install libtpu                # the release that `pip show jax` names for its extra "tpu"
python -m pytest -m long tests/kernels/test_compiles_for_tpu.py
"""

import jax
import jax.numpy as jnp
import pytest

import qjax
from qjax import kernels

pytest.importorskip("libtpu", reason="compiles for a TPU, which wants its compiler; no TPU is needed")
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]

INT8 = qjax.QuantSpec(qjax.int8, symmetric=True)
UINT8 = qjax.QuantSpec(qjax.uint8)
INT4 = qjax.QuantSpec(qjax.int4, symmetric=True)
HOW = {"platform": "tpu", "interpret": False}
N = 4096
ONE, POINT, CHANNELS = (
    jax.ShapeDtypeStruct(*each) for each in (((), jnp.float32), ((), jnp.int32), ((N,), jnp.float32))
)


def array(rows, columns=N, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((rows, columns), dtype)


def blocks(kernel, spec):
    return lambda x: jax.tree.leaves(kernel(x, spec, **HOW)), (array(N),)


def packed(spec, rows):
    groups = N // spec.granularity.size
    scale, point = array(groups, dtype=jnp.float32), array(groups, dtype=jnp.int32)

    def run(x, words, scale, point):
        return kernels.packed_matmul(x, words, qjax.QParams(scale, point), spec, **HOW)

    return run, (array(rows), array(N // 2, dtype=jnp.uint8), scale, point)


def int8(spec, rows):
    w8 = INT8.replace(granularity=qjax.PerChannel(-1))

    def run(x, codes, channels, scale, point):
        weight = qjax.QTensor(codes, channels, jnp.zeros(N, jnp.int32), w8)
        qparams = None if isinstance(spec.granularity, qjax.PerToken) else qjax.QParams(scale, point)
        return kernels.int8_matmul(x, weight, qparams, spec, bias=channels, **HOW)

    return run, (array(rows), array(N, dtype=jnp.int8), CHANNELS, ONE, POINT)


def elementwise(kernel, spec, *more):
    def run(x, scale, point, *more):
        how = {"key": more[0]} if more else {}
        return jax.tree.leaves(kernel(x, qjax.QParams(scale, point), spec, **how, **HOW))

    return run, (array(N), ONE, POINT, *more)


CASES = {
    **{
        f"quantize {name}": blocks(kernels.quantize_blocks, getattr(qjax, name))
        for name in ("mxfp8_e4m3", "mxfp4", "nvfp4")
    },
    "fake_quantize mxint8": blocks(kernels.fake_quantize_blocks, qjax.mxint8),
    "packed groups": packed(INT4.replace(granularity=qjax.PerGroup(0, 128)), N),
    "packed decode": packed(qjax.QuantSpec(qjax.uint4, granularity=qjax.PerGroup(0, 64)), 1),
    "packed mxfp4": packed(qjax.mxfp4.replace(granularity=qjax.PerGroup(0, 32)), N),
    "packed nvfp4": packed(qjax.nvfp4.replace(granularity=qjax.PerGroup(0, 16)), 1),
    "int8 affine": int8(UINT8, N),
    "int8 tokens": int8(INT8.replace(granularity=qjax.PerToken()), 1),
    "observe": elementwise(kernels.observe_quantize, UINT8),
    "stochastic": elementwise(
        kernels.quantize_stochastic, UINT8.replace(rounding="stochastic"), jax.ShapeDtypeStruct((2,), jnp.uint32)
    ),
    "histogram": (lambda x: kernels.histogram(x, **HOW), (array(N),)),
}


@pytest.fixture(scope="module", params=["v5e:2x2", "v6e:2x2"])
def device(request):
    from jax.experimental import topologies

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")  # do not ask the network what machine this is
        yield topologies.get_topology_desc(request.param, "tpu").devices[0]


@pytest.mark.parametrize("name", CASES)
def test_compiles(name, device):
    function, arguments = CASES[name]
    placed = jax.sharding.SingleDeviceSharding(device)
    shapes = [jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=placed) for each in arguments]
    assert jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",)).compile().memory_analysis() is not None
