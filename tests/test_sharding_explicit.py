"""Mesh axes of type Explicit: the sharding is part of the type, and checked.

The result must carry what `add` would give it, the gradient the sharding of x, and both
the right values: a wrong replication passes any test that looks at shapes alone.
"""

import contextlib
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_revseg
from jax_revseg import reverse_segments, reverse_sequence
from jax_revseg._layout import Layout
from tests.cases import Case, assert_same_bits, reverse_order
from tests.meshes import CASES, calls, integers, make_mesh, put, with_gradients

MESH = make_mesh("Explicit")
SHAPE = CASES[0].shape
SEGMENTS = [case.segments() for case in CASES]
BOTH = ("a", "b")
# The shardings of x, of the rows of segments, and of the result.
SPECS = {
    "both": (("a", None, "b"), "a", ("a", None, "b")),
    "rows-over-both": ((BOTH, None, None), BOTH, (BOTH, None, None)),
    "segments-only": ((None, None, None), "a", ("a", None, None)),
    "segments-and-features": ((None, None, "b"), "a", ("a", None, "b")),
    "x-only": (("a", None, "b"), None, ("a", None, "b")),
}
WAYS = [(name, "jit") for name in SPECS]
WAYS += [("both", "eager"), ("segments-and-features", "jit-without-mesh")]


def spec_of(x):
    return tuple(jax.typeof(x).sharding.spec)


def operands(mesh, name):
    x_spec, rows, out_spec = SPECS[name]
    x = put(mesh, integers(SHAPE), *x_spec)
    segments = [put(mesh, s, rows, *[None] * (s.ndim - 1)) for s in SEGMENTS]
    cts = [put(mesh, integers(SHAPE, i), *out_spec) for i in range(len(CASES))]
    return [x] * len(CASES), segments, cts


def check(name, how="jit", over=MESH, value=None):
    """Values, gradients, and the shardings of both."""
    x_spec, _, out_spec = SPECS[name]
    given = operands(over, name)
    run = partial(with_gradients, partial(calls, padding_value=value))
    context = contextlib.nullcontext() if "without" in how else jax.set_mesh(over)
    with context:
        results = (run if how == "eager" else jax.jit(run))(*given)
    kept = {*over.abstract_mesh.explicit_axes}
    specs = [
        tuple(n if kept.issuperset(jax.tree.leaves(n)) else None for n in spec)
        for spec in (out_spec, x_spec)
    ]
    for case, s, ct, y, x_bar in zip(CASES, SEGMENTS, given[2], *results, strict=True):
        assert_same_bits(y, case.expected(integers(SHAPE), s, value), case.name)
        want = case.expected(np.asarray(ct), s, None if value is None else 0)
        np.testing.assert_array_equal(x_bar, want, case.name)
        assert [spec_of(y), spec_of(x_bar)] == specs


@pytest.mark.parametrize("name, how", WAYS)
def test_values_and_gradients(name, how):
    """Fails on another sharding than `add` gives, or rows exchanged on the way."""
    check(name, how)


def test_padding_value():
    """Fails on a mask that is sharded otherwise than what it selects from."""
    check("segments-and-features", value=5.0)


@pytest.mark.parametrize("kinds", ("Explicit Auto", "Auto Explicit"))
def test_mixed_mesh(kinds):
    """Fails on an auto axis treated as an explicit one, or the other way round."""
    check("segments-and-features", over=make_mesh(kinds))


