"""One loop over both directions: values, gradients, padding, packed rows, errors."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_revseg import _bidirectional_scan, bidirectional_scan

N, T, D, H = 6, 6, 3, 4
LENGTHS = np.array([0, 1, T, 3, 3, 1])


def gru(params, carry, x):
    """One step whose derivatives with respect to everything are dense."""
    gate = jax.nn.sigmoid(x @ params["x"] + carry @ params["h"])
    new = jnp.tanh(x @ params["x"] - carry * gate)
    carry = gate * carry + (1 - gate) * new
    return carry, carry * 2


def lstm(params, carry, x):
    hidden, cell = carry
    z = x @ params["x"] + hidden @ params["h"]
    cell = cell * jax.nn.sigmoid(z) + jnp.tanh(z)
    hidden = jnp.tanh(cell)
    return (hidden, cell), hidden


def digits(base, carry, x):
    """A state that tells apart every order and choice of steps, exactly."""
    carry = carry * base + x
    return carry, carry


def arguments(seed=0, n=N):
    rng = np.random.default_rng(seed)

    def random(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = tuple({"x": random(D, H), "h": random(H, H)} for _ in range(2))
    return params, random(n, H), random(n, T, D)


@partial(jax.jit, static_argnums=0)  # One compilation for each length.
def alone(f, params, init, x):
    return jax.lax.scan(partial(f, params), init, x)


def row_by_row(f, params, inits, xs, segments):
    """The same, with a scan of its own for each segment of each row: no padding."""
    carries, outputs = [], []
    for direction, order in enumerate((1, -1)):
        last, ys = [], []
        for n, bounds in enumerate(segments):
            init = carry = jax.tree.map(lambda leaf, n=n: leaf[n], inits[direction])
            row = jnp.zeros_like(alone(f, params[direction], init, xs[n])[1])
            for start, end in bounds[::order]:
                x = xs[n, start:end][::order]
                carry, y = alone(f, params[direction], init, x)
                row = row.at[start:end].set(y[::order])
            last.append(carry)
            ys.append(row)
        carries.append(jax.tree.map(lambda *rows: jnp.stack(rows), *last))
        outputs.append(jnp.stack(ys))
    return tuple(carries), tuple(outputs)


def weigh(result):
    """A scalar that depends on every value of the result differently."""
    leaves = jax.tree.leaves(result)
    return sum(
        jnp.sum(leaf * jnp.cos(jnp.arange(leaf.size) + i).reshape(leaf.shape))
        for i, leaf in enumerate(leaves)
    )


PADDED = [[(0, int(n))] if n else [] for n in LENGTHS]


@pytest.fixture(params=["small", "large"])
def step(request, monkeypatch):
    """Carries chosen as in small steps, which all are here, and as in large ones."""
    if request.param == "large":
        monkeypatch.setattr(_bidirectional_scan, "_SMALL_STEP", 0)


@pytest.mark.parametrize("f, jit", [(gru, True), (gru, False), (lstm, True)])
def test_values_and_gradients(f, jit):
    """Wrong order, wrong final state, lost or leaked gradient."""
    params, init, xs = arguments()
    inits = ((init, init / 2),) * 2 if f is lstm else (init, init)
    given = inits[0]

    def ours(params, init, xs):
        return bidirectional_scan(f, params, init, xs, jnp.asarray(LENGTHS))

    def loop(params, init, xs):
        return row_by_row(f, params, (init, init), xs, PADDED)

    wrap = jax.jit if jit else lambda function: function
    chex.assert_trees_all_close(
        wrap(ours)(params, given, xs), loop(params, given, xs), atol=1e-6, rtol=1e-5
    )
    grads = [
        jax.grad(lambda *args, run=run: weigh(run(*args)), (0, 1, 2))
        for run in (wrap(ours), loop)
    ]
    chex.assert_trees_all_close(
        grads[0](params, given, xs), grads[1](params, given, xs), atol=2e-5, rtol=1e-4
    )


@pytest.mark.usefixtures("step")
def test_exact_on_integers():
    """Every step once, in its order, in its place: digits of different bases."""
    xs = np.random.default_rng(1).integers(1, 7, (N, T))
    init = jnp.arange(N)
    got = bidirectional_scan(digits, (10, 7), init, jnp.asarray(xs), LENGTHS)
    want = row_by_row(digits, (10, 7), (init, init), jnp.asarray(xs), PADDED)
    chex.assert_trees_all_equal(got, want)
    empty = LENGTHS == 0
    chex.assert_trees_all_equal(got[0][0][empty], init[empty])


IDS = np.array(
    [
        [3, 3, 3, 3, 3, 3],
        [1, 1, 2, 1, 0, 0],  # An id that comes back is another segment.
        [0, 5, 0, 5, 4, 0],  # Padding on the left, between, and on the right.
        [0, 0, 0, 0, 0, 0],
        [0, 0, 2, 2, 2, 2],
        [1, 2, 3, 4, 5, 6],
    ]
)


def runs(ids, padding_id):
    edges = [0, *(np.flatnonzero(np.diff(ids)) + 1), len(ids)]
    pairs = zip(edges[:-1], edges[1:], strict=True)
    return [(int(a), int(b)) for a, b in pairs if ids[a] != padding_id]


def test_padding_id_past_an_int32():
    """The greatest uint32: as a Python int it is no int32."""
    most = 2**32 - 1
    ids = jnp.array([[3, 3, most]], jnp.uint32)
    carries, outputs = bidirectional_scan(
        digits,
        (10, 10),
        jnp.zeros(1, int),
        jnp.array([[1, 2, 7]]),
        segment_ids=ids,
        padding_id=most,
    )
    assert [carry.tolist() for carry in carries] == [[12], [21]]
    assert [y.tolist() for y in outputs] == [[[1, 12, 0]], [[21, 2, 0]]]


@pytest.mark.usefixtures("step")
@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("padding_id", [None, 0])
def test_packed_rows(padding_id, device):
    """A carry that crosses from one segment into the next, in either direction."""
    xs = np.random.default_rng(2).integers(1, 7, (N, T))
    init = jnp.arange(N)
    segments = [runs(row, padding_id) for row in IDS]
    got = bidirectional_scan(
        digits,
        (10, 7),
        init,
        jnp.asarray(xs),
        segment_ids=jnp.asarray(IDS) if device else IDS,
        padding_id=padding_id,
    )
    want = row_by_row(digits, (10, 7), (init, init), jnp.asarray(xs), segments)
    chex.assert_trees_all_equal(got, want)


@pytest.mark.usefixtures("step")
def test_packed_gradients():
    """A gradient that crosses from one segment into another, or comes from padding."""
    params, init, xs = arguments()
    segments = [runs(row, 0) for row in IDS]
    padding = jnp.asarray(IDS == 0)[..., None]

    def ours(params, init, xs):
        xs = jnp.where(padding, jnp.nan, xs)
        return bidirectional_scan(gru, params, init, xs, segment_ids=IDS, padding_id=0)

    def loop(params, init, xs):
        return row_by_row(gru, params, (init, init), xs, segments)

    got, want = (
        jax.grad(lambda *args, run=run: weigh(run(*args)), (0, 1, 2))(params, init, xs)
        for run in (ours, loop)
    )
    chex.assert_trees_all_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e38])
def test_padding_does_not_count(garbage):
    """A NaN in the padding of xs that reaches a value or any gradient."""
    params, init, xs = arguments()
    valid = (np.arange(T) < LENGTHS[:, None])[..., None]

    def loss(params, init, xs):
        result = bidirectional_scan(gru, params, init, xs, LENGTHS)
        return weigh(result), result

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    clean = run(params, init, jnp.where(valid, xs, 0))
    planted = run(params, init, jnp.where(valid, xs, garbage))
    chex.assert_trees_all_equal(planted, clean)
    assert np.all(np.asarray(planted[1][2])[~valid[..., 0]] == 0)
    ys = planted[0][1][1]
    assert all(np.all(np.asarray(y)[~valid[..., 0]] == 0) for y in ys)


@pytest.mark.usefixtures("step")
@pytest.mark.parametrize("padded", [True, False])
def test_step_that_only_valid_steps_can_take(padded):
    """A step that is singular at zero, and where a row's carry would run on to.

    Each valid step divides by x and by what is left to count down; zeros for padding,
    or one step more than the row has, would divide by zero and make all gradients NaN.
    """
    lengths = np.array([1, 4, 5])
    xs = jnp.where(np.arange(5) < lengths[:, None], 2.0, jnp.nan)

    def countdown(scale, left, x):
        return left - 1, scale / (left * x) + jnp.log(left)

    def loss(params, init, xs):
        packed = {"segment_ids": ~np.isnan(xs_host) * 1, "padding_id": 0}
        rows: dict[str, Any] = {"lengths": lengths} if padded else packed
        carries, ys = bidirectional_scan(countdown, params, init, xs, **rows)
        return weigh((carries, ys))

    xs_host = np.asarray(xs)
    params, init = (jnp.float32(3), jnp.float32(5)), jnp.asarray(lengths, jnp.float32)
    value, grads = jax.value_and_grad(loss, (0, 1, 2))(params, init, xs)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("pair", [False, True])
def test_init_alone_or_in_pairs(pair):
    """An LSTM's carry, a tuple of two, taken for a pair, or a pair for a carry."""
    params, init, xs = arguments()
    forward, backward = (init, -init), ((3 * init, init) if pair else (init, -init))
    given = (forward, backward) if pair else forward
    got = bidirectional_scan(lstm, params, given, xs, LENGTHS)
    want = row_by_row(lstm, params, (forward, backward), xs, PADDED)
    chex.assert_trees_all_close(got, want, atol=1e-6, rtol=1e-5)


