"""`scan_segments` and `bidirectional_scan` beside a Python loop over valid steps.

The loop calls `f` for the valid steps alone. Gradients are compared too, of `init`,
`carry_in`, `xs` and of what `f` closes over, with NaN and infinity in the padding.
"""

import gc
import weakref
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_revseg import (
    _programs,
    associative_scan_segments,
    bidirectional_scan,
    scan_segments,
)
from tests.ragged import (
    ENCODINGS,
    IDS,
    LENGTHS,
    MASK,
    STARTS,
    TRACED,
    N,
    T,
    close,
    same,
    scan_by_hand,
    traced,
    valid_steps,
    weighted,
)

D = 3
BOTH_WAYS = (False, True)
AUTO = (jax.sharding.AxisType.Auto,)


def gru(w, carry, x):
    """A pytree carry of two dtypes, and a step that depends on both inputs."""
    h, count = carry
    z = jax.nn.sigmoid(x["a"] @ w["z"] + h)
    h = (1 - z) * h + z * jnp.tanh(x["a"] @ w["h"] + x["b"][:, None])
    return (h, count + 1), {"h": h, "count": count}


@jax.jit  # The loop by hand calls one program faster than its operations.
def norm(w, carry, x):
    """The derivative is infinite where x or the carry is 0, and NaN below 0."""
    h, count = carry
    size = jnp.sqrt(jnp.sum((x["a"] @ w["z"]) ** 2, -1, keepdims=True))
    h = jnp.sqrt(h**2 + size) * jnp.log(1 + w["h"][0]) / jnp.sqrt(x["b"])[:, None]
    return (h, count + 1), {"h": h, "log": jnp.log(h), "count": count}


def make(bad=np.nan, **encoding):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.uniform(0.5, 1.5, shape).astype(np.float32)  # noqa: E731
    w = {"z": draw(D, 2), "h": draw(D, 2)}
    init = (draw(N, 2), np.arange(N, dtype=np.int32))
    xs = {"a": draw(N, T, D), "b": draw(N, T)}
    valid = valid_steps(**encoding)
    for x in xs.values():
        x[~valid] = bad
    return w, init, xs


def values_and_gradients(scan, w, init, carry_in, xs, **more):
    """Of the weights, of the floating parts of the carries, and of xs."""

    def loss(w, h, h_in, xs):
        if carry_in is not None:
            more["carry_in"] = (h_in, carry_in[1])
        out = scan(partial(norm, w), (h, init[1]), xs, **more)
        return weighted(*out), out

    grad = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)
    (_, out), grads = grad(w, init[0], 0.0 if carry_in is None else carry_in[0], xs)
    return out, grads


def test_values_and_gradients_are_those_of_valid_steps_alone():
    """Also fails if a row goes on from `init` where it has a `carry_in`."""
    w, init, _ = make(**ENCODINGS["lengths"])
    carry_in = (init[0][::-1] + 1, init[1] + 10)
    options = ((None, None), (carry_in, 3))  # The last chunk is not full.
    cases = {  # Each encoding and each direction has both.
        (name, way): options[(i + way) % 2]
        for i, name in enumerate(ENCODINGS)
        for way in BOTH_WAYS
    }

    @jax.jit  # Compilation takes the time.
    def run(w, init, xs, encodings):
        return {
            (name, way): values_and_gradients(
                partial(scan_segments, reverse=way, chunk=chunk),
                *(w, init, carry_in, xs[name]),
                **ENCODINGS[name] | encodings[name],
            )
            for (name, way), (carry_in, chunk) in cases.items()
        }

    desired = {
        (name, way): values_and_gradients(
            partial(scan_by_hand, reverse=way),
            *(w, init, carry_in, make(1.0, **ENCODINGS[name])[2]),
            **ENCODINGS[name],
        )
        for (name, way), (carry_in, _) in cases.items()
    }
    for bad in (np.nan, np.inf, 0.0):
        xs = {name: make(bad, **e)[2] for name, e in ENCODINGS.items()}
        close(run(w, init, xs, TRACED), desired)


def test_bidirectional_scan_is_two_scans():
    names = ("ids and padding", "starts", "mask")
    w, init, _ = make(**ENCODINGS["lengths"])
    params = (w, jax.tree.map(lambda a: a / 2, w))
    inits = (init, jax.tree.map(lambda a: a + 1, init))

    def two(f, params, inits, xs, **encoding):
        ways = [
            scan_segments(partial(f, p), init, xs, reverse=reverse, **encoding)
            for p, init, reverse in zip(params, inits, BOTH_WAYS, strict=True)
        ]
        return tuple(zip(*ways, strict=True))

    @partial(jax.jit, static_argnums=0)
    def run(scan, params, xs, traced):
        def loss(params, xs, encoding):
            out = scan(gru, params, inits, xs, **encoding)
            return weighted(*out), out

        grad = jax.grad(loss, (0, 1), has_aux=True)
        return [grad(params, xs[n], ENCODINGS[n] | traced[n]) for n in names]

    xs = {name: make(**ENCODINGS[name])[2] for name in names}
    operands = params, xs, TRACED
    close(run(bidirectional_scan, *operands), run(two, *operands))


