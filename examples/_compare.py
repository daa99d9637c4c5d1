"""What the examples of recurrent layers share: a ragged batch, and the comparison."""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

N, T, D, H = 8, 20, 5, 7


def options(description):
    """--help, and --quick, which these examples need not heed: they are quick."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="changes nothing here")
    return parser.parse_args()


def batch():
    """Rows (N, T, D) with noise for padding, which must not show, and their lengths."""
    rng = np.random.default_rng(0)
    lengths = np.array([T, 1, 13, 7, 2, T - 1, 10, 4])
    x = rng.normal(size=(N, T, D)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(lengths)


def valid(y, lengths):
    """`y` with zero for padding."""
    return jnp.where(jnp.arange(T)[:, None] < lengths[:, None, None], y, 0)


def compare(ours, theirs, params, x, lengths, tolerance):
    """Prints how far apart two functions of (params, x) are on valid steps.

    Both give `(N, T, features)`. Compared are the values and the gradients of one
    scalar that depends on every valid value, with respect to params and x.
    """
    shape = jax.eval_shape(ours, params, x).shape
    weights = np.random.default_rng(1).normal(size=shape).astype(np.float32)

    def loss(run, params, x):
        y = valid(run(params, x), lengths)
        return jnp.sum(y * weights), y

    results = []
    for run in (ours, theirs):
        step = jax.value_and_grad(partial(loss, run), (0, 1), has_aux=True)
        (_, y), (by_params, by_x) = jax.jit(step)(params, x)
        results.append({"values": y, "d params": by_params, "d x": by_x})
    print(f"{'on valid steps':16}{'largest':>12}{'difference':>12}{'allowed':>12}")
    for name, mine in results[0].items():
        pairs = [
            (np.asarray(a), np.asarray(b))
            for a, b in zip(
                jax.tree.leaves(mine), jax.tree.leaves(results[1][name]), strict=True
            )
        ]
        size = max(np.abs(b).max() for _, b in pairs)
        difference = max(np.abs(a - b).max() for a, b in pairs)
        allowed = tolerance * max(size, 1)
        print(f"{name:16}{size:12.3g}{difference:12.3g}{allowed:12.3g}")
        assert size > 0, f"{name}: nothing to compare"
        assert difference <= allowed, f"{name}: {difference} > {allowed}"