def test_one_loop():
    """Two loops after each other, or a step that calls f once for each direction."""
    params, init, xs = arguments()
    run = partial(bidirectional_scan, gru)
    text = jax.jit(run).lower(params, init, xs, jnp.asarray(LENGTHS)).as_text()
    assert text.count("stablehlo.while") == 1
    assert f"tensor<2x{N}x{H}xf32>" in text


def test_choice_by_the_size_of_a_step():
    """The choice made where it is slower: in a small step f follows it, else not."""

    def chosen_first(n):
        jaxpr = jax.make_jaxpr(partial(bidirectional_scan, digits))(
            (10, 7), jnp.zeros(n), jnp.zeros((n, T)), jnp.zeros(n, int)
        )
        loops = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
        body = str(loops[0].params["jaxpr"])
        return body.index("name=_where") < body.index(" mul ")

    assert chosen_first(4096) and not chosen_first(4097)


def test_axes_and_trees():
    """Time-major, two batch axes, no batch axis, leaves of other ranks and dtypes."""
    params, init, xs = arguments()
    plain = bidirectional_scan(gru, params, init, xs, LENGTHS)

    def swapped(run):
        return jax.tree.map(lambda y: y.swapaxes(0, 1), run)

    carries, ys = bidirectional_scan(
        gru, params, init, xs.swapaxes(0, 1), LENGTHS, axis=0
    )
    chex.assert_trees_all_equal((carries, swapped(ys)), plain)

    fold = partial(jax.tree.map, lambda a: a.reshape(2, 3, *a.shape[1:]))
    folded = bidirectional_scan(gru, params, fold(init), fold(xs), fold(LENGTHS))
    chex.assert_trees_all_close(folded, fold(plain), atol=1e-6)

    one = bidirectional_scan(gru, params, init[3], xs[3], int(LENGTHS[3]))
    row = jax.tree.map(lambda a: a[3], plain)
    chex.assert_trees_all_close(one, row, atol=1e-6)

    def step(params, carry, x):
        carry, y = gru(params, carry, x["float"] * x["flag"][..., None])
        return carry, {"y": y, "number": x["number"] + 1}

    tree = {
        "float": xs,
        "flag": jnp.ones((N, T), bool),
        "number": jnp.arange(N * T, dtype=jnp.int8).reshape(N, T),
    }
    carries, ys = bidirectional_scan(step, params, init, tree, LENGTHS)
    chex.assert_trees_all_equal((carries, tuple(y["y"] for y in ys)), plain)
    valid = np.arange(T) < LENGTHS[:, None]
    for y in ys:
        want = np.where(valid, np.arange(N * T).reshape(N, T) + 1, 0)
        chex.assert_trees_all_equal(y["number"], want.astype(np.int8))


