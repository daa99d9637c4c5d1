"""A bidirectional state space layer over packed rows, in three ways.

The state is a diagonal linear recurrence, h[t] = a h[t - 1] + u[t], which runs in
parallel over time. A row holds several sequences, told apart by segment ids, and no
state may cross from one to the next, in either direction.

The three ways are a segmented associative scan for each direction; one loop over steps
for both; and `bidirectional` around a layer that only runs forward, as most packages of
state space models have it. A loop over the sequences, one by one, says what is right.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from jax_revseg import associative_scan_segments, bidirectional, bidirectional_scan


def states(decay, u, ids, reverse=False):
    """h (rows, steps, features): the segments of each row start from zero."""

    def combine(before, now):
        return before[0] * now[0], now[0] * before[1] + now[1]

    elems = (jnp.broadcast_to(decay, u.shape), u)
    return associative_scan_segments(
        combine, elems, segment_ids=ids, padding_id=0, reverse=reverse
    )[1]


def two_scans(decays, u, ids):
    return states(decays[0], u, ids), states(decays[1], u, ids, reverse=True)


def one_loop(decays, u, ids):
    def step(decay, h, u):
        h = decay * h + u
        return h, h

    start = jnp.zeros_like(u[:, 0])
    return bidirectional_scan(
        step, tuple(decays), (start, start), u, segment_ids=ids, padding_id=0
    )[1]


def reversing(decays, u, ids):
    # Segments keep their places, so both layers restart at the same ids.
    forward, backward = (lambda u, a=a: states(a, u, ids) for a in decays)
    return bidirectional(
        forward,
        backward,
        u,
        segment_ids=ids,
        padding_id=0,
        merge=lambda *both: both,
    )


def one_by_one(decays, u, ids):
    """The definition, in NumPy and double precision."""
    out = np.zeros((2, *u.shape))
    for n, row in enumerate(ids):
        for number in np.unique(row[row != 0]):
            where = np.flatnonzero(row == number)
            for i, order in enumerate((where, where[::-1])):
                h = np.zeros(u.shape[2])
                for t in order:
                    h = decays[i] * h + u[n, t]
                    out[i, n, t] = h
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller batch")
    rows, steps, features = (2, 64, 4) if parser.parse_args().quick else (8, 2048, 64)

    rng = np.random.default_rng(0)
    u = rng.normal(size=(rows, steps, features)).astype(np.float32)
    ids = 1 + (rng.random((rows, steps)) < 1 / 50).cumsum(1)
    ids[:, -steps // 10 :] = 0  # The rest of a row is padding.
    decays = rng.uniform(0.5, 0.99, (2, features)).astype(np.float32)
    want = one_by_one(decays, u, ids)
    valid = (ids != 0)[..., None]

    count = sum(len(np.unique(row[row != 0])) for row in ids)
    print(f"{rows} rows of {steps} steps, {features} features, {count} sequences\n")
    print(f"{'':30}{'error':>10}{'forward, ms':>14}{'gradient, ms':>14}")
    for name, f in (
        ("two associative_scan_segments", two_scans),
        ("one bidirectional_scan", one_loop),
        ("bidirectional", reversing),
    ):

        def loss(decays, u, ids, f=f):
            return sum(jnp.sum(jnp.where(valid, h, 0) ** 2) for h in f(decays, u, ids))

        operands, times = (decays, jnp.asarray(u), jnp.asarray(ids)), []
        for run in (jax.jit(f), jax.jit(jax.grad(loss, (0, 1)))):
            jax.block_until_ready(run(*operands))  # The first call compiles.
            start = time.perf_counter()
            jax.block_until_ready(run(*operands))
            times.append(1e3 * (time.perf_counter() - start))
        error = np.abs(np.where(valid, np.stack(f(*operands)) - want, 0)).max()
        print(f"{name:30}{error:10.1e}{times[0]:14.2f}{times[1]:14.2f}")
        assert error < 1e-3, f"{name}: {error}"


if __name__ == "__main__":
    main()