def undefined_at_zero(algebra, w, carry, x):
    """None of these has a gradient where a row holds zeros, or one value."""
    c, h = carry
    m, v = x["matrix"], x["vector"]
    terms = [jnp.log(x["count"]), 1 / x["count"], jnp.sqrt(x["price"] - 100)]
    terms.append(v[:, 0] / jnp.std(v, -1))
    if algebra:
        terms.append(jnp.linalg.inv(m)[:, 0, 1])
        terms.append(jnp.linalg.solve(m, v[..., None])[:, 0, 0])
        terms.append(jnp.linalg.slogdet(m)[1])
        terms.append(jnp.linalg.cholesky(m @ m.mT)[:, 1, 0])
    h = jnp.sqrt(c**2 * h) + x["price"]
    c = c + sum(w[i] * term for i, term in enumerate(terms))
    return (c, h), c


ROOTS, ALGEBRA = (partial(undefined_at_zero, algebra) for algebra in BOTH_WAYS)


def test_a_row_without_a_valid_step_borrows_one():
    """Fails if the gradient of the weights is NaN since such a row holds zeros."""
    rng = np.random.default_rng(0)
    xs = {
        "count": np.array([[3, 1, 2], [0, 0, 0]]),
        "price": np.array([[101, 104, 102], [np.nan] * 3], np.float32),
        "matrix": rng.normal(size=(2, 3, 2, 2)).astype(np.float32),
        "vector": rng.normal(size=(2, 3, 2)).astype(np.float32),
    }
    xs["matrix"][1], xs["vector"][1] = 0, 1
    xs["matrix"][0] += 3 * np.eye(2)
    init = np.array([1, 0], np.float32), np.array([1, 0], np.float32)
    encodings = {
        "lengths": np.array([3, 0]),
        "cu_seqlens": np.array([[0, 3], [0, 0]]),
        "mask": np.array([[1, 1, 1], [0, 0, 0]], bool),
        "segment_ids": np.array([[1, 1, 1], [0, 0, 0]]),
    }
    cases = (
        (ALGEBRA, "lengths", dict(reverse=False)),
        (ROOTS, "cu_seqlens", dict(reverse=True, chunk=2)),
        (ROOTS, "mask", dict(reverse=False)),
        (ROOTS, "segment_ids", dict(reverse=True, padding_id=0)),
    )
    w = np.ones(8, np.float32)

    def summed(f):
        return lambda *operands: sum(map(jnp.sum, jax.tree.leaves(f(*operands))))

    @jax.jit
    def alone(w, init, xs):
        """The first row by `lax.scan`."""
        init = jax.tree.map(lambda a: a[:1], init)
        xs = jax.tree.map(lambda x: jnp.moveaxis(x[:1], 1, 0), xs)

        def grad(f, reverse):
            loss = lambda w: lax.scan(partial(f, w), init, xs, reverse=reverse)  # noqa: E731
            return jax.grad(summed(loss))(w)

        return grad(ALGEBRA, False), grad(ROOTS, False), grad(ROOTS, True)

    @jax.jit
    def run(w, init, xs, encodings):
        def one(f, w, init, **more):
            return scan_segments(partial(f, w), init, xs, **more)

        def both(w, init):
            inits = init, init
            return bidirectional_scan(ROOTS, w, inits, xs, encodings["lengths"])

        grads = [
            jax.grad(
                summed(partial(one, f, **more, **{name: encodings[name]})), (0, 1)
            )(w, init)
            for f, name, more in cases
        ]
        return grads, jax.grad(summed(both), (0, 1))((w, w), init)

    algebra, roots, back = alone(w, init, xs)
    assert np.isfinite(roots + back).all() and np.isfinite(algebra).all()
    for order in (slice(None), slice(None, None, -1)):  # Also with that row first.
        operands = jax.tree.map(lambda a: a[order], (init, xs, encodings))  # noqa: B023
        grads, (both, both_init) = run(w, *operands)
        want = algebra, back, roots, back, roots, back
        for a, b in zip((*(w for w, _ in grads), *both), want, strict=True):
            close(a, b, rtol=1e-4)
        inits = jax.tree.leaves(([init for _, init in grads], both_init))
        assert np.isfinite(inits).all()


def test_a_batch_without_a_valid_step_has_finite_gradients():
    def loss(w, lengths):
        f = lambda c, x: (jnp.sqrt(c) * w + jnp.log(x), None)  # noqa: E731
        return scan_segments(f, jnp.ones(2), jnp.zeros((2, 3)), lengths)[0].sum()

    assert jax.grad(loss)(1.0, jnp.array([0, 0])) == 0
    counts, lengths = jnp.array([[3, 1, 2], [0, 0, 0]]), jnp.array([3, 0])
    log = lambda w: scan_segments(  # noqa: E731
        lambda c, k: (c + w * jnp.log(k), None), jnp.zeros(2), counts, lengths
    )[0].sum()
    np.testing.assert_allclose(jax.grad(log)(1.0), np.log(6), rtol=1e-6)


@jax.jit
def total(scale, carry, x):
    """Exact on integers, and different for every order of steps."""
    carry = 10 * carry + scale * x
    return carry, carry


def exact():
    """Integers: rows, inits, carries that enter."""
    xs = np.random.default_rng(1).integers(1, 10, (N, T)).astype(np.int32)
    return np.arange(N, dtype=np.int32) + 1, np.arange(N, dtype=np.int32) + 6, xs


