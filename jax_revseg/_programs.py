"""Compiled programs of recurrences, kept as long as the user's function lives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref

import jax

from jax_revseg import _compat

_programs: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()


def run(program: Callable[..., Any], f: Any, *operands: Any, **static: Any) -> Any:
    """Runs `program(f, *operands, **static)`, compiled if the call is eager.

    Compiled programs live as long as `f`, as those of `lax.scan` do: they reach `f`
    through a weak reference.
    """
    if _compat.staged():
        return program(f, *operands, **static)
    try:
        kept, own = _programs.setdefault(f, {}), ref(f)
    except TypeError:  # No weak reference, or no hash.
        kept, own = {}, lambda: f
    if program not in kept:
        kept[program] = jax.jit(
            lambda static, *operands: program(own(), *operands, **dict(static)),
            static_argnums=0,
        )
    return kept[program](tuple(static.items()), *operands)
