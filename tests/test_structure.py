"""What a call costs: equations, saved arrays, operations, traces, imports."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_revseg
from jax_revseg import bidirectional, pack_segments, reverse_sequence, scan_segments
from jax_revseg._host_values import HostValues
from tests.cases import DTYPES, LAYOUTS, Case, bit_width, pullback

# Far larger than its segments: what has its size is a copy of it.
LARGE = tuple(
    Case(layout, (4, 8, 64), layout=layout, padding_id=0) for layout in LAYOUTS
)
by_name = functools.partial(pytest.mark.parametrize, ids=lambda case: case.name)


TRANSFORMS = {
    "call": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: jax.vmap(f, (2, None), 2),
    "grad": pullback,
    "grad of jit": lambda f: pullback(jax.jit(f)),
    "jit of vmap of grad": lambda f: jax.jit(jax.vmap(pullback(f), (3, 0), 3)),
    "jvp": lambda f: lambda x, s: jax.jvp(lambda x: f(x, s), (x,), (x,))[1],
}


def equations(jaxpr):
    """Every equation, those of inner jaxprs instead of the call of them."""
    for equation in jaxpr.eqns:
        values = [getattr(v, "jaxpr", v) for v in equation.params.values()]
        inner = [value for value in values if hasattr(value, "eqns")]
        for each in inner:
            yield from equations(each)
        if not inner:
            yield equation


def large_equations(f, x, segments):
    """The names of the primitives that make an array of x's size."""
    found = equations(jax.make_jaxpr(f)(x, segments).jaxpr)
    large = [e for e in found if any(out.aval.size >= x.size for out in e.outvars)]
    return [equation.primitive.name for equation in large]


@by_name("case", LARGE)
def test_one_equation(case):
    """Fails if a transformation adds a move, a copy or a gather of all of x."""
    for name, transform in TRANSFORMS.items():
        x, segments = jnp.asarray(case.x()), jnp.asarray(case.segments())
        if name == "vmap":
            x = x[:, :, None]
        elif name == "jit of vmap of grad":
            x, segments = x[..., None], segments[None]
        found = large_equations(transform(case.call), x, segments)
        # A derivative is one more, beside the value.
        derivative = "grad" in name or name == "jvp"
        assert found == ["reverse_segments"] * (1 + derivative), name


def test_order_is_two_reversals():
    """Fails if the order of segments takes more than the two reversals that it is."""
    case = LARGE[1]
    f = lambda x, s: jax_revseg.reverse_segment_order(x, s)[0]  # noqa: E731
    found = large_equations(f, jnp.asarray(case.x()), jnp.asarray(case.segments()))
    assert found == ["reverse_segments"] * 2


def test_vmap_over_lengths_broadcasts():
    """Fails if mapping the lengths alone does more than to broadcast x."""
    x, lengths = jnp.zeros((8, 64)), jnp.zeros(4, jnp.int32)
    run = jax.vmap(reverse_sequence, (None, 0))
    found = large_equations(run, x, lengths)
    assert found == ["broadcast_in_dim", "reverse_segments"]
    # XLA reads x where it lies: nothing of the size of the result is written but that.
    compiled = jax.jit(run).lower(x, lengths).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * x.size


@by_name("case", LARGE)
def test_keeps_the_segments_alone(case):
    """Fails if the backward pass keeps x, or an index as long as x, alive."""
    segments = jnp.asarray(case.segments())
    kept = jax.eval_shape(
        lambda x: jax.vjp(lambda x: case.call(x, segments), x)[1], case.x()
    )
    # Offsets have become as many lengths.
    size = segments.size - (len(segments) if case.layout == "offsets" else 0)
    assert sum(leaf.size for leaf in jax.tree.leaves(kept)) <= size


@by_name("case", LARGE)
def test_compiled_backward_pass(case):
    """Fails if the gradient adds up, by a scatter, what a gather read, or needs more
    memory than a few indices."""
    x, segments = jnp.asarray(case.x()), jnp.asarray(case.segments())
    compiled = jax.jit(pullback(case.call)).lower(x, segments).compile()
    # What finds the segments may scatter a few words: none of the size of x.
    text = compiled.as_text()
    assert "f32[4,8,64]" in text
    for shape in re.findall(r" \w+\[([\d,]*)\]\S* scatter\(", text):
        assert math.prod(map(int, shape.split(","))) < x.size / 4
    assert not re.search(r"custom-call|all-", text)
    padded, index = case.layout == "padded", 4 * math.prod(x.shape[:2])
    assert not padded or "scatter" not in text
    most = 0 if padded else 4 * index + 1024
    assert compiled.memory_analysis().temp_size_in_bytes <= most


