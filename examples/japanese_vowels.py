"""Who is speaking? A bidirectional GRU on real ragged speech, done in four ways.

Utterances have 7 to 29 steps of 12 channels, by 9 speakers. A model reads each with a
GRU in one or both directions and classifies it by the final states. Data: M. Kudo et
al., Pattern Recognition Letters 20 (1999) 1103-1111; UCI, doi 10.24432/C5NS47.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _japanese_vowels import draw, load
from tqdm import tqdm

from jax_revseg import bidirectional, bidirectional_scan

HERE = Path(__file__).parent
CHANNELS, SPEAKERS, HIDDEN = 12, 9, 32


def gru(params, h, x):
    """One step on all rows."""
    xr, xz, xn = jnp.split(x @ params["x"] + params["b"], 3, -1)
    hr, hz, hn = jnp.split(h @ params["h"], 3, -1)
    z = jax.nn.sigmoid(xz + hz)
    h = (1 - z) * jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * hn) + z * h
    return h, h


def outputs(params, x):
    """The GRU from the first position to the last, padding and all."""
    init = jnp.zeros((len(x), HIDDEN))
    _, ys = jax.lax.scan(partial(gru, params), init, x.swapaxes(0, 1))
    return ys.swapaxes(0, 1)


def final(ys, lengths):
    return ys[jnp.arange(len(ys)), lengths - 1]


def forward_only(params, x, lengths):
    return final(outputs(params[0], x), lengths)


def naive_flip(params, x, lengths):
    backward = jnp.flip(outputs(params[1], jnp.flip(x, 1)), 1)
    return jnp.concatenate([forward_only(params, x, lengths), backward[:, 0]], -1)


def with_reverse_sequence(params, x, lengths):
    layers = (partial(outputs, p) for p in params)
    run = bidirectional(*layers, merge=lambda *both: both)
    forward, backward = run(x, lengths)
    return jnp.concatenate([final(forward, lengths), backward[:, 0]], -1)


def with_bidirectional_scan(params, x, lengths):
    init = jnp.zeros((len(x), HIDDEN))
    states, _ = bidirectional_scan(gru, params, init, x, lengths)
    return jnp.concatenate(states, -1)


MODELS = {
    "forward only": forward_only,
    "naive flip": naive_flip,
    "reverse_sequence": with_reverse_sequence,
    "bidirectional_scan": with_bidirectional_scan,
}


def initialise(key, directions):
    keys = jax.random.split(key, 5)

    def normal(i, *shape):
        return jax.random.normal(keys[i], shape) / np.sqrt(shape[0])

    def layer(i):
        x, h = normal(i, CHANNELS, 3 * HIDDEN), normal(i + 1, HIDDEN, 3 * HIDDEN)
        return {"x": x, "h": h, "b": jnp.zeros(3 * HIDDEN)}

    out = normal(4, directions * HIDDEN, SPEAKERS)
    return {"gru": (layer(0), layer(2)), "out": out}


def train(model, seeds, steps, data, bar):
    """Trains all seeds at once; the test accuracy after each step, (steps, seeds)."""
    (x, lengths, speakers), test = data
    optimiser = optax.adam(3e-3)

    def logits(params, x, lengths):
        return model(params["gru"], x, lengths) @ params["out"]

    def loss(params):
        chances = jax.nn.log_softmax(logits(params, x, lengths))
        return -jnp.take_along_axis(chances, speakers[:, None], 1).mean()

    @jax.jit
    @jax.vmap
    def step(params, state):
        updates, state = optimiser.update(jax.grad(loss)(params), state)
        params = optax.apply_updates(params, updates)
        right = logits(params, *test[:2]).argmax(-1) == test[2]
        return params, state, right.mean()

    start = partial(initialise, directions=1 if model is forward_only else 2)
    params = jax.vmap(start)(jax.vmap(jax.random.key)(jnp.arange(seeds)))
    state, curve = jax.vmap(optimiser.init)(params), []
    for _ in range(steps):
        params, state, accuracy = step(params, state)
        curve.append(np.asarray(accuracy))
        bar.update()
    return np.array(curve)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 steps: does it run?")
    parser.add_argument("--seeds", type=int, default=3, help="default 3")
    parser.add_argument("--steps", type=int, default=150, help="default 150")
    parser.add_argument("--data", type=Path, default=HERE / "data", help="its folder")
    output = HERE / "output/japanese_vowels.png"
    parser.add_argument("--output", type=Path, default=output, help="the picture")
    args = parser.parse_args()
    steps = 3 if args.quick else args.steps
    data = jax.tree.map(jnp.asarray, load(args.data))
    curves, seconds = {}, {}
    with tqdm(total=len(MODELS) * steps, unit="step") as bar:
        for name, model in MODELS.items():
            bar.set_description(name)
            start = time.perf_counter()
            curves[name] = train(model, args.seeds, steps, data, bar)
            seconds[name] = time.perf_counter() - start
    print(f"\n{len(data[1][0])} test utterances, {args.seeds} seeds, {steps} steps")
    print(f"{'model':20}{'% right':>9}{'lowest':>9}{'highest':>9}{'seconds':>9}")
    for name, curve in curves.items():
        last = 100 * curve[-1]
        figures = (last.mean(), last.min(), last.max(), seconds[name])
        print(f"{name:20}{''.join(f'{figure:9.2f}' for figure in figures)}")
    draw(args.output, curves, *map(np.asarray, data[0][:2]))
    print(f"Curves and a batch before and after: {args.output}")


if __name__ == "__main__":
    main()
