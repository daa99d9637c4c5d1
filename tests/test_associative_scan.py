"""`associative_scan_segments` beside a Python loop, also over a sharded axis."""

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
    same,
    traced,
    valid_steps,
    weighted,
)

BOTH_WAYS = (False, True)


@jax.jit
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
    cases = {  # Whether there is a `carry_in`.
        ("lengths", False): True,
        ("lengths", True): False,
        ("ids", True): True,
        ("ids and padding", False): False,
        ("ids and padding", True): True,
        ("offsets", False): True,
        ("starts", True): False,
    }

    def grad(scan, elems, valid, carried, **encoding):
        def loss(w, elems, carry_in):
            more = dict(carry_in=(carry_in, carry_in)) if carried else {}
            fn = partial(affine_and_log_sum_exp, w)
            out = scan(fn, (elems, elems), **more, **encoding)
            mine = jax.tree.map(lambda y: jnp.where(valid, y, 0), out)
            finite = jax.tree.map(lambda y: jnp.where(abs(y) < 1e20, y, 0), mine)
            return weighted(finite), out

        return jax.grad(loss, (0, 1, 2), has_aux=True)(2.0, elems, carry_in)

    def at(valid, fill):
        return jax.tree.map(lambda x: np.where(valid, x, np.float32(fill)), clean)

    @jax.jit
    def run(elems, valid, encodings):
        return {
            (name, way): grad(
                partial(associative_scan_segments, reverse=way),
                *(elems[name], valid[name], carried),
                **PACKED[name] | encodings[name],
            )
            for (name, way), carried in cases.items()
        }

    want = {
        (name, way): grad(
            partial(combine_by_hand, reverse=way),
            *(at(valid[name], 1), valid[name], carried),
            **PACKED[name],
        )
        for (name, way), carried in cases.items()
    }
    encodings = {name: TRACED[name] for name in PACKED}
    for bad in (np.nan, np.inf):
        elems = {name: at(v, bad) for name, v in valid.items()}
        close(run(elems, valid, encodings), want)  # Padding gets zeros, too.


@jax.jit
def join(a, b):
    """Of numbers and their powers of ten: exact, and different for every order."""
    return a[0] * b[1] + b[0], a[1] * b[1]


def digits(rows, size):
    draw = np.random.default_rng(2).integers(1, 10, (rows, size)).astype(np.int32)
    return draw, np.full_like(draw, 10)


@pytest.mark.parametrize("name", PACKED)
def test_layouts_and_maps_are_exact(name):
    """Time-major data, rows under vmap, host encodings, and what enters rows."""
    elems, encoding = digits(N, T), PACKED[name]
    (key, segments), *_ = traced(encoding).items()
    more = {k: v for k, v in encoding.items() if k != key}
    turn = lambda a: a.T if key in ("segment_ids", "starts") else a  # noqa: E731
    carry_in = tuple(x[::-1, 1] for x in elems)

    first = list(PACKED).index(name) % 2  # Each way sees both directions.

    @jax.jit
    def run(elems, carry_in, segments):
        ways = (first == 0, first == 1)
        one, other = (
            partial(associative_scan_segments, join, reverse=way, **more)
            for way in ways
        )
        given = {"carry_in": carry_in, key: encoding[key]}
        host = one(elems, **given)
        given[key] = turn(segments)
        time_major = other(jax.tree.map(jnp.transpose, elems), axis=0, **given)
        row = lambda x, c, s: one(x, carry_in=c, **{key: s})  # noqa: E731
        mapped = jax.vmap(row)(elems, carry_in, segments)
        return host, jax.tree.map(jnp.transpose, time_major), mapped

    operands = jax.tree.map(jnp.asarray, (elems, carry_in))
    by_hand = partial(combine_by_hand, join, *operands, **encoding)
    want = by_hand(reverse=first == 0), by_hand(reverse=first == 1)
    same(run(elems, carry_in, segments), (*want, want[0]))


