"""A reversal beside a copy of the same bytes, and beside other ways to reverse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import PEERS
from benchmarks.timing import (
    Absent,
    Contender,
    Options,
    Row,
    device,
    gather,
    measure,
    repeat,
)
from tests.cases import Case, random_bits

OURS, COPY, SNIPPET = "jax_revseg", "copy", "take_along_axis"

Function = Callable[..., jax.Array]  # Of x and the segments.


class Operands:
    """The operands of a row, on the host and on the device.

    All contenders that reuse their output donate one shared buffer.
    """

    def __init__(self, case: Case):
        self.case, self.segments = case, case.segments()
        rng = np.random.default_rng(0)
        # Ordinary floats: the scatter in a peer's gradient may flush denormals, and
        # would fail its check. No shift by a power of 2 maps a pattern of prime size
        # to itself.
        dtype, some = jnp.dtype(case.dtype), (1_000_003,)
        if jnp.issubdtype(dtype, jnp.floating):
            pattern = rng.standard_normal(some, np.float32).astype(dtype)
        else:
            pattern = random_bits(rng, some, case.dtype)
        self.host = np.resize(pattern, case.shape)
        self.x, self.s = jax.device_put((self.host, self.segments), device())
        self.buffer = jax.device_put(np.zeros_like(self.host), device())

    @cached_property
    def right(self) -> np.ndarray:
        return self.case.expected(self.host, self.segments)

    def check(self, contender: Contender) -> None:
        """Raises where the result is not the reversal."""
        if contender.compared == "none":
            return
        got: Any = contender.run(1)
        got = np.asarray(got.cpu() if hasattr(got, "is_cuda") else got)
        if got.dtype.itemsize == self.right.dtype.itemsize:
            got = got.view(self.right.dtype)  # PyTorch's bfloat16 leaves it as int16.
        same = got == self.right
        if contender.compared == "valid":  # With one segment a row.
            valid = np.arange(self.case.size) < self.segments[:, None]
            valid = valid.T if self.case.axis == 0 else valid
            same |= ~np.expand_dims(valid, tuple(range(2, same.ndim)))
        if not same.all():
            raise Absent(f"its {contender.direction} computes something else")

    def of_jax(self, name: str, function: Function, **more: Any) -> Iterator[Contender]:
        """Forward and gradient, each into a new and into a reused output."""
        yield Contender(name, self._new(function), "new", **more)
        yield Contender(name, self._reused(function), "reused", **more)
        if jnp.issubdtype(self.x.dtype, jnp.inexact) and name != COPY:

            def backward(ct: jax.Array, s: jax.Array) -> jax.Array:
                return jax.vjp(lambda x: function(x, s), ct)[1](ct)[0]

            more["direction"] = "gradient"
            yield Contender(name, self._new(backward), "new", **more)
            yield Contender(name, self._reused(backward), "reused", **more)

    def _new(self, function: Function) -> Callable[[int], Any]:
        compiled = jax.jit(function)
        return repeat(lambda: compiled(self.x, self.s))

    def _reused(self, function: Function) -> Callable[[int], Any]:
        compiled = jax.jit(
            lambda x, s, out: function(x, s), donate_argnums=2, keep_unused=True
        )

        def call() -> jax.Array:
            self.buffer = compiled(self.x, self.s, self.buffer)
            return self.buffer

        return repeat(call)


def copies(o: Operands) -> Iterator[Contender]:
    """A copy by XLA, and one by the system."""

    def flip_a_bit(x: jax.Array, s: jax.Array) -> jax.Array:
        # XLA would leave out a plain copy, and x + 1 in bfloat16 is more than one.
        unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        return (x.view(unsigned) ^ jnp.ones((), unsigned)).view(x.dtype)

    yield from o.of_jax(COPY, flip_a_bit, compared="none")
    if device().platform == "cpu":
        source, target = o.host.view(np.uint8), np.zeros_like(o.host).view(np.uint8)

        def memcpy(n: int) -> None:
            for _ in range(n):
                np.copyto(target, source)

        yield Contender("memcpy", memcpy, "reused", compared="none")


def snippet(o: Operands) -> Iterator[Contender]:
    """`where` and `take_along_axis`, the snippet that users copy."""

    def function(x: jax.Array, lengths: jax.Array) -> jax.Array:
        t, n = jnp.arange(o.case.size), lengths[:, None]
        index = jnp.where(t < n, n - 1 - t, t)
        index = index.T if o.case.axis == 0 else index
        index = index.reshape(index.shape + (1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, index, o.case.axis)

    yield from o.of_jax(SNIPPET, function)


def flax(o: Operands) -> Iterator[Contender]:
    from flax.linen.recurrent import flip_sequences

    def function(x: jax.Array, lengths: jax.Array) -> jax.Array:
        return flip_sequences(x, lengths, 1, time_major=o.case.axis == 0)

    yield from o.of_jax("Flax", function, compared="valid")


OTHERS = {SNIPPET: snippet, "Flax": flax, **PEERS}


def measure_case(case: Case, options: Options, others: Any = OTHERS) -> Row:
    """Times a case beside copies and other libraries; all are checked first."""
    o = Operands(case)
    own = [*copies(o), *o.of_jax(OURS, case.call)]
    for contender in own:
        o.check(contender)
    peers, absent = [], {}
    if case.layout == "padded":  # No other library has packed rows.
        calls = {name: other(o) for name, other in others.items()}
        peers, absent = gather(calls, o.check)
    compiled = jax.jit(case.call).lower(o.x, o.s).compile()
    memory: Any = compiled.memory_analysis()
    facts = dict(bytes=o.host.nbytes, temporary_bytes=memory.temp_size_in_bytes)
    row = measure(options, (COPY, OURS), own, peers)
    return dict(group="reversal", **facts, absent=absent, **row)