@pytest.mark.parametrize("name", ENCODINGS)
def test_layouts_chunks_and_maps_are_exact(name):
    """Time-major data, two batch axes, chunks of any size, and rows under vmap."""
    f = partial(total, 1)
    init, carry_in, xs = exact()
    encoding = ENCODINGS[name]
    (key, segments), *_ = traced(encoding).items()
    more = {k: v for k, v in encoding.items() if k != key}
    per_step = key in ("segment_ids", "starts", "mask")
    square = lambda a: a.reshape(2, 2, *a.shape[1:])  # noqa: E731
    middle = lambda a: jnp.moveaxis(square(a), -1, 1)  # noqa: E731
    turn = lambda a: a.T if per_step else a  # noqa: E731

    def host(scan, init, carry_in, xs, segments):
        return scan(init, xs, carry_in=carry_in, chunk=10, **{key: encoding[key]})

    def time_major(scan, init, carry_in, xs, segments):
        given = {key: turn(segments), "carry_in": carry_in}
        carry, ys = scan(init, xs.T, axis=0, chunk=3, **given)
        return carry, ys.T

    def two_batch_axes(scan, init, carry_in, xs, segments):
        given = {key: (middle if per_step else square)(segments)}
        given["carry_in"] = square(carry_in)
        carry, ys = scan(square(init), middle(xs), axis=1, **given)
        return carry.reshape(N), jnp.moveaxis(ys, 1, -1).reshape(N, T)

    def rows(scan, init, carry_in, xs, segments):
        one = lambda i, c, x, s: scan(i, x, carry_in=c, chunk=4, **{key: s})  # noqa: E731
        return jax.vmap(one)(init, carry_in, xs, segments)

    def only_encodings(scan, init, carry_in, xs, segments):
        one = lambda s: scan(init, xs, carry_in=carry_in, chunk=7, **{key: s})  # noqa: E731
        two = jnp.stack([segments, segments[::-1]])
        return jax.tree.map(lambda out: out[0], jax.vmap(one)(two))

    ways = (host, time_major, two_batch_axes, rows, only_encodings)
    first = list(ENCODINGS).index(name) % 2  # Each way sees both directions.

    @jax.jit
    def run(*operands):
        scan = partial(scan_segments, f, **more)
        return [
            way(partial(scan, reverse=(first + i) % 2 == 0), *operands)
            for i, way in enumerate(ways)
        ]

    init, carry_in, xs = map(jnp.asarray, (init, carry_in, xs))
    by_hand = partial(scan_by_hand, f, init, xs, carry_in, **encoding)
    want = [by_hand(reverse=reverse) for reverse in BOTH_WAYS]
    for i, out in enumerate(run(init, carry_in, xs, segments)):
        same(out, want[(first + i) % 2 == 0])


@pytest.mark.parametrize("name", ("segment_ids", "mask", "starts"))
def test_time_major_steps_of_a_square(name):
    """Fails if `(T, N)` is taken for `(N, T)` where both are equal."""
    init, _, xs = (jnp.asarray(a[..., :N]) for a in exact())
    segments = {"segment_ids": IDS, "mask": MASK, "starts": STARTS}[name][:, :N]
    want = scan_by_hand(partial(total, 1), init, xs, **{name: segments})
    scan = partial(scan_segments, partial(total, 1), init)
    c, y = scan(xs.T, axis=0, **{name: segments.T})
    same((c, y.T), want)
    same(scan(xs, **{name: segments}), want)


@pytest.mark.parametrize("name", ("lengths", "ids", "starts", "mask"))
def test_blocks_with_carry_in_are_one_scan(name):
    """Also fails if a row without a valid step loses its carry."""
    f = jax.jit(partial(total, 1))
    (key, whole), *_ = traced(ENCODINGS[name]).items()
    init, carry_in, xs = exact()
    if key != "lengths":
        whole = np.concatenate([whole, whole[:, -1:]], 1)
    xs = np.concatenate([xs, xs[:, :1]], 1)
    first = np.zeros((N, 9), bool)  # Of a segment, but for those of rows.
    if key == "starts":
        first[:, 1:8] = whole[:, 1:]
    elif key == "segment_ids":
        first[:, 1:8] = whole[:, 1:] != whole[:, :-1]

    for reverse in BOTH_WAYS:
        scan = jax.jit(partial(scan_segments, f, reverse=reverse))
        carry, ys = carry_in, {}
        for t in (4, 0) if reverse else (0, 4):
            part = np.clip(whole - t, 0, 4) if key == "lengths" else whole[:, t : t + 4]
            anew = first[:, t + 4 if reverse else t]
            carry = jnp.where(anew, init, carry)
            given = {key: part, "carry_in": carry}
            carry, ys[t] = scan(init, xs[:, t : t + 4], **given)
        ys = np.concatenate([ys[0], ys[4]], 1)
        want = scan(init, xs, carry_in=carry_in, **{key: whole})
        same((carry, ys), jax.device_get(want))


