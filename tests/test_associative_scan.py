"""`associative_scan_segments` beside a Python loop, also over a sharded segment axis."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_revseg import associative_scan_segments
from tests.meshes import bytes_received
from tests.ragged import (
    PACKED,
    TRACED,
    N,
    T,
    close,
    combine_by_hand,
    valid_steps,
    weighted,
)

BOTH_WAYS = (False, True)


def affine(a, b):
    """Composition of x -> m x + v: not commutative."""
    return {"m": b["m"] * a["m"], "v": b["m"] * a["v"] + b["v"]}


@jax.jit
def affine_and_log_sum_exp(w, a, b):
    """The derivative of the second is NaN at two infinities, that of w where w a = 0"""
    m = a[1]["m"] * b[1]["m"]
    power = jnp.logaddexp(w * jnp.log(a[1]["v"]), w * jnp.log(b[1]["v"])) / w
    return affine(a[0], b[0]), {"m": m, "v": jnp.exp(power)}


def test_each_segment_is_combined_alone():
    """Fails if a product overflows into the next segment, or a NaN in the padding
    reaches a gradient."""
    rng = np.random.default_rng(0)
    clean = {"m": rng.uniform(0.5, 1.5, (N, T, 1)), "v": rng.uniform(1, 2, (N, T, 2))}
    clean = jax.tree.map(np.float32, clean)
    clean["m"][0, :2] = 1e30  # Their product is infinite.
    carry_in = jax.tree.map(lambda x: x[::-1, -1], clean)
    valid = {name: valid_steps(**e)[..., None] for name, e in PACKED.items()}
    cases = [(name, way) for name in PACKED for way in BOTH_WAYS]

    def grad(scan, elems, valid, carried, **encoding):
        def loss(w, elems, carry_in):
            more = dict(carry_in=(carry_in, carry_in)) if carried else {}
            fn = partial(affine_and_log_sum_exp, w)
            out = scan(fn, (elems, elems), **more, **encoding)
            out = jax.tree.map(lambda y: jnp.where(valid, y, 0), out)
            finite = jax.tree.map(lambda y: jnp.where(abs(y) < 1e20, y, 0), out)
            return weighted(finite), out

        return jax.grad(loss, (0, 1, 2), has_aux=True)(2.0, elems, carry_in)

    def at(valid, fill):
        return jax.tree.map(lambda x: np.where(valid, x, np.float32(fill)), clean)

    @jax.jit
    def run(elems, valid, encodings):
        scan = associative_scan_segments
        return {
            (name, way): [
                grad(
                    *(partial(scan, reverse=way), elems[name], valid[name], carried),
                    **PACKED[name] | encodings[name],
                )
                for carried in (False, True)
            ]
            for name, way in cases
        }

    want = {
        (name, way): [
            grad(
                *(partial(combine_by_hand, reverse=way), at(valid[name], 1)),
                *(valid[name], carried),
                **PACKED[name],
            )
            for carried in (False, True)
        ]
        for name, way in cases
    }
    encodings = {name: TRACED[name] for name in PACKED}
    for bad in (np.nan, np.inf):
        elems = {name: at(v, bad) for name, v in valid.items()}
        close(run(elems, valid, encodings), want)  # Padding gets zeros, too.
