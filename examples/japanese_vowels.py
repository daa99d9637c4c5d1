"""Who is speaking? A bidirectional GRU labels each step of real ragged speech.

Each utterance has 7 to 29 steps of 12 channels, and one of 9 speakers. The model names
the speaker at every step. It trains on a batch padded to 29 steps; then the same test
utterances get more and more padding. Data: M. Kudo, J. Toyama, M. Shimbo, Pattern
Recognition Letters 20 (1999) 1103-1111; UCI, doi 10.24432/C5NS47.
"""

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _japanese_vowels import CHANNELS, LONGEST, SPEAKERS, load
from _report import report
from tqdm import tqdm

from jax_revseg import bidirectional

HIDDEN = 32
# No forecast: the first update compiles, and would count like any other.
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}]"
PADDED_TO = [LONGEST, 32, 36, 40, 50, 60, 100, 200]


def gru(params, h, x):
    """One step of all rows."""
    xr, xz, xn = jnp.split(x @ params["x"] + params["b"], 3, -1)
    hr, hz, hn = jnp.split(h @ params["h"], 3, -1)
    z = jax.nn.sigmoid(xz + hz)
    h = (1 - z) * jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * hn) + z * h
    return h, h


def run(params, x):
    """The state at every position, from the first to the last, padding included."""
    start = jnp.zeros((len(x), HIDDEN))
    _, states = jax.lax.scan(partial(gru, params), start, x.swapaxes(0, 1))
    return states.swapaxes(0, 1)


def forward_only(params, x, lengths):
    """One GRU reads each row from its first step to its last."""
    return run(params[0], x)


def naive_flip(params, x, lengths):
    """A second GRU reads jnp.flip(x, 1), so it reads the padding first."""
    backward = jnp.flip(run(params[1], jnp.flip(x, 1)), 1)
    return jnp.concatenate([run(params[0], x), backward], -1)


def with_reverse_sequence(params, x, lengths):
    """`bidirectional`: the second GRU reads reverse_sequence(x, lengths)."""
    forward, backward = (partial(run, p) for p in params)
    return bidirectional(forward, backward, x, lengths)


MODELS = {
    "forward only": forward_only,
    "naive flip": naive_flip,
    "reverse_sequence": with_reverse_sequence,
}


def logits(model, params, x, lengths):
    return model(params["gru"], x, lengths) @ params["out"]


def initialise(model, key):
    """Random parameters of two GRUs and of the output layer."""
    keys = jax.random.split(key, 5)

    def normal(i, *shape):
        return jax.random.normal(keys[i], shape) / np.sqrt(shape[0])

    def layer(i):
        x, h = normal(i, CHANNELS, 3 * HIDDEN), normal(i + 1, HIDDEN, 3 * HIDDEN)
        return {"x": x, "h": h, "b": jnp.zeros(3 * HIDDEN)}

    width = HIDDEN if model is forward_only else 2 * HIDDEN
    return {"gru": (layer(0), layer(2)), "out": normal(4, width, SPEAKERS)}


def train(model, utterances, seeds, updates, bar):
    """Train all seeds at once and return their parameters."""
    x, lengths, speakers = utterances
    valid = jnp.arange(x.shape[1]) < lengths[:, None]
    optimiser = optax.adam(3e-3)

    def loss(params):
        chances = jax.nn.log_softmax(logits(model, params, x, lengths))
        return -chances[jnp.arange(len(x)), :, speakers].mean(where=valid)

    @jax.jit
    @jax.vmap
    def update(params, state):
        changes, state = optimiser.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, changes), state

    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    params = jax.vmap(partial(initialise, model))(keys)
    state = jax.vmap(optimiser.init)(params)
    for _ in range(updates):
        params, state = jax.block_until_ready(update(params, state))
        bar.update()
    return params


def accuracy(model, params, utterances, padded_to):
    """Pad with zeros; return each seed's % of valid steps labelled correctly."""
    x, lengths, speakers = utterances
    x = jnp.pad(x, ((0, 0), (0, padded_to - x.shape[1]), (0, 0)))
    valid = jnp.arange(padded_to) < lengths[:, None]
    named = jax.jit(jax.vmap(lambda p: logits(model, p, x, lengths).argmax(-1)))(params)
    correct = (named == speakers[:, None]).mean((1, 2), where=valid)
    return [round(100 * float(mean), 2) for mean in correct]


def main():
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 updates: does it run?")
    parser.add_argument("--seeds", type=int, default=3, help="default 3")
    parser.add_argument("--updates", type=int, default=150, help="default 150")
    parser.add_argument("--data", type=Path, default=here / "data", help="its folder")
    parser.add_argument("--output", type=Path, default=here / "output", help="folder")
    args = parser.parse_args()
    updates, paddings = (3, PADDED_TO[::7]) if args.quick else (args.updates, PADDED_TO)
    training, test = jax.tree.map(jnp.asarray, load(args.data))
    found = {name: [] for name in MODELS}
    with tqdm(total=len(MODELS) * (updates + len(paddings)), bar_format=BAR) as bar:
        for name, model in MODELS.items():
            bar.set_description(name)
            params = train(model, training, args.seeds, updates, bar)
            for padded_to in paddings:
                found[name].append(accuracy(model, params, test, padded_to))
                bar.update()
    shown = test[1][:: len(test[1]) // 11].tolist()  # Twelve utterances, to draw.
    results = {"updates": updates, "padded_to": paddings, "lengths": shown}
    explained = {name: model.__doc__ for name, model in MODELS.items()}
    report(args.output, results | {"accuracy": found}, explained)


if __name__ == "__main__":
    main()
