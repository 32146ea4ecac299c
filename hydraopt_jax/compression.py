"""The main verb: a collection of adapters in, a store out.

Host code: it walks the buckets, calls the vmapped solvers, rounds to the stored dtype and measures the true
errors of what was rounded. The mathematics is in `forms` and `optimize`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
import optax

from hydraopt_jax import adapters, forms
from hydraopt_jax.adapters import Adapter, Bucket
from hydraopt_jax.errors import HydraOptError
from hydraopt_jax.forms import Factors, Info, gradient, losses
from hydraopt_jax.linalg import decompose
from hydraopt_jax.linalg.decompose import Svd
from hydraopt_jax.rate_control.encode_at_step import Metrics
from hydraopt_jax.store import Store, extras, sources_of, task_factors

# modules solved in one call: bounds memory, keeps the progress bar moving
CHUNK = 24
# chunks in flight
WORKERS = 2
# relative error below which the expanded square, whose round-off is about 1e-6, is not exact enough
EXPANSION_FLOOR = 1e-3
SIDES = ("in", "out", "auto")
SOLVERS = ("closed", "optax")
DTYPES = extras.DTYPES


class Options(NamedTuple):
    """How to compress.

    Attributes:
      heads: K, heads a module; None for T, one a task.
      rank: S, width of the shared factor; None for the adapters' largest rank.
      side: "in", "out" or "auto": per module the better side at the bytes of the cheaper one.
      cores: give each task an S x S core, with fewer heads than tasks.
      solver: "closed" or "optax"; start, steps and optimizer are the latter's and refused with the former.
      start: start of the optax solver, "closed" or "mean" (the published method).
      steps: upper limit of Optax steps.
      optimizer: an `optax.GradientTransformation`; None for `gradient.default_optimizer`.
      dtype: "float32", "float16", "bfloat16"; None for the widest dtype that came in.
      extras_dtype: full tensors beside the factors that are wider are rounded to it; None keeps them.
    """

    heads: int | None = None
    rank: int | None = None
    side: str = "auto"
    cores: bool = False
    solver: str = "closed"
    start: str = "closed"
    steps: int = 1000
    optimizer: optax.GradientTransformation | None = None
    dtype: str | None = None
    extras_dtype: str | None = None


def check_options(options: Options, tasks: int) -> None:
    """Refuse an unknown or impossible option value, naming it."""
    for name, known in (("side", SIDES), ("solver", SOLVERS), ("start", ("closed", "mean"))):
        value = getattr(options, name)
        if value not in known:
            raise HydraOptError(f"{name} = {value!r}: must be one of {', '.join(known)}")
    if options.dtype is not None and options.dtype not in DTYPES:
        raise HydraOptError(f"dtype = {options.dtype!r}: must be one of {', '.join(DTYPES)}")
    extras.check_dtype(options.extras_dtype)
    if options.heads is not None and not 1 <= options.heads <= tasks:
        raise HydraOptError(f"heads = {options.heads}: must lie between 1 and the {tasks} tasks")
    if options.rank is not None and options.rank < 1:
        raise HydraOptError(f"rank = {options.rank}: must be at least 1")
    if options.steps < 1:
        raise HydraOptError(f"steps = {options.steps}: must be at least 1")
    check_idle(options, tasks)


def check_idle(options: Options, tasks: int) -> None:
    """Refuse an option that would do nothing beside the others, naming both."""
    defaults = Options()
    for name in ("start", "steps", "optimizer") if options.solver == "closed" else ():
        value = getattr(options, name)
        if value != getattr(defaults, name):
            said = f" = {value!r}" if name != "optimizer" else ""
            raise HydraOptError(
                f"{name}{said}: does nothing with solver = 'closed': give solver = 'optax', or leave it out"
            )
    if options.cores and (options.heads or tasks) == tasks:
        raise HydraOptError(
            f"cores: do nothing with a head for each of the {tasks} tasks: give fewer heads, or no cores"
        )


@functools.partial(jax.jit, static_argnames=("heads", "rank", "side", "cores"))
def fit_closed(deltas: Svd, *, heads: int, rank: int, side: str, cores: bool) -> Any:
    """`forms.hydra` for modules of one shape, decompositions of `[M, T]` deltas."""
    solve = functools.partial(forms.hydra, heads=heads, rank=rank, side=side, cores=cores)
    return jax.vmap(solve)(deltas)


def fit_optax(a: jax.Array, b: jax.Array, deltas: Svd, options: Options, **form: Any) -> tuple[Factors, Info]:
    """`gradient.hydra` for modules of one shape, vmapped and jitted."""

    def solve(a: jax.Array, b: jax.Array, deltas: Svd) -> tuple[Factors, Info]:
        return gradient.hydra(
            a,
            b,
            deltas,
            start=options.start,
            optimizer=options.optimizer,
            steps=options.steps,
            **form,
        )

    return jax.jit(jax.vmap(solve))(a, b, deltas)


def entries(tasks: int, heads: int, rank: int, shape: tuple[int, int], side: str) -> int:
    """Numbers kept of one module: S (I + K O), or S (O + K I) with the output side shared."""
    inputs, outputs = shape if side == "in" else shape[::-1]
    return min(rank, inputs) * (inputs + heads * outputs)


def rank_at(cost: int, tasks: int, heads: int, shape: tuple[int, int], side: str) -> int:
    """The largest rank whose entries do not exceed `cost`, at least 1."""
    return max(cost // entries(tasks, heads, 1, shape, side), 1)


def fit(a: jax.Array, b: jax.Array, options: Options, heads: int, rank: int) -> list[tuple[Factors, Info]]:
    """Solve modules of one shape; with side "auto" both sides compete module by module at equal entries."""
    shape, tasks = (a.shape[2], b.shape[3]), a.shape[1]
    deltas = decompose.batched_svd(a, b)
    solutions = []
    costs = {side: entries(tasks, heads, rank, shape, side) for side in ("in", "out")}
    for side in ("in", "out") if options.side == "auto" else (options.side,):
        width = rank
        if options.side == "auto":
            width = min(rank_at(min(costs.values()), tasks, heads, shape, side), rank)
        form: dict[str, Any] = {"heads": heads, "rank": width, "side": side, "cores": options.cores}
        if options.solver == "closed":
            found = fit_closed(deltas, **form)
        else:
            found = fit_optax(a, b, deltas, options, **form)
        solutions.append(jax.device_get(found))
    losses = np.array([(info.weights * info.error).sum(-1) for _, info in solutions])
    return [
        jax.tree.map(lambda x, m=m: x[m], solutions[best]) for m, best in enumerate(losses.argmin(0).tolist())
    ]


def prune(factors: Factors) -> Factors:
    """Drop the factors no task uses, and number the others anew."""
    keep_a, a_of = np.unique(factors.a_of[factors.a_of >= 0], return_inverse=True)
    keep_b, b_of = np.unique(factors.b_of[factors.b_of >= 0], return_inverse=True)
    new_a, new_b = np.full_like(factors.a_of, -1), np.full_like(factors.b_of, -1)
    new_a[factors.a_of >= 0], new_b[factors.b_of >= 0] = a_of, b_of
    return Factors(factors.a[keep_a], factors.b[keep_b], new_a, new_b, factors.core)  # type: ignore[arg-type]


def scale(factors: Factors) -> Factors:
    """Balance the shared factor against the heads, so that half precision loses neither."""
    a, b = factors.a, factors.b
    na = np.sqrt(np.mean(np.sum(a**2, 1), 0))
    nb = np.sqrt(np.mean(np.sum(b**2, 2), 0))
    root = np.sqrt(np.divide(nb, na, out=np.ones_like(na), where=(na > 0) & (nb > 0)))
    if factors.core is not None:
        return factors
    return factors._replace(a=a * root, b=b / root[:, None])


def cast(factors: Factors, dtype: str, module: str) -> Factors:
    """Round to the stored dtype; an overflow is an error that names the module."""
    with np.errstate(over="ignore"):
        out = [
            None if x is None else np.asarray(x).astype(dtype) for x in (factors.a, factors.b, factors.core)
        ]
    for x in out:
        if x is not None and not np.isfinite(x.astype(np.float32)).all():
            raise HydraOptError(f"{module}: values overflow {dtype}; give --dtype bfloat16 or float32")
    return Factors(out[0], out[1], factors.a_of, factors.b_of, out[2])  # type: ignore[arg-type]


expanded = jax.jit(jax.vmap(losses.squared_errors))
exact = jax.jit(decompose.residual_energy)


def squared_errors(
    a: jax.Array, b: jax.Array, a_hat: jax.Array, b_hat: jax.Array, energy: np.ndarray
) -> np.ndarray:
    """Squared errors `[M, T]` of stored factors: by expansion, or by QR where its round-off would show."""
    error = np.asarray(expanded(a, b, a_hat, b_hat))
    if (error >= EXPANSION_FLOOR * energy).all():
        return error
    return np.asarray(exact(a, b, a_hat, b_hat))


def stacked(factors: Factors) -> tuple[np.ndarray, np.ndarray]:
    """`forms.pair` on the host: `[T, I, S]` and `[T, S, O]` in float32, core folded in."""
    a = np.asarray(factors.a, np.float32)[np.maximum(factors.a_of, 0)]
    b = np.asarray(factors.b, np.float32)[np.maximum(factors.b_of, 0)]
    if factors.core is not None:
        b = np.asarray(factors.core, np.float32) @ b
    return a, b * (np.asarray(factors.b_of) >= 0)[:, None, None]


def relative(error: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """`error / energy`; 0 for an all-zero delta that came back as zeros, NaN is left to absent tasks."""
    return np.divide(error, energy, out=np.where(error > 0, np.inf, 0.0), where=energy > 0)


def stored_dtype(collection: Sequence[Adapter]) -> str:
    """The widest dtype among the adapters: one of `DTYPES`."""
    names = {x.dtype for x in collection}
    half = len(names) == 1 and names <= {"float16", "bfloat16"}
    return names.pop() if half else "float32"


def compress(
    collection: Sequence[Adapter],
    options: Options | None = None,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> Store:
    """Compress adapters of one base model into a store.

    Args:
      collection: adapters, as a reader in `formats` gives them.
      options: the form and how to fit it; the default keeps one head a task and the adapters' rank.
      progress: called with the number of modules just finished.

    Returns:
      Store with the achieved relative squared error of every module and task, measured on the rounded
      factors, and the bound of the form in `report`.

    Raises:
      HydraOptError: bad adapters or options.

    Reference: Ceritli et al., HydraOpt, arXiv 2507.17706, 2025.
    """
    options = options or Options()
    inputs = adapters.stack(collection)
    tasks = len(inputs.tasks)
    check_options(options, tasks)
    dtype = options.dtype or stored_dtype(collection)
    done: dict[str, tuple[Factors, np.ndarray, float]] = {}
    chunks = [
        (bucket, slice(start, start + CHUNK))
        for bucket in inputs.buckets
        for start in range(0, len(bucket.modules), CHUNK)
    ]
    # different shapes side by side, so that none is compiled twice
    chunks.sort(key=lambda x: x[1].start)
    with ThreadPoolExecutor(WORKERS) as pool:
        for found in pool.map(lambda x: compress_chunk(x[0], x[1], options, dtype), chunks):
            done.update(found)
            progress(len(found))
    order = list(adapters.check(collection))
    errors = np.stack([done[name][1] for name in order])
    report = {
        "form": "hydra",
        "options": {**options._asdict(), "optimizer": None, "heads": options.heads or tasks, "dtype": dtype},
        "entries": inputs.size,
        "bound": {name: float(f"{done[name][2]:.6g}") for name in order},
    }
    sources = sources_of(extras.carried(collection, options.extras_dtype))
    return Store(inputs.tasks, {name: (done[name][0],) for name in order}, sources, report, errors)


def compress_chunk(
    bucket: Bucket, span: slice, options: Options, dtype: str
) -> dict[str, tuple[Factors, np.ndarray, float]]:
    """Fit, round and measure some modules of a bucket: module -> (factors, relative errors `[T]`, bound)."""
    a, b = jnp.asarray(bucket.a[span]), jnp.asarray(bucket.b[span])
    tasks = a.shape[1]
    heads, rank = options.heads or tasks, options.rank or a.shape[3]
    out = {}
    rows = []
    for name, (factors, info) in zip(bucket.modules[span], fit(a, b, options, heads, rank), strict=True):
        kept = cast(scale(prune(factors)), dtype, name)
        rows.append((name, kept, info))
    widths = [x.a.shape[2] for _, x, _ in rows]
    left = np.zeros((*a.shape[:3], max(widths)), np.float32)
    right = np.zeros((*b.shape[:2], max(widths), b.shape[3]), np.float32)
    for m, (_, kept, _) in enumerate(rows):
        left[m, :, :, : widths[m]], right[m, :, : widths[m]] = stacked(kept)
    energy = np.stack([info.energy for _, _, info in rows])
    error = squared_errors(a, b, jnp.asarray(left), jnp.asarray(right), energy)
    for m, (name, kept, info) in enumerate(rows):
        absent = bucket.ranks[span][m] == 0
        errors = np.where(absent, np.nan, relative(error[m], np.asarray(info.energy)))
        present = max(int((info.energy > 0).sum()), 1)
        out[name] = kept, errors, float(info.bound) / present
    return out


def measure(
    content: Store, collection: Sequence[Adapter], metrics: Mapping[str, Metrics] | None = None
) -> dict[str, float]:
    """True mean relative squared error of stored tasks against adapters of the same names.

    Of weights; with the metrics of a calibration (`coding.trial.metrics_of`) of the modules' outputs.

    Raises:
      HydraOptError: an adapter whose task the store does not have, or that differs in its modules.
    """
    return {x.task: float(np.mean(list(module_errors(content, x, metrics).values()))) for x in collection}


def error_table(
    content: Store, collection: Sequence[Adapter], metrics: Mapping[str, Metrics] | None = None
) -> np.ndarray:
    """True relative squared errors `[M, T]` of a store's tasks, given in its order; see `measure`."""
    rows = [module_errors(content, x, metrics) for x in collection]
    return np.stack([[x.get(n, np.nan) for x in rows] for n in content.modules])