def test_chunks_are_skipped_where_no_row_has_a_step():
    seen, xs = [], jnp.ones((2, 12), int)

    def f(carry, x):
        jax.debug.callback(lambda: seen.append(1))
        return total(1, carry, x)

    def steps(reverse, chunk, mapped=False, **encoding):
        scan = partial(scan_segments, f, jnp.zeros(2, int), xs, reverse=reverse)
        scan = partial(scan, chunk=chunk)
        if mapped:
            jax.vmap(lambda s: scan(**s))(jax.tree.map(lambda s: s[None], encoding))
        else:
            scan(**encoding)
        jax.effects_barrier()
        taken = len(seen)
        seen.clear()
        return taken

    lengths, mask = jnp.array([2, 4]), jnp.arange(12) // 6 == jnp.array([[1], [3]])
    for reverse in BOTH_WAYS:
        assert steps(reverse, 3, lengths=lengths) == 6
    assert steps(False, 5, lengths=lengths * 0) == 0
    assert steps(True, 2, mask=mask) == 6
    assert steps(False, 4, starts=mask) == 12
    assert steps(False, 3, mapped=True, lengths=lengths) == 12


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")
def test_chunks_with_a_collective_in_f():
    """Fails if a device skips a chunk whose collective another waits for."""
    mesh, rows = jax.make_mesh((4,), ("d",), axis_types=AUTO), jax.P("d")
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32)
    lengths, init = jnp.array([1, 0, 8, 3]), jnp.ones(4)

    def loss(w, xs, lengths, chunk, reverse):
        f = lambda c, x: (w * c + lax.psum(x * c, "d"), c)  # noqa: E731
        scan = partial(scan_segments, f, init[:1], reverse=reverse, chunk=chunk)
        carry, ys = scan(xs, lengths)
        return lax.psum(jnp.sum(jnp.sin(carry)) + jnp.sum(jnp.cos(ys)), "d")

    def grad(chunk, reverse):
        one = partial(loss, chunk=chunk, reverse=reverse)
        specs = (jax.P(), rows, rows)
        sharded = jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=jax.P())
        run = jax.jit(jax.value_and_grad(sharded, (0, 1)))
        return run(jnp.float32(0.5), xs, lengths)

    close(grad(2, True), grad(None, True))


class Cell:
    def __call__(self, carry, x):
        return carry + x, carry

    method = __call__


class Product:
    def __call__(self, a, b):
        return a * b

    combine = __call__

    def step(self, _, carry, x):
        return carry * x, carry


def adding(_, carry, x):
    return carry + x, carry


CELL, PRODUCT = Cell(), Product()
KINDS = {
    "function": (lambda c, x: (c + x, c), jnp.logaddexp, adding),
    "partial": (partial(adding, None), partial(jnp.add), partial(adding)),
    "bound method": (CELL.method, PRODUCT.combine, PRODUCT.step),
    "callable object": (CELL, PRODUCT, adding),
}


def eager_calls(f, fn, g, xs, init, lengths, ways=(True,)):
    """The three scans, and the gradient of one."""
    for reverse in ways:
        scan = partial(scan_segments, f, init, xs, lengths, reverse=reverse)
        scan()
        scan(chunk=2, carry_in=init)
        associative_scan_segments(fn, xs, lengths, reverse=reverse)
        loss = lambda init, r=reverse: scan_segments(  # noqa: E731
            f, init, xs, lengths, reverse=r
        )[0]
        jax.vjp(loss, init)[1](init)
    bidirectional_scan(g, (init[0], init[1]), (init, init), xs, lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_a_repeated_eager_call_compiles_nothing(kind, caplog):
    f, fn, g = KINDS[kind]
    ways = BOTH_WAYS if kind == "function" else (False,)
    operands = jnp.ones((2, 4)), jnp.zeros(2), jnp.array([4, 2])
    with jax.log_compiles(), caplog.at_level("WARNING"):
        eager_calls(f, fn, g, *operands, ways)
        compiled = [r for r in caplog.messages if "XLA compilation" in r]
        assert len(compiled) >= 5
        caplog.clear()
        eager_calls(f, fn, g, *operands, ways)
        assert not [r for r in caplog.messages if "compil" in r.lower()]


def test_a_new_lambda_is_kept_no_longer_than_it_lives():
    operands = jnp.ones((2, 4)), jnp.zeros(2), jnp.array([4, 2])
    gc.collect()
    before, refs = len(_programs._programs), []

    def call():
        new = [lambda c, x: (c + x, c), lambda a, b: a + b, lambda p, c, x: (c + x, c)]
        refs.extend(map(weakref.ref, new))
        eager_calls(*new, *operands)
        assert len(_programs._programs) == before + 3

    def fail(carry, x):
        raise RuntimeError

    call()
    refs.append(weakref.ref(fail))
    with pytest.raises(RuntimeError):
        scan_segments(fail, operands[1], operands[0], operands[2])
    del fail
    gc.collect()
    assert [ref() for ref in refs] == [None] * 4
    assert len(_programs._programs) == before


def test_a_gradient_keeps_what_that_of_a_plain_scan_keeps():
    """Fails if the loop saves a mask as large as what it selects."""
    n, t, d = 64, 512, 128
    x, h, a = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((n, t, d), (n, d), (d,)))
    step = lambda a, c, x: (a * c + x,) * 2  # noqa: E731

    def plain(a, h, x, _):
        ys = lax.scan(partial(step, a), h, jnp.moveaxis(x, 1, 0))[1]
        return jnp.sum(jnp.sin(jnp.moveaxis(ys, 0, 1)))

    def ragged(name, reverse, a, h, x, segments):
        scan = partial(scan_segments, partial(step, a), h, x, reverse=reverse)
        return jnp.sum(jnp.sin(scan(**{name: segments})[1]))

    def temporaries(loss, segments):
        grad = jax.jit(jax.grad(loss, (0, 1, 2))).lower(a, h, x, segments)
        return grad.compile().memory_analysis().temp_size_in_bytes

    lengths, ids = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((n,), (n, t)))
    limit = 1.05 * temporaries(plain, lengths)
    assert temporaries(partial(ragged, "lengths", False), lengths) <= limit
    assert temporaries(partial(ragged, "segment_ids", True), ids) <= limit


