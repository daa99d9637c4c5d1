"""Equinox cells in both directions: `bidirectional` and `bidirectional_scan`.

Equinox has no bidirectional layer, so both are compared with what it is meant to be:
each row on its own, cut to its length, read from either end.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from _compare import D, H, N, batch, compare, options

from jax_revseg import bidirectional, bidirectional_scan


def read(cell, row):
    """One row (T, D) from its first step to its last."""

    def step(h, x):
        h = cell(x, h)
        return h, h

    return jax.lax.scan(step, jnp.zeros(H), row)[1]


def main():
    options(__doc__)
    x, lengths = batch()
    keys = jax.random.split(jax.random.key(0))
    cells = tuple(eqx.nn.GRUCell(D, H, key=key) for key in keys)
    params, static = eqx.partition(cells, eqx.is_array)

    def layers(params, x):
        cells = eqx.combine(params, static)
        run = bidirectional(*(jax.vmap(lambda row, c=c: read(c, row)) for c in cells))
        return run(x, lengths)

    def one_loop(params, x):
        def step(params, h, x):
            h = jax.vmap(eqx.combine(params, static[0]))(x, h)
            return h, h

        start = jnp.zeros((N, H))
        # Not the static part of the pair: it is the same for both directions.
        _, ys = bidirectional_scan(step, params, (start, start), x, lengths)
        return jnp.concatenate(ys, -1)

    def rows(params, x):
        forward, backward = eqx.combine(params, static)
        out = jnp.zeros((*x.shape[:2], 2 * H))
        for n, length in enumerate(lengths.tolist()):
            row = x[n, :length]
            out = out.at[n, :length, :H].set(read(forward, row))
            out = out.at[n, :length, H:].set(read(backward, row[::-1])[::-1])
        return out

    for name, ours in {"bidirectional": layers, "bidirectional_scan": one_loop}.items():
        print(f"{name} against rows cut to their lengths")
        compare(ours, rows, params, x, lengths, tolerance=1e-5)


if __name__ == "__main__":
    main()