def module_errors(
    content: Store, adapter: Adapter, metrics: Mapping[str, Metrics] | None = None
) -> dict[str, float]:
    """True relative squared error of each of an adapter's modules; see `measure`."""
    kept = task_factors(content, adapter.task)
    unknown = set(adapter.a) - set(content.modules)
    if unknown:
        raise HydraOptError(f"{adapter.task!r}: the store has no module {min(unknown)}")
    out = {}
    for name, a in adapter.a.items():
        b = adapter.b[name]
        a_hat, b_hat = kept.get(name, (np.zeros_like(a), np.zeros_like(b)))
        if (a_hat.shape[0], b_hat.shape[1]) != (a.shape[0], b.shape[1]):
            raise HydraOptError(f"{adapter.task!r}: {name} has another shape in the store")
        left, right = (metrics or {}).get(name, (None, None))
        if left is not None:
            a, a_hat = left.root @ a, left.root @ a_hat
        if right is not None:
            b, b_hat = b @ right.root, b_hat @ right.root
        out[name] = relative_error(a, b, a_hat, b_hat)
    return out


def relative_error(a: np.ndarray, b: np.ndarray, a_hat: np.ndarray, b_hat: np.ndarray) -> float:
    """`||a b - a_hat b_hat||^2 / ||a b||^2` in float64 on the host."""
    a, b, a_hat, b_hat = (np.asarray(x, np.float64) for x in (a, b, a_hat, b_hat))
    r: np.ndarray = np.linalg.qr(np.concatenate([a, -a_hat], 1), mode="r")  # type: ignore[assignment]
    error = float(np.sum((r @ np.concatenate([b, b_hat], 0)) ** 2))
    energy = float(np.sum((r[:, : a.shape[1]] @ b) ** 2))
    return float(relative(np.array(error), np.array(energy)))
