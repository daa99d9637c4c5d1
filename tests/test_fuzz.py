"""Random reversals under random stacks of transformations, against NumPy loops.

`HYPOTHESIS_PROFILE=fuzz` (that is, `make fuzz`) runs 20,000 stacks.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, note, settings, strategies as st

from tests.cases import Case, assert_same_bits
from tests.strategies import cases, segments, segments_shape, stacks

calls = itertools.count(1)


def forget_now_and_then():
    """Each example compiles something that no other one will use."""
    if next(calls) % 100 == 0:
        jax.clear_caches()


@given(stacks())
def test_stack(stack):
    """Fails on a rule on what another rule returned."""
    forget_now_and_then()
    f, x, s, name = stack
    note(name)
    y = f.call(jnp.asarray(x), jnp.asarray(s))
    assert_same_bits(y, f.forward(x, s), name)


@settings(max_examples=settings().max_examples // 3)
@given(cases(), st.data())
def test_host_and_device(case, data):
    """Fails on a check on the host that refuses what is right, or lets pass what is
    not, or another result from the host than from the device."""
    forget_now_and_then()
    s = data.draw(segments(case, segments_shape(case)))
    x = case.x()
    want = case.expected(x, s)
    assert_same_bits(case.call(jnp.asarray(x), jnp.asarray(s)), want)
    if valid(case, s):
        assert_same_bits(case.call(x, s), want)
        assert_same_bits(case.call(x, s.tolist() if s.size else s), want)
    else:
        with pytest.raises(ValueError, match=r"reverse_seg|reverse_seq"):
            case.call(x, s)


def valid(case: Case, s: np.ndarray) -> bool:
    if case.layout in ("ids", "starts"):
        return True
    s = s.astype(object)
    first = s[..., 0] if case.layout == "offsets" else np.zeros(())
    s = np.diff(s) if case.layout == "offsets" else s
    totals = s if case.layout == "padded" else np.asarray(s.sum(-1))
    return bool((first == 0).all() and (s >= 0).all() and (totals <= case.size).all())