def test_keys():
    """Key arrays in xs, as for dropout, which have no zero to multiply by."""
    keys = jax.random.split(jax.random.key(0), (N, T))

    def step(scale, carry, key):
        draw = jax.vmap(jax.random.uniform)(key)
        return carry + scale * draw, draw

    _, (forward, backward) = bidirectional_scan(
        step, (1.0, 2.0), jnp.zeros(N), keys, LENGTHS
    )
    valid = np.arange(T) < LENGTHS[:, None]
    draws = jax.vmap(jax.vmap(jax.random.uniform))(keys)
    chex.assert_trees_all_equal(forward, jnp.where(valid, draws, 0))
    chex.assert_trees_all_equal(backward, forward)


@pytest.mark.parametrize("shape", [(0, T), (N, 0)])
def test_nothing_to_do(shape):
    n, t = shape
    params, init, _ = arguments(n=n)
    carries, ys = bidirectional_scan(
        gru, params, init, jnp.zeros((n, t, D)), np.zeros(n, int)
    )
    chex.assert_trees_all_equal(carries, (init, init))
    chex.assert_shape(ys, (n, t, H))


def test_lengths_on_a_device_are_cut():
    params, init, xs = arguments()
    beyond = np.where(LENGTHS == 0, -3, np.where(LENGTHS == T, 2**31 - 1, LENGTHS))
    chex.assert_trees_all_equal(
        bidirectional_scan(gru, params, init, xs, jnp.asarray(beyond)),
        bidirectional_scan(gru, params, init, xs, jnp.asarray(LENGTHS)),
    )


