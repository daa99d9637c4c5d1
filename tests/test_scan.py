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

from jax_revseg import associative_scan_segments, bidirectional_scan, scan_segments
from jax_revseg._programs import _programs
from tests import ragged
from tests.meshes import make_mesh
from tests.ragged import ENCODINGS, TRACED, N, T, close, digits, gradients, weighted

D = 3
BOTH_WAYS = (False, True)


def cell(w, carry, x):
    """A pytree carry of two dtypes, and a step that depends on both inputs."""
    h, count = carry
    h = jnp.tanh(x["a"] @ w["z"] + w["h"] * h + x["b"][:, None])
    return (h, count + 1), {"h": h, "count": count}


@jax.jit  # The loop by hand calls one program faster than its operations.
def norm(w, carry, x):
    """The derivative is infinite where x or the carry is 0, and NaN below 0."""
    h, count = carry
    size = jnp.sqrt(jnp.sum((x["a"] @ w["z"]) ** 2, -1, keepdims=True))
    h = jnp.sqrt(h**2 + size) * jnp.log(1 + w["h"]) / jnp.sqrt(x["b"])[:, None]
    return (h, count + 1), {"h": h, "log": jnp.log(h), "count": count}


def draw(*shape):
    return np.random.default_rng(0).uniform(0.5, 1.5, shape).astype(np.float32)


W = {"z": draw(D, 2), "h": draw(2)}
H, COUNT = draw(N, 2), np.arange(N, dtype=np.int32)


def make_xs(name, bad=np.nan):
    valid = ragged.valid_steps(**ENCODINGS[name])
    xs = {"a": draw(N, T, D), "b": draw(N, T) + 1}
    for x in xs.values():
        x[~valid] = bad
    return xs


def one_of_both(f, init, xs, reverse=False, **encoding):
    """One direction of `bidirectional_scan`, where the other has other operands."""

    def pair(tree):
        pair = tree, jax.tree.map(lambda a: a + 1, tree)
        return pair[::-1] if reverse else pair

    params, inits = pair(f.args[0]), pair(init)
    carries, ys = bidirectional_scan(f.func, params, inits, xs, **encoding)
    return carries[reverse], ys[reverse]


in_chunks = partial(scan_segments, chunk=3)  # The last is not full.


def test_values_and_gradients_are_those_of_valid_steps_alone():
    """Also fails if a row goes on from `init` where it has a `carry_in`."""
    cases = (  # The encoding, the direction, and whether there is a `carry_in`.
        (in_chunks, "lengths", False, True),
        (scan_segments, "ids", True, True),
        (in_chunks, "ids and padding", False, False),
        (scan_segments, "ids and padding", True, True),
        (in_chunks, "starts", True, True),
        (scan_segments, "mask", True, False),
        (one_of_both, "ids and padding", True, False),
        (one_of_both, "starts", False, False),
    )

    def one(scan, name, reverse, carried, xs, encoding):
        def run(w, h, h_in, xs):
            more = {"carry_in": (h_in, COUNT + 10)} if carried else {}
            more |= ENCODINGS[name] | encoding
            return scan(partial(norm, w), (h, COUNT), xs, reverse=reverse, **more)

        return gradients(run, W, H, H[::-1] + 1, xs)

    @jax.jit  # Compilation takes the time.
    def run(xs, encodings):
        return [one(*case, xs[case[1]], encodings[case[1]]) for case in cases]

    by_hand = partial(one, ragged.scan_by_hand)
    want = [by_hand(*case, make_xs(case[0], 1.0), {}) for _, *case in cases]
    for bad in (np.nan, np.inf, 0.0):
        close(run({name: make_xs(name, bad) for name in ENCODINGS}, TRACED), want)


def undefined_at_zero(w, carry, x):
    """No term has a gradient where a row holds zeros, or one value."""
    (c, h), v = carry, x["vector"]
    terms = [jnp.log(x["count"]), 1 / x["count"], jnp.sqrt(x["price"] - 100)]
    terms.append(v[:, 0] / jnp.std(v, -1))
    h = jnp.sqrt(c**2 * h) + x["price"]
    c = c + sum(w[i] * term for i, term in enumerate(terms))
    return (c, h), c