@pytest.mark.parametrize("name", ("ids", "starts"))
def test_blocks_with_carry_in_are_one_scan(name):
    (key, whole), *_ = traced(PACKED[name]).items()
    whole = np.concatenate([whole, whole[:, -1:]], 1)
    first = whole[:, 1:] if key == "starts" else whole[:, 1:] != whole[:, :-1]
    elems, carry_in = digits(N, 8), digits(N, 1)
    carry_in = tuple(c[:, 0] for c in carry_in)
    for reverse in BOTH_WAYS:
        scan = jax.jit(partial(associative_scan_segments, join, reverse=reverse))
        carry, blocks = carry_in, {}
        for t in (4, 0) if reverse else (0, 4):
            part = tuple(x[:, t : t + 4] for x in elems)
            blocks[t] = scan(part, carry_in=carry, **{key: whole[:, t : t + 4]})
            last = tuple(x[:, 0 if reverse else -1] for x in blocks[t])
            one = zip(last, (0, 1), strict=True)  # Joining nothing.
            carry = tuple(jnp.where(first[:, 3], nothing, x) for x, nothing in one)
        got = tuple(
            map(
                partial(jnp.concatenate, axis=1), zip(blocks[0], blocks[4], strict=True)
            )
        )
        same(got, scan(elems, carry_in=carry_in, **{key: whole}))


INF = float("inf")
EXACT = {  # fn, elements, ids, gradient of the last result.
    "log": (jnp.logaddexp, [1, 2, -INF, 0], [0, 0, 1, 1], [0, 0, 0, 1]),
    "infinity": (jnp.multiply, [2, INF, 3, 4], [0, 1, 2, 2], [0, 0, 4, 3]),
    "infinite start": (jnp.multiply, [2, 3, 0, 4], [0, 1, 2, 2], [0, 0, 4, 0]),
    "hypotenuse": (jnp.hypot, [3, 0, 0, 4], [0, 0, 1, 1], [0, 0, 0, 1]),
}


@pytest.mark.parametrize("name", EXACT)
def test_gradients_stay_within_a_segment(name):
    """Fails if what stands at a start, or before it, makes a gradient NaN."""
    fn, x, ids, want = EXACT[name]
    x, ids, want = jnp.array(x, float), jnp.array(ids), jnp.array(want, float)

    def last(x, reverse):
        order = slice(None, None, -1) if reverse else slice(None)
        scan = partial(associative_scan_segments, fn, reverse=reverse)
        return scan(x[order], segment_ids=ids[order])[order][-1]

    for reverse in BOTH_WAYS:
        close(jax.grad(last)(x, reverse), want)


def test_gradients_of_what_fn_closes_over():
    x = np.array([[1, 2, 3], [2, 1, 5]], np.float32)

    def norm(p, a, b):
        return (a**p + b**p) ** (1 / p)

    @jax.jit
    @jax.grad
    def grad(p, x, lengths):
        return jnp.sum(associative_scan_segments(partial(norm, p), x, lengths))

    @jax.grad
    def alone(p, row):
        return jnp.sum(lax.associative_scan(partial(norm, p), row))

    for lengths in (np.array(n) for n in ([3, 3], [3, 0], [3, 2])):
        want = sum(alone(2.0, row[:n]) for row, n in zip(x, lengths, strict=True) if n)
        for bad in (np.nan, 0, 1, np.inf):
            filled = np.where(np.arange(3) < lengths[:, None], x, np.float32(bad))
            close(grad(2.0, filled, lengths), want, rtol=1e-4)


needs_8_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
ROWS, SIZE = 4, 8
LONGER = {
    name: {
        k: np.concatenate([v, v[:, -1:]], 1) if k in ("segment_ids", "starts") else v
        for k, v in encoding.items()
    }
    for name, encoding in PACKED.items()
}
MESHES = {  # Axes of rows and steps; for encodings, whether reversed and carried on.
    "steps": (
        *(None, "s"),
        {
            "lengths": (False, True),
            "ids": (True, False),
            "ids and padding": (False, True),
            "offsets": (True, True),
            "starts": (False, False),
        },
    ),
    "rows and steps": ("r", "s", {"lengths": (True, False), "ids": (False, True)}),
    "steps over both": (
        *(None, ("s", "r")),
        {"offsets": (False, False), "starts": (True, True)},
    ),
}


