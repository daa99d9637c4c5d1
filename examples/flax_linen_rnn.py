"""`bidirectional` around Flax Linen RNNs, against Flax's own `nn.Bidirectional`."""

from functools import partial

import jax
from _compare import H, batch, compare, options
from flax import linen as nn

from jax_revseg import bidirectional


def main():
    options(__doc__)
    x, lengths = batch()
    forward, backward = nn.RNN(nn.LSTMCell(H)), nn.RNN(nn.LSTMCell(H))
    model = nn.Bidirectional(forward, backward)
    params = model.init(jax.random.key(0), x)["params"]

    def ours(params, x):
        def layer(rnn, name):
            return partial(rnn.clone(parent=None).apply, {"params": params[name]})

        run = bidirectional(
            layer(forward, "forward_rnn"), layer(backward, "backward_rnn")
        )
        return run(x, lengths)

    def theirs(params, x):
        return model.apply({"params": params}, x, seq_lengths=lengths)

    compare(ours, theirs, params, x, lengths, tolerance=1e-5)


if __name__ == "__main__":
    main()