@pytest.mark.parametrize("way", ["vmap", "checkpoint", "unroll", "jvp"])
def test_transformations(way):
    """Another value or another gradient under a transformation."""
    params, init, xs = arguments()

    def loss(params, init, xs, f=gru, unroll=1):
        run = partial(bidirectional_scan, f, unroll=unroll)
        return weigh(run(params, init, xs, jnp.asarray(LENGTHS)))

    grad = jax.jit(jax.grad(loss, (0, 1, 2)))
    want = grad(params, init, xs)
    close = partial(chex.assert_trees_all_close, atol=2e-5, rtol=1e-4)
    if way == "vmap":
        batch = jax.tree.map(lambda a: jnp.stack([a, a / 2]), (params, init, xs))
        for i, got in enumerate((want, grad(*jax.tree.map(lambda a: a[1], batch)))):
            close(jax.tree.map(lambda a, i=i: a[i], jax.vmap(grad)(*batch)), got)
    elif way == "checkpoint":
        for again in (jax.checkpoint(loss), partial(loss, f=jax.checkpoint(gru))):
            close(jax.jit(jax.grad(again, (0, 1, 2)))(params, init, xs), want)
    elif way == "unroll":
        unrolled = jax.jit(jax.grad(partial(loss, unroll=4), (0, 1, 2)))
        close(unrolled(params, init, xs), want)
    else:
        tangents = jax.tree.map(jnp.ones_like, (params, init, xs))
        _, tangent = jax.jit(partial(jax.jvp, loss))((params, init, xs), tangents)
        total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(want))
        chex.assert_trees_all_close(tangent, total, rtol=1e-4)


@pytest.mark.parametrize("mode", ["auto", "explicit", "shard_map"])
@pytest.mark.parametrize(
    "packed, step", [(False, "small"), (True, "large")], indirect=["step"]
)
def test_batch_sharded(mode, packed, step):
    """A collective over the data, or a gradient of replicated params not summed."""
    params, init, xs = arguments(n=8)
    rows = jnp.asarray(np.resize(IDS, (8, T)) if packed else np.resize(LENGTHS, 8))

    def loss(params, init, xs, rows):
        named = {"segment_ids": rows, "padding_id": 0} if packed else {"lengths": rows}
        return weigh(bidirectional_scan(gru, params, init, xs, **named))

    grad = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    want = grad(params, init, xs, rows)
    kind = jax.sharding.AxisType.Explicit if mode == "explicit" else None
    kind = kind or jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    spec, sharded_grad = jax.sharding.PartitionSpec("data"), grad
    with jax.set_mesh(mesh):
        sharded = jax.device_put((init, xs, rows), jax.NamedSharding(mesh, spec))
        if mode == "shard_map":
            # The weights of `weigh` count from the first row of each shard.
            def local(params, init, xs, rows):
                return jax.lax.psum(loss(params, init, xs, rows), "data")

            sharded_grad = jax.value_and_grad(
                jax.shard_map(
                    local,
                    mesh=mesh,
                    in_specs=(jax.P(), spec, spec, spec),
                    out_specs=jax.P(),
                ),
                (0, 1, 2),
            )
            parts = [
                grad(params, *(a[i : i + 2] for a in (init, xs, rows)))
                for i in range(0, 8, 2)
            ]
            value = sum(part[0] for part in parts)
            by_row = [jnp.concatenate([p[1][i] for p in parts]) for i in (1, 2)]
            summed = jax.tree.map(lambda *a: sum(a), *(part[1][0] for part in parts))
            want = (value, (summed, *by_row))
        got = jax.jit(sharded_grad)(params, *sharded)
    chex.assert_trees_all_close(
        jax.device_get(got), jax.device_get(want), atol=5e-5, rtol=1e-4
    )


