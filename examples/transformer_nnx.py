"""An NNX transformer with dropout learns to spell in 8 bits; the prepared module is trained like any NNX module.

python -m examples.transformer_nnx
"""

import jax
import optax
from flax import nnx

import qjax
from examples._common import CONTEXT, batches, compare, cross_entropy, text

WIDTH, LAYERS, HEADS = 32, 2, 2


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.05, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norms[0](x), mask=mask)
        return x + self.dropout(self.down(nnx.relu(self.up(self.norms[1](x)))))


class Transformer(nnx.Module):
    def __init__(self, alphabet, rngs):
        self.embed = nnx.Embed(alphabet, WIDTH, rngs=rngs)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (CONTEXT, WIDTH)))
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm, self.head = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, alphabet, rngs=rngs)

    def __call__(self, tokens):
        x, mask = self.embed(tokens) + self.position[: tokens.shape[1]], nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


def main():
    train, test, alphabet = text()
    model = Transformer(alphabet, nnx.Rngs(0))

    recipe = qjax.recipes.torch_qat("onednn", averaging_constant=0.1)
    q = qjax.flax.nnx.prepare(model, recipe, train[:1, :-1], engine="onednn")
    print(q.ops(train[:1, :-1]), end="\n\n")

    optimizer = nnx.Optimizer(q, optax.adam(0.005), wrt=nnx.Param)

    @nnx.jit
    def step(q, optimizer, tokens):
        def loss_of(q):
            return cross_entropy(q(tokens[:, :-1]), tokens[:, 1:])

        loss, grads = nnx.value_and_grad(loss_of)(q)
        optimizer.update(q, grads)
        return loss

    losses = [float(step(q, optimizer, tokens)) for (tokens,) in batches(train, size=32, steps=100)]

    q.eval()  # dropout off, ranges frozen; it switches the model inside as well
    tokens, target = test[:, :-1], test[:, 1:]
    integer = q.convert(tokens[:1])
    evaluate = nnx.jit(lambda module, tokens: module(tokens))
    float_logits, logits, integer_logits = evaluate(model, tokens), evaluate(q, tokens), jax.jit(integer)(tokens)
    return compare("loss", cross_entropy, target, losses, float_logits, logits, integer_logits)


if __name__ == "__main__":
    main()
