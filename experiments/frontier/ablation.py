"""What each part of the coder saves, and what ideas that were not kept would have cost.

    python -m experiments.frontier.ablation gpt2=FOLDER forty=FOLDER llm=FOLDER \
        --json experiments/frontier/ablation.json

One part at a time is turned off, or replaced by another. Bytes at the same error, over those of the coder as
it is, from the local slope of the curve; positive where the coder as it is needs fewer. Processor seconds of
the search on the whole collection, over those of the coder as it is. Needs no model. Rows that the file has
already are kept: remove it to measure them again.
"""

import contextlib
import json
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from experiments.frontier.named import BUDGETS, Named
from hydraopt_jax import adapters
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.codec import bitstream, contexts, encode, prediction, trellis
from hydraopt_jax.rate_control import coding, mode_decision, precision, search
from hydraopt_jax.rate_control.problem import Problem, prepare

NEARBY = 1.05
Patch = Callable[[], None]


def eight_states() -> None:
    """The trellis of 8 states that stores had before, `q[i + 1] = q[i - 1] xor q[i - 2] xor p[i]`."""
    table = [[0, 1], [2, 3], [5, 4], [7, 6], [1, 0], [3, 2], [4, 5], [6, 7]]
    trellis.STATES, trellis.NEXT = 8, np.array(table, np.int32)
    ways = [[(s, p) for s in range(8) for p in range(2) if table[s][p] == d] for d in range(8)]
    trellis.FROM = np.array([[s for s, _ in x] for x in ways], np.int32)
    trellis.BRANCH = np.array([[2 * (s % 2) + p for s, p in x] for x in ways])
    # its compiled loop is of another trellis
    trellis.quantize.clear_cache()  # type: ignore[attr-defined]


def constants(**values: Any) -> Patch:
    """Other values of constants, named `module__CONSTANT`."""
    rooms = {
        "contexts": contexts,
        "prediction": prediction,
        "coding": coding,
        "encode": encode,
        "mode_decision": mode_decision,
        "precision": precision,
    }

    def patch() -> None:
        for key, value in values.items():
            room, name = key.split("__")
            setattr(rooms[room], name, value)

    return patch


def price(multiplier: float, distortion: float) -> Patch:
    """Another price of a bit."""

    def patch() -> None:
        for room in (encode, mode_decision):
            room.MULTIPLIER, room.DISTORTION = multiplier, distortion  # type: ignore[attr-defined]
        encode.quantize.__defaults__ = (multiplier,)

    return patch


def one_unit(exponent: int) -> Patch:
    """Coefficients in units of `2^exponent` steps, whatever the remainder."""

    def patch() -> None:
        prediction.UNIT = exponent
        prediction.units = lambda context: np.full(context.shape, exponent)
        prediction.agreeing = lambda context, units: context

    return patch


def no_rice_codes() -> None:
    """Side information in Huffman codes with their tables only."""
    bitstream.rice = lambda codes, k: bytes(4 * len(codes) + 1000)


def reference_for_itself() -> None:
    """References with no directions but those that they would code if nothing were predicted."""
    mode_decision.helpful = lambda of, energy, keep, *rest: keep[np.arange(len(energy)), of.task]


def reference_without_noise() -> None:
    """A mode decision that takes decoded references for exact ones."""
    decide, cost = mode_decision.predicted_cost, mode_decision.cost

    def predicted(*given: Any) -> Any:
        kept, mode_decision.DISTORTION = mode_decision.DISTORTION, 0.0
        try:
            return decide(*given)
        finally:
            mode_decision.DISTORTION = kept

    # the cost keeps its own distortion
    mode_decision.cost = types.FunctionType(cost.__code__, dict(vars(mode_decision)))
    mode_decision.predicted_cost = predicted  # type: ignore[assignment]


