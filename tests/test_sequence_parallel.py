"""The segment axis sharded over devices: `axis_name`.

Every test compares with the reversal of the whole array, so that a block that went to
the wrong device, or came back to the wrong place, shows.
"""

import textwrap
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jax_revseg import (
    _reference,
    associative_scan_segments,
    bidirectional,
    reverse_segment_order,
    reverse_segments,
    reverse_sequence,
)
from tests.cases import Case, assert_same_bits
from tests.meshes import bytes_received


def make_mesh(axis_type=AxisType.Auto, **sizes):
    axis_types = (axis_type,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=axis_types)


def specs(case, axis_name="seq", batch=None):
    """The specs of x and of the segments: blocks of the segment axis, and of axis 0."""
    of_x = {a: None for a in range(len(case.shape))} | {case.axis: axis_name}
    of_x[case.batch_axes[0] if case.batch_axes else -1] = batch
    of_segments = (
        [batch, *(None for _ in case.batch_axes[1:])] if case.batch_axes else []
    )
    if case.layout != "padded":
        of_segments.append(axis_name if case.layout == "ids" else None)
    return P(*(of_x[a] for a in range(len(case.shape)))), P(*of_segments)


def over_blocks(case, mesh, axis_name="seq", batch=None, **more):
    """The call of the case on whole arrays, each device working on its block."""
    of_x, of_segments = specs(case, axis_name, batch)
    return jax.shard_map(
        partial(case.call, axis_name=axis_name, **more),
        mesh=mesh,
        in_specs=(of_x, of_segments),
        out_specs=of_x,
    )


def value_and_pullback(f):
    def both(x, segments, ct):
        out, pullback = jax.vjp(lambda x: f(x, segments), x)
        return out, pullback(ct)[0]

    return jax.jit(both)


def check(cases, functions, value=None):
    """Values and gradients against the reference, bit for bit, by one program."""
    xs, segments = [c.x() for c in cases], [c.segments() for c in cases]
    cts = [x[::-1].copy() for x in xs]
    linear = [jnp.issubdtype(c.dtype, jnp.inexact) for c in cases]

    @jax.jit
    def run(xs, segments, cts):
        return [
            value_and_pullback(f)(x, s, ct) if inexact else (f(x, s), None)
            for f, inexact, x, s, ct in zip(
                functions, linear, xs, segments, cts, strict=True
            )
        ]

    outs = run(xs, segments, cts)
    for case, x, s, ct, (out, ct_x) in zip(cases, xs, segments, cts, outs, strict=True):
        assert_same_bits(out, case.expected(x, s, value), case.name)
        if ct_x is not None:
            zero = None if value is None else 0
            assert_same_bits(ct_x, case.expected(ct, s, zero), case.name)


# What gets cut in the place of the segment axis, of 16 or 32 positions: a feature axis,
# a batch axis, one that must be padded, or none.
SHAPES = (
    Case("features", (3, 16, 8)),
    Case("features-int8-lengths", (3, 32, 8), lengths="over", lengths_dtype="int8"),
    Case("batch", (8, 16, 3)),
    Case("time-major", (16, 8, 3), axis=0, batch_axes=(1,)),
    Case("two-batch-axes", (2, 8, 16), axis=2, batch_axes=(1, 0)),
    Case("padded-features", (3, 16, 5), lengths="over"),
    Case("padded-batch", (11, 16), lengths="over"),
    Case("rank-1", (16,), axis=0, batch_axes=()),
    Case("one-row", (16, 8), axis=0, batch_axes=()),
    Case("one-position-a-device", (3, 8, 8)),
    Case("packed-features", (3, 16, 8), layout="packed", count=4),
    Case("packed-batch", (8, 16, 3), layout="packed", lengths="over"),
    Case("offsets", (3, 16, 8), layout="offsets"),
    Case("offsets-batch", (9, 16, 3), layout="offsets", lengths="over"),
    Case("ids-features", (3, 16, 8), layout="ids", padding_id=0),
    Case("ids-batch", (8, 16, 8), layout="ids"),
    Case("ids-padded-batch", (9, 16), layout="ids", padding_id=1),
    Case("ids-rank-1", (16,), layout="ids", axis=0, batch_axes=()),
)
TYPES = tuple(
    Case(f"type-{dtype}", (5, 16, 8), dtype, layout)
    for dtype, layout in {
        **{"int8": "packed", "bool": "ids", "uint32": "padded", "int4": "packed"},
        **{"float16": "padded", "float8_e4m3fn": "packed", "complex64": "padded"},
    }.items()
)


def test_values_and_gradients():
    check(SHAPES, [over_blocks(case, make_mesh(seq=8)) for case in SHAPES])


