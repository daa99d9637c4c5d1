"""`associative_scan_segments` beside a Python loop, also over a sharded axis."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_revseg import associative_scan_segments
from tests import ragged
from tests.meshes import bytes_received, make_mesh
from tests.ragged import PACKED, N, T, close, combine_by_hand, digits, gradients, same

BOTH_WAYS = (False, True)


@jax.jit
def affine(a, b):
    """Composition of x -> m x + v: not commutative."""
    return {"m": b["m"] * a["m"], "v": b["m"] * a["v"] + b["v"]}


@jax.jit
def affine_and_norm(w, a, b):
    """The norm's derivative is NaN at two zeros or infinities, that of w at one."""
    norm = jnp.logaddexp(w * jnp.log(a["norm"]), w * jnp.log(b["norm"])) / w
    return affine(a, b) | {"norm": jnp.exp(norm)}


def test_each_segment_is_combined_alone():
    """Fails if a product overflows into the next segment, or a NaN in the padding
    reaches a gradient, also of what `fn` closes over."""
    rng = np.random.default_rng(0)
    names = {"m": (0.5, 1.5), "v": (1, 2), "norm": (1, 2)}
    clean = {k: rng.uniform(*v, (N, T)).astype(np.float32) for k, v in names.items()}
    clean["m"][0, :2] = 1e30  # Their product is infinite.
    carry_in = jax.tree.map(lambda x: x[::-1, -1], clean)
    cases = {  # The direction, and whether there is a `carry_in`.
        "lengths": (False, False),
        "ids": (True, True),
        "ids and padding": (True, True),
    }
    valid = {name: ragged.valid_steps(**PACKED[name]) for name in cases}

    def at_padding(fill):
        fill = np.float32(fill)
        return {
            name: jax.tree.map(lambda x, v=v: np.where(v, x, fill), clean)
            for name, v in valid.items()
        }

    def run(scan, elems, encodings):
        def one(name, w, elems, carry):
            reverse, carried = cases[name]
            fn, more = partial(affine_and_norm, w), PACKED[name] | encodings[name]
            more["carry_in"] = carry if carried else None
            out = scan(fn, elems, reverse=reverse, **more)
            return jax.tree.map(lambda y: jnp.where(abs(y) > 1e20, 0, y), out)

        return {
            name: gradients(partial(one, name), 2.0, elems[name], carry_in)
            for name in cases
        }

    want = run(combine_by_hand, at_padding(1), ragged.TRACED)
    scans = jax.jit(partial(run, associative_scan_segments))
    for bad in (np.nan, np.inf, 0):
        close(scans(at_padding(bad), ragged.TRACED), want)  # Padding gets zeros, too.


INF = float("inf")
EXACT = (  # fn, elements, ids, gradient of the last result.
    (jnp.logaddexp, [1, 2, -INF, 0], [0, 0, 1, 1], [0, 0, 0, 1]),
    (jnp.multiply, [2, INF, 3, 4], [0, 1, 2, 2], [0, 0, 4, 3]),
    (jnp.multiply, [2, 3, 0, 4], [0, 1, 2, 2], [0, 0, 4, 0]),
    (jnp.hypot, [3, 0, 0, 4], [0, 0, 1, 1], [0, 0, 0, 1]),
)


def test_gradients_stay_within_a_segment():
    """Fails if what stands at a start, or before it, makes a gradient NaN."""

    def last(x, ids, fn, reverse):
        order = slice(None, None, -1) if reverse else slice(None)
        scan = partial(associative_scan_segments, fn, reverse=reverse)
        return scan(x[order], segment_ids=ids[order])[order][-1]

    @jax.jit
    def run(cases):
        return [
            [jax.grad(last)(*case, fn, reverse) for reverse in BOTH_WAYS]
            for case, (fn, *_) in zip(cases, EXACT, strict=True)
        ]

    outs = run([(jnp.array(x, float), jnp.array(ids)) for _, x, ids, _ in EXACT])
    close(outs, [[jnp.array(want, float)] * 2 for *_, want in EXACT])


