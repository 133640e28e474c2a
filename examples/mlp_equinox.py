"""An Equinox module is a pytree, so the plain function of its arrays is all that qjax needs.

python -m examples.mlp_equinox
"""

import equinox as eqx
import jax
import optax

import qjax
from examples._common import accuracy, batches, compare, cross_entropy, digits


def main():
    (images, labels), (test_images, test_labels) = digits()
    images, test_images = images.reshape(-1, 64), test_images.reshape(-1, 64)
    net = eqx.nn.MLP(64, 10, width_size=32, depth=2, key=jax.random.key(0))
    params, static = eqx.partition(net, eqx.is_array)

    def forward(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    prepared = qjax.prepare(forward, qjax.recipes.torch_qat("onednn", averaging_constant=0.1), engine="onednn")
    qvars = prepared.init(params, images[:1])
    print(prepared.ops(params, images[:1]), end="\n\n")

    optimizer = optax.adam(0.01)
    opt_state = optimizer.init(params)

    @eqx.filter_jit
    def step(params, qvars, opt_state, x, y):
        def loss_of(params):
            logits, new_qvars = prepared(qvars, params, x, mode="train")
            return cross_entropy(logits, y), new_qvars

        (loss, qvars), grads = eqx.filter_value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return eqx.apply_updates(params, updates), qvars, opt_state, loss

    losses = []
    for x, y in batches(images, labels, size=64, steps=150):
        params, qvars, opt_state, loss = step(params, qvars, opt_state, x, y)
        losses.append(float(loss))

    integer = qjax.convert(prepared, qvars, params)
    float_logits = jax.jit(forward)(params, test_images)
    logits, _ = jax.jit(prepared, static_argnames="mode")(qvars, params, test_images, mode="eval")
    integer_logits = jax.jit(integer)(test_images)
    return compare("accuracy", accuracy, test_labels, losses, float_logits, logits, integer_logits)


if __name__ == "__main__":
    main()