def test_steps_that_are_all_valid_cost_one_selection():
    """Fails if ids without padding select anything but the carry at a start."""
    xs = jnp.ones((2, 4))

    def text(carry_in=None, **encoding):
        scan = partial(scan_segments, lambda c, x: (c + x, c), jnp.zeros(2))
        return str(jax.make_jaxpr(partial(scan, carry_in=carry_in))(xs, **encoding))

    ids = text(segment_ids=jnp.zeros((2, 4), int))
    starts = text(starts=xs > 0, carry_in=jnp.ones(2))
    assert ids.count("select_n") == starts.count("select_n") == 1
    assert text(lengths=jnp.array([1, 2])).count("select_n") > 1
    assert "cumsum" not in starts and "gather" not in starts


DIGITS = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])


def test_layouts_of_xs_and_trees():
    f = partial(total, 1)
    zeros, lengths = jnp.zeros(2, int), jnp.array([3, 2])
    carry, ys = scan_segments(f, zeros, DIGITS, lengths)
    assert ys.tolist() == [[1, 12, 123, 0], [5, 56, 0, 0]]
    assert carry.tolist() == [123, 56]
    time_major = scan_segments(f, zeros, DIGITS.T, lengths, axis=0)
    close(time_major, (carry, ys.T))
    close(
        scan_segments(f, zeros[None], DIGITS[None], lengths[None]),
        (carry[None], ys[None]),
    )
    alone = scan_segments(f, jnp.int32(0), DIGITS[0], 3, reverse=True)
    assert alone[1].tolist() == [321, 32, 3, 0]
    mapped = jax.vmap(partial(scan_segments, f))(zeros, DIGITS, lengths)
    close(mapped, (carry, ys))
    unrolled = scan_segments(f, zeros, DIGITS, lengths, unroll=3)
    close(unrolled, (carry, ys))
    back = (np.array([321, 65]), [[321, 32, 3, 0], [65, 6, 0, 0]])
    both = bidirectional_scan(total, [1, 1], [zeros, zeros], DIGITS, lengths)
    close(both[0], (carry, jnp.asarray(back[0])))
    assert both[1][1].tolist() == back[1]


def test_dtypes_and_keys():
    """Fails if key arrays, which have no zero, cannot be carried or scanned."""
    keys = jax.random.split(jax.random.key(0), (2, 4))
    xs = {"key": keys, "byte": DIGITS.astype(np.int8), "flag": DIGITS > 2}

    def f(carry, x):
        draw = jax.vmap(jax.random.bits)(x["key"])
        return (carry[0] + draw, x["key"]), (x["flag"], x["byte"], None)

    init = (jnp.zeros(2, jnp.uint32), jax.random.split(jax.random.key(1), 2))
    carry, ys = scan_segments(f, init, xs, jnp.array([3, 0]))
    draws = [jax.random.bits(key) for key in keys[0, :3]]
    assert carry[0].tolist() == [int(sum(draws)), 0]
    last = jnp.stack([keys[0, 2], init[1][1]])
    assert (jax.random.key_data(carry[1]) == jax.random.key_data(last)).all()
    assert ys[1].dtype == jnp.int8 and ys[1].tolist() == [[1, 2, 3, 0], [0] * 4]


@pytest.mark.parametrize("shape", ((2, 0), (0, 4), (2, 4)))
@pytest.mark.parametrize("chunk", (None, 3))
def test_nothing_to_scan_returns_the_carry(shape, chunk):
    xs, init = jnp.ones(shape), jnp.arange(shape[0], dtype=float)

    @jax.jit
    def run(init, xs, encodings):
        outs, shapes = [], []
        for encoding in encodings:
            padding = {"padding_id": 0} if "segment_ids" in encoding else {}
            more = dict(carry_in=init + 1, chunk=chunk, **encoding, **padding)
            scan = partial(scan_segments, lambda c, x: (c * x, c), init, xs, **more)
            outs += [scan(reverse=way) for way in BOTH_WAYS]
            if "mask" not in encoding:
                del more["chunk"]
                shapes.append(associative_scan_segments(jnp.add, xs, **more).shape)
        assert set(shapes) == {shape}
        return outs

    encodings = (
        dict(lengths=jnp.zeros(shape[0], int)),
        dict(cu_seqlens=jnp.zeros((shape[0], 1), int)),
        dict(segment_ids=jnp.zeros(shape, int)),
        dict(mask=jnp.zeros(shape, bool)),
    )
    close(run(init, xs, encodings), [(init + 1, jnp.zeros(shape))] * 8)


def test_unroll():
    """Fails if 0, which unrolls all of a `lax.scan`, is refused."""
    zeros, lengths = jnp.zeros(2, int), jnp.array([3, 2])

    def loop(unroll):
        run = partial(scan_segments, partial(total, 1), unroll=unroll)
        close(run(zeros, DIGITS, lengths)[0], jnp.array([123, 56]))
        return str(jax.make_jaxpr(run)(zeros, DIGITS, lengths)).split("unroll=")[1]

    def plain(unroll):
        run = partial(lax.scan, partial(total, 1), unroll=unroll)
        return str(jax.make_jaxpr(run)(zeros, DIGITS.T)).split("unroll=")[1]

    for ours, theirs in ((0, True), (True, True), (False, False), (2, 2)):
        assert loop(ours).split()[0] == plain(theirs).split()[0]


def test_f_is_traced_once():
    calls = []

    def f(params, carry, x):
        calls.append(carry.shape)
        return carry + params * x, carry

    lengths = jnp.array([3, 2])
    zeros = jnp.zeros(2)
    scan_segments(partial(f, 2), zeros, DIGITS * 1.0, lengths)
    bidirectional_scan(f, (2, 3), (zeros, zeros), DIGITS * 1.0, lengths)
    assert calls == [(2,), (2,)]


