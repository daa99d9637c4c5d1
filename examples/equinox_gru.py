"""Train an Equinox module that runs two of its fields by `bidirectional`.

The rows are ragged. The task is to tell of each symbol whether it is seen elsewhere in
its row. The model answers by its forward layer, by its backward layer, or by both.
"""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
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

from jax_revseg import bidirectional


class GRU(eqx.Module):
    """A layer of one row, which only runs forward."""

    cell: eqx.nn.GRUCell

    def __call__(self, xs):
        def step(h, x):
            h = self.cell(x, h)
            return h, h

        return jax.lax.scan(step, jnp.zeros(HIDDEN), xs)[1]


class Tagger(eqx.Module):
    """Symbols (T,) and the length of one row to logits (T,)."""

    forward: GRU
    backward: GRU
    head: eqx.nn.Linear
    name: str = eqx.field(static=True)

    def __init__(self, name, key):
        *keys, last = jax.random.split(key, 3)
        self.forward, self.backward = (
            GRU(eqx.nn.GRUCell(SYMBOLS, HIDDEN, key=key)) for key in keys
        )
        width = 2 * HIDDEN if name == "both" else HIDDEN
        self.head = eqx.nn.Linear(width, "scalar", key=last)
        self.name = name

    def __call__(self, symbols, length):
        x, merge = jax.nn.one_hot(symbols, SYMBOLS), partial(direction, self.name)
        states = bidirectional(self.forward, self.backward, x, length, merge=merge)
        return jax.vmap(self.head)(states)


@partial(eqx.filter_value_and_grad, has_aux=True)
def gradient(model, symbols, lengths, labels):
    return loss_and_score(jax.vmap(model)(symbols, lengths), lengths, labels)


def train(name, steps):
    model, rng = Tagger(name, jax.random.key(0)), np.random.default_rng(0)
    optimiser = optax.adam(1e-2)
    state = optimiser.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model, state, *data):
        (loss, right), grads = gradient(model, *data)
        updates, state = optimiser.update(grads, state)
        return eqx.apply_updates(model, updates), state, loss, right

    history = []
    for _ in progress(steps, name):
        model, state, *figures = step(model, state, *batch(rng))
        history.append([float(figure) for figure in figures])
    leaves = jax.tree.leaves(eqx.filter(model, eqx.is_array))
    return name, sum(leaf.size for leaf in leaves), history


if __name__ == "__main__":
    arguments = options(__doc__)
    report([train(name, arguments.steps) for name in ("forward", "backward", "both")])
