"""How long the choice of forms and the allocation take: 40 seeded adapters of 112 modules.

    python -m experiments.frontier.allocation

Prints processor seconds for the analysis of the collection (decompositions, likeness, hierarchies), done
once, and for the whole allocation at one step (every module's form, every direction of every task), which the
search repeats, the least of three times. A minute.
"""

import json
import time

import numpy as np

from hydraopt_jax import adapters, synthetic
from hydraopt_jax.rate_control import mode_decision
from hydraopt_jax.rate_control.problem import prepare


def main() -> None:
    """Time both on one collection."""
    modules = synthetic.transformer_modules(16, 128, mlp=256)
    tasks = [f"task {t}" for t in range(40)]
    many = synthetic.collection(tasks=tasks, modules=modules, rank=8, likeness=0.3)
    begun = time.process_time()
    problem = prepare(adapters.stack(many), list(modules), np.ones(len(many)))
    analyzed = time.process_time()
    runs = []
    for _ in range(3):
        start = time.process_time()
        for spectrum in problem.spectra:
            mode_decision.decide_modes(spectrum, 0.05)
        runs.append(time.process_time() - start)
    seconds = {"analysis": round(analyzed - begun, 2), "allocation": round(min(runs), 3)}
    print(json.dumps({"adapters": len(many), "modules": len(modules), "processor seconds": seconds}))


if __name__ == "__main__":
    main()
