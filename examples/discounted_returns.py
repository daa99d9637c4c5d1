"""Returns and advantages of a rollout buffer, and a state that goes on, block by block.

The buffer is time-major, (steps, environments), and `dones` marks the last step of each
episode. Returns and generalised advantages (GAE) run backward in time and start anew in
every episode. An episode that the buffer cuts off goes on from the value of the step
after the buffer: `carry_in`. As `init`, every episode would end with that value.

A recurrent policy's state runs forward: it goes on from the rollout before, and starts
anew where an episode does. Here it is a decaying sum of rewards. Every result, also of
short blocks one after the other, is compared with the definition in NumPy.
"""

import argparse
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jax_revseg import associative_scan_segments, scan_segments

DISCOUNT, LAMBDA = 0.97, 0.95


def starts_of(dones):
    """True at the first step of each episode: `dones`, one step later."""
    return jnp.concatenate([jnp.ones_like(dones[:1]), dones[:-1]])


def loop(decay, x, dones, enters, reverse):
    """h = decay * h + x within each episode, one step of all environments at a time."""

    def step(h, x):
        h = decay * h + x
        return h, h

    return scan_segments(
        step,
        jnp.zeros_like(enters),
        x,
        starts=starts_of(dones),
        carry_in=enters,
        reverse=reverse,
        axis=0,
    )[1]


def parallel(decay, x, dones, enters, reverse):
    """The same, all steps at once."""

    def combine(before, now):
        return before[0] * now[0], now[0] * before[1] + now[1]

    return associative_scan_segments(
        combine,
        (jnp.full_like(x, decay), x),
        starts=starts_of(dones),
        carry_in=(jnp.ones_like(enters), enters),
        reverse=reverse,
        axis=0,
    )[1]


def by_blocks(scan, size, decay, x, dones, enters, reverse):
    """One scan for each block of `size` steps, each going on from the one before."""
    blocks = [slice(i, i + size) for i in range(0, len(x), size)]
    out = []
    for block in reversed(blocks) if reverse else blocks:
        over = dones[block][-1]
        if reverse:  # Nothing comes back from the episode after this one.
            enters = jnp.where(over, 0, enters)
        out.append(scan(decay, x[block], dones[block], enters, reverse))
        enters = out[-1][0] if reverse else jnp.where(over, 0, out[-1][-1])
    return jnp.concatenate(out[::-1] if reverse else out)


def results(scan, size, rewards, values, dones, last_value, state):
    """Returns, advantages and states, each (steps, environments)."""
    run = partial(by_blocks, scan, size)
    following = jnp.where(dones, 0, jnp.concatenate([values[1:], last_value[None]]))
    errors = rewards + DISCOUNT * following - values
    nothing = jnp.zeros_like(last_value)
    return (
        run(DISCOUNT, rewards, dones, last_value, True),
        run(DISCOUNT * LAMBDA, errors, dones, nothing, True),
        run(DISCOUNT, rewards, dones, state, False),
    )


def definition(rewards, values, dones, last_value, state):
    """The same, by loops in NumPy and double precision."""
    goes_on, steps = 1.0 - dones, range(len(rewards))
    values = np.append(values, last_value[None], 0)
    out = np.zeros((3, *rewards.shape))
    total, advantage = last_value, 0.0
    for t in reversed(steps):
        error = rewards[t] + DISCOUNT * goes_on[t] * values[t + 1] - values[t]
        out[0, t] = total = rewards[t] + DISCOUNT * goes_on[t] * total
        out[1, t] = advantage = error + DISCOUNT * LAMBDA * goes_on[t] * advantage
    for t in steps:
        out[2, t] = rewards[t] + DISCOUNT * state
        state = goes_on[t] * out[2, t]
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller buffer")
    steps, environments = (64, 4) if parser.parse_args().quick else (2048, 64)

    rng, shape = np.random.default_rng(0), (steps, environments)
    rewards, values = rng.normal(size=(2, *shape)).astype(np.float32)
    dones = rng.random(shape) < 1 / 40
    last_value, state = rng.normal(size=(2, environments)).astype(np.float32)
    buffer = rewards, values, dones, last_value, state
    want, buffer = definition(*buffer), [jnp.asarray(part) for part in buffer]
    print(f"{steps} steps of {environments} environments, {dones.sum()} episode ends\n")
    print("Returns, advantages and states: the largest error of each, and the time")
    print(f"{'scan':27}{'blocks':>7}{'error':>27}{'ms':>10}")
    scans = {"scan_segments": loop, "associative_scan_segments": parallel}
    for name, scan in scans.items():
        for blocks in (1, 8):
            run = jax.jit(partial(results, scan, steps // blocks))
            jax.block_until_ready(run(*buffer))  # The first call compiles.
            start = time.perf_counter()
            got = jax.block_until_ready(run(*buffer))
            ms = 1e3 * (time.perf_counter() - start)
            errors = np.abs(np.array(got) - want).max((1, 2))
            cells = "".join(f"{error:9.1e}" for error in errors)
            print(f"{name:27}{blocks:7}{cells}{ms:10.2f}")
            assert errors.max() < 1e-4, (name, blocks, errors)


if __name__ == "__main__":
    main()