def test_a_row_without_a_valid_step_borrows_one():
    """Fails if the gradient of the weights is NaN since such a row holds zeros."""
    xs = {
        "count": np.array([[3, 1, 2], [0, 0, 0]]),
        "price": np.array([[101, 104, 102], [np.nan] * 3], np.float32),
        "vector": draw(2, 3, 2),
    }
    xs["vector"][1] = 1
    init = np.array([1, 0], np.float32), np.array([1, 0], np.float32)
    lengths, offsets = np.array([3, 0]), np.array([[0, 3], [0, 0]])
    cases = (
        (scan_segments, "lengths", False),
        (in_chunks, "cu_seqlens", True),
        (one_of_both, "lengths", False),
        (one_of_both, "lengths", True),
    )

    def grad(scan, init, xs, **more):
        def loss(w, init):
            out = scan(partial(undefined_at_zero, w), init, xs, **more)
            return sum(map(jnp.sum, jax.tree.leaves(out)))

        return jax.grad(loss, (0, 1))(np.ones(4, np.float32), init)

    @jax.jit
    def alone(init, xs):
        """The first row by `lax.scan`."""
        init = jax.tree.map(lambda a: a[:1], init)
        xs = jax.tree.map(lambda x: jnp.moveaxis(x[:1], 1, 0), xs)
        return [grad(lax.scan, init, xs, reverse=way)[0] for way in BOTH_WAYS] * 2

    @jax.jit
    def run(init, xs, lengths, offsets):
        given = {"lengths": lengths, "cu_seqlens": offsets}
        return [
            grad(scan, init, xs, reverse=way, **{name: given[name]})
            for scan, name, way in cases
        ]

    want = alone(init, xs)
    assert np.isfinite(want).all()
    for order in (slice(None), slice(None, None, -1)):  # Also with that row first.
        operands = jax.tree.map(lambda a: a[order], (init, xs, lengths, offsets))  # noqa: B023
        for (w, init_bar), alone_bar in zip(run(*operands), want, strict=True):
            close(w, alone_bar, rtol=1e-4)
            assert np.isfinite(jax.tree.leaves(init_bar)).all()


def test_a_batch_without_a_valid_step_has_finite_gradients():
    def loss(w, lengths):
        f = lambda c, x: (jnp.sqrt(c) + jnp.log(x**w) + jnp.arcsin(x**w), None)  # noqa: E731
        return scan_segments(f, jnp.ones(2), jnp.zeros((2, 3)), lengths)[0].sum()

    assert jax.jit(jax.grad(loss))(1.0, jnp.array([0, 0])) == 0


@jax.jit
def total(scale, carry, x):
    """Exact on integers, and different for every order of steps."""
    carry = 10 * carry + scale * x
    return carry, carry


@pytest.mark.parametrize("name", ENCODINGS)
def test_layouts_chunks_and_maps_are_exact(name):
    """Time-major data, two batch axes, chunks of any size, and rows under vmap."""
    key, of_host, static = ragged.split(ENCODINGS[name])
    per_step = key in ("segment_ids", "starts", "mask")
    square = partial(jax.tree.map, lambda a: a.reshape(2, 2, *a.shape[1:]))
    middle = partial(jax.tree.map, lambda a: jnp.moveaxis(square(a), -1, 1))
    transpose = partial(jax.tree.map, jnp.transpose)

    def host(scan, init, carry_in, xs, _):
        return scan(init, carry_in, xs, of_host, chunk=10)

    def time_major(scan, init, carry_in, xs, segments):
        segments = segments.T if per_step else segments
        operands = init, carry_in, transpose(xs), segments
        carry, ys = scan(*operands, axis=0, chunk=3)
        return carry, transpose(ys)

    def two_batch_axes(scan, init, carry_in, xs, segments):
        segments = (middle if per_step else square)(segments)
        operands = square(init), square(carry_in), middle(xs), segments
        carry, ys = scan(*operands, axis=1)
        flat = lambda y: jnp.moveaxis(y, 1, -1).reshape(N, T)  # noqa: E731
        return carry.reshape(N), jax.tree.map(flat, ys)

    def rows(scan, *operands):
        return jax.vmap(partial(scan, chunk=4))(*operands)

    def only_encodings(scan, init, carry_in, xs, segments):
        one = lambda s: scan(init, carry_in, xs, s, chunk=7)  # noqa: E731
        two = jnp.stack([segments, segments[::-1]])
        return jax.tree.map(lambda out: out[0], jax.vmap(one)(two))

    layouts = (host, time_major, two_batch_axes, rows, only_encodings)
    first = list(ENCODINGS).index(name)
    ways = [(first + i) % 2 for i in range(5)]  # Each layout sees both directions.

    def both_scans(scan, combine, way, init, carry_in, xs, chunk=None, **how):
        how |= {"reverse": way == 0}
        f, more = partial(total, 1), {"chunk": chunk} if chunk else {}
        carry, ys = scan(f, init, xs[0], carry_in=carry_in[0], **more, **how)
        if name != "mask":
            ys = ys, combine(ragged.join, xs, carry_in=carry_in, **how)
        return carry, ys

    @jax.jit
    def run(*operands):
        def scan(way, init, carry_in, xs, segments, **more):
            how = static | more | {key: segments}
            scans = scan_segments, associative_scan_segments
            return both_scans(*scans, way, init, carry_in, xs, **how)

        pairs = zip(layouts, ways, strict=True)
        return [layout(partial(scan, way), *operands) for layout, way in pairs]

    carry_in = tuple(x[::-1, 1] for x in digits(N, T))
    operands = jax.tree.map(jnp.asarray, (np.arange(N), carry_in, digits(N, T)))
    by_hand = partial(both_scans, ragged.scan_by_hand, ragged.combine_by_hand)
    want = [by_hand(way, *operands, **ENCODINGS[name]) for way in (0, 1)]
    ragged.same(run(*operands, of_host), [want[way] for way in ways])