needs_8_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")


def over_blocks(fn, encoding, rows, steps, elems, carry_in=None, reverse=False):
    """The scan of whole arrays, each device working on its block."""
    key, segments, static = ragged.split(encoding)
    both, row = jax.P(rows, steps), jax.P(rows)

    def local(elems, carry_in, segments):
        more = dict(carry_in=carry_in, reverse=reverse, axis_name=steps) | static
        return associative_scan_segments(fn, elems, **{key: segments}, **more)

    specs = both, row, both if key in ("segment_ids", "starts") else row
    f = jax.shard_map(local, mesh=make_mesh(s=4, r=2), in_specs=specs, out_specs=both)
    return f(elems, carry_in, segments)


@needs_8_devices
@pytest.mark.parametrize(
    "name, rows, steps, reverse, carried",
    (
        ("lengths", None, "s", False, True),
        ("lengths", "r", "s", True, False),
        ("ids", None, "s", True, False),
        ("ids and padding", "r", "s", False, True),
        ("offsets", None, "s", True, True),
        ("offsets", None, ("s", "r"), False, False),
        ("starts", None, "s", False, False),
        ("starts", None, ("s", "r"), True, True),
    ),
)
def test_a_sharded_segment_axis(name, rows, steps, reverse, carried):
    """Fails if a state leaks over the edge of a block, or stops there."""
    elems, carry_in = digits(N, T + 1), jax.tree.map(lambda x: x[:, 0], digits(N, 1))
    how = carry_in if carried else None, reverse
    longer, join = ragged.LONGER[name], ragged.join
    scan = partial(over_blocks, join, longer, rows, steps, reverse=reverse)
    want = combine_by_hand(join, elems, *how, **longer)
    same(jax.device_get(jax.jit(scan)(elems, how[0])), jax.device_get(want))


@needs_8_devices
@pytest.mark.parametrize("name, reverse", (("lengths", True), ("ids", False)))
def test_gradients_over_a_sharded_segment_axis(name, reverse):
    """Fails if a block gives no cotangent to those before it."""
    rng = np.random.default_rng(0)
    elems = {k: rng.uniform(0.5, 1.5, (N, T + 1)).astype(np.float32) for k in "mv"}
    operands = elems, jax.tree.map(lambda x: x[::-1, 0] + 1, elems)
    longer = ragged.LONGER[name]
    blocks = partial(over_blocks, affine, longer, "r", "s", reverse=reverse)
    by_hand = partial(combine_by_hand, affine, reverse=reverse, **longer)
    got = jax.jit(partial(gradients, blocks))(*operands)
    want = gradients(by_hand, *operands)
    close(jax.device_get(got), jax.device_get(want), atol=1e-5)


@needs_8_devices
@pytest.mark.parametrize("key", ("lengths", "segment_ids"))
def test_a_device_holds_its_block_alone(key):
    block, features = 13, 3
    size, steps = 4 * block, jax.P(None, "s")
    shapes = {  # And how the devices share it.
        "x": ((2, size, features), np.float32, steps),
        "carry": ((2, features), np.float32, jax.P()),
        "lengths": ((2,), np.int32, jax.P()),
        "segment_ids": ((2, size), np.int32, steps),
    }

    def placed(name):
        shape, dtype, spec = shapes[name]
        sharding = jax.NamedSharding(make_mesh(s=4, r=2), spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    @jax.jit
    @jax.value_and_grad
    def run(x, carry, segments):
        scan = partial(over_blocks, jnp.multiply, {key: segments}, None, "s")
        return jnp.sum(jnp.sin(scan(x, carry)))

    compiled = run.lower(*map(placed, ("x", "carry", key))).compile()
    assert f"f32[2,{block},{features}]" in compiled.as_text()
    assert not re.search(rf"[\[,]{size}[\],]", compiled.as_text())
    # One element, and a flag, a row and device; all else is a few bytes.
    received = sum(n for _, n in bytes_received(compiled))
    assert received < block * 2 * features * 4, received