def test_fewer_devices():
    meshes = [make_mesh(seq=devices) for devices in (1, 2)]
    for mesh in meshes:
        check(SHAPES[::4], [over_blocks(case, mesh) for case in SHAPES[::4]])


def test_every_kind_of_dtype():
    check(TYPES, [over_blocks(case, make_mesh(seq=4)) for case in TYPES])


def test_keys():
    case = Case("keys", (3, 8, 3))
    data = np.arange(3 * 8 * 3 * 2, dtype=np.uint32).reshape(3, 8, 3, 2)
    f = jax.jit(over_blocks(case, make_mesh(seq=4)))
    out = f(jax.random.wrap_key_data(jnp.asarray(data)), case.segments())
    assert_same_bits(jax.random.key_data(out), case.expected(data, case.segments()))


def test_nothing_in_an_axis():
    cases = [Case("empty", shape) for shape in ((0, 16, 8), (3, 0, 8), (3, 16, 0))]
    check(cases, [over_blocks(case, make_mesh(seq=4)) for case in cases])


def of_each_layout(name, *shapes):
    return [
        Case(f"{name}-{layout}-{shape}", shape, layout=layout, padding_id=0)
        for layout in ("padded", "packed", "ids")
        for shape in shapes
    ]


def test_padding_value_is_written_by_global_position():
    cases = of_each_layout("value", (3, 16, 4), (8, 16, 4))
    mesh = make_mesh(seq=4)
    check(cases, [over_blocks(c, mesh, padding_value=7) for c in cases], value=7)


@pytest.mark.parametrize("batch", [3, 8])
def test_reverse_segment_order(batch):
    case = Case("order", (batch, 16, 4), layout="packed", count=4)
    x, lengths = case.x(), case.segments()
    of_x, of_lengths = specs(case)
    f = jax.shard_map(
        partial(reverse_segment_order, axis_name="seq"),
        mesh=make_mesh(seq=4),
        in_specs=(of_x, of_lengths),
        out_specs=(of_x, of_lengths),  # The lengths stay replicated.
    )

    @jax.jit
    def both(x):
        out, pullback, flipped = jax.vjp(lambda x: f(x, lengths), x, has_aux=True)
        return out, flipped, pullback(x)[0]

    out, flipped, ct_x = both(x)
    expected = _reference.reverse_order(x, lengths, axis=1, batch_axes=(0,))
    assert_same_bits(out, expected[0])
    np.testing.assert_array_equal(flipped, expected[1])
    undone, _ = _reference.reverse_order(x, expected[1], axis=1, batch_axes=(0,))
    assert_same_bits(ct_x, undone)


# ---- meshes


def test_batch_by_sequence():
    cases = of_each_layout("batch-by-sequence", (4, 16, 4), (8, 16, 3))
    mesh = make_mesh(data=2, seq=4)
    check(cases, [over_blocks(case, mesh, batch="data") for case in cases])


def test_several_mesh_axes():
    case, mesh = Case("names", (8, 16, 3)), make_mesh(a=2, b=4)
    names = (("a", "b"), ("b", "a"), ("b",))
    check([case] * 3, [over_blocks(case, mesh, axis_name=name) for name in names])


def test_lengths_vary_where_x_does_not():
    # x is one for all of "data", the lengths are not: the gradient is a sum.
    lengths = np.array([3, 16])
    x, ct = np.arange(32.0).reshape(16, 2), np.arange(64.0).reshape(2, 16, 2)
    f = jax.shard_map(
        lambda x, n: reverse_sequence(x, n[0], axis_name="seq")[None],
        mesh=make_mesh(data=2, seq=4),
        in_specs=(P("seq"), P("data")),
        out_specs=P("data", "seq"),
    )
    out, ct_x = value_and_pullback(f)(x, lengths, ct)
    both = np.stack([x, x])
    np.testing.assert_array_equal(out, reverse_sequence(both, lengths))
    np.testing.assert_array_equal(ct_x, reverse_sequence(ct, lengths).sum(0))


def test_x_is_the_same_on_every_device():
    # Four equal blocks make one axis; the gradient is the sum over the four.
    x, ct = np.arange(12.0).reshape(3, 4), np.arange(48.0).reshape(12, 4)
    f = jax.shard_map(
        lambda x, n: reverse_sequence(x, n, axis_name="seq"),
        mesh=make_mesh(seq=4),
        in_specs=(P(), P()),
        out_specs=P("seq"),
    )
    out, ct_x = value_and_pullback(f)(x, 7, ct)
    np.testing.assert_array_equal(out, reverse_sequence(np.tile(x, (4, 1)), 7))
    np.testing.assert_array_equal(
        ct_x, np.asarray(reverse_sequence(ct, 7)).reshape(4, 3, 4).sum(0)
    )


