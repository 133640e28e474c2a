"""A residual network with batch norm, in Linen and in NNX, its batch norms folded: trained, evaluated, converted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import qjax
from tests.transform.models import assert_trees_close, jitted, mismatches, normal

FLOAT = qjax.Recipe([qjax.Rule(".*", batch_norm="fold_if_present")])
QAT = qjax.recipes.torch_qat("fbgemm", version=0, averaging_constant=0.5, batch_norm="fold_if_present")


class Block(nn.Module):
    """conv-bn-relu, conv-bn, added to the input or to its downsampling conv-bn, relu."""

    features: int
    strides: int
    train: bool

    @nn.compact
    def __call__(self, x):
        strides = (self.strides, self.strides)
        y = nn.relu(self.norm()(nn.Conv(self.features, (3, 3), strides, use_bias=False)(x)))
        y = self.norm()(nn.Conv(self.features, (3, 3))(y))
        if y.shape != x.shape:
            x = self.norm()(nn.Conv(self.features, (1, 1), strides, use_bias=False)(x))
        return nn.relu(x + y)

    def norm(self):
        return nn.BatchNorm(use_running_average=not self.train, momentum=0.8)


class ResNet(nn.Module):
    """A block that changes the size, rematerialized, and a dense head."""

    train: bool

    @nn.compact
    def __call__(self, x):
        x = nn.remat(Block)(6, 2, self.train)(x)
        return nn.Dense(3)(x.mean((1, 2)))


def linen_net(rng):
    def fn(variables, x, train):
        out = ResNet(train).apply(variables, x, mutable=["batch_stats"] if train else False)
        return out if train else (out, {})

    variables = ResNet(False).init(jax.random.key(0), jnp.zeros((1, 6, 6, 4)))
    return fn, variables


class NnxBlock(nnx.Module):
    """The same block in NNX."""

    def __init__(self, inputs, features, strides, rngs):
        def conv(inputs, kernel, strides):
            return nnx.Conv(inputs, features, (kernel, kernel), strides, use_bias=False, rngs=rngs)

        def norm():
            return nnx.BatchNorm(features, momentum=0.8, rngs=rngs)

        self.conv1, self.bn1 = conv(inputs, 3, strides), norm()
        self.conv2, self.bn2 = conv(features, 3, 1), norm()
        self.downsample = (
            nnx.Sequential(conv(inputs, 1, strides), norm()) if (inputs, 1) != (features, strides) else None
        )

    def __call__(self, x):
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return nnx.relu(y + (x if self.downsample is None else self.downsample(x)))


class NnxResNet(nnx.Module):
    """Two blocks, one of each kind, and a dense head, in NNX."""

    def __init__(self, rngs):
        self.block1, self.block2 = NnxBlock(4, 4, 1, rngs), NnxBlock(4, 6, 2, rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.block2(self.block1(x)).mean((1, 2)))


def nnx_net(rng):
    model = NnxResNet(nnx.Rngs(0))
    model.train()
    train_graph, state = nnx.split(model)
    model.eval()
    eval_graph, _ = nnx.split(model)

    def fn(state, x, train):
        model = nnx.merge(train_graph if train else eval_graph, state)
        return model(x), nnx.state(model, nnx.BatchStat) if train else {}

    return fn, state


def updated(params, new):
    """The variables of Linen or the state of NNX with the new running statistics."""
    if isinstance(params, nnx.State):
        return nnx.merge_state(params, new)
    return params | new


NETS = pytest.mark.parametrize(
    "net", [pytest.param(linen_net, id="linen"), pytest.param(nnx_net, id="nnx", marks=pytest.mark.long)]
)


@pytest.mark.long
@NETS
def test_float_networks_folded_are_the_networks(rng, net):
    fn, params = net(rng)
    params = jax.tree.map(lambda a: a + 0.2 * jnp.abs(normal(rng, *a.shape)), params)
    x, prepared = normal(rng, 8, 6, 6, 4), qjax.prepare(fn, FLOAT)
    for train in (False, True):
        folded = [op.name for op in prepared.ops(params, x, train) if op.batch_norm == "folded"]
        assert len(folded) == (3 if net is linen_net else 5)
        got = jitted(lambda *args: prepared(prepared.init(*args), *args)[0], params, x, train)
        assert_trees_close(got, jitted(fn, params, x, train), rtol=1e-5)


@NETS
def test_a_residual_network_trains_and_its_evaluation_is_the_integer_program(rng, net):
    fn, params = net(rng)
    x = normal(rng, 16, 6, 6, 4)
    target = jnp.asarray(rng.normal(size=(16, 3)).astype(np.float32))
    prepared = qjax.prepare(fn, QAT)

    @jax.jit
    def step(params, qvars):
        def loss(params):
            (out, new), qv = prepared(qvars, params, x, True)
            return jnp.mean((out - target) ** 2), (new, qv)

        (value, (new, qvars)), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, updated(jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), new), qvars

    qvars, losses = prepared.init(params, x, True), []
    for _ in range(10):
        value, params, qvars = step(params, qvars)
        losses.append(float(value))
    assert losses[-1] < 0.75 * losses[0]

    integer = qjax.convert(prepared, qvars, params, x, False)
    assert all(op.bias is not None for op in integer.ops)
    codes = jitted(prepared.codes, qvars, params, x, False)
    assert mismatches(jitted(integer.codes, x, False), codes)[0] == 0
    simulated = jnp.mean((jitted(integer, x, False)[0] - target) ** 2)
    assert simulated < losses[0]