def lossy_estimate() -> None:
    """A mode decision that counts what the trellis loses against the rate-distortion function, most of it at
    about one step: 0.09 bits a code, and 0.17 more there."""

    def cost(count: int, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        loss = 0.09 + 0.17 * np.exp(-((np.log2(np.maximum(variance, 1e-9)) / 1.2) ** 2))
        bits = 0.5 * np.log2(np.maximum(variance / encode.DISTORTION, 1)) + loss
        paid = encode.DISTORTION + encode.MULTIPLIER * bits
        return count * np.minimum(paid, variance), count * np.where(paid < variance, bits, 0)

    mode_decision.cost = cost


OFF = {
    "trellis of 8 states": eight_states,
    "one context per vector": constants(contexts__LEAST_SAVED=np.inf),
    "gains of 10 bits and an exponent": constants(coding__LEAST_GAIN_BITS=10, coding__MOST_GAIN_BITS=10),
    "coefficients in units of two steps": one_unit(1),
    "coefficients in units of four steps": one_unit(2),
    "no Rice codes": no_rice_codes,
    "coefficients zero up to 0.6 units": constants(prediction__ROUND_UP=0.4),
    "one precision for all": constants(precision__LEAST=1.0, precision__MOST=1.0),
    "references coded for themselves": reference_for_itself,
    "references taken for exact": reference_without_noise,
    "price of a bit 0.31": price(0.31, 0.24),
    "price of a bit 0.56": price(0.56, 0.30),
    "losses of the trellis estimated": lossy_estimate,
}


@contextlib.contextmanager
def patched(patch: Patch) -> Iterator[None]:
    """The coder with something else in it."""
    rooms = (bitstream, contexts, prediction, coding, encode, mode_decision, precision, trellis)
    before = [(room, dict(vars(room))) for room in rooms]
    defaults, states = encode.quantize.__defaults__, trellis.STATES
    patch()
    try:
        yield
    finally:
        if states != trellis.STATES:
            trellis.quantize.clear_cache()  # type: ignore[attr-defined]
        for room, names in before:
            vars(room).update(names)
        encode.quantize.__defaults__ = defaults


def measure(problem: Problem, size: float) -> dict[str, float]:
    """Logarithms of bytes and error near `size` bytes, the slope there, and processor seconds of the second
    of two searches, which compiles nothing."""
    search_for(problem, size)
    return search_for(problem, size)


def search_for(problem: Problem, size: float) -> dict[str, float]:
    """`measure` of one search."""
    began = time.process_time()
    start = search.first_step(problem, size)
    found = search.find_step(problem, lambda x: float(np.log(x.bytes / size)), -1.0, start)
    spent = time.process_time() - began
    last = found.last
    near = coding.encode_at_step(problem, NEARBY * last.step, found.frequencies)
    errors = [float(np.log(np.nanmean(x.errors))) for x in (last, near)]
    slope = (errors[1] - errors[0]) / float(np.log(near.bytes / last.bytes))
    return {"bytes": float(np.log(last.bytes)), "error": errors[0], "slope": slope, "seconds": spent}


def saved(own: dict[str, float], other: dict[str, float]) -> float:
    """Share of the other's bytes that the coder as it is saves at the same error."""
    return 1 - float(np.exp(own["bytes"] - other["bytes"] - (own["error"] - other["error"]) / other["slope"]))


def ablate(
    collection: list[Adapter], kept: Mapping[str, Any], budgets: tuple[float, ...] = BUDGETS
) -> dict[str, Any]:
    """Every row at every budget, those in `kept` as they are."""
    stacked, names = adapters.stack(collection), tuple(adapters.check(collection))
    size = 2 * sum(x.a[n].size + x.b[n].size for x in collection for n in x.a)
    whole = prepare(stacked, names, np.ones(len(collection)))
    alone = prepare(stacked, names, np.ones(len(collection)), share=False)
    result: dict[str, Any] = {}
    for budget in budgets:
        there = kept.get(f"{budget:g}", {})
        own = measure(whole, budget * size)
        rows = {} if there else {"nothing shared": measure(alone, budget * size)}
        for name, patch in ((k, x) for k, x in OFF.items() if k not in there):
            with patched(patch):
                rows[name] = measure(whole, budget * size)
        error = own["error"] - own["slope"] * (own["bytes"] - np.log(budget * size))
        result[f"{budget:g}"] = (
            {"error": float(f"{np.exp(error):.4g}")}
            | dict(there)
            | {
                k: {"saved": round(saved(own, x), 4), "seconds": round(x["seconds"] / own["seconds"], 2)}
                for k, x in rows.items()
            }
        )
        print(json.dumps(result), flush=True)
    return result


def main() -> None:
    """Measure the collections that are named."""
    named = Named(__doc__)
    result = named.kept()
    for name, found in named:
        result[name] = ablate(found, result.get(name, {}))
        named.write(result)


if __name__ == "__main__":
    main()
