"""`bidirectional` around an LSTM, against the one in `jax.experimental.rnn`.

JAX's own LSTM runs on cuDNN; its reference implementation runs everywhere, and is used
here both for the layers (in one direction) and for the comparison (in both).
"""

import jax
import jax.numpy as jnp
from _compare import D, H, N, T, batch, compare, options
from jax.experimental import rnn

from jax_revseg import bidirectional


def main():
    options(__doc__)
    x, lengths = batch()
    lengths = lengths.astype(jnp.int32)
    flat = rnn.init_lstm_weight(jax.random.key(0), D, H, 1, True)

    def lstm(weights, x, lengths, directions):
        start = jnp.zeros((directions, N, H))
        both = directions == 2
        return rnn.lstm_ref(
            x, start, start, *weights, lengths, D, H, 1, dropout=0.0, bidirectional=both
        )[0]

    def ours(flat, x):
        weights = rnn.unpack_lstm_weights(flat, D, H, 1, True)

        def layer(direction):
            own = [{0: part[direction]} for part in weights]
            # The layer itself need not know the lengths.
            return lambda x: lstm(own, x, jnp.full(N, T, jnp.int32), 1)

        return bidirectional(layer(0), layer(1))(x, lengths)

    def theirs(flat, x):
        weights = rnn.unpack_lstm_weights(flat, D, H, 1, True)
        return lstm(weights, x, lengths, 2)

    compare(ours, theirs, flat, x, lengths, tolerance=1e-5)


if __name__ == "__main__":
    main()