def test_bidirectional_scan_is_one_loop():
    w, init, xs = make(1.0, **ENCODINGS["lengths"])
    run = partial(bidirectional_scan, gru, (w, w), (init, init))
    text = str(jax.make_jaxpr(run)(xs, LENGTHS))
    assert text.count("scan[") == 1


@pytest.mark.parametrize(
    "how",
    (
        "remat",
        "jvp",
        "hessian",
        "hessian of chunks",
        "vmap over parameters",
        "scan over layers",
    ),
)
def test_transformations(how):
    w, init, xs = make(np.nan, **ENCODINGS["ids and padding"])
    chunk = 3 if how in ("remat", "hessian of chunks") else None
    encoding = dict(segment_ids=jnp.asarray(IDS), padding_id=0, chunk=chunk)

    def loss(w, step=gru):
        return weighted(*scan_segments(partial(step, w), init, xs, **encoding))

    grad = jax.jit(jax.grad(loss))
    if how == "remat":
        close(jax.jit(jax.grad(jax.checkpoint(loss)))(w), grad(w))
        again = jax.jit(jax.grad(partial(loss, step=jax.checkpoint(gru))))
        close(again(w), grad(w))
    elif how == "jvp":
        tangent = jax.jit(partial(jax.jvp, loss))((w,), (w,))[1]
        expected = sum(jnp.sum(w[k] * v) for k, v in grad(w).items())
        np.testing.assert_allclose(tangent, expected, rtol=1e-5)
    elif how.startswith("hessian"):
        direction = jax.tree.map(np.cos, w)

        def along(w):
            return sum(jnp.sum(direction[k] * v) for k, v in jax.grad(loss)(w).items())

        forward = jax.jit(lambda w: jax.jvp(jax.grad(loss), (w,), (direction,))[1])
        backward = jax.jit(jax.grad(along))(w)
        for k, v in forward(w).items():
            np.testing.assert_allclose(v, backward[k], atol=1e-3)
    elif how == "vmap over parameters":
        models = jax.tree.map(lambda a: jnp.stack([a, a / 2]), w)
        mapped = jax.jit(jax.vmap(jax.value_and_grad(loss)))(models)
        for i in (0, 1):
            model = jax.tree.map(lambda a, i=i: a[i], models)
            of_model = jax.tree.map(lambda a, i=i: a[i], mapped)
            close(of_model, jax.jit(jax.value_and_grad(loss))(model))
    else:
        layers = jax.tree.map(lambda a: jnp.stack([a, a / 2]), w)

        def layer(ys, w):
            scan = partial(scan_segments, partial(gru, w), init, **encoding)
            return ys, weighted(*scan(xs))

        _, stacked = jax.jit(lambda layers: jax.lax.scan(layer, 0.0, layers))(layers)
        expected = [loss(jax.tree.map(lambda a, i=i: a[i], layers)) for i in (0, 1)]
        np.testing.assert_allclose(stacked, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ("lengths", "ids and padding", "offsets", "mask"))
def test_under_debugging_settings(name):
    """Fails if a NaN in the padding counts as one of the program."""
    w, init, xs = jax.tree.map(jnp.asarray, make(np.nan, **ENCODINGS[name]))
    reverse = name == "offsets"
    with jax.debug_nans(True):  # All eager.
        loss = lambda w, **more: weighted(  # noqa: E731
            *scan_segments(
                *(partial(norm, w), init, xs),
                **ENCODINGS[name] | dict(reverse=reverse, **more),
            )
        )
        assert np.isfinite(jax.tree.leaves(jax.grad(loss)(w))[0]).all()
        assert np.isfinite(loss(w, chunk=3))
        if name == "lengths":
            pairs = (w, w), (init, init)
            bidirectional_scan(norm, *pairs, xs, **ENCODINGS[name])
        if name != "mask":
            product = partial(associative_scan_segments, jnp.multiply)
            jax.vjp(lambda x: product(x, **ENCODINGS[name]), xs["b"])[1](
                jnp.ones((N, T))
            )


def test_without_jit():
    with jax.disable_jit():
        digits = scan_segments(partial(total, 1), np.zeros(2, int), DIGITS, [3, 2])
    assert digits[1].tolist() == [[1, 12, 123, 0], [5, 56, 0, 0]]


def test_as_many_offsets_as_steps_are_offsets_too():
    """Two segments on an axis of two steps, also where the axis is mapped away."""
    init, xs = jnp.zeros(3, int), jnp.array([[1, 2], [3, 4], [5, 6]])
    offsets = jnp.array([[0, 1, 2], [0, 2, 2], [0, 0, 1]])
    want = [[1, 2], [3, 34], [5, 0]]
    scan = partial(scan_segments, partial(total, 1))
    row = lambda c, x, o: scan(c, x, cu_seqlens=o)  # noqa: E731
    assert row(init, xs, offsets)[1].tolist() == want
    assert jax.vmap(row)(init, xs, offsets)[1].tolist() == want
    associative = lambda x, o: associative_scan_segments(  # noqa: E731
        jnp.add, x, cu_seqlens=o
    )
    want = [[1, 2], [3, 7], [5, 0]]
    assert associative(xs, offsets).tolist() == want
    assert jax.vmap(associative)(xs, offsets).tolist() == want


