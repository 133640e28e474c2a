"""A Linen LSTM reads digits row by row in 8 bits; what was calibrated on 8 rows holds for any number of them.

python -m examples.lstm_linen
"""

import jax
import optax
from flax import linen as nn

import qjax
from examples._common import accuracy, batches, compare, cross_entropy, digits


class Reader(nn.Module):
    @nn.compact
    def __call__(self, rows):
        states = nn.RNN(nn.OptimizedLSTMCell(32))(rows)
        return nn.Dense(10, name="head")(states[:, -1])


def main():
    (images, labels), (test_images, test_labels) = digits()
    model = Reader()

    q = qjax.flax.linen.prepare(model, qjax.recipes.torch_qat("onednn", averaging_constant=0.1), engine="onednn")
    variables = jax.jit(q.init)(jax.random.key(0), images[:1])
    print(q.ops(variables, images[:1]), end="\n\n")

    params, quant = variables["params"], variables["quant"]
    optimizer = optax.adam(0.01)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, quant, opt_state, x, y):
        def loss_of(params):
            logits, updates = q.apply({"params": params, "quant": quant}, x, mutable=["quant"])
            return cross_entropy(logits, y), updates["quant"]

        (loss, quant), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), quant, opt_state, loss

    losses = []
    for x, y in batches(images, labels, size=64, steps=120):
        params, quant, opt_state, loss = step(params, quant, opt_state, x, y)
        losses.append(float(loss))

    variables = {"params": params, "quant": quant}
    integer = q.convert(variables, images[:1])
    float_logits = jax.jit(model.apply)(variables, test_images)
    logits = jax.jit(q.apply)(variables, test_images)
    integer_logits = jax.jit(integer)(test_images)
    return compare("accuracy", accuracy, test_labels, losses, float_logits, logits, integer_logits)


if __name__ == "__main__":
    main()
