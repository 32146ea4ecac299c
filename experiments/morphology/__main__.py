"""The whole experiment from its seeds, into one folder.

    python -m experiments.morphology --data DATA --out OUT

Downloads what is missing in DATA, trains the base and both regimes' adapters, makes and scores all stores,
and prints the tables; results and plots are in OUT/results. Each step goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.morphology import adapters, download, pretrain, stores, summary


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of the words, filled where it is not"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for all that is made")
    given = parser.parse_args(argv)
    data, out = ["--data", str(given.data)], ["--out", str(given.out)]
    results = ["--results", str(given.out / "results")]
    download.main(data)
    pretrain.main([*data, *out])
    for regime in adapters.REGIMES:
        adapters.main([*data, *out, "--regime", regime, "--items", "1000"])
        archive = ["--adapters", str(given.out / f"adapters-{regime}.zip")]
        base = ["--base", str(given.out / "base.safetensors")]
        stores.main([*data, *out, *results, *base, *archive, "--regime", regime])
    summary.main(results)


if __name__ == "__main__":
    main()