def test_export_with_a_symbolic_batch():
    w, init, xs = make(np.nan, **ENCODINGS["lengths"])
    scope = jax.export.SymbolicScope()

    def spec(x):
        shape = ", ".join(map(str, x.shape[1:]))
        shape = jax.export.symbolic_shape(f"n, {shape}", scope=scope)
        return jax.ShapeDtypeStruct(shape, x.dtype)

    def run(init, xs, lengths):
        scan = bidirectional_scan(gru, (w, w), (init, init), xs, lengths)
        return scan, associative_scan_segments(jnp.add, xs["b"], lengths)[:, :1]

    operands = jax.tree.map(jnp.asarray, (init, xs, LENGTHS))
    exported = jax.export.export(jax.jit(run))(*jax.tree.map(spec, operands))
    close(exported.call(*operands), jax.jit(run)(*operands))


def sharded_loss(params, h, xs, encodings, weights):
    """All three scans, by several encodings; `h` and the rest may be blocks."""
    start, total = (h, jnp.zeros(h.shape[:1], jnp.int32)), 0.0
    for x, encoding in zip(xs, encodings, strict=True):
        more = encoding | ({"padding_id": 0} if "segment_ids" in encoding else {})
        one = scan_segments(partial(gru, params[0]), start, x, **more)
        both = bidirectional_scan(gru, params, (start, start), x, **more)
        b = jnp.where(jnp.isnan(x["b"]), 0.0, x["b"])
        ids = {"segment_ids": encoding["mask"] + 0} if "mask" in encoding else more
        parallel = associative_scan_segments(jnp.add, b, **ids)
        leaves = [one[0][0], both[0][0][0], both[0][1][0], parallel[:, :1]]
        leaves += [jnp.sum(y["h"], 1) for y in (one[1], *both[1])]
        total += sum(jnp.sum(leaf * weights) for leaf in leaves)
    return total


def sharded_case(*names):
    w, init, _ = make(**ENCODINGS["lengths"])
    xs = [make(**ENCODINGS[name])[2] for name in names]
    encodings = [{k: v for k, v in ENCODINGS[name].items() if k != "padding_id"}
                 for name in names]  # fmt: skip
    weights = jnp.cos(jnp.arange(N * 2.0)).reshape(N, 2)
    return (w, w), init[0], xs, encodings, weights


@cache
def desired_of(*names):
    grad = jax.jit(jax.value_and_grad(sharded_loss, (0, 1, 2)))
    return jax.device_get(grad(*sharded_case(*names)))


MODES = {  # The operands that are sharded.
    "auto": (1, 2, 3, 4),
    "explicit": (1, 2, 3, 4),
    "explicit xs": (2,),
    "explicit mask": (3,),
    "shard_map": (1, 2, 3, 4),
}


@pytest.mark.parametrize("mode", MODES)
def test_sharded_batch(mode):
    """Fails if a gradient of replicated parameters is not summed over the devices."""
    if "explicit" in mode and jax.__version_info__ < (0, 8):
        pytest.skip("JAX 0.7 cannot differentiate x @ w where rows of x are sharded")
    names = ("ids and padding", "mask") if len(MODES[mode]) > 1 else ("mask",)
    sharded, loss = list(sharded_case(*names)), sharded_loss
    kind = "Explicit" if "explicit" in mode else "Auto"
    kind = getattr(jax.sharding.AxisType, kind)
    mesh, rows = jax.make_mesh((4,), ("d",), axis_types=(kind,)), jax.P("d")
    if mode == "shard_map":
        loss = jax.shard_map(
            lambda *operands: jax.lax.psum(sharded_loss(*operands), "d"),
            mesh=mesh,
            in_specs=(jax.P(), rows, rows, rows, rows),
            out_specs=jax.P(),
        )
    for i in MODES[mode]:
        sharded[i] = jax.device_put(sharded[i], jax.NamedSharding(mesh, rows))
    with jax.set_mesh(mesh):
        got = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*sharded)
    # The terms of the sums have both signs.
    close(jax.device_get(got), desired_of(*names), rtol=1e-3)


