"""A task that needs both directions: is a symbol seen elsewhere in its row?

The symbols before a step are half of the answer, and the symbols after it the rest.
"""

import argparse

import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

ROWS, STEPS, SYMBOLS, HIDDEN = 64, 10, 10, 48


def options(description):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=600, help="default 600")
    parser.add_argument("--quick", dest="steps", action="store_const", const=2)
    return parser.parse_args()


def progress(steps, name):
    """A bar without a forecast: the first step compiles, and is no measure."""
    form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}]"
    return tqdm(range(steps), desc=name, bar_format=form)


def batch(rng):
    """Symbols (N, T), lengths (N,) and labels (N, T). Padding holds symbols, too."""
    symbols = rng.integers(0, SYMBOLS, (ROWS, STEPS))
    lengths = rng.integers(1, STEPS + 1, ROWS)
    valid = np.arange(STEPS) < lengths[:, None]
    same = (symbols[:, :, None] == symbols[:, None]) & valid[:, None]
    return symbols, lengths, same.sum(2) > 1


def loss_and_score(logits, lengths, labels):
    """The mean cross-entropy of a valid step, and the percentage of right answers."""
    valid = jnp.arange(STEPS) < lengths[:, None]
    errors = optax.sigmoid_binary_cross_entropy(logits, labels)
    right = jnp.sum(valid & ((logits > 0) == labels)) / jnp.sum(valid)
    return jnp.sum(jnp.where(valid, errors, 0)) / jnp.sum(valid), 100 * right


def direction(name, forward, backward):
    """The merge of a layer that answers by one direction, or by both."""
    both = jnp.concatenate([forward, backward], -1)
    return {"forward": forward, "backward": backward, "both": both}[name]


def report(results):
    """Prints the mean of the last batches of each way."""
    print(f"\n{'direction':12}{'parameters':>12}{'loss':>10}{'% right':>10}")
    for name, parameters, history in results:
        loss, right = np.mean(history[-len(history) // 10 :], 0)
        print(f"{name:12}{parameters:12}{loss:10.3f}{right:10.1f}")
