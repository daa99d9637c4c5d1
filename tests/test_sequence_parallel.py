"""The segment axis sharded over devices: `axis_name`.

Every test compares with the reversal of the whole array, so that a block that went to
the wrong device, or came back to the wrong place, shows.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import checkify
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import jax_revseg
from jax_revseg import reverse_sequence
from tests.cases import Case, assert_same_bits, reverse_order
from tests.meshes import bytes_received, make_mesh, with_gradients
from tests.test_tpu import chips, needs_compiler


def mapped(f, in_specs, out_specs, **sizes):
    mesh = make_mesh(**sizes)
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def specs(case, axis_name="seq", batch=None):
    """The specs of x and of the segments: blocks of the segment axis, and of axis 0."""
    of_x = {a: None for a in range(len(case.shape))} | {case.axis: axis_name}
    of_x[case.batch_axes[0] if case.batch_axes else -1] = batch
    rows = [batch, *(None for _ in case.batch_axes[1:])] if case.batch_axes else []
    of_segments = {"padded": rows, "ids": [*rows, axis_name]}.get(
        case.layout, [*rows, None]
    )
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


def check(cases, functions, value=None):
    """Values and gradients against the reference, bit for bit, by one program."""
    xs, segments = [c.x() for c in cases], [c.segments() for c in cases]
    cts = [x[::-1].copy() for x in xs]
    linear = [jnp.issubdtype(c.dtype, jnp.inexact) for c in cases]

    @jax.jit
    def run(xs, segments, cts):
        return [
            with_gradients(f, x, s, ct) if inexact else (f(x, s), None)
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
    Case("features-int8-lengths", (3, 32, 8), lengths="over", lengths_dtype="int8"),
    Case("batch", (8, 16, 3)),
    Case("time-major", (16, 8, 3), axis=0, batch_axes=(1,)),
    Case("two-batch-axes", (2, 8, 16), axis=2, batch_axes=(1, 0)),
    Case("padded-features", (3, 16, 5), lengths="over"),
    Case("padded-batch", (11, 16), lengths="over"),
    Case("one-row", (16, 8), axis=0, batch_axes=()),
    Case("one-position-a-device", (3, 8, 8)),
    Case("packed-batch", (8, 16, 3), layout="packed", lengths="over"),
    Case("offsets", (3, 16, 8), layout="offsets"),
    Case("ids-features", (3, 16, 8), layout="ids", padding_id=0),
    Case("ids-padded-batch", (9, 16), layout="ids", padding_id=1),
    Case("ids-rank-1", (16,), layout="ids", axis=0, batch_axes=()),
)
SHAPES += tuple(Case("empty", shape) for shape in ((0, 16, 8), (3, 0, 8), (3, 16, 0)))
SHAPES += tuple(
    Case(f"type-{dtype}", (5, 16, 8), dtype, layout)
    for dtype, layout in {
        **{"int8": "packed", "bool": "ids", "uint32": "padded", "int4": "packed"},
        **{"float16": "padded", "float8_e4m3fn": "packed", "complex64": "padded"},
    }.items()
)


def test_values_and_gradients():
    check(SHAPES, [over_blocks(case, make_mesh(seq=8)) for case in SHAPES])


def test_fewer_devices():
    for mesh in (make_mesh(seq=devices) for devices in (1, 2)):
        check(SHAPES[:13:3], [over_blocks(case, mesh) for case in SHAPES[:13:3]])


def test_keys():
    case = Case("keys", (3, 8, 3))
    data = np.arange(3 * 8 * 3 * 2, dtype=np.uint32).reshape(3, 8, 3, 2)
    f = jax.jit(over_blocks(case, make_mesh(seq=4)))
    out = f(jax.random.wrap_key_data(jnp.asarray(data)), case.segments())
    assert_same_bits(jax.random.key_data(out), case.expected(data, case.segments()))


@pytest.mark.parametrize("batch", [3, 8])
def test_reverse_segment_order(batch):
    case = Case("order", (batch, 16, 4), layout="packed", count=4)
    x, lengths, operands = case.x(), case.segments(), specs(case)
    order = partial(jax_revseg.reverse_segment_order, axis_name="seq")
    f = mapped(order, operands, operands, seq=4)  # The lengths stay replicated.

    @jax.jit
    def both(x):
        out, pullback, flipped = jax.vjp(lambda x: f(x, lengths), x, has_aux=True)
        return out, flipped, pullback(x)[0]

    out, flipped, ct_x = both(x)
    order = partial(reverse_order, x, axis=1, batch_axes=(0,))
    want, want_lengths = order(lengths)
    assert_same_bits(out, want)
    np.testing.assert_array_equal(flipped, want_lengths)
    assert_same_bits(ct_x, order(want_lengths)[0])


# ---- meshes


def test_meshes_of_two_axes():
    """Fails if blocks are counted wrongly, or `padding_value` by their positions."""
    cases = [
        Case(f"{layout}-{shape}", shape, layout=layout, padding_id=0)
        for layout in ("padded", "packed", "ids")
        for shape in ((4, 16, 4), (8, 16, 3))
    ]
    mesh = make_mesh(data=2, seq=4)
    call = partial(over_blocks, mesh=mesh, batch="data", padding_value=7)
    check(cases, [call(case) for case in cases], value=7)
    case, mesh = Case("names", (8, 16, 3)), make_mesh(a=2, b=4)
    names = (("a", "b"), ("b", "a"), ("b",))
    check([case] * 3, [over_blocks(case, mesh, axis_name=name) for name in names])


@pytest.mark.parametrize("same", ("x", "x and lengths"))
def test_what_all_devices_share_gets_a_sum_of_gradients(same):
    """Fails if the gradient of an `x` that does not vary is that of one device."""
    n, ct = np.array([3, 16]), np.arange(64.0).reshape(2, 16, 2)
    x, sizes, block = np.arange(32.0).reshape(16, 2), dict(data=2, seq=4), P("seq")
    if same == "x and lengths":  # Four equal blocks make one axis.
        n, ct, x, sizes, block = n[:1], ct[:1], x[:4], dict(data=1, seq=4), P()
    f = lambda x, n: reverse_sequence(x, n[0], axis_name="seq")[None]  # noqa: E731
    f = mapped(f, (block, P("data")), P("data", "seq"), **sizes)
    out, ct_x = jax.jit(partial(with_gradients, f))(x, n, ct)
    whole = np.tile(x, (len(n), 16 // len(x), 1))
    np.testing.assert_array_equal(out, reverse_sequence(whole, n))
    parts = np.asarray(reverse_sequence(ct, n)).reshape(-1, *x.shape)
    np.testing.assert_array_equal(ct_x, parts.sum(0))


def test_result_varies():
    """Fails if one block passes for the whole result."""
    f = partial(reverse_sequence, axis_name="seq")
    f = mapped(f, (P("seq"), P()), P(), seq=4)
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
    case = Case("transformations", (5, 16, 4))
    of_x, of_segments = specs(case)
    local = partial(case.call, axis_name="seq")
    place = partial(mapped, in_specs=(of_x, of_segments), out_specs=of_x, seq=4)
    functions = [place(w(local)) if inside else w(place(local)) for w in WRAPPERS]
    check([case] * len(WRAPPERS), functions)


def test_axis_name_of_a_vmap():
    """The same exchange without a mesh: blocks along a mapped axis, on one device."""
    case = Case("vmap-axis", (5, 16, 4), layout="ids")

    def f(x, segments):
        blocks = x.reshape(5, 4, 4, 4)
        local = partial(case.call, axis_name="blocks")
        local = jax.vmap(local, in_axes=1, out_axes=1, axis_name="blocks")
        return local(blocks, segments.reshape(5, 4, 4)).reshape(x.shape)

    check([case], [f])


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


def test_host_values_describe_the_whole_axis():
    """Fails if they count for a block, or if ids from the host pass for a block."""
    for f, x, pattern in (
        (
            partial(reverse_sequence, lengths=[17, 16], axis=0),
            np.ones((16, 2)),
            r"lengths\[0\] is 17.* 16.* 2 devices",
        ),
        (
            partial(jax_revseg.reverse_segments, segment_ids=[1] * 8),
            np.ones(16),
            "segment_ids.*2 devices.*in_specs",
        ),
    ):
        with pytest.raises(ValueError, match=pattern):
            mapped(partial(f, axis_name="seq"), P("seq"), P("seq"), seq=2)(x)


def test_lengths_and_offsets_are_not_blocks():
    """Fails if each device takes its part of them for those of the whole rows."""
    add = partial(jax_revseg.associative_scan_segments, jnp.add)
    for f, name, shape, spec in (
        (reverse_sequence, "lengths", (4,), P("seq")),
        (add, "cu_seqlens", (2, 4), P(None, "seq")),
    ):
        run = lambda x, n, f=f, name=name: f(x, axis_name="seq", **{name: n})  # noqa: E731
        f = mapped(run, (P(None, "seq"), spec), P(), seq=2)
        with pytest.raises(ValueError, match=rf"{name} varies .*\['seq'\]"):
            f(np.ones((2, 16)), np.zeros(shape, np.int32))


# ---- what is sent, and what is held


def compile_both(case, mesh):
    """The compiled call, and that of its gradient alone."""
    f = over_blocks(case, mesh)
    x, segments = case.types(*(NamedSharding(mesh, spec) for spec in specs(case)))

    def pullback(ct, segments):  # Linear: the value of x does not matter.
        return jax.vjp(lambda x: f(x, segments), jnp.zeros_like(ct))[1](ct)[0]

    return [jax.jit(g).lower(x, segments).compile() for g in (f, pullback)]


def check_bytes(case, mesh):
    block = 4 * int(np.prod(case.shape)) // 8
    for compiled in compile_both(case, mesh):
        # Of each, the eighth that a device keeps is not sent: 2 * 7 / 8 of its block.
        assert bytes_received(compiled) == [("all-to-all", block)] * 2
        memory = compiled.memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes < 3 * block  # The whole array is 8.
        assert memory.output_size_in_bytes < 1.1 * block


@pytest.mark.parametrize("layout", ("padded", "packed"))
def test_bytes_sent_and_held(layout):
    check_bytes(Case("large", (4, 1024, 64), layout=layout), make_mesh(seq=8))


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


@needs_compiler
def test_compiled_for_a_tpu():
    mesh = Mesh(np.array(chips("v5e")), ("seq",))
    check_bytes(Case("tpu", (4, 32768, 512)), mesh)
