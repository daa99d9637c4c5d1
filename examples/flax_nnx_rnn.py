"""`bidirectional` around Flax NNX RNNs, against Flax's own `nnx.Bidirectional`."""

import jax.numpy as jnp
from _compare import D, H, N, batch, compare, options
from flax import nnx

from jax_revseg import bidirectional


def main():
    options(__doc__)
    x, lengths = batch()
    rngs = nnx.Rngs(0)
    layers = [nnx.RNN(nnx.GRUCell(D, H, rngs=rngs), rngs=False) for _ in range(2)]
    model = nnx.Bidirectional(*layers, rngs=False)
    structure, params, rest = nnx.split(model, nnx.Param, ...)
    start = jnp.zeros((N, H))

    def ours(params, x):
        model = nnx.merge(structure, params, rest)
        run = bidirectional(
            lambda x: model.forward_rnn(x, initial_carry=start),
            lambda x: model.backward_rnn(x, initial_carry=start),
        )
        return run(x, lengths)

    def theirs(params, x):
        model = nnx.merge(structure, params, rest)
        return model(x, initial_carry=(start, start), seq_lengths=lengths)

    compare(ours, theirs, params, x, lengths, tolerance=1e-5)


if __name__ == "__main__":
    main()