def lowered(x, platform):
    x = jax.ShapeDtypeStruct(*x)
    lengths = jax.ShapeDtypeStruct(x.shape[:1], jnp.int32)
    traced = jax.jit(reverse_sequence).trace(x, lengths)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_windows():
    """Fails if single elements are read without a window, or rows with one."""
    for features in (1, 2):
        for platform in ("cpu", "tpu", "cuda"):
            text = lowered(((4, 64, features), jnp.float32), platform)
            expected = features == 1 and platform != "cuda"
            assert ("stablehlo.pad" in text) == expected
    # On a CPU they need no memory, or for small elements an index for each row.
    lengths = jnp.zeros(4, jnp.int32)
    for dtype, most in ((jnp.float32, 0), (jnp.int16, 8 * 4)):
        x = jnp.zeros((4, 64, 1), dtype)
        memory = jax.jit(reverse_sequence).lower(x, lengths).compile().memory_analysis()
        assert memory.temp_size_in_bytes <= most


def test_small_floats_move_as_integers():
    """Fails if small floats move as floats, which may change the payload of a NaN."""
    kinds = [jnp.dtype(d) for d in DTYPES if jnp.issubdtype(d, jnp.floating)]
    for dtype in [d for d in kinds if 8 <= bit_width(d) <= 16]:
        for x in (((4, 8, 2), dtype), ((4, 8, 1), dtype)):
            moved = r'"stablehlo.gather".* -> tensor<[\dx]*x(\w+)>'
            types = set(re.findall(moved, lowered(x, "cpu")))
            assert types - {"i1"} == {f"ui{jnp.finfo(dtype).bits}"}


def test_eager_calls_compile_once(caplog):
    """Fails if an eager call compiles again for other lengths."""

    def compiled(lengths):
        caplog.clear()
        with jax.log_compiles():
            reverse_sequence(x, lengths)
            jax_revseg.reverse_segments(x, cu_seqlens=[[0, n] for n in lengths])
            for value in sum(lengths) + np.arange(30):  # Host values of any kind.
                reverse_sequence(x, lengths, padding_value=float(value))
                pack_segments(x[0], lengths[:2], max_length=3, padding_value=value)
        return sum("Compiling" in record.message for record in caplog.records)

    x = jnp.zeros((3, 6, 17))  # A shape of its own: nothing has compiled it.
    assert 2 <= compiled([1, 2, 3]) < 20
    assert compiled([0, 6, 5]) == 0


def test_a_pytree_shares_its_segments(monkeypatch):
    """Fails if each of six leaves gets differences of offsets, or renumbered ids."""
    six, offsets = [jnp.ones((2, 5))] * 6, jnp.zeros((2, 4), int)
    both = lambda *results: results  # noqa: E731
    for run in (
        lambda x, n: bidirectional(list, list, x, cu_seqlens=n, merge=both),
        lambda x, n: jax_revseg.associative_scan_segments(
            lambda a, b: jax.tree.map(jnp.add, a, b), x, cu_seqlens=n
        ),
        lambda x, n: scan_segments(lambda c, x: (c, x), offsets[:, 0], x, cu_seqlens=n),
    ):
        text = str(jax.make_jaxpr(run)(six, offsets))
        assert len(re.findall(r"u32\[2,3\] = sub", text)) == 1
    counts, ids = [], HostValues._ids
    monkeypatch.setattr(HostValues, "_ids", lambda self: counts.append(0) or ids(self))
    bidirectional(list, list, six, segment_ids=np.ones((2, 5), int), merge=both)
    assert len(counts) == 1


def test_one_function_for_many_calls():
    """Fails if forty calls become forty copies of the lowering."""

    def f(x, lengths):
        for _ in range(40):
            x = jnp.sin(reverse_sequence(x, lengths))
        return x

    x, lengths = jnp.zeros((64, 128, 256)), jnp.zeros(64, jnp.int32)
    text = jax.jit(f).lower(x, lengths).as_text()
    assert len(re.findall(r"func\.func private @\w*reverse", text)) == 1
    assert len(text) < 13_000  # 10 kB, and what forty sines take.


def test_public_names():
    """Fails if a name is public and not in __all__, or the other way around."""
    public = {name for name in vars(jax_revseg) if not name.startswith("_")}
    assert public == set(jax_revseg.__all__)
