"""Discounted returns of packed episodes: reverse, scan, reverse back.

A rollout buffer holds the rewards of several episodes end to end in each row. The
return G[t] = r[t] + discount * G[t + 1] runs backward in time and starts again at the
end of every episode. The same three lines serve any recurrence that runs that way.
"""

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jax_revseg import reverse_segments


def returns(rewards, episodes, discount):
    """Rewards (rows, steps) and the episode of each step to returns of that shape."""
    reverse = partial(reverse_segments, segment_ids=episodes)
    starts = episodes != jnp.roll(episodes, 1, 1)  # The last steps, once reversed.
    decay = jnp.where(starts.at[:, 0].set(True), 0.0, discount)

    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    scan = (decay, reverse(rewards))
    return reverse(jax.lax.associative_scan(combine, scan, axis=1)[1])


def loop(rewards, episodes, discount):
    """The definition, in NumPy and double precision."""
    out = np.zeros(rewards.shape)
    for n, t in np.ndindex(rewards.shape):
        t = rewards.shape[1] - 1 - t
        more = t + 1 < rewards.shape[1] and episodes[n, t + 1] == episodes[n, t]
        out[n, t] = rewards[n, t] + (discount * out[n, t + 1] if more else 0)
    return out


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

    run = jax.jit(returns)
    device = jnp.asarray(rewards), jnp.asarray(episodes)
    got = jax.block_until_ready(run(*device, args.discount))
    start = time.perf_counter()
    jax.block_until_ready(run(*device, args.discount))
    compiled = time.perf_counter() - start
    start = time.perf_counter()
    want = loop(rewards, episodes, args.discount)
    python = time.perf_counter() - start

    difference = np.abs(got - want).max()
    print(f"{rows} rows of {steps} steps, {episodes[:, -1].sum() + rows} episodes")
    print(f"{'':22}{'largest return':>16}{'ms':>10}")
    print(f"{'NumPy loop':22}{np.abs(want).max():16.5f}{1e3 * python:10.2f}")
    print(
        f"{'reverse, scan, reverse':22}{np.abs(got).max():16.5f}{1e3 * compiled:10.2f}"
    )
    print(f"largest difference {difference:.2g}, allowed 1e-4")
    assert difference < 1e-4, difference


if __name__ == "__main__":
    main()