def test_chunks_are_skipped_where_no_row_has_a_step():
    seen, xs = [], jnp.ones((2, 12), int)

    def f(carry, x):
        jax.debug.callback(lambda: seen.append(1))
        return total(1, carry, x)

    def steps(reverse, chunk, **encoding):
        scan = partial(scan_segments, f, jnp.zeros(2, int), xs, reverse=reverse)
        scan(chunk=chunk, **encoding)
        jax.effects_barrier()
        taken = len(seen)
        seen.clear()
        return taken

    lengths, mask = jnp.array([2, 4]), jnp.arange(12) // 6 == jnp.array([[1], [3]])
    for reverse in BOTH_WAYS:
        assert steps(reverse, 3, lengths=lengths) == 6
    assert steps(False, 3, lengths=lengths * 0) == 0
    assert steps(True, 2, mask=mask) == 6
    assert steps(False, 4, starts=mask) == 12
    assert jax.vmap(lambda n: steps(False, 3, lengths=n))(lengths[None]) == 12


@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")
def test_chunks_with_a_collective_in_f():
    """Fails if a device skips a chunk whose collective another waits for."""
    mesh, rows = make_mesh(d=4), jax.P("d")
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32)
    lengths, init = jnp.array([1, 0, 8, 3]), jnp.ones(4)

    def loss(w, xs, lengths, chunk):
        f = lambda c, x: (w * c + lax.psum(x * c, "d"), c)  # noqa: E731
        scan = partial(scan_segments, f, init[:1], reverse=True, chunk=chunk)
        carry, ys = scan(xs, lengths)
        return lax.psum(jnp.sum(jnp.sin(carry)) + jnp.sum(jnp.cos(ys)), "d")

    def grad(chunk):
        one, specs = partial(loss, chunk=chunk), (jax.P(), rows, rows)
        sharded = jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=jax.P())
        run = jax.jit(jax.value_and_grad(sharded, (0, 1)))
        return run(jnp.float32(0.5), xs, lengths)

    close(grad(2), grad(None))


class Cell:
    def __call__(self, carry, x):
        return carry + x, carry

    step = __call__

    def product(self, a, b):
        return a * b

    def scaled(self, _, carry, x):
        return carry * x, carry


def adding(_, carry, x):
    return carry + x, carry


CELL = Cell()
KINDS = {
    "function": (lambda c, x: (c + x, c), jnp.logaddexp, adding),
    "partial": (partial(adding, None), partial(jnp.add), partial(adding)),
    "bound method": (CELL.step, CELL.product, CELL.scaled),
    "callable object": (CELL, jnp.multiply, adding),  # The second is one, too.
}


