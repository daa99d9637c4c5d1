"""Short sentences packed into long rows, and a bidirectional tagger trained on them.

The task is to find the spaces again in text without any: after which letters does a
word end? That takes what comes before and what comes after. The text is real and on
your disk already: the sentences of NumPy's docstrings (BSD 3-Clause licence). A row of
the packed batch holds several sentences, told apart by `segment_ids`; a row of the
padded batch holds one. Both train the same model, on the same sentences, alike.
"""

import argparse
import re
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from jax_revseg import bidirectional_scan

LETTERS = "abcdefghijklmnopqrstuvwxyz"
HIDDEN, WIDTH = 64, 256


def sentences():
    """Pairs (letters, whether a word ends there) from NumPy's own documentation."""
    members = [getattr(np, name) for name in sorted(dir(np)) if name[0] != "_"]
    texts = {doc for member in members if isinstance(doc := member.__doc__, str)}
    found = set()
    for text in texts:
        for sentence in re.findall(r"[A-Z][a-z ,\n]{20,300}\.", text):
            found.add(" ".join(re.findall("[a-z]+", sentence.lower())))
    for sentence in sorted(found):
        words = sentence.split()
        letters = np.array([LETTERS.index(c) for c in "".join(words)])
        ends = np.zeros(len(letters), np.float32)
        ends[np.cumsum([len(word) for word in words]) - 1] = 1
        if len(letters) <= WIDTH:
            yield letters, ends


def fill(pairs, packed):
    """Rows of letters, word ends and sentence numbers (0 is padding)."""
    width = WIDTH if packed else max(len(letters) for letters, _ in pairs)
    rows, room = [], []
    for pair in sorted(pairs, key=lambda pair: -len(pair[0])) if packed else pairs:
        size = len(pair[0])
        # First fit: the first row with enough room left.
        fits = (i for i, left in enumerate(room) if packed and left >= size)
        if (row := next(fits, None)) is None:
            row = len(rows)
            rows.append([])
            room.append(width)
        rows[row].append(pair)
        room[row] -= size
    letters, ids = np.zeros((2, len(rows), width), np.int32)
    ends = np.zeros((len(rows), width), np.float32)
    for n, row in enumerate(rows):
        at = 0
        for number, (some, marks) in enumerate(row, 1):
            where = slice(at, at := at + len(some))
            letters[n, where], ends[n, where], ids[n, where] = some, marks, number
    return letters, ends, ids


def gru(params, h, letter):
    xr, xz, xn = jnp.split(params["letter"][letter], 3, -1)
    hr, hz, hn = jnp.split(h @ params["h"], 3, -1)
    z = jax.nn.sigmoid(xz + hz)
    h = (1 - z) * jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * hn) + z * h
    return h, h


def loss(params, letters, ends, ids):
    """The mean cross-entropy of a letter, and how many word ends are right."""
    start = jnp.zeros((len(letters), HIDDEN))
    _, ys = bidirectional_scan(
        gru, params["gru"], (start, start), letters, segment_ids=ids, padding_id=0
    )
    logits = jnp.concatenate(ys, -1) @ params["out"] + params["bias"]
    valid = ids != 0
    errors = optax.sigmoid_binary_cross_entropy(logits, ends)
    right = jnp.sum(valid & ((logits > 0) == (ends > 0))) / jnp.sum(valid)
    return jnp.sum(jnp.where(valid, errors, 0)) / jnp.sum(valid), right


def train(batches, steps, name):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / 8, jnp.float32)

    def layer():
        return {"letter": normal(26, 3 * HIDDEN), "h": normal(HIDDEN, 3 * HIDDEN)}

    params = {"gru": (layer(), layer()), "out": normal(2 * HIDDEN), "bias": normal()}
    optimiser = optax.adam(1e-2)
    state = optimiser.init(params)

    @jax.jit
    def step(params, state, batch):
        (value, right), grads = jax.value_and_grad(loss, has_aux=True)(params, *batch)
        updates, state = optimiser.update(grads, state)
        return optax.apply_updates(params, updates), state, value, right

    batch = jax.tree.map(jnp.asarray, batches)
    value, right = step(params, state, batch)[2:]  # And it is compiled.
    first = value.item()
    value = right = jnp.zeros(())
    start = time.perf_counter()
    for _ in tqdm(range(steps), desc=name):
        params, state, value, right = step(params, state, batch)
    jax.block_until_ready(value)
    seconds = time.perf_counter() - start
    valid = int((batches[2] != 0).sum())
    used = 100 * valid / batches[2].size
    figures = (
        f"{used:12.1f}{valid * steps / seconds:12.0f}{value:9.4f}{100 * right:9.1f}"
    )
    return first, f"{name:8}{str(batches[2].shape):>12}{figures}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="64 sentences, 2 steps")
    parser.add_argument("--steps", type=int, default=40, help="default 40")
    args = parser.parse_args()
    pairs = list(sentences())[: 64 if args.quick else 512]
    pairs = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
    run = partial(train, steps=2 if args.quick else args.steps)

    (packed, packed_row), (padded, padded_row) = (
        run(fill(pairs, packed=way == "packed"), name=way)
        for way in ("packed", "padded")
    )
    letters = sum(len(some) for some, _ in pairs)
    print(f"\n{len(pairs)} sentences, {letters} letters")
    names = ("rows", "shape", "% in use", "letters/s", "loss", "% right")
    print("{:8}{:>12}{:>12}{:>12}{:>9}{:>9}".format(*names))
    print(packed_row, padded_row, sep="\n")
    print(f"First loss, packed and padded: {packed:.6f} and {padded:.6f}")
    assert abs(packed - padded) < 1e-5, (packed, padded)


if __name__ == "__main__":
    main()