def test_result_varies():
    # Were the blocks taken for replicated, one of them would pass for the result.
    f = jax.shard_map(
        partial(reverse_sequence, axis_name="seq"),
        mesh=make_mesh(seq=4),
        in_specs=(P("seq"), P()),
        out_specs=P(),
    )
    with pytest.raises(ValueError, match="out_specs"):
        jax.eval_shape(f, np.ones((16, 4)), np.int32(3))


# ---- transformations


WRAPPERS = (
    lambda f: lambda x, n: jax.jvp(lambda x: jax.checkpoint(f)(x, n), (x,), (x,))[1],
    lambda f: lambda x, n: lax.scan(lambda c, _: (f(c, n), None), x, length=3)[0],
    lambda f: lambda x, n: jax.vmap(f)(x[None], n[None])[0],
    lambda f: lambda x, n: jax.vmap(f, (1, None), 1)(x[:, None], n)[:, 0],
)


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_transformations(inside):
    case, mesh = Case("transformations", (5, 16, 4)), make_mesh(seq=4)
    of_x, of_segments = specs(case)
    local = partial(case.call, axis_name="seq")
    place = partial(
        jax.shard_map, mesh=mesh, in_specs=(of_x, of_segments), out_specs=of_x
    )
    functions = [place(w(local)) if inside else w(place(local)) for w in WRAPPERS]
    check([case] * len(WRAPPERS), functions)


@pytest.mark.parametrize("layout", ["padded", "ids"])
def test_axis_name_of_a_vmap(layout):
    # The same exchange without a mesh: blocks along a mapped axis, on one device.
    case = Case("vmap-axis", (5, 16, 4), layout=layout)

    def f(x, segments):
        blocks = x.reshape(5, 4, 4, 4)
        ids = layout == "ids"
        local = jax.vmap(
            partial(case.call, axis_name="blocks"),
            in_axes=(1, 1 if ids else None),
            out_axes=1,
            axis_name="blocks",
        )
        out = local(blocks, segments.reshape(5, 4, 4) if ids else segments)
        return out.reshape(x.shape)

    check([case], [f])


def test_bidirectional_sums_over_devices():
    def cumulative(x):
        """A sum along a sharded axis: a local one, and what came before."""
        local = jnp.cumsum(x, 1)
        totals = lax.all_gather(local[:, -1], "seq")
        before = jnp.arange(len(totals)) < lax.axis_index("seq")
        return local + jnp.tensordot(before.astype(x.dtype), totals, 1)[:, None]

    x = np.arange(3 * 16 * 4).reshape(3, 16, 4)
    lengths = np.array([5, 16, 11])
    f = jax.shard_map(
        partial(bidirectional, cumulative, cumulative, axis_name="seq"),
        mesh=make_mesh(seq=4),
        in_specs=(P(None, "seq"), P()),
        out_specs=P(None, "seq"),
    )
    total = partial(jnp.cumsum, axis=1)
    expected = bidirectional(total, total, x, lengths)
    valid = (np.arange(16) < lengths[:, None])[..., None]
    np.testing.assert_array_equal(jax.jit(f)(x, lengths) * valid, expected * valid)


def test_checkify_counts_on_the_whole_axis():
    case = Case("checkify", (3, 16, 4))
    f = jax.jit(checkify.checkify(over_blocks(case, make_mesh(seq=4))))
    x = case.x()
    error, _ = f(x, np.array([3, 16, 0]))  # 16 is more than a block, which is 4.
    error.throw()
    error, _ = f(x, np.array([3, 17, 0]))
    with pytest.raises(checkify.JaxRuntimeError, match=r"lengths\[1\] is 17.* 16"):
        error.throw()


# ---- errors


def test_host_lengths_are_checked_against_the_whole_axis():
    f = jax.shard_map(
        lambda x: reverse_sequence(x, [16, 17], axis_name="seq"),
        mesh=make_mesh(seq=2),
        in_specs=P(None, "seq"),
        out_specs=P(None, "seq"),
    )
    with pytest.raises(ValueError, match=r"lengths\[1\] is 17.* 16.*over 2 devices"):
        f(np.ones((2, 16)))


def test_lengths_and_offsets_are_not_blocks():
    """Fails if each device takes its part of them for those of the whole rows."""
    add = partial(associative_scan_segments, jnp.add)
    for name, f in (("lengths", reverse_sequence), ("cu_seqlens", add)):

        def run(x, whole, name=name, f=f):
            return f(x, axis_name="seq", **{name: whole})

        spec = P("seq") if name == "lengths" else P(None, "seq")
        f = jax.shard_map(
            run, mesh=make_mesh(seq=2), in_specs=(P(None, "seq"), spec), out_specs=P()
        )
        whole = np.zeros((2, 4) if name == "cu_seqlens" else 4, np.int32)
        rule = rf"{name} varies over mesh axis \['seq'\].*leave that axis out"
        with pytest.raises(ValueError, match=rule):
            f(np.ones((2, 16)), whole)


