"""Train a Flax NNX module that runs two of its layers by `bidirectional`.

The rows are ragged. The task is to tell of each symbol whether it is seen elsewhere in
its row. The model answers by its forward layer, by its backward layer, or by both.
"""

from functools import partial

import jax
import numpy as np
import optax
from _repeats import (
    HIDDEN,
    SYMBOLS,
    batch,
    direction,
    loss_and_score,
    options,
    progress,
    report,
)
from flax import nnx

from jax_revseg import bidirectional


class Tagger(nnx.Module):
    """Symbols (N, T) and the lengths of the rows to logits (N, T)."""

    def __init__(self, name, rngs):
        self.forward, self.backward = (
            nnx.RNN(nnx.GRUCell(SYMBOLS, HIDDEN, rngs=rngs), rngs=rngs)
            for _ in range(2)
        )
        self.name = name
        width = 2 * HIDDEN if name == "both" else HIDDEN
        self.head = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, symbols, lengths):
        x, merge = jax.nn.one_hot(symbols, SYMBOLS), partial(direction, self.name)
        states = bidirectional(self.forward, self.backward, x, lengths, merge=merge)
        return self.head(states)[..., 0]


@nnx.jit
def step(model, optimiser, symbols, lengths, labels):
    @partial(nnx.value_and_grad, has_aux=True)
    def gradient(model):
        return loss_and_score(model(symbols, lengths), lengths, labels)

    figures, grads = gradient(model)
    optimiser.update(model, grads)
    return figures


def train(name, steps):
    model, rng = Tagger(name, nnx.Rngs(0)), np.random.default_rng(0)
    optimiser = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    history = []
    for _ in progress(steps, name):
        figures = step(model, optimiser, *batch(rng))
        history.append([float(figure) for figure in figures])
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    return name, sum(leaf.size for leaf in leaves), history


if __name__ == "__main__":
    arguments = options(__doc__)
    report([train(name, arguments.steps) for name in ("forward", "backward", "both")])