ZEROS, SUM = np.zeros(2, np.int32), lambda c, x: (c + x, c)
scan, both, associative = scan_segments, bidirectional_scan, associative_scan_segments
ERRORS = (
    (ValueError, "scan_segments: got none; .*, segment_ids, cu_seqlens, starts, mask",
     lambda: scan(SUM, ZEROS, DIGITS)),
    (ValueError, "got both lengths and mask", lambda: scan(SUM, ZEROS, DIGITS, [1, 1],
                                                         mask=DIGITS > 0)),
    (ValueError, "padding_id is 0, but .* by mask",
     lambda: scan(SUM, ZEROS, DIGITS, mask=DIGITS > 0, padding_id=0)),
    (TypeError, "mask is int64.*boolean", lambda: scan(SUM, ZEROS, DIGITS,
                                                              mask=DIGITS)),
    (ValueError, r"xs is {}, a pytree without", lambda: scan(SUM, ZEROS, {}, [1, 1])),
    (ValueError, r"lengths\[1\] is 5.* 4, the size of axis 1 of xs\['a'\]",
     lambda: scan(SUM, ZEROS, {"a": DIGITS}, [1, 5])),
    (ValueError, r"xs\['b'\] has shape \(2, 3\)",
     lambda: scan(SUM, ZEROS, {"a": DIGITS, "b": DIGITS[:, :3]}, [1, 1])),
    (ValueError, r"^(?!.*batch_axis).*\(3,\).*\(2,",
     lambda: scan(SUM, ZEROS, DIGITS, [1] * 3)),
    (ValueError, r"xs has shape \(4, 2\).*time-major, use axis=0",
     lambda: scan(SUM, ZEROS, DIGITS.T, [1, 1])),
    (ValueError, r"init\[0\] has shape \(3,\).*batch axes \(2,\)",
     lambda: scan(SUM, (np.zeros(3),), DIGITS, [1, 1])),
    (TypeError, "init is <function", lambda: scan(SUM, SUM, DIGITS, [1, 1])),
    (TypeError, r"f must return a pair .* returned int32\[2\]",
     lambda: scan(lambda c, x: c, ZEROS, DIGITS, [1, 1])),
    (TypeError, r"returned \(\'int32\[2\]\', \'int32\[2\]\', \'int32\[2\]\'\)",
     lambda: scan(lambda c, x: (c, x, x), ZEROS, DIGITS, [1, 1])),
    (TypeError, r"carry of \('int32\[2\]', 'int32\[2\]'\), .*\['int32\[2\]', 'int32",
     lambda: scan(lambda c, x: ([c[0], c[1]], x), (ZEROS, ZEROS), DIGITS, [1, 1])),
    (TypeError, r"carry of int32\[2\], but returned one of float32\[2\]",
     lambda: scan(lambda c, x: (c * 1.5, x), ZEROS, DIGITS, [1, 1])),
    (ValueError, r"y of f has shape \(\).*batch axes \(2,\)",
     lambda: scan(lambda c, x: (c, x.sum()), ZEROS, DIGITS, [1, 1])),
    (ValueError, r"segment axis of xs is 2, but y of f has shape \(2,\)",
     lambda: scan(lambda c, x: (c, c), ZEROS, DIGITS[:, None], [1, 1], axis=2)),
    (TypeError, "unroll is 1.5", lambda: scan(SUM, ZEROS, DIGITS, [1, 1], unroll=1.5)),
    (ValueError, "unroll is -1", lambda: scan(SUM, ZEROS, DIGITS, [1, 1], unroll=-1)),
    (ValueError, "chunk is 0; use", lambda: scan(SUM, ZEROS, DIGITS, [1, 1], chunk=0)),
    (TypeError, "chunk is 1.5", lambda: scan(SUM, ZEROS, DIGITS, [1, 1], chunk=1.5)),
    (ValueError, r"carry_in has shape \(3,\).*batch axes \(2,\)",
     lambda: scan(SUM, ZEROS, DIGITS, [1, 1], carry_in=np.zeros(3, np.int32))),
    (ValueError, r"carry_in is float32\[2\], but must be int32\[2\], like init",
     lambda: scan(SUM, ZEROS, DIGITS, [1, 1], carry_in=np.zeros(2, np.float32))),
    (ValueError, r"carry_in is \('int32\[2\]',\), but must be int32",
     lambda: scan(SUM, ZEROS, DIGITS, [1, 1], carry_in=(ZEROS, ZEROS)[:1])),
    (ValueError, r"carry_in is int32\[2,1\], but must be int32\[2\], like one step",
     lambda: associative(jnp.add, DIGITS, [1, 1], carry_in=ZEROS[:, None])),
    (TypeError, "f is None", lambda: scan(None, ZEROS, DIGITS, [1, 1])),
    (TypeError, "f is 3", lambda: both(3, (1, 1), (ZEROS, ZEROS), DIGITS, [1, 1])),
    (TypeError, "fn is 3", lambda: associative(3, DIGITS, [1, 1])),
    (TypeError, "reverse is .*static|reverse",
     lambda: jax.jit(lambda r: scan(SUM, ZEROS, DIGITS, [1, 1], reverse=r))(True)),
    (ValueError, "lengths", lambda: scan(SUM, ZEROS, DIGITS, 3)),
    (TypeError, r"return \(h, h\)", lambda: scan(jnp.add, ZEROS, DIGITS, [1, 1])),
    (TypeError, r"return \(\(h, c\), h\)",
     lambda: scan(lambda c, x: (c[0] + x, c[1]), (ZEROS, ZEROS), DIGITS, [1, 1])),
    (TypeError, r"for an LSTM \(\(h, c\), \(h, c\)\)",
     lambda: both(lambda p, c, x: ((c, c), x), (1, 1), (ZEROS, ZEROS), DIGITS, [1, 1])),
    (ValueError, r"init\[1\] is int32\[2,1\], but must be int32\[2\], like init\[0\]",
     lambda: both(total, (1, 1), (ZEROS, ZEROS[:, None]), DIGITS, [1, 1])),
    (TypeError, "params must be a pair .* is .*1 of type int",
     lambda: both(total, (1, 1, 1), (ZEROS, ZEROS), DIGITS, [1, 1])),
    (TypeError, r"init must be a pair .* is int32\[2\]",
     lambda: both(total, (1, 1), ZEROS, DIGITS, [1, 1])),
    (ValueError, r"params\[1\] is {'a': 'int32\[\]'}, but must be int32\[\]",
     lambda: both(total, (1, {"a": 1}), (ZEROS, ZEROS), DIGITS, [1, 1])),
    (ValueError, r"params\[1\] is {'a': 'float32\[\]'}, but must be {'a': 'int32",
     lambda: both(total, ({"a": 1}, {"a": 1.0}), (ZEROS, ZEROS), DIGITS, [1, 1])),
    (TypeError, r"fn was given int32\[2,2\], but returned float32\[2,2\]",
     lambda: associative(lambda a, b: a * 1.5, DIGITS, [1, 1])),
)  # fmt: skip


@pytest.mark.parametrize("error, message, call", ERRORS)
def test_bad_input_names_the_argument_and_the_remedy(error, message, call):
    with pytest.raises(error, match=message):
        call()