@pytest.mark.parametrize("name", ("both", "segments-and-features"))
def test_vmap_over_a_sharded_axis(name):
    """Fails if the mapped axis and its sharding part."""
    xs, segments, cts = operands(MESH, name)
    x_axis = 0
    if name == "segments-and-features":  # Only the segments are mapped.
        xs, x_axis = [x[0] for x in xs], None

    def rows(xs, segments):
        return [
            jax.vmap(lambda x, s: case.call(x[None], s[None])[0], (x_axis, 0))(x, s)  # noqa: B023
            for case, x, s in zip(CASES, xs, segments, strict=True)
        ]

    with jax.set_mesh(MESH):
        results = jax.jit(partial(with_gradients, rows))(xs, segments, cts)
    x = np.broadcast_to(xs[0], SHAPE)
    for case, s, ct, y, x_bar in zip(CASES, SEGMENTS, cts, *results, strict=True):
        assert_same_bits(y, case.expected(x, s), case.name)
        want_bar = case.expected(np.asarray(ct), s)
        want_bar = want_bar.sum(0) if x_axis is None else want_bar
        np.testing.assert_array_equal(x_bar, want_bar, case.name)
        assert (spec_of(y), spec_of(x_bar)) == (SPECS[name][2], spec_of(xs[0]))


def test_order_of_segments():
    """Fails on wrong sums of lengths, or another sharding of the reversed lengths."""
    x, axes = integers(SHAPE), dict(axis=1, batch_axes=(0,))
    wanted = reverse_order(x, SEGMENTS[1], **axes)
    lengths = put(MESH, SEGMENTS[1], "a", None)
    reverse = jax.jit(jax_revseg.reverse_segment_order)
    for x_spec in (("a", None, "b"), (None, None, "b")):
        with jax.set_mesh(MESH):
            outs = reverse(put(MESH, x, *x_spec), lengths)
        for out, want in zip(outs, wanted, strict=True):
            np.testing.assert_array_equal(out, want)
        assert [*map(spec_of, outs)] == [("a", None, "b"), ("a", None)]


def test_other_operands():
    """Fails if host lengths, offsets or a bare bind cannot take a sharded array."""
    x, lengths = put(MESH, integers(SHAPE), "a", None, "b"), SEGMENTS[1]
    bind = partial(jax_revseg.reverse_segments_p.bind, layout=Layout("packed", 1, (0,)))
    offsets = np.pad(lengths.cumsum(-1), ((0, 0), (1, 0)))
    with jax.set_mesh(MESH):
        on_device = put(MESH, lengths, "a", None)
        outs = [
            reverse_segments(x, lengths),
            jax.jit(lambda x: reverse_segments(x, lengths))(x),
            reverse_segments(x, cu_seqlens=put(MESH, offsets, "a", None)),
            bind(x, on_device),
        ]
        with jax.disable_jit():
            outs.append(reverse_segments(x, on_device))
    for y in outs:
        assert_same_bits(y, CASES[1].expected(integers(SHAPE), lengths))
        assert spec_of(y) == ("a", None, "b")


@pytest.mark.parametrize(
    "x_spec, rows, message",
    (
        ((None, "b"), (None,), "axis 1 of x.* 'b'; .*reshard"),
        ((None, BOTH), (None,), r"axis 1 of x.*\('a', 'b'\).*axis_name=\('a', 'b'"),
        (("a",), ("b",), r"axis 0 of .*'b'.*\('a', None, None\)"),
        (("a",), (BOTH,), r"axis 0 .*\('a', 'b'\).*\('a', None, None\)"),
        ((None, None, "a"), ("a",), r"axis 0 .* 'a'.*\(None, None, 'a'\)"),
        ((), (None, "a"), r"axis 1 of .* 'a'"),
    ),
)
def test_errors(x_spec, rows, message):
    """Fails on data replicated in silence, or an error that names no remedy."""
    x = put(MESH, jnp.zeros((8, 8, 4)), *x_spec)
    lengths = put(MESH, np.zeros((8, 4)[: len(rows)], int), *rows)
    f = reverse_sequence if len(rows) == 1 else reverse_segments
    with jax.set_mesh(MESH), pytest.raises(ValueError, match=re.compile(message, re.S)):
        f(x, lengths)


def ramp(x):
    """A layer in which the position of a step counts, also in a block."""
    t = jax.lax.broadcasted_iota(x.dtype, x.shape, 1)
    if jax.typeof(x).sharding.mesh.manual_axes:
        t += jax.lax.axis_index("b").astype(x.dtype) * x.shape[1]
    return t * x


