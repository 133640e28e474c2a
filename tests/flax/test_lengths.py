"""What was calibrated at one batch size and sequence length works at every other, in mode "eval" and converted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import qjax
from tests.transform.models import INPUTS, jitted, mismatches, normal
from tests.transform.test_scan_linen import Transformer

MODELS = {
    "dense": lambda: nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(8)]),
    "LSTM": lambda: nn.RNN(nn.LSTMCell(5)),
    "transformer": lambda: Transformer(scanned=True),
}
LONG = ("LSTM", "transformer")  # tests/transform/test_scan_linen.py has nn.OptimizedLSTMCell


@pytest.mark.parametrize("name", ["dense", *(pytest.param(name, marks=pytest.mark.long) for name in LONG)])
def test_every_batch_size_and_length(rng, name):
    with jax.numpy_rank_promotion("allow"):
        model, x = MODELS[name](), normal(rng, 64, 4, 8)
        q = qjax.flax.linen.prepare(model, INPUTS)
        variables = jitted(q.calibrate, jax.jit(model.init)(jax.random.key(0), x), x)
        program, fixed = q.convert(variables, x), {}
        for shape in ((1, 1), (5, 9)):
            new = 0.8 * normal(rng, *shape, 8)
            blank = jax.eval_shape(q.init_quant, {"params": variables["params"]}, new)
            assert jax.tree.map(jnp.shape, blank) == jax.tree.map(jnp.shape, variables)  # no state depends on them
            evaluate = jax.jit(lambda v, x: (q.apply(v, x), q.codes(v, x), model.apply(v, x)))
            want, codes, real = evaluate(variables, new)
            out, computed = jax.jit(lambda x: (program(x), program.codes(x)))(new)
            assert mismatches(codes, computed)[0] == 0
            np.testing.assert_allclose(out, want, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(want, real, atol=0.2)
            weights = {key: np.asarray(each.codes) for key, each in codes.items() if key.endswith("/weight")}
            fixed = fixed or weights
            jax.tree.map(np.testing.assert_array_equal, weights, fixed)
