"""The three scans beside a Python loop over rows, segments and steps.

The oracle calls `f` for the valid steps alone. Gradients are compared too, of `init`,
of `xs` and of what `f` closes over, with NaN and infinity in the padding.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_revseg import (
    _reference,
    associative_scan_segments,
    bidirectional_scan,
    scan_segments,
)

N, T, D = 4, 7, 3
LENGTHS = np.array([7, 0, 3, 1])
IDS = np.array(
    [
        [5, 5, 5, 2, 2, 5, 5],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 1, 1, 0],
        [3, 0, 0, 3, 0, 0, 0],
    ]
)
OFFSETS = np.array([[0, 2, 2, 5], [0, 0, 0, 0], [0, 7, 7, 7], [0, 1, 2, 4]])
MASK = np.array(
    [
        [1, 1, 0, 0, 1, 0, 1],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1],
    ],
    bool,
)
ENCODINGS = {
    "lengths": dict(lengths=LENGTHS),
    "ids": dict(segment_ids=IDS),
    "ids and padding": dict(segment_ids=IDS, padding_id=0),
    "offsets": dict(cu_seqlens=OFFSETS),
    "mask": dict(mask=MASK),
}
# Of each, the part that may be traced. The other is static.
TRACED = {
    name: {k: v for k, v in encoding.items() if k != "padding_id"}
    for name, encoding in ENCODINGS.items()
}


def segments_of_row(n, *, lengths=None, segment_ids=None, cu_seqlens=None, mask=None,
                    padding_id=None):  # fmt: skip
    """For each segment of a row, its steps."""
    if lengths is not None:
        return [range(lengths[n])]
    if mask is not None:
        return [np.flatnonzero(mask[n])]
    if cu_seqlens is not None:
        bounds = zip(cu_seqlens[n][:-1], cu_seqlens[n][1:], strict=True)
    else:
        bounds = _reference.id_bounds(segment_ids[n], padding_id)
    return [range(start, end) for start, end in bounds]


def valid_steps(**encoding):
    valid = np.zeros((N, T), bool)
    for n in range(N):
        for steps in segments_of_row(n, **encoding):
            valid[n, list(steps)] = True
    return valid


@jax.jit  # One program for all positions.
def step_of(tree, n, t):
    return jax.tree.map(lambda leaf: leaf[n, t][None], tree)


def oracle(f, init, xs, reverse=False, **encoding):
    """One row, one segment, one step at a time; `f` sees batches of one row."""
    carries, ys = [], []
    for n in range(N):
        start = jax.tree.map(lambda leaf, n=n: leaf[n : n + 1], init)
        last, row = start, {}
        segments = [list(steps) for steps in segments_of_row(n, **encoding)]
        for steps in reversed(segments) if reverse else segments:
            carry = start
            for t in reversed(steps) if reverse else steps:
                x = step_of(xs, n, t)
                carry, row[t] = f(carry, x)
                last = carry
        carries.append(last)
        ys.append(row)
    some = next((y for row in ys for y in row.values()), None)
    zero = jax.tree.map(jnp.zeros_like, some)
    rows = [
        jax.tree.map(lambda *y: jnp.stack(y, 1), *(row.get(t, zero) for t in range(T)))
        for row in ys
    ]
    concatenate = partial(jax.tree.map, lambda *leaves: jnp.concatenate(leaves))
    return concatenate(*carries), concatenate(*rows)


def gru(w, carry, x):
    """A pytree carry of two dtypes, and a step that depends on both inputs."""
    h, count = carry
    z = jax.nn.sigmoid(x["a"] @ w["z"] + h)
    h = (1 - z) * h + z * jnp.tanh(x["a"] @ w["h"] + x["b"][:, None])
    return (h, count + 1), {"h": h, "count": count}


def norm(w, carry, x):
    """The derivative is infinite where x or the carry is 0, and NaN below 0."""
    h, count = carry
    size = jnp.sqrt(jnp.sum((x["a"] @ w["z"]) ** 2, -1, keepdims=True))
    h = jnp.sqrt(h**2 + size) * jnp.log(1 + size) / jnp.sqrt(x["b"])[:, None]
    return (h, count), {"h": h, "log": jnp.log(h)}


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


def weighted(carry, ys):
    """A scalar of all floating results, in which each counts differently."""
    leaves = [
        x for x in jax.tree.leaves((carry, ys)) if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    return sum(
        jnp.sum(x * jnp.cos(jnp.arange(x.size).reshape(x.shape))) for x in leaves
    )


def close(actual, desired, rtol=2e-5):
    same = jax.tree.structure(actual) == jax.tree.structure(desired)
    assert same, (actual, desired)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


@jax.jit  # The oracle calls one program faster than its operations.
def gru_and_norm(w, carry, x):
    """Both, each with weights and a carry of its own."""
    outs = gru(w[0], carry[0], x), norm(w[1], carry[1], x)
    return tuple(zip(*outs, strict=True))


def values_and_gradients(scan, w, init, xs, **more):
    """Of the weights, of the floating parts of init, and of xs."""
    h, count = init

    def loss(w, hs, xs):
        starts = tuple((h, count) for h in hs)
        out = scan(partial(gru_and_norm, w), starts, xs, **more)
        return weighted(*out), out

    grad = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    (_, out), grads = grad((w, w), (h, h), xs)
    return out, grads


def test_values_and_gradients_are_those_of_valid_steps_alone():
    @partial(jax.jit, static_argnames="reverse")  # Compilation takes the time.
    def run(w, init, xs, traced, reverse):
        scan = partial(scan_segments, reverse=reverse)
        return {
            name: values_and_gradients(
                scan, w, init, xs[name], **encoding | traced[name]
            )
            for name, encoding in ENCODINGS.items()
        }

    for reverse in (False, True):
        desired = {}
        for name, encoding in ENCODINGS.items():
            w, init, xs = make(1.0, **encoding)
            scan = partial(oracle, reverse=reverse)
            desired[name] = values_and_gradients(scan, w, init, xs, **encoding)
        for bad in (np.nan, np.inf, 0.0):
            xs = {name: make(bad, **e)[2] for name, e in ENCODINGS.items()}
            close(run(w, init, xs, TRACED, reverse), desired)


def test_bidirectional_scan_is_two_scans():
    names = ("lengths", "ids and padding", "mask")
    w, init, _ = make(**ENCODINGS["lengths"])
    params = (w, jax.tree.map(lambda a: a / 2, w))
    inits = (init, jax.tree.map(lambda a: a + 1, init))

    def two(f, params, inits, xs, **encoding):
        ways = [
            scan_segments(partial(f, p), init, xs, reverse=reverse, **encoding)
            for p, init, reverse in zip(params, inits, (False, True), strict=True)
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


def affine(a, b):
    """Composition of x -> m x + v: not commutative."""
    return {"m": b["m"] * a["m"], "v": b["m"] * a["v"] + b["v"]}


def log_sum_exp(a, b):
    """The derivative at two infinities is NaN."""
    return {"m": a["m"] * b["m"], "v": jnp.logaddexp(a["v"], b["v"])}


@jax.jit
def affine_and_log_sum_exp(a, b):
    return affine(a[0], b[0]), log_sum_exp(a[1], b[1])


def combine_all(fn, elems, reverse, **encoding):
    """One step after the other; zero at padding."""
    rows = []
    zero = jax.tree.map(jnp.zeros_like, step_of(elems, 0, 0))
    for n in range(N):
        row = [zero] * T
        for steps in segments_of_row(n, **encoding):
            total = None
            for t in reversed(steps) if reverse else steps:
                x = step_of(elems, n, t)
                total = row[t] = x if total is None else fn(total, x)
        rows.append(jax.tree.map(lambda *leaves: jnp.stack(leaves, 1), *row))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rows)


def test_associative_scan_combines_each_segment_alone():
    """Fails if a product overflows into the next segment, or a NaN in the padding
    reaches a gradient."""
    encodings = {k: e for k, e in ENCODINGS.items() if "mask" not in e}
    rng = np.random.default_rng(0)
    clean = {"m": rng.uniform(0.5, 1.5, (N, T, 1)), "v": rng.normal(size=(N, T, 2))}
    clean = jax.tree.map(np.float32, clean)
    clean["m"][0, :2] = 1e30  # Their product is infinite.
    valid = {name: valid_steps(**e)[..., None] for name, e in encodings.items()}

    def grad(scan, elems, valid, reverse, encoding):
        def loss(elems):
            pair = (elems, elems)
            out = scan(affine_and_log_sum_exp, pair, reverse=reverse, **encoding)
            out = jax.tree.map(lambda y: jnp.where(valid, y, 0), out)
            finite = jax.tree.map(lambda y: jnp.where(abs(y) < 1e20, y, 0), out)
            return weighted((), finite), out

        return jax.grad(loss, has_aux=True)(elems)

    def at(valid, fill):
        return jax.tree.map(lambda x: np.where(valid, x, np.float32(fill)), clean)

    @partial(jax.jit, static_argnames="reverse")
    def run(elems, valid, traced, reverse):
        scan = associative_scan_segments
        return {
            name: grad(scan, elems[name], valid[name], reverse, e | traced[name])
            for name, e in encodings.items()
        }

    for reverse in (False, True):
        want = {
            name: grad(combine_all, at(valid[name], 1), valid[name], reverse, e)
            for name, e in encodings.items()
        }
        for bad in (np.nan, np.inf):
            elems = {name: at(v, bad) for name, v in valid.items()}
            close(run(elems, valid, TRACED, reverse), want)  # Padding gets zeros, too.


def total(scale, carry, x):
    """Exact on integers, and different for every order of steps."""
    carry = 10 * carry + scale * x
    return carry, carry


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
def test_nothing_to_scan_returns_init(shape):
    xs, init = jnp.ones(shape), jnp.arange(shape[0], dtype=float)

    @jax.jit
    def run(init, xs, encodings):
        outs, shapes = [], []
        for encoding in encodings:
            padding = {"padding_id": 0} if "segment_ids" in encoding else {}
            scan = partial(scan_segments, lambda c, x: (c * x, c), init, xs)
            outs += [scan(reverse=way, **encoding, **padding) for way in (False, True)]
            if "mask" not in encoding:
                out = associative_scan_segments(jnp.add, xs, **encoding, **padding)
                shapes.append(out.shape)
        assert set(shapes) == {shape}
        return outs

    encodings = (
        dict(lengths=jnp.zeros(shape[0], int)),
        dict(cu_seqlens=jnp.zeros((shape[0], 1), int)),
        dict(segment_ids=jnp.zeros(shape, int)),
        dict(mask=jnp.zeros(shape, bool)),
    )
    close(run(init, xs, encodings), [(init, jnp.zeros(shape))] * 8)


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
    "how", ("remat", "jvp", "hessian", "vmap over parameters", "scan over layers")
)
def test_transformations(how):
    w, init, xs = make(np.nan, **ENCODINGS["ids and padding"])
    encoding = dict(segment_ids=jnp.asarray(IDS), padding_id=0)

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
    elif how == "hessian":
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


def test_under_debugging_settings():
    """Fails if a NaN in the padding counts as one of the program."""
    w, init, xs = make(np.nan, **ENCODINGS["lengths"])
    run = partial(scan_segments, partial(gru, w), init, lengths=LENGTHS)
    expected = jax.jit(run)(xs)
    with jax.debug_nans(True):
        close(jax.jit(run)(xs), expected)
    with jax.disable_jit():
        digits = scan_segments(partial(total, 1), np.zeros(2, int), DIGITS, [3, 2])
    assert digits[1].tolist() == [[1, 12, 123, 0], [5, 56, 0, 0]]


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
    for x, traced in zip(xs, encodings, strict=True):
        more = traced | ({"padding_id": 0} if "segment_ids" in traced else {})
        one = scan_segments(partial(gru, params[0]), start, x, **more)
        both = bidirectional_scan(gru, params, (start, start), x, **more)
        b = jnp.where(jnp.isnan(x["b"]), 0.0, x["b"])
        ids = {"segment_ids": traced["mask"] + 0} if "mask" in traced else more
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
scan, both = scan_segments, bidirectional_scan
ERRORS = (
    (ValueError, "scan_segments: got none of lengths, segment_ids, cu_seqlens, mask",
     lambda: scan(SUM, ZEROS, DIGITS)),
    (ValueError, "got lengths and mask of", lambda: scan(SUM, ZEROS, DIGITS, [1, 1],
                                                         mask=DIGITS > 0)),
    (ValueError, "padding_id is 0, but .* by mask",
     lambda: scan(SUM, ZEROS, DIGITS, mask=DIGITS > 0, padding_id=0)),
    (TypeError, "mask has dtype int64.*boolean", lambda: scan(SUM, ZEROS, DIGITS,
                                                              mask=DIGITS)),
    (ValueError, r"xs is {}, a pytree without", lambda: scan(SUM, ZEROS, {}, [1, 1])),
    (ValueError, r"lengths\[1\] is 5.* 4, the size of axis 1 of xs\['a'\]",
     lambda: scan(SUM, ZEROS, {"a": DIGITS}, [1, 5])),
    (ValueError, r"xs\['b'\] has shape \(2, 3\)",
     lambda: scan(SUM, ZEROS, {"a": DIGITS, "b": DIGITS[:, :3]}, [1, 1])),
    (ValueError, r"^(?!.*batch_axis).*2.*3", lambda: scan(SUM, ZEROS, DIGITS, [1] * 3)),
    (ValueError, r"xs has shape \(4, 2\).*time-major, use axis=0",
     lambda: scan(SUM, ZEROS, DIGITS.T, [1, 1])),
    (ValueError, r"init\[0\] has shape \(3,\).*batch axes \(2,\)",
     lambda: scan(SUM, (np.zeros(3),), DIGITS, [1, 1])),
    (TypeError, "init is <function", lambda: scan(SUM, SUM, DIGITS, [1, 1])),
    (TypeError, "f must return a pair .* returned JitTracer|f must return a pair",
     lambda: scan(lambda c, x: c, ZEROS, DIGITS, [1, 1])),
    (TypeError, "returned tuple of 3",
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
    (ValueError, "unroll is 0", lambda: scan(SUM, ZEROS, DIGITS, [1, 1], unroll=0)),
    (TypeError, "params must be a pair .* is a tuple of 3",
     lambda: both(total, (1, 1, 1), (ZEROS, ZEROS), DIGITS, [1, 1])),
    (TypeError, "init must be a pair .* is a ndarray",
     lambda: both(total, (1, 1), ZEROS, DIGITS, [1, 1])),
    (ValueError, "params has the structure .* forward and .* backward",
     lambda: both(total, (1, {"a": 1}), (ZEROS, ZEROS), DIGITS, [1, 1])),
    (ValueError, r"params\['a'\] is int32\(\) forward and float32\(\) backward",
     lambda: both(total, ({"a": 1}, {"a": 1.0}), (ZEROS, ZEROS), DIGITS, [1, 1])),
    (TypeError, r"fn was given int32\(2, 2\), but returned float32\(2, 2\)",
     lambda: associative_scan_segments(lambda a, b: a * 1.5, DIGITS, [1, 1])),
)  # fmt: skip


@pytest.mark.parametrize("error, message, call", ERRORS)
def test_bad_input_names_the_argument_and_the_remedy(error, message, call):
    with pytest.raises(error, match=message):
        call()
