"""Discounted returns of packed episodes: a segmented scan from the end.

A rollout buffer holds the rewards of several episodes end to end in each row. The
return G[t] = r[t] + discount * G[t + 1] runs backward in time and starts again at the
end of every episode. No data is reversed. Compared are the parallel scan, the loop over
steps, and the definition in NumPy.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from jax_revseg import associative_scan_segments, scan_segments


def parallel(rewards, episodes, discount):
    """Rewards (rows, steps) and the episode of each step to returns of that shape."""

    def combine(later, earlier):
        return later[0] * earlier[0], earlier[0] * later[1] + earlier[1]

    elems = (jnp.full_like(rewards, discount), rewards)
    return associative_scan_segments(
        combine, elems, segment_ids=episodes, reverse=True
    )[1]


def sequential(rewards, episodes, discount):
    """The same, one step of all rows at a time."""

    def step(later, reward):
        value = reward + discount * later
        return value, value

    start = jnp.zeros(len(rewards))
    return scan_segments(step, start, rewards, segment_ids=episodes, reverse=True)[1]


def definition(rewards, episodes, discount):
    """The definition, in NumPy and double precision."""
    out = np.zeros(rewards.shape)
    for n, t in np.ndindex(rewards.shape):
        t = rewards.shape[1] - 1 - t
        more = t + 1 < rewards.shape[1] and episodes[n, t + 1] == episodes[n, t]
        out[n, t] = rewards[n, t] + (discount * out[n, t + 1] if more else 0)
    return out


def timed(f, *args):
    start = time.perf_counter()
    result = jax.block_until_ready(f(*args))
    return result, 1e3 * (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller buffer")
    parser.add_argument("--discount", type=float, default=0.97, help="default 0.97")
    args = parser.parse_args()
    rows, steps = (4, 64) if args.quick else (256, 2048)

    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(rows, steps)).astype(np.float32)
    ends = rng.random((rows, steps)) < 1 / 40
    episodes = np.concatenate([np.zeros((rows, 1), int), ends[:, :-1].cumsum(1)], 1)
    print(f"{rows} rows of {steps} steps, {episodes[:, -1].sum() + rows} episodes")

    want, ms = timed(definition, rewards, episodes, args.discount)
    print(f"{'':26}{'largest return':>16}{'error':>10}{'ms':>10}")
    print(f"{'NumPy loop':26}{np.abs(want).max():16.5f}{'':10}{ms:10.2f}")
    device = jnp.asarray(rewards), jnp.asarray(episodes), args.discount
    for name, f in (
        ("associative_scan_segments", parallel),
        ("scan_segments", sequential),
    ):
        run = jax.jit(f)
        jax.block_until_ready(run(*device))  # The first call compiles.
        got, ms = timed(run, *device)
        error = np.abs(got - want).max()
        print(f"{name:26}{np.abs(got).max():16.5f}{error:10.1e}{ms:10.2f}")
        assert error < 1e-4, f"{name}: {error}"


if __name__ == "__main__":
    main()
