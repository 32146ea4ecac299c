"""Time of a batch that mixes tasks: against gathers of each token's factors and against a loop over tasks.

    taskset -c 0 python -m experiments.serving.mixed_batch --json experiments/serving/one_core.json
    python -m experiments.serving.mixed_batch --json experiments/serving/two_cores.json

Everything is jitted, in float32, with the same factors; contenders take turns within one process, and the
median of the turns is reported. A minute on two cores; the gathers of the large case need 3 GB.

- gather: `einsum("ns,nso->no", einsum("ni,nis->ns", x, a[a_of[ids]]), b[b_of[ids]])`.
- loop: for each task, `x @ a @ b` for all tokens, kept where the token is the task's.
- loop, shared once: the same with `x @ a` computed once where all tasks share `a`.
"""

import argparse
import functools
import json
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hydraopt_jax import serving
from hydraopt_jax.forms import Factors

CASES = {
    "512 tokens, 8 tasks, r 32, 896 x 896": (512, 8, 32, 896),
    "4096 tokens, 40 tasks, r 32, 2048 x 2048": (4096, 40, 32, 2048),
}
# turns of each contender: a millisecond needs more of them than a second beside other processes
TURNS = (61, 7)
FORMS = ("shared input factor", "nothing shared")


def gather(x: Array, term: Factors, ids: Array) -> Array:
    """Both factors gathered for each token."""
    h = jnp.einsum("ni,nis->ns", x, term.a[term.a_of[ids]], precision="highest")
    return jnp.einsum("ns,nso->no", h, term.b[term.b_of[ids]], precision="highest")


def loop(x: Array, term: Factors, ids: Array, *, once: bool = False) -> Array:
    """All tokens through every task in turn."""
    product = functools.partial(jnp.dot, precision="highest")
    shared = product(x, term.a[0]) if once else None

    def step(task: Array, y: Array) -> Array:
        h = product(x, term.a[term.a_of[task]]) if shared is None else shared
        return y + jnp.where((ids == task)[:, None], product(h, term.b[term.b_of[task]]), 0.0)

    return jax.lax.fori_loop(0, term.a_of.shape[0], step, jnp.zeros((x.shape[0], term.b.shape[2])))


def contenders(form: str) -> dict[str, Callable[..., Array]]:
    """Name -> function of tokens, factors and ids."""
    served = lambda method: lambda x, term, ids: serving.apply(x, (term,), ids, method=method)  # noqa: E731
    methods = {"this package": served(None)} | {f"method {m}": served(m) for m in ("mask", "blocks")}
    others: dict[str, Callable[..., Array]] = {"gather": gather, "loop": loop}
    once = {"loop, shared once": functools.partial(loop, once=True)} if form == FORMS[0] else {}
    return methods | others | once


def problem(tokens: int, tasks: int, rank: int, width: int, form: str) -> tuple[Array, Factors, Array]:
    """Tokens, factors and ids of one case."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = 1 if form == FORMS[0] else tasks
    every = jnp.arange(tasks)
    a = jax.random.normal(keys[0], (heads, width, rank)) / width**0.5
    b = jax.random.normal(keys[1], (tasks, rank, width)) / rank**0.5
    ids = jax.random.randint(keys[2], (tokens,), 0, tasks)
    return jax.random.normal(keys[3], (tokens, width)), Factors(a, b, every % heads, every), ids


def measure(case: str, form: str, turns: int) -> dict[str, Any]:
    """Milliseconds of every contender, ratios to this package, and its deviation from the dense delta."""
    x, term, ids = problem(*CASES[case], form)
    functions = {name: jax.jit(f) for name, f in contenders(form).items()}
    results = {name: np.asarray(f(x, term, ids)) for name, f in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(turns):
        for name, f in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(f(x, term, ids))
            times[name].append(1e3 * (time.perf_counter() - start))
    median, least = ({name: round(float(q(t)), 2) for name, t in times.items()} for q in (np.median, np.min))
    dense = np.zeros(results["gather"].shape)
    for task in range(term.a_of.shape[0]):
        rows = np.flatnonzero(np.asarray(ids) == task)
        a, b = (np.asarray(f[i[task]], np.float64) for f, i in ((term.a, term.a_of), (term.b, term.b_of)))
        dense[rows] = np.asarray(x, np.float64)[rows] @ (a @ b)
    ours = results["this package"]
    return {
        "case": case,
        "form": form,
        "turns": turns,
        "milliseconds": median,
        "least": least,
        "times faster": {k: round(v / median["this package"], 2) for k, v in median.items()},
        "largest deviation from the dense delta, over its largest entry": float(
            f"{np.abs(ours - dense).max() / np.abs(dense).max():.2g}"
        ),
    }


def main() -> None:
    """Measure all cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the results to this file")
    options = parser.parse_args()
    before = os.getloadavg()[0]
    cases = zip(CASES, TURNS, strict=True)
    rows = [measure(case, form, turns) for case, turns in cases for form in FORMS]
    machine = {
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "load": [round(before, 1), round(os.getloadavg()[0], 1)],
        "jax": jax.__version__,
    }
    results = {"machine": machine, "rows": rows}
    text = json.dumps(results, indent=1)
    print(text)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
