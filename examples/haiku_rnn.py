"""`bidirectional` around Haiku's `dynamic_unroll`.

Haiku has no bidirectional layer. Compared is each row on its own, cut to its length and
unrolled by Haiku forward and with `reverse=True`.
"""

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from _compare import H, batch, compare, options

from jax_revseg import bidirectional


def main():
    options(__doc__)
    x, lengths = batch()
    sizes = lengths.tolist()

    def unroll(core, x, reverse=False) -> Any:
        start = core.initial_state(len(x))
        ys, _ = hk.dynamic_unroll(core, x, start, time_major=False, reverse=reverse)
        return jnp.asarray(ys)  # By its type it could be a tree.

    def cores():
        return hk.LSTM(H, name="forward"), hk.LSTM(H, name="backward")

    @hk.transform
    def ours(x):
        run = bidirectional(*(lambda x, core=core: unroll(core, x) for core in cores()))
        return run(x, lengths)

    @hk.transform
    def rows(x):
        forward, backward = cores()
        out = jnp.zeros((*x.shape[:2], 2 * H))
        for n, length in enumerate(sizes):
            row = x[n : n + 1, :length]
            both = unroll(forward, row), unroll(backward, row, reverse=True)
            out = out.at[n, :length].set(jnp.concatenate(both, -1)[0])
        return out

    params = ours.init(jax.random.key(0), x)
    compare(
        lambda params, x: ours.apply(params, None, x),
        lambda params, x: rows.apply(params, None, x),
        params,
        x,
        lengths,
        tolerance=1e-5,
    )


if __name__ == "__main__":
    main()