@pytest.mark.parametrize(
    "name, given",
    (
        ("reverse_sequence", "lengths"),
        ("reverse_segments", "segment_ids"),
        ("bidirectional", "cu_seqlens"),
        ("bidirectional", "starts"),
        ("bidirectional", "mask"),
    ),
)
def test_remedies_of_a_sharded_segment_axis(name, given):
    """Fails if what the error names does not do what was asked for."""
    host = integers((8, 6, 4))
    ids = np.arange(6) // 2 + np.zeros((8, 1), int)
    segments = {"segment_ids": ids, "starts": ids % 2 > 0, "mask": ids != 1}
    segments["cu_seqlens"] = ids[:, ::5] + np.arange(2)
    segments = segments.get(given, np.arange(8) % 7)
    function = getattr(jax_revseg, name)
    call = partial(function, *[ramp, ramp][: 2 * (name[0] == "b")])
    spec = P() if given in ("lengths", "cu_seqlens") else P(None, "b")
    s = put(MESH, segments, *spec)
    x = put(MESH, host, None, "b", None)
    with pytest.raises(ValueError, match="axis 1 of x.*'b'; .*reshard") as error:
        call(x, **{given: s})
    if "axis_name='b'" in str(error.value):
        specs = P(None, "b", None), spec
        local = lambda x, s: call(x, **{given: s}, axis_name="b")  # noqa: E731
        local = partial(jax.shard_map, local, mesh=MESH, in_specs=specs)
        out = local(out_specs=specs[0])(x, s)
    else:
        assert given == "mask"
        with jax.set_mesh(MESH):
            out = call(jax.sharding.reshard(x, P()), mask=segments)
    want = jax.jit(lambda x, s: call(x, **{given: s}))(host, segments)
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("x_axis, ids_axis", (("a", None), (None, "a")))
def test_scans_refuse_a_sharded_segment_axis(x_axis, ids_axis):
    """Fails on a scan over blocks, or an error that names no remedy."""
    x = put(MESH, jnp.ones((4, 8)), None, x_axis)
    ids = put(MESH, jnp.zeros((4, 8), int), None, ids_axis)
    scan = partial(jax_revseg.scan_segments, lambda c, x: (c + x, x), jnp.zeros(4))
    associative = partial(jax_revseg.associative_scan_segments, jnp.add)
    for f, given, remedy in (
        (scan, dict(segment_ids=ids), "reshard.$"),
        (scan, dict(mask=ids == 0), "reshard.$"),
        (associative, dict(segment_ids=ids), "axis_name='a'.$" if x_axis else "resha"),
    ):
        message = f"axis 1 of .*'a'.*{remedy}"
        with jax.set_mesh(MESH), pytest.raises(ValueError, match=message):
            f(x, **given)


def test_two_batch_axes():
    """Fails if only the first axis of lengths counts, or x needs a mesh."""
    x = integers((8, 8, 4))
    lengths = np.arange(64).reshape(8, 8) % 5
    want = Case("", x.shape, axis=2, batch_axes=(0, 1)).expected(x, lengths)
    for given in (x, put(MESH, x, None, None, None)):
        y = reverse_sequence(given, put(MESH, lengths, "a", "b"))
        assert_same_bits(y, want)
        assert spec_of(y) == ("a", "b", None)


def test_partial_sums():
    """Fails on `unreduced` dropped from the type, so that a sum is never made."""
    rows = put(MESH, integers((8, 4)), "a", "b")
    steps = put(MESH, integers((4, 6), 1), "b", None)

    @jax.jit
    def product(rows, steps):
        x = jnp.einsum("nb,bt->nt", rows, steps, out_sharding=P("a", unreduced={"b"}))
        return reverse_sequence(x, SEGMENTS[0])

    with jax.set_mesh(MESH), pytest.raises(ValueError, match="x .*unreduced.*reshard"):
        product(rows, steps)