def sharded(f, rows, steps, key):
    """`f(elems, carry_in, segments, axis_name)`, in which `elems` are blocks."""
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("s", "r"), axis_types=kinds)
    both = jax.P(rows, steps)
    specs = (
        both,
        jax.P(rows),
        both if key in ("segment_ids", "starts") else jax.P(rows),
    )
    f = partial(f, axis_name=steps)
    return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=both)


@needs_8_devices
@pytest.mark.parametrize("name", MESHES)
def test_a_sharded_segment_axis(name):
    """Fails if a state leaks over the edge of a block, or stops there."""
    rows, steps, cases = MESHES[name]
    rng = np.random.default_rng(0)
    elems = {
        "m": rng.uniform(0.5, 1.5, (ROWS, SIZE, 2)).astype(np.float32),
        "v": rng.normal(size=(ROWS, SIZE, 2)).astype(np.float32),
    }
    carry_in = jax.tree.map(lambda x: x[::-1, 0] + 1, elems)

    def grad(scan, elems, carry_in):
        def loss(elems, carry_in):
            out = scan(elems, carry_in)
            return weighted(out), out

        (elems_bar, carry_bar), out = jax.grad(loss, (0, 1), has_aux=True)(
            elems, carry_in
        )
        return elems_bar, carry_bar, out

    @jax.jit
    def run(elems, carry_in, encodings):
        outs = {}
        for n, (reverse, carried) in cases.items():
            (key, segments), *_ = encodings[n].items()
            more = {k: v for k, v in LONGER[n].items() if k != key}

            def one(elems, carry_in, segments, axis_name, key=key, more=more,
                    carried=carried, reverse=reverse):  # fmt: skip
                return associative_scan_segments(
                    *(affine, elems),
                    carry_in=carry_in if carried else None,
                    reverse=reverse,
                    axis_name=axis_name,
                    **{key: segments},
                    **more,
                )

            scan = sharded(one, rows, steps, key)
            scan = lambda e, c, scan=scan, s=segments: scan(e, c, s)  # noqa: E731
            outs[n] = grad(scan, elems, carry_in)
        return outs

    got = run(elems, carry_in, {n: traced(LONGER[n]) for n in cases})
    for n, (reverse, carried) in cases.items():
        by_hand = lambda e, c, n=n, r=reverse, with_carry=carried: combine_by_hand(  # noqa: E731
            *(affine, e), carry_in=c if with_carry else None, reverse=r, **LONGER[n]
        )
        want = grad(by_hand, elems, carry_in)
        close(jax.device_get(got[n]), jax.device_get(want), atol=1e-5)


@needs_8_devices
@pytest.mark.parametrize("key", ("lengths", "segment_ids", "starts"))
def test_a_device_holds_its_block_alone(key):
    size, features = 4 * 101, 3
    shape = {"lengths": (2,)}.get(key, (2, size))
    segments = jax.ShapeDtypeStruct(shape, bool if key == "starts" else np.int32)
    x = jax.ShapeDtypeStruct((2, size, features), np.float32)

    def one(x, carry_in, segments, axis_name):
        return associative_scan_segments(
            jnp.multiply, x, carry_in=carry_in, axis_name=axis_name, **{key: segments}
        )

    scan = sharded(one, None, "s", key)
    run = lambda x, c, s: jax.value_and_grad(  # noqa: E731
        lambda x: jnp.sum(jnp.sin(scan(x, c, s)))
    )(x)
    spec = lambda a: jax.P(None, "s") if a.ndim > 1 else jax.P()  # noqa: E731
    mesh = jax.make_mesh(
        (4, 2), ("s", "r"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    carry = jax.ShapeDtypeStruct((2, features), np.float32)
    placed = [
        jax.ShapeDtypeStruct(
            a.shape,
            a.dtype,
            sharding=jax.NamedSharding(mesh, jax.P() if a is carry else spec(a)),
        )
        for a in (x, carry, segments)
    ]
    compiled = jax.jit(run).lower(*placed).compile()
    text = compiled.as_text()
    assert re.search(r"f32\[2,101,3\]", text)
    assert not re.search(rf"[\[,]{size}[\],]", text)
    # One element, and a flag, a row and device; all else is a few bytes.
    assert sum(n for _, n in bytes_received(compiled)) < 101 * 2 * features * 4
