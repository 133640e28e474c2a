"""A Linen transformer, scanned over its layers and rematerialized, learns to spell in 8 bits.

Every layer has quantizers of its own: their state is stacked by layer, as the scanned weights are.

    python -m examples.transformer_linen
"""

import jax
import optax
from flax import linen as nn

import qjax
from examples._common import CONTEXT, batches, compare, cross_entropy, text

WIDTH, LAYERS, HEADS = 32, 3, 2


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS, name="attention")(y, mask=mask)
        y = nn.Dense(4 * WIDTH, name="up")(nn.LayerNorm()(x))
        return x + nn.Dense(WIDTH, name="down")(nn.relu(y)), None


class Transformer(nn.Module):
    alphabet: int

    @nn.compact
    def __call__(self, tokens):
        position = self.param("position", nn.initializers.normal(0.02), (CONTEXT, WIDTH))
        x = nn.Embed(self.alphabet, WIDTH)(tokens) + position[: tokens.shape[1]]
        layers = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=LAYERS,
        )
        x, _ = layers(name="layers")(x, nn.make_causal_mask(tokens))
        return nn.Dense(self.alphabet, name="head")(nn.LayerNorm()(x))


def main():
    train, test, alphabet = text()
    model = Transformer(alphabet)

    # torch's recipe leaves embeddings in float; this rule gives each row of the table a scale.
    table = qjax.QuantSpec(qjax.int8, symmetric=True, granularity=qjax.PerChannel("output"))
    embedding = qjax.Recipe([qjax.Rule("Embed_0", weight=table)])
    q = qjax.flax.linen.prepare(
        model, qjax.recipes.torch_qat("onednn", averaging_constant=0.1) + embedding, engine="onednn"
    )
    variables = jax.jit(q.init)(jax.random.key(0), train[:1, :-1])
    print(q.ops(variables, train[:1, :-1]), end="\n\n")

    params, quant = variables["params"], variables["quant"]
    optimizer = optax.adam(0.005)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, quant, opt_state, tokens):
        def loss_of(params):
            logits, updates = q.apply({"params": params, "quant": quant}, tokens[:, :-1], mutable=["quant"])
            return cross_entropy(logits, tokens[:, 1:]), updates["quant"]

        (loss, quant), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), quant, opt_state, loss

    losses = []
    for (tokens,) in batches(train, size=32, steps=100):
        params, quant, opt_state, loss = step(params, quant, opt_state, tokens)
        losses.append(float(loss))

    variables, tokens, target = {"params": params, "quant": quant}, test[:, :-1], test[:, 1:]
    integer = q.convert(variables, tokens[:1])
    float_logits = jax.jit(model.apply)(variables, tokens)
    logits, integer_logits = jax.jit(q.apply)(variables, tokens), jax.jit(integer)(tokens)
    return compare("loss", cross_entropy, target, losses, float_logits, logits, integer_logits)


if __name__ == "__main__":
    main()
