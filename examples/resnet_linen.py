"""A Linen ResNet reads digits in 8 bits, its batch norms folded; running averages and ranges are updated in one step.

python -m examples.resnet_linen
"""

import functools

import jax
import optax
from flax import linen as nn

import qjax
from examples._common import accuracy, batches, compare, cross_entropy, digits


class Block(nn.Module):
    channels: int
    strides: int

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        conv = functools.partial(nn.Conv, self.channels, use_bias=False)
        y = nn.relu(norm()(conv((3, 3), self.strides)(x)))
        y = norm()(conv((3, 3))(y))
        if x.shape != y.shape:
            x = norm()(conv((1, 1), self.strides, name="shortcut")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        for channels, strides in ((8, 1), (16, 2)):
            x = Block(channels, strides)(x, train)
        return nn.Dense(10, name="head")(x.mean(axis=(1, 2)))


def main():
    (images, labels), (test_images, test_labels) = digits()
    images, test_images = images[..., None], test_images[..., None]
    model = ResNet()

    # What is quantized is each weight with its batch norm folded in, in training too, as in torch's ConvBn modules.
    recipe = qjax.recipes.torch_qat("onednn", averaging_constant=0.1, batch_norm="fold_if_present")
    q = qjax.flax.linen.prepare(model, recipe, engine="onednn")
    variables = jax.jit(q.init)(jax.random.key(0), images[:1])  # params, batch_stats and quant
    print(q.ops(variables, images[:1]), end="\n\n")

    params, rest = variables.pop("params"), variables
    optimizer = optax.adam(0.01)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, rest, opt_state, x, y):
        def loss_of(params):
            variables = {"params": params, **rest}
            logits, updates = q.apply(variables, x, train=True, mutable=["batch_stats", "quant"])
            return cross_entropy(logits, y), updates

        (loss, rest), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), rest, opt_state, loss

    losses = []
    for x, y in batches(images, labels, size=64, steps=80):
        params, rest, opt_state, loss = step(params, rest, opt_state, x, y)
        losses.append(float(loss))

    variables = {"params": params, **rest}
    integer = q.convert(variables, images[:1], train=False)
    float_logits = jax.jit(model.apply)(variables, test_images)
    logits = jax.jit(q.apply)(variables, test_images)
    integer_logits = jax.jit(integer)(test_images)
    return compare("accuracy", accuracy, test_labels, losses, float_logits, logits, integer_logits)


if __name__ == "__main__":
    main()
