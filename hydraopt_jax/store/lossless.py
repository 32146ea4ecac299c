"""Lossless storage: every tensor bit for bit in its dtype, with the scale beside it.

A delta is `scale * a @ b`. Folding the scale into a half-precision `b` would round it, so it is stored
separately, as a diagonal core in float32.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hydraopt_jax.deferred import Deferred
from hydraopt_jax.factors import Factors, LazyFactors, parts_of_task

FORM = "lossless"


class Raw(NamedTuple):
    """One module of one task as in its file: `a: [I, R]`, `b: [R, O]`, and the scale of `a @ b`.

    The arrays may be deferred.
    """

    a: np.ndarray | Deferred
    b: np.ndarray | Deferred
    scale: float

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.a.nbytes + self.b.nbytes


def terms(rows: Sequence[Raw | None]) -> tuple[LazyFactors, ...]:
    """The terms of a module, one per combination of rank and dtypes; rows are None for absent tasks."""
    alike: dict[Any, list[int]] = {}
    for t, x in enumerate(rows):
        if x is not None:
            alike.setdefault((x.a.shape[1], str(x.a.dtype), str(x.b.dtype)), []).append(t)
    out = []
    for (rank, *_), tasks in alike.items():
        of = np.full(len(rows), -1, np.int32)
        of[tasks] = np.arange(len(tasks))
        members = [x for t in tasks if (x := rows[t]) is not None]
        scales = np.ones(len(rows), np.float32)
        scales[tasks] = [x.scale for x in members]
        core = None if (scales == 1).all() else np.repeat(scales[:, None], rank, 1)
        out.append(LazyFactors([x.a for x in members], [x.b for x in members], of, of, core))
    return tuple(out)


def lossless_terms(
    rows: Mapping[str, Sequence[Raw | None]],
) -> tuple[dict[str, tuple[LazyFactors, ...]], np.ndarray, dict[str, Any]]:
    """Terms and errors `[M, T]` of all modules, and their part of the report."""
    made = {name: terms(x) for name, x in rows.items()}
    errors = np.array([[np.nan if x is None else 0.0 for x in row] for row in rows.values()])
    size = sum(x.nbytes for row in rows.values() for x in row if x is not None)
    return made, errors, {"form": FORM, "forms": {FORM: len(made)}, "factor_bytes": size}


def factor_bytes(modules: Mapping[str, Sequence[Any]], live: Sequence[int]) -> int:
    """Bytes of the factors of the tasks at some places of a segment that `terms` has made."""
    return sum(
        x.rank * size * sum(of[t] >= 0 for t in live)
        for every in modules.values()
        for x in every
        for of, size in (
            (x.a_of, x.inputs * np.dtype(x.a_dtype).itemsize),
            (x.b_of, x.outputs * np.dtype(x.b_dtype).itemsize),
        )
    )


def raw_factors(modules: Mapping[str, Sequence[Factors]], task: int) -> dict[str, Raw] | None:
    """Module -> `Raw` of a task that `terms` stored; None for a task that was stored otherwise."""
    out = {}
    for name, every in modules.items():
        for a, b, core in parts_of_task(every, task):
            scale = np.ones(1, np.float32) if core is None else core
            if name in out or scale.ndim != 1 or not (scale == scale[0]).all():
                return None
            out[name] = Raw(a, b, float(scale[0]))
    return out


def folded(raw: Mapping[str, Raw]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """`a` unchanged and `b` with the scale folded in, as a reader of adapters returns them."""
    a = {n: np.asarray(x.a) for n, x in raw.items()}
    return a, {n: fold(x.b, x.scale) for n, x in raw.items()}


def fold(b: np.ndarray | Deferred, scale: float) -> np.ndarray:
    """`b * scale` in float32, or in float64 if `b` has it."""
    wide = np.promote_types(b.dtype, np.float32)
    out = np.array(np.asarray(b), dtype=wide, order="C")
    out *= wide.type(np.float32(scale))
    return out


def unfold(b: np.ndarray, scale: float, dtype: str) -> np.ndarray | None:
    """The factor whose `fold` is `b` bit for bit, `b / scale` rounded to a dtype; None if there is none.

    Of a half-precision factor, which has half of float32's digits, the quotient rounds to the factor itself.
    """
    wide = np.promote_types(b.dtype, np.float32)
    with np.errstate(all="ignore"):
        own = (b / wide.type(np.float32(scale))).astype(dtype)
        return own if same_bits(fold(own, scale), b.astype(wide)) else None


def same_bits(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether arrays of one dtype are equal bit for bit, including signs of zeros."""
    return x.dtype == y.dtype and np.ascontiguousarray(x).tobytes() == np.ascontiguousarray(y).tobytes()


def is_of(raw: Raw, a: np.ndarray, b: np.ndarray) -> bool:
    """Whether factors are those that a reader makes of `raw`, bit for bit."""
    return same_bits(np.asarray(raw.a), a) and same_bits(fold(raw.b, raw.scale), b)
