"""A bidirectional state space layer: `bidirectional` around `lax.associative_scan`.

The state is a diagonal linear recurrence, h[t] = a h[t - 1] + b x[t], which runs in
parallel over time. Compared is the associative scan with `reverse=True` over inputs
that are zero at padding: from the end it then reaches each row's last step with h = 0.
That holds for this recurrence alone; reversing the rows holds for any layer.
"""

import jax
import jax.numpy as jnp
import numpy as np
from _compare import D, H, batch, compare, options, valid

from jax_revseg import bidirectional


def combine(left, right):
    """Two stretches of the recurrence as one: h -> a h + u, one after the other."""
    (a, u), (b, v) = left, right
    return a * b, b * u + v


def layer(params, x, reverse=False):
    """(N, T, D) to (N, T, D), through H states."""
    inputs = x @ params["in"]
    decay = jnp.broadcast_to(jax.nn.sigmoid(params["decay"]), inputs.shape)
    _, states = jax.lax.associative_scan(
        combine, (decay, inputs), axis=1, reverse=reverse
    )
    return states @ params["out"]


def split(params):
    return [{name: value[i] for name, value in params.items()} for i in (0, 1)]


def main():
    options(__doc__)
    x, lengths = batch()
    rng = np.random.default_rng(0)
    shapes = {"in": (2, D, H), "decay": (2, H), "out": (2, H, D)}
    params = {k: jnp.asarray(rng.normal(size=s), "float32") for k, s in shapes.items()}

    def ours(params, x):
        forward, backward = split(params)
        run = bidirectional(lambda x: layer(forward, x), lambda x: layer(backward, x))
        return run(x, lengths)

    def masked(params, x):
        x = valid(x, lengths)
        forward, backward = split(params)
        both = layer(forward, x), layer(backward, x, reverse=True)
        return jnp.concatenate(both, -1)

    compare(ours, masked, params, x, lengths, tolerance=1e-5)


if __name__ == "__main__":
    main()
