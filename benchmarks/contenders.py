"""What takes part in a row: this library, the limits, and the JAX ways to do the same.

All JAX contenders of a row that write into a donated output hand one buffer round, so
that a row of 1 GB needs a few GB and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.timing import Contender
from tests.cases import Case, random_bits

Function = Callable[..., jax.Array]  # Of x and the segments.
Device = Any  # jax.Device, which a type checker takes for a variable.


class Absent(Exception):
    """Why a peer does not take part in a row."""


class Operands:
    """The operands of a row, on the host and on the device, and the shared output."""

    def __init__(self, case: Case, device: Device):
        self.case, self.device = case, device
        self.segments = case.segments()
        rng = np.random.default_rng(0)
        # Ordinary floats: a scatter-add or a flush of denormals changes the other
        # kinds, and then a peer would fail its check for what nobody times. The
        # pattern's size is a prime, so that no shift of a power of 2 goes unseen.
        dtype, some = jnp.dtype(case.dtype), (1_000_003,)
        if jnp.issubdtype(dtype, jnp.floating):
            pattern = rng.standard_normal(some, np.float32).astype(dtype)
        else:
            pattern = random_bits(rng, some, case.dtype)
        self.host = np.resize(pattern, case.shape)
        self.x = jax.device_put(self.host, device)
        self.s = jax.device_put(self.segments, device)
        self.box = [jax.device_put(np.zeros_like(self.host), device)]
        # A CPU would run calls that do not depend on each other side by side.
        self.wait_each = device.platform == "cpu"

    @cached_property
    def right(self) -> np.ndarray:
        return self.case.expected(self.host, self.segments)

    @cached_property
    def valid(self) -> np.ndarray:
        """Where there is no padding: `(N, T)` or `(T, N)`, padded layout only."""
        t = np.arange(self.case.size)
        mask = t < self.segments[:, None]
        mask = mask.T if self.case.axis == 0 else mask
        return np.expand_dims(mask, tuple(range(2, self.host.ndim)))

    def check(self, contender: Contender) -> None:
        """Raises if the result is not the reversal; a wrong answer is not timed."""
        if contender.whole is None:
            return
        got, right = np.asarray(contender.run(1)), self.right
        if got.dtype != right.dtype and got.dtype.itemsize == right.dtype.itemsize:
            got = got.view(right.dtype)  # PyTorch hands bfloat16 over as int16.
        same = got == right
        if not (same if contender.whole else same | ~self.valid).all():
            raise Absent(f"its {contender.direction} computes something else")

    def repeat(self, call: Callable[[], jax.Array]) -> Callable[[int], jax.Array]:
        def run(n: int) -> jax.Array:
            for _ in range(n - 1):
                # No name holds the output, so that the next can have its memory.
                if self.wait_each:
                    call().block_until_ready()
                else:
                    call()
            return call().block_until_ready()

        return run

    def reused(self, function: Function, *operands: Any) -> Callable[[int], jax.Array]:
        """`function` into the shared output."""
        compiled = jax.jit(
            lambda *args: function(*args[:-1]),
            donate_argnums=len(operands),
            keep_unused=True,
        )

        def call() -> jax.Array:
            self.box[0] = compiled(*operands, self.box[0])
            return self.box[0]

        return self.repeat(call)

    def fresh(self, function: Function, *operands: Any) -> Callable[[int], jax.Array]:
        return self.repeat(lambda: function(*operands))


def vjp(function: Function) -> Function:
    """The gradient alone: what the primal computes is not asked for."""
    return lambda ct, s: jax.vjp(lambda x: function(x, s), ct)[1](ct)[0]


def directions(function: Function, o: Operands) -> dict[str, Function]:
    """The function, and its gradient where the dtype has one."""
    if jnp.issubdtype(o.x.dtype, jnp.inexact):
        return {"forward": function, "vjp": vjp(function)}
    return {"forward": function}


def of_jax(
    name: str, function: Function, o: Operands, *, whole: bool = True
) -> Iterator[Contender]:
    """Forward and gradient, into a reused output and into a fresh one."""
    for direction, f in directions(function, o).items():
        yield Contender(name, o.reused(f, o.x, o.s), "reused", direction, whole)
        yield Contender(name, o.fresh(jax.jit(f), o.x, o.s), "fresh", direction, whole)


OURS, ADD = "jax_revseg", "x + 1"


def ours(o: Operands) -> Iterator[Contender]:
    yield from of_jax(OURS, o.case.call, o)
    yield Contender(OURS, o.fresh(o.case.call, o.x, o.s), "eager")


def limits(o: Operands) -> Iterator[Contender]:
    """What nothing that reads and writes all of x can beat by much."""

    def add(x: jax.Array) -> jax.Array:
        return ~x if x.dtype == np.bool_ else x + jnp.ones((), x.dtype)

    yield Contender(ADD, o.reused(add, o.x))
    yield Contender(ADD + ", again", o.reused(add, o.x))
    yield Contender(ADD, o.fresh(jax.jit(add), o.x), "fresh")
    if o.device.platform == "cpu":
        source, target = o.host.view(np.uint8), np.zeros_like(o.host).view(np.uint8)

        def memcpy(n: int) -> None:  # One thread, into pages that have been touched.
            for _ in range(n):
                np.copyto(target, source)

        yield Contender("copy", memcpy)
    else:
        yield Contender("copy", o.reused(jnp.copy, o.x))


def pasted_index(segments: jax.Array, size: int, case: Case) -> jax.Array:
    """The source index as people write it, `(N, T)`; lengths are taken to be valid."""
    t = jnp.arange(size)
    if case.layout == "padded":
        n = segments[:, None]
        return jnp.where(t < n, n - 1 - t, t)
    if case.layout == "packed":
        ends = jnp.cumsum(segments, 1)
        k = jax.vmap(lambda row: jnp.searchsorted(row, t, side="right"))(ends)
        inside, k = k < ends.shape[1], jnp.minimum(k, ends.shape[1] - 1)
        end = jnp.take_along_axis(ends, k, 1)
        start = end - jnp.take_along_axis(segments, k, 1)
        return jnp.where(inside, start + end - 1 - t, t)
    changes = segments[:, 1:] != segments[:, :-1]
    edge = jnp.ones_like(segments[:, :1], bool)
    starts, ends = (jnp.concatenate(p, 1) for p in ((edge, changes), (changes, edge)))
    start = lax.cummax(jnp.where(starts, t, 0), 1)
    end = lax.cummin(jnp.where(ends, t, size - 1), 1, reverse=True)
    inside = True if case.padding_id is None else segments != case.padding_id
    return jnp.where(inside, start + end - t, t)


def pasted(case: Case) -> Function:
    """The `where` + `take_along_axis` snippet that goes round."""

    def function(x: jax.Array, segments: jax.Array) -> jax.Array:
        index = pasted_index(segments, case.size, case)
        index = index.T if case.axis == 0 else index
        index = index.reshape(index.shape + (1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, index, case.axis)

    return function


def take_along_axis(o: Operands) -> Iterator[Contender]:
    yield from of_jax("take_along_axis", pasted(o.case), o)


def flax(o: Operands) -> Iterator[Contender]:
    if o.case.layout != "padded":
        raise Absent("one segment a row only")
    from flax.linen.recurrent import flip_sequences

    def function(x: jax.Array, lengths: jax.Array) -> jax.Array:
        return flip_sequences(x, lengths, 1, time_major=o.case.axis == 0)

    yield from of_jax("Flax flip_sequences", function, o, whole=False)
