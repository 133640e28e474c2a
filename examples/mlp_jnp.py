"""An MLP in plain jnp reads digits in 8 bits.

python -m examples.mlp_jnp
"""

import jax
import jax.numpy as jnp
import optax

import qjax
from examples._common import accuracy, batches, compare, cross_entropy, digits


def mlp(params, x):
    x = jax.nn.relu(x @ params["hidden"]["w"] + params["hidden"]["b"])
    return x @ params["head"]["w"] + params["head"]["b"]


def dense(key, inputs, outputs):
    return {"w": jax.random.normal(key, (inputs, outputs)) / inputs**0.5, "b": jnp.zeros(outputs)}


def main():
    (images, labels), (test_images, test_labels) = digits()
    images, test_images = images.reshape(-1, 64), test_images.reshape(-1, 64)
    keys = jax.random.split(jax.random.key(0))
    params = {"hidden": dense(keys[0], 64, 32), "head": dense(keys[1], 32, 10)}

    prepared = qjax.prepare(mlp, qjax.recipes.torch_qat("onednn", averaging_constant=0.1), engine="onednn")
    qvars = prepared.init(params, images[:1])
    print(prepared.ops(params, images[:1]), end="\n\n")

    optimizer = optax.adam(0.01)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, qvars, opt_state, x, y):
        def loss_of(params):
            logits, new_qvars = prepared(qvars, params, x, mode="train")
            return cross_entropy(logits, y), new_qvars

        (loss, qvars), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), qvars, opt_state, loss

    losses = []
    for x, y in batches(images, labels, size=64, steps=150):
        params, qvars, opt_state, loss = step(params, qvars, opt_state, x, y)
        losses.append(float(loss))

    integer = qjax.convert(prepared, qvars, params)  # a function of the images alone; its weights are int8
    float_logits = jax.jit(mlp)(params, test_images)
    logits, _ = jax.jit(prepared, static_argnames="mode")(qvars, params, test_images, mode="eval")
    integer_logits = jax.jit(integer)(test_images)
    return compare("accuracy", accuracy, test_labels, losses, float_logits, logits, integer_logits)


if __name__ == "__main__":
    main()