def test_scan_starts_where_nothing_varies():
    """`init` made inside shard_map is the same on every device; the carry is not."""
    params, _, xs = arguments(n=8)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.P("data")

    def local(params, xs):
        return bidirectional_scan(
            gru, params, jnp.zeros((2, H)), xs, jnp.full(2, T, jnp.int32)
        )

    run = jax.shard_map(local, mesh=mesh, in_specs=(jax.P(), spec), out_specs=spec)
    want = bidirectional_scan(gru, params, jnp.zeros((8, H)), xs, jnp.full(8, T))
    chex.assert_trees_all_close(jax.jit(run)(params, xs), want, atol=1e-6)


def other_params(params):
    return (params[0], {"x": params[1]["x"]})


def narrow_params(params):
    return (params[0], {**params[1], "h": params[1]["h"][:, :2]})


ERRORS = [
    (ValueError, "none of lengths and segment_ids", {"lengths": None}),
    (ValueError, "both of lengths and segment_ids", {"segment_ids": IDS}),
    (ValueError, "padding_id is 0, but .* by lengths", {"padding_id": 0}),
    (ValueError, "xs is {}, a pytree with no array", {"xs": {}}),
    (ValueError, r"lengths has shape \(5,\) and x has shape", {"lengths": [1] * 5}),
    (ValueError, r"lengths\[5\] is 7, but .* 6", {"lengths": [1] * 5 + [7]}),
    (TypeError, "lengths has dtype float", {"lengths": np.ones(N)}),
    (TypeError, "params has type dict, but must be a pair", {"params": {"x": 1}}),
    (ValueError, "params has the structure .*h.* forward and", other_params),
    (ValueError, r"\['h'\] is float32\(4, 4\) forward and .*\(4, 2\)", narrow_params),
    (TypeError, "params has a leaf <function", {"params": (gru, gru)}),
    (ValueError, r"init has shape \(4,\), .* batch axes \(6,\)", {"init": np.ones(H)}),
    (ValueError, "axis is 4, but x has rank 3", {"axis": 4}),
]


@pytest.mark.parametrize("error, message, change", ERRORS)
def test_errors(error, message, change):
    params, init, xs = arguments()
    call = {"params": params, "init": init, "xs": xs, "lengths": LENGTHS}
    call |= change if isinstance(change, dict) else {"params": change(params)}
    with pytest.raises(error, match=message):
        bidirectional_scan(gru, **call)


def test_errors_of_the_step():
    params, init, xs = arguments()
    call = partial(bidirectional_scan, params=params, xs=xs, lengths=LENGTHS)
    with pytest.raises(TypeError, match=r"float32\(6, 4\), but returned .*\(6, 1\)"):
        call(lambda p, c, x: (c[:, :1], c), init=init)
    with pytest.raises(ValueError, match=r"a y of f has shape \(\), .* axes \(6,\)"):
        call(lambda p, c, x: (c, c.sum()), init=init)
    with pytest.raises(ZeroDivisionError):  # Not an error about the pair it is not.
        call(lambda p, c, x: (c, 1 // 0), init=(init, init))
    with pytest.raises(ValueError, match=r"axis is 2, but a y of f has shape \(6,\)"):
        call(lambda p, c, x: (c, c[:, 0]), init=init, xs=xs.swapaxes(1, 2), axis=2)
    with pytest.raises(ValueError, match=r"axis, its size\) at \[\(1, 6\), \(2, 6\)\]"):
        call(gru, init=init, xs=(xs[..., 0], xs.swapaxes(1, 2)), axis=-1)