def eager_calls(f, fn, g):
    """The three scans, and the gradient of one."""
    xs, init, lengths = jnp.ones((2, 4)), jnp.zeros(2), jnp.array([4, 2])
    scan = lambda init, **more: scan_segments(f, init, xs, lengths, **more)  # noqa: E731
    scan(init, chunk=2, carry_in=init, reverse=True)
    associative_scan_segments(fn, xs, lengths)
    jax.vjp(lambda init: scan(init)[0], init)[1](init)
    bidirectional_scan(g, (init[0], init[1]), (init, init), xs, lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_a_repeated_eager_call_compiles_nothing(kind, caplog):
    with jax.log_compiles(), caplog.at_level("WARNING"):
        eager_calls(*KINDS[kind])
        compiled = [r for r in caplog.messages if "XLA compilation" in r]
        assert len(compiled) >= 4
        caplog.clear()
        eager_calls(*KINDS[kind])
        assert not [r for r in caplog.messages if "compil" in r.lower()]


def test_a_new_lambda_is_kept_no_longer_than_it_lives():
    gc.collect()
    before, refs = len(_programs), []

    def call():
        new = [lambda c, x: (c + x, c), lambda a, b: a + b, lambda p, c, x: (c + x, c)]
        refs.extend(map(weakref.ref, new))
        eager_calls(*new)
        assert len(_programs) == before + 3

    def fail(carry, x):
        raise RuntimeError

    call()
    refs.append(weakref.ref(fail))
    with pytest.raises(RuntimeError):
        scan_segments(fail, jnp.zeros(2), jnp.ones((2, 4)), jnp.array([4, 2]))
    del fail
    gc.collect()
    assert [ref() for ref in refs] == [None] * 4
    assert len(_programs) == before


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


def test_one_row_square_rows_and_no_jit():
    """Fails if `(T, N)` is taken for `(N, T)` where both are equal."""
    f, zeros, lengths = partial(total, 1), np.zeros(2, int), [3, 2]
    alone = scan_segments(f, jnp.int32(0), DIGITS[0], 3, reverse=True)
    assert alone[1].tolist() == [321, 32, 3, 0]
    time_major = dict(mask=np.array([[True, False], [True, True]]), axis=0)
    square = scan_segments(f, zeros, DIGITS[:, :2].T, **time_major)
    assert square[0].tolist() == [12, 6]
    with jax.disable_jit():
        carry, ys = scan_segments(f, zeros, DIGITS, lengths)
    assert carry.tolist() == [123, 56]
    assert ys.tolist() == [[1, 12, 123, 0], [5, 56, 0, 0]]
    carries, both = bidirectional_scan(total, [1, 1], [zeros, zeros], DIGITS, lengths)
    close((carries[0], both[0]), (carry, ys))
    assert carries[1].tolist() == [321, 65]
    assert both[1].tolist() == [[321, 32, 3, 0], [65, 6, 0, 0]]


def test_block_by_block():
    """Fails if what `carry_in` brings is lost, or passes the start of a segment."""
    scans = (
        lambda x, **how: scan_segments(partial(total, 1), ZEROS, x, **how)[1],
        lambda x, **how: associative_scan_segments(jnp.add, x, **how),
    )
    starts = np.arange(4) == [[1], [3]]
    for scan in scans:
        first = scan(DIGITS[:, :2], starts=starts[:, :2])
        rest = scan(DIGITS[:, 2:], starts=starts[:, 2:], carry_in=first[:, -1])
        close(jnp.concatenate([first, rest], 1), scan(DIGITS, starts=starts))


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
def test_nothing_to_scan_returns_the_carry(shape):
    xs, init = jnp.ones(shape), jnp.arange(shape[0], dtype=float)

    @jax.jit
    def run(init, xs, encodings):
        outs = []
        for encoding in encodings:
            padding = {"padding_id": 0} if "segment_ids" in encoding else {}
            more = dict(carry_in=init + 1, **encoding, **padding)
            scan = partial(scan_segments, lambda c, x: (c * x, c), init, xs, **more)
            outs += [scan(), scan(reverse=True, chunk=3)]
            if "mask" not in encoding:
                assert associative_scan_segments(jnp.add, xs, **more).shape == shape
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
    f, zeros = partial(total, 1), jnp.zeros(2, int)

    def loop(scan, unroll, *operands):
        run = partial(scan, f, unroll=unroll)
        return str(jax.make_jaxpr(run)(zeros, *operands)).split("unroll=")[1].split()[0]

    for ours, plain in ((0, True), (True, True), (False, False), (2, 2)):
        want = loop(lax.scan, plain, DIGITS.T)
        assert loop(scan_segments, ours, DIGITS, jnp.array([3, 2])) == want
    carry, _ = scan_segments(f, zeros, DIGITS, jnp.array([3, 2]), unroll=0)
    assert carry.tolist() == [123, 56]


def test_f_is_traced_once_and_bidirectional_scan_is_one_loop():
    calls = []

    def f(params, carry, x):
        calls.append(carry.shape)
        return carry + params * x, carry

    zeros, operands = jnp.zeros(2), (DIGITS * 1.0, jnp.array([3, 2]))
    scan_segments(partial(f, 2), zeros, *operands)
    both = partial(bidirectional_scan, f, (2, 3), (zeros, zeros))
    assert str(jax.make_jaxpr(both)(*operands)).count("scan[") == 1
    assert calls == [(2,), (2,)]


@pytest.mark.parametrize("chunk", (None, 3))
def test_transformations(chunk):
    """Fails if remat, a second order, vmap or a loop around a scan changes it."""
    xs, encoding = make_xs("ids and padding"), ENCODINGS["ids and padding"]

    def loss(w, step=cell):
        scan = partial(scan_segments, partial(step, w), (H, COUNT), xs, chunk=chunk)
        return weighted(scan(**encoding))

    def dot(a, b):
        return sum(jnp.sum(a[k] * b[k]) for k in a)

    grad, direction = jax.grad(loss), jax.tree.map(np.cos, W)

    @jax.jit
    def run(w):
        models = jax.tree.map(lambda a: jnp.stack([a / 2, a]), w)
        first, forward = jax.jvp(grad, (w,), (direction,))
        backward = jax.grad(lambda w: dot(grad(w), direction))(w)
        value, tangent = jax.jvp(loss, (w,), (direction,))
        remat = jax.grad(jax.checkpoint(partial(loss, step=jax.checkpoint(cell))))(w)
        mapped = jax.tree.map(lambda g: g[1], jax.vmap(grad)(models))
        got = remat, mapped, tangent, lax.map(loss, models)[1]
        return (got, forward), ((first, first, dot(first, direction), value), backward)

    got, want = run(W)
    close(got[0], want[0])
    close(got[1], want[1], atol=1e-3)
    assert any(np.any(abs(g) > 0.1) for g in jax.tree.leaves(want))


@pytest.mark.parametrize("name", ("lengths", "offsets"))
def test_under_debugging_settings(name):
    """Fails if a NaN in the padding counts as one of the program."""
    xs, encoding, init = make_xs(name), ENCODINGS[name], (H, COUNT)
    reverse, chunk = (True, 3) if name == "offsets" else (False, None)
    with jax.debug_nans(True):  # All eager.
        scan = partial(scan_segments, reverse=reverse, chunk=chunk, **encoding)
        loss = lambda w: weighted(scan(partial(norm, w), init, xs))  # noqa: E731
        assert np.isfinite(jax.tree.leaves(jax.grad(loss)(W))[0]).all()
        bidirectional_scan(norm, (W, W), (init, init), xs, **encoding)
        product = partial(associative_scan_segments, jnp.multiply, **encoding)
        jax.vjp(product, xs["b"])[1](jnp.ones((N, T)))


def test_as_many_offsets_as_steps_are_offsets_too():
    """Two segments on an axis of two steps, also where the axis is mapped away."""
    xs, offsets = jnp.array([[1, 2], [3, 4], [5, 6]]), [[0, 1, 2], [0, 2, 2], [0, 0, 1]]
    want = [[1, 2], [3, 34], [5, 0]], [[1, 2], [3, 7], [5, 0]]

    def row(init, x, o):
        ys = scan_segments(partial(total, 1), init, x, cu_seqlens=o)[1]
        return ys, associative_scan_segments(jnp.add, x, cu_seqlens=o)

    operands = jnp.zeros(3, int), xs, jnp.array(offsets)
    for out in jax.jit(lambda *args: (row(*args), jax.vmap(row)(*args)))(*operands):
        assert tuple(ys.tolist() for ys in out) == want


def test_export_with_a_symbolic_batch():
    scope = jax.export.SymbolicScope()

    def spec(x):
        shape = ", ".join(map(str, x.shape[1:]))
        shape = jax.export.symbolic_shape(f"n, {shape}", scope=scope)
        return jax.ShapeDtypeStruct(shape, x.dtype)

    def run(init, xs, lengths):
        scan = bidirectional_scan(cell, (W, W), (init, init), xs, lengths)
        return scan, associative_scan_segments(jnp.add, xs["b"], lengths)[:, :1]

    operands = (H, COUNT), make_xs("lengths"), ragged.LENGTHS
    operands = jax.tree.map(jnp.asarray, operands)
    exported = jax.export.export(jax.jit(run))(*jax.tree.map(spec, operands))
    close(exported.call(*operands), jax.jit(run)(*operands))


def sharded_loss(params, h, xs, encoding):
    """Of all three scans; `h` and what follows may be blocks of rows."""
    start = h, jnp.zeros(h.shape[:1], jnp.int32)
    more = encoding | ({"padding_id": 0} if "segment_ids" in encoding else {})
    one = scan_segments(partial(cell, params[0]), start, xs, **more)
    both = bidirectional_scan(cell, params, (start, start), xs, **more)
    b = jnp.where(jnp.isnan(xs["b"]), 0.0, xs["b"])
    ids = {"segment_ids": encoding["mask"] + 0} if "mask" in encoding else more
    parallel = associative_scan_segments(jnp.add, b, **ids)
    leaves = jax.tree.leaves((one, both, parallel))
    return sum(jnp.sum(jnp.sin(x)) for x in leaves if x.dtype == jnp.float32)


def sharded_case(name):
    return (W, jax.tree.map(jnp.cos, W)), H, make_xs(name), TRACED[name]


@cache
def desired_of(name):
    grad = jax.jit(jax.value_and_grad(sharded_loss, (0, 1, 2)))
    return jax.device_get(grad(*sharded_case(name)))


@pytest.mark.parametrize(
    "mode, name, places",  # Of the operands that are sharded.
    (
        ("auto", "mask", (1, 2, 3)),
        ("explicit", "ids and padding", (1, 2, 3)),
        ("explicit", "ids and padding", (2,)),
        ("explicit", "mask", (3,)),
        ("shard_map", "ids and padding", (1, 2, 3)),
    ),
)
def test_sharded_batch(mode, name, places):
    """Fails if a gradient of replicated parameters is not summed over the devices."""
    if mode == "explicit" and jax.__version_info__ < (0, 8):
        pytest.skip("JAX 0.7 cannot differentiate x @ w where rows of x are sharded")
    kind = "Explicit" if mode == "explicit" else "Auto"
    mesh, rows = make_mesh(kind, d=4), jax.P("d")
    loss, sharding = sharded_loss, jax.NamedSharding(mesh, rows)
    if mode == "shard_map":
        loss = jax.shard_map(
            lambda *operands: jax.lax.psum(sharded_loss(*operands), "d"),
            mesh=mesh,
            in_specs=(jax.P(), rows, rows, rows),
            out_specs=jax.P(),
        )
    operands = [
        jax.device_put(a, sharding) if i in places else a
        for i, a in enumerate(sharded_case(name))
    ]
    with jax.set_mesh(mesh):
        got = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*operands)
    # The terms of the sums have both signs.
    close(jax.device_get(got), desired_of(name), rtol=1e-3)


