"""Collections that a command names as NAME=FOLDER, for the scripts that measure several."""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hydraopt_jax import adapters, formats
from hydraopt_jax.adapters import Adapter
from hydraopt_jax.rate_control.problem import Problem, prepare

# fractions of the half-precision bytes
BUDGETS = (0.125, 0.03)


class Named:
    """The arguments of a script: folders of adapter folders, and a file for the results."""

    def __init__(self, description: str) -> None:
        parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("collections", nargs="+", metavar="NAME=FOLDER", help="folder of adapter folders")
        parser.add_argument("--json", type=Path, help="write the results to this file")
        self.options = parser.parse_args()

    def __iter__(self) -> Iterator[tuple[str, list[Adapter]]]:
        """Names and their adapters, without full tensors."""
        for name, _, folder in (x.partition("=") for x in self.options.collections):
            found = [formats.read_adapter(x) for x in sorted(Path(folder).iterdir()) if x.is_dir()]
            yield name, [x.replace(extras={}) for x in found]

    def kept(self) -> dict[str, Any]:
        """What the file of the results has already."""
        path = self.options.json
        return json.loads(path.read_text()) if path and path.exists() else {}

    def write(self, result: Any) -> None:
        """Write what has been measured so far."""
        if self.options.json:
            self.options.json.write_text(json.dumps(result, indent=1) + "\n")

    def measure(self, figures: Callable[[Problem, float], dict[str, float]]) -> None:
        """Print and write the figures of every collection, given what is coded and the bytes of a budget."""
        result: dict[str, Any] = {}
        for name, found in self:
            size = 2 * sum(x.a[n].size + x.b[n].size for x in found for n in x.a)
            whole = prepare(adapters.stack(found), tuple(adapters.check(found)), np.ones(len(found)))
            for budget in BUDGETS:
                result.setdefault(name, {})[f"{budget:g}"] = figures(whole, budget * size)
                print(json.dumps(result), flush=True)
                self.write(result)