def test_ids_from_the_host_are_not_a_block():
    f = jax.shard_map(
        lambda x: reverse_segments(x, segment_ids=[1] * 8, axis_name="seq"),
        mesh=make_mesh(seq=2),
        in_specs=P("seq"),
        out_specs=P("seq"),
    )
    with pytest.raises(ValueError, match="segment_ids.*2 devices.*in_specs"):
        f(np.ones(16))


def test_program_in_the_error_reverses_the_sharded_axis():
    mesh = make_mesh(AxisType.Explicit, data=2, seq=4)
    case = Case("lines", (4, 16, 8))
    x_spec, spec = specs(case, batch="data")
    x = jax.device_put(case.x(), NamedSharding(mesh, x_spec))
    lengths = jax.device_put(case.segments(), NamedSharding(mesh, spec))
    with pytest.raises(ValueError, match="axis 1 of x.*over mesh axis 'seq'") as e:
        reverse_sequence(x, lengths)
    _, program = str(e.value).split(":\n\n")
    program = textwrap.dedent(program).replace("(jax.P(...), jax.P(...))", "given")

    def run(x, lengths):
        names = globals() | dict(x=x, lengths=lengths, given=(x_spec, spec))
        exec(program, names)
        return names["out"]

    for out in (run(x, lengths), jax.jit(run)(x, lengths)):
        assert_same_bits(out, case.expected(case.x(), case.segments()))
        assert out.sharding.is_equivalent_to(x.sharding, 3)


# ---- what is sent, and what is held


def compile_both(case, mesh):
    """The compiled call, and that of its gradient alone."""
    f = over_blocks(case, mesh)
    segments = case.segments()
    x, segments = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in zip(
            (case.shape, segments.shape),
            (case.dtype, segments.dtype),
            specs(case),
            strict=True,
        )
    )

    def pullback(ct, segments):  # Linear: the value of x does not matter.
        return jax.vjp(lambda x: f(x, segments), jnp.zeros_like(ct))[1](ct)[0]

    return [jax.jit(g).lower(x, segments).compile() for g in (f, pullback)]


LARGE = (
    Case("large-features", (4, 1024, 64)),
    Case("large-batch", (8, 1024, 4)),
    Case("large-packed", (4, 1024, 64), layout="packed"),
)


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_bytes_sent_and_held(case):
    block = 4 * int(np.prod(case.shape)) // 8
    for compiled in compile_both(case, make_mesh(seq=8)):
        found = bytes_received(compiled)
        # Of each, the eighth that a device keeps is not sent: 2 * 7 / 8 of its block.
        assert found == [("all-to-all", block)] * 2
        memory = compiled.memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes < 3 * block  # The whole array is 8.
        assert memory.output_size_in_bytes <= block


def test_the_axis_that_needs_the_least_padding_is_exchanged():
    block = 4 * 5 * 64 * 8 // 4  # Seven features become eight, not five rows.
    for compiled in compile_both(Case("least", (5, 64, 7)), make_mesh(seq=4)):
        assert bytes_received(compiled) == [("all-to-all", block)] * 2


def test_only_ids_are_gathered():
    case = Case("ids", (3, 64, 16), layout="ids")
    block, ids = 4 * 3 * 64 * 16 // 8, 4 * 3 * 64
    for compiled in compile_both(case, make_mesh(seq=8)):
        expected = [("all-gather", ids), *[("all-to-all", block)] * 2]
        assert sorted(bytes_received(compiled)) == expected
    # Exchanged along the batch, ids are not gathered either.
    case = Case("ids", (8, 64, 16), layout="ids")
    for compiled in compile_both(case, make_mesh(seq=8)):
        assert {name for name, _ in bytes_received(compiled)} == {"all-to-all"}


def test_compiled_for_a_tpu(monkeypatch):
    pytest.importorskip("libtpu", reason="libtpu is missing: not compiled for TPU v5e")
    # Nothing runs on a TPU here, so that several processes may load the compiler.
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    mesh = jax.sharding.Mesh(
        np.array(topology.devices).reshape(8), ("seq",), axis_types=(AxisType.Auto,)
    )
    case = Case("tpu", (4, 32768, 512))
    block = 4 * int(np.prod(case.shape)) // 8
    for compiled in compile_both(case, mesh):
        assert bytes_received(compiled) == [("all-to-all", block)] * 2
        memory = compiled.memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes < 3 * block
        assert memory.output_size_in_bytes < 1.1 * block