ZEROS, SUM = np.zeros(2, np.int32), lambda c, x: (c + x, c)
scan, both, associative = scan_segments, bidirectional_scan, associative_scan_segments
RIGHT = {  # Arguments of which each error changes some.
    scan: dict(f=SUM, init=ZEROS, xs=DIGITS, lengths=[1, 1]),
    both: dict(f=total, params=(1, 1), init=(ZEROS,) * 2, xs=DIGITS, lengths=[1, 1]),
    associative: dict(fn=jnp.add, elems=DIGITS, lengths=[1, 1]),
}
ERRORS = (
    (scan, ValueError, "scan_segments.*segment_ids.*mask", dict(lengths=None)),
    (scan, ValueError, "both lengths and mask", dict(mask=DIGITS > 0)),
    (scan, ValueError, "padding_id is 0.*mask",
     dict(lengths=None, mask=DIGITS > 0, padding_id=0)),
    (scan, TypeError, "mask.*int64.*boolean", dict(lengths=None, mask=DIGITS)),
    (scan, ValueError, "lengths", dict(lengths=3)),
    (scan, ValueError, r"lengths\[1\] is 5.* 4.*xs\['a'\]",
     dict(xs={"a": DIGITS}, lengths=[1, 5])),
    (scan, ValueError, r"^(?!.*batch_axis).*\(3,\).*2", dict(lengths=[1] * 3)),
    (scan, ValueError, "xs is {}", dict(xs={})),
    (scan, ValueError, r"xs\['b'\].*\(2, 3\)",
     dict(xs={"a": DIGITS, "b": DIGITS[:, :3]})),
    (scan, ValueError, r"xs.*\(4, 2\).*axis=0", dict(xs=DIGITS.T)),
    (scan, ValueError, r"init\[0\].*\(3,\).*\(2,\)", dict(init=(np.zeros(3),))),
    (scan, TypeError, "init is <function", dict(init=SUM)),
    (scan, TypeError, r"\(carry, y\).*\(h, h\)", dict(f=jnp.add)),
    (scan, TypeError, r"\('int32.*, 'int32.*, 'int32", dict(f=lambda c, x: (c, x, x))),
    (scan, TypeError, r"\('int32\[2\]', 'int32\[2\]'\).*\['int32\[2\]', 'int32",
     dict(init=(ZEROS, ZEROS), f=lambda c, x: ([c[0], c[1]], x))),
    (scan, TypeError, r"int32\[2\].*float32\[2\]", dict(f=lambda c, x: (c * 1.5, x))),
    (scan, TypeError, r"return \(\(h, c\), h\)",
     dict(init=(ZEROS, ZEROS), f=lambda c, x: (c[0] + x, c[1]))),
    (scan, ValueError, r"y of f.*\(\).*\(2,\)", dict(f=lambda c, x: (c, x.sum()))),
    (scan, ValueError, r"2.*y of f.*\(2,\)",
     dict(f=lambda c, x: (c, c), xs=DIGITS[:, None], axis=2)),
    (scan, TypeError, "unroll is 1.5", dict(unroll=1.5)),
    (scan, ValueError, "unroll is -1", dict(unroll=-1)),
    (scan, TypeError, "chunk is 1.5", dict(chunk=1.5)),
    (scan, ValueError, "chunk is 0", dict(chunk=0)),
    (scan, TypeError, "reverse", dict(reverse=jnp.array(True))),
    (scan, ValueError, r"carry_in.*\(3,\).*\(2,\)", dict(carry_in=np.zeros(3, int))),
    (scan, TypeError, r"carry_in.*float32\[2\].*int32\[2\]", dict(carry_in=ZEROS / 2)),
    (scan, TypeError, r"carry_in.*\('int32\[2\]',\).*int32", dict(carry_in=(ZEROS,))),
    (associative, ValueError, r"carry_in.*int32\[2,1\].*int32\[2\]",
     dict(carry_in=ZEROS[:, None])),
    (scan, TypeError, "f is None", dict(f=None)),
    (both, TypeError, "f is 3", dict(f=3)),
    (associative, TypeError, "fn is 3", dict(fn=3)),
    (associative, TypeError, r"fn.*int32\[2,2\].*float32\[2,2\]",
     dict(fn=lambda a, b: a * 1.5)),
    (both, TypeError, r"LSTM \(\(h, c\), \(h, c\)\)",
     dict(f=lambda p, c, x: ((c, c), x))),
    (both, ValueError, r"init.*int32\[2,1\].*int32\[2\]",
     dict(init=(ZEROS, ZEROS[:, None]))),
    (both, TypeError, "params.*1 of type int", dict(params=(1, 1, 1))),
    (both, TypeError, "init.*ndarray", dict(init=ZEROS)),
    (both, ValueError, r"params.*{'a': 'int32\[\]'}.*int32\[\]",
     dict(params=(1, {"a": 1}))),
    (both, ValueError, r"params.*{'a': 'float32\[\]'}.*'int32\[\]'}",
     dict(params=({"a": 1}, {"a": 1.0}))),
)  # fmt: skip


@pytest.mark.parametrize("function, error, message, changed", ERRORS)
def test_bad_input_names_the_argument_and_the_remedy(function, error, message, changed):
    with pytest.raises(error, match=f"(?s){message}"):
        function(**RIGHT[function] | changed)
