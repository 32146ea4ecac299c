"""Coded pieces as the terms of modules: `Factors` in quantizer steps with diagonal cores."""

from collections.abc import Mapping, Sequence

import numpy as np

from hydraopt_jax.codec import decode, syntax
from hydraopt_jax.codec.decode import Decoded
from hydraopt_jax.codec.encode import Coded
from hydraopt_jax.codec.layout import Piece, TermShape
from hydraopt_jax.forms import Factors


def coded_factors(
    coded: Coded, values: Sequence[np.ndarray | None] | None = None
) -> dict[str, list[Factors]]:
    """The terms of every module in steps, cores left out: `a: [A, I, S]`, `b: [B, S, O]`."""
    return assemble(coded.shapes, coded.pieces, coded.values if values is None else values)


def assemble(
    shapes: Mapping[str, tuple[TermShape, ...]], rows: Sequence[Piece], values: Sequence[np.ndarray | None]
) -> dict[str, list[Factors]]:
    """Pieces as terms; a piece that was not read counts as zeros."""
    of: dict[tuple[str, int, int], list[np.ndarray]] = {}
    for piece, value in zip(rows, values, strict=True):
        blank = np.zeros((piece.length, piece.rank), np.float32)
        of.setdefault((piece.module, piece.term, piece.side), []).append(blank if value is None else value)
    out: dict[str, list[Factors]] = {}
    for name, terms in shapes.items():
        out[name] = [
            Factors(
                np.stack(of[name, k, 0]),  # type: ignore[arg-type]
                np.stack(of[name, k, 1]).swapaxes(1, 2),  # type: ignore[arg-type]
                np.array(term.a_of, np.int32),  # type: ignore[arg-type]
                np.array(term.b_of, np.int32),  # type: ignore[arg-type]
            )
            for k, term in enumerate(terms)
        ]
    return out


def deserialize(
    leaves: Mapping[str, bytes],
    shapes: Mapping[str, tuple[TermShape, ...]],
    tasks: Sequence[int],
    frequencies: np.ndarray | None = None,
) -> dict[str, tuple[Factors, ...]]:
    """Terms of every module for some tasks, from the leaves that they read; see `codec.decode.decode`.

    Returns:
      Module -> terms with diagonal cores `[T, S]`; tasks that were not asked for have zero cores.
    """
    return terms_of(decode.decode(leaves, shapes, tasks, frequencies), shapes, tasks)


def terms_of(
    found: Decoded, shapes: Mapping[str, tuple[TermShape, ...]], tasks: Sequence[int]
) -> dict[str, tuple[Factors, ...]]:
    """Decoded pieces as the terms of `deserialize`."""
    terms = assemble(shapes, found.pieces, found.values)
    cores = {
        (n, k): np.zeros((len(x.a_of), x.rank), np.float32)
        for n, v in shapes.items()
        for k, x in enumerate(v)
    }
    for task in tasks:
        live = syntax.live_directions(shapes, found.pieces, found.contexts, task)
        for (key, mask), gains in zip(live.items(), found.gains[task], strict=True):
            cores[key][task, mask] = gains
    return {n: tuple(x._replace(core=cores[n, k]) for k, x in enumerate(v)) for n, v in terms.items()}  # type: ignore[arg-type]
